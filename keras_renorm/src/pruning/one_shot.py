"""`prune`: one-shot pruning of a trained model."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterator, Mapping
from typing import Any

import keras

from keras_renorm.src.calibration.samples import Samples, take_samples
from keras_renorm.src.calibration.scaling import warn_of_odd_samples
from keras_renorm.src.core import validation
from keras_renorm.src.core.keras_internals import flatten_layers
from keras_renorm.src.kernels.report import LayerReport, PruningReport
from keras_renorm.src.layers.kernel_plan import resolve_rules
from keras_renorm.src.layers.prunable import prunable_layers
from keras_renorm.src.models.model_copies import copy_model
from keras_renorm.src.pruning.calibrated import prune_with_samples
from keras_renorm.src.pruning.conversion import strip
from keras_renorm.src.pruning.data_free import prune_without_samples
from keras_renorm.src.pruning.plan import Plan, check_sparsity, make_plan, resolve_request
from keras_renorm.src.pruning.recovery import recover as recovery
from keras_renorm.src.pruning.selection import outermost_layers
from keras_renorm.src.pruning.units import notes_on_units
from keras_renorm.src.rules import allocation as allocations


def prune(
    model: keras.Model,
    sparsity: float | dict[str, float] | None = None,
    criterion: Any = "auto",
    pattern: Any = "unstructured",
    group: str = "layer",
    allocation: Any = "balanced",
    renormalize: Any = "auto",
    calibration: Any = None,
    layers: Any = None,
    target: str | None = None,
    recover: bool | Mapping[str, Any] = False,
    batch_size: int = 128,
    verbose: int | str = "auto",
) -> keras.Model:
    """Prune a trained model in one shot and renormalize it, without training and without labels.

    With calibration samples (a few hundred to a few thousand typical inputs), layers are pruned in the order in which the model
    calls them. Each layer gets the inputs of the pruned model and is fitted to the outputs of the dense model. Layers behind a
    pruned layer are fitted too, with the zeros that they have, and BatchNormalization is adjusted to its new inputs. If the
    outputs of the model on these samples are then farther from the dense outputs than after plain pruning, plain pruning is
    kept, and the report says so.

    The model that is passed in is not changed.

    Args:
        model: a built model: Sequential, Functional, or a subclassed model with a `get_config()`.
        sparsity: fraction of the weights to remove, in [0, 1), over all kernels of the chosen layers. Or a dict of layer name
            (or glob) to sparsity, which also chooses the layers: a name has precedence over a glob, an earlier glob over a
            later one; `"user/fc1"` is layer `"fc1"` of the inner model `"user"`. Defaults to `None`, for a criterion that
            chooses the sparsity.
        criterion: what scores the weights: `"magnitude"`, `"random"`, or a callable `kernel -> scores`; with samples also
            `"activation"`, `"activity"`, `"obs"` and `"admm"`, with labels `"taylor"`, and
            `keras_renorm.criteria.Activity(share)`, which chooses the sparsity itself. Defaults to `"auto"`: `"admm"` with
            samples, else `"magnitude"`.
        pattern: which weights are removed together: `"unstructured"`, `"unit"`, `"block"`, `"n_of_m"`, or an instance; or a
            dict of layer name (or glob) to pattern, where other layers are `"unstructured"`. With `"unit"`, the same units are
            removed from layers whose outputs are added, removed units output zero (`keras_renorm.compact` then takes them out),
            and layers that make the outputs of the model are not pruned unless `layers` names them. Notes of the report tell
            which units `compact` cannot take out, and why. Defaults to `"unstructured"`.
        group: which weights compete with each other: `"layer"` or `"unit"`. Defaults to `"layer"`.
        allocation: how the sparsity is divided among the kernels: `"uniform"`, `"global"`, `"erk"`, `"lamp"`, `"balanced"` (the
            mean of uniform and erk), or a callable (see `keras_renorm.allocation`). Not used with a dict as `sparsity`.
            Defaults to `"balanced"`.
        renormalize: what changes the kept weights: `"l1"`, `"l2"`, a renormalizer, or `None` for plain pruning; with samples
            also `"moments"` and `"lstsq"`. Defaults to `"auto"`: `"lstsq"` with samples, else `L2()` with `group="unit"` and
            `L2(max_scale=2)` with `group="layer"`. Kernels that cannot be fitted to samples (recurrent layers, embeddings, your
            own layers) get the latter, if the outputs on the samples are then closer to the dense outputs.
        calibration: unlabelled samples: an array, a list or a dict of arrays (one for each input), a `tf.data.Dataset`, a
            `keras.utils.PyDataset`, or a generator of batches. Of batches `(x, y)`, `x` is used. A criterion that needs labels,
            `"taylor"`, takes `(x, y)` or such batches, and a model that is compiled with its loss. Defaults to `None`.
        layers: the layers to prune, as in `keras_renorm.to_prunable`. Defaults to `None`: all layers with kernels.
        target: the runtime for which the pattern of each layer is chosen, unless a dict names it: `"litert"` (1x4 blocks in
            Dense, single weights in 1x1 convolutions of networks that XNNPACK computes sparsely, whole units in other
            convolutions), or `"litert-int8"` (1x16 blocks in Dense, whole units). See `keras_renorm.export.explain`. Defaults
            to `None`.
        recover: whether the dense model then teaches the pruned one on the samples, which takes minutes:
            `keras_renorm.recover`, whose report the new model has as attribute `recovery_report`. A dict holds arguments of
            that function, such as `dict(augment="flip", seconds=600)`. Defaults to `False`.
        batch_size: batch size for `calibration`, if it is an array. Defaults to 128.
        verbose: `"auto"`, 0, 1, or 2: the progress bar over the layers with samples. Defaults to `"auto"`: shown where Keras
            logs interactively.

    Returns:
        A new model of plain Keras layers, whose kernels hold zeros. It is compiled if `model` is, with a fresh optimizer. Its
        attribute `pruning_report` tells what happened to each kernel; it is not saved with the model.

    Raises:
        ValueError: if the sparsity is missing or outside [0, 1), the model is not built or has nothing to prune, a name is
            unknown, a kernel holds NaN or infinity, or the samples are empty, of the wrong shape or not finite.
        TypeError: if it is not a Keras 3 model.

    Example:

    >>> import keras, numpy as np, keras_renorm as kr
    >>> model = keras.Sequential([keras.Input((64,)), keras.layers.Dense(32)])
    >>> pruned = kr.prune(model, sparsity=0.75)
    >>> int(np.count_nonzero(pruned.layers[0].kernel))
    512
    >>> samples = np.random.default_rng(0).standard_normal((256, 64)).astype("float32")
    >>> pruned = kr.prune(model, sparsity=0.75, calibration=samples, verbose=0)
    >>> pruned.pruning_report.rows[0].renormalize
    'LeastSquares'
    """
    validation.check_model(model)
    verbose = validation.check_verbose(verbose)
    rules = resolve_rules(criterion, group, renormalize, calibrated=calibration is not None)
    check_sparsity(rules, sparsity, pattern, layers, target)
    options = _recovery_options(recover, model, calibration)
    allocation = allocations.get(allocation)
    if prunable_layers(model):
        model = strip(model)
    request = resolve_request(model, rules, sparsity, pattern, allocation, layers, target)
    with _calibration_set(calibration, model, batch_size, rules.needs_labels) as samples:
        pruned, copies = copy_model(model, inputs=_first_sample(samples))
        plan = make_plan(request, pruned, copies)
        if samples is None:
            rows, notes, errors = prune_without_samples(pruned, plan)
        else:
            rows, notes, errors = prune_with_samples(model, pruned, copies, plan, samples, verbose)
        pruned.pruning_report = _report(pruned, plan, rows, notes, errors)
        return pruned if options is None else recovery.recover(pruned, model, samples, **options, verbose=verbose)


def _recovery_options(recover: Any, model: keras.Model, calibration: Any) -> dict[str, Any] | None:
    """The arguments of `keras_renorm.recover`; `None` if nothing is to be recovered."""
    if recover is False or recover is None:
        return None
    if recover is not True and not isinstance(recover, Mapping):
        raise TypeError(
            "Argument `recover` must be a bool or a dict of arguments of `keras_renorm.recover`. Received: "
            f"recover={recover!r} (of type {type(recover)})."
        )
    if calibration is None:
        raise ValueError("Argument `recover` needs samples: pass `calibration`. Received: calibration=None.")
    options = {} if recover is True else dict(recover)
    given = ("pruned", "model", "samples", "verbose")
    known = [name for name in inspect.signature(recovery.recover).parameters if name not in given]
    unknown = [name for name in options if name not in known]
    if unknown:
        raise ValueError(f"Argument `recover` can hold {known}. Received: {unknown} in recover={recover!r}.")
    recovery.check_options(model, options)
    return options


@contextlib.contextmanager
def _calibration_set(data: Any, model: keras.Model, batch_size: int, labels: bool) -> Iterator[Samples | None]:
    """The calibration samples, if there are any; a warning if they look unlike the inputs of the model."""
    if data is None:
        yield None
        return
    with Samples(data, model, batch_size, labels) as samples:
        warn_of_odd_samples(model, samples)
        yield samples


def _first_sample(samples: Samples | None) -> Any:
    return None if samples is None else take_samples(next(iter(samples)), slice(1))


def _report(
    model: keras.Model, plan: Plan, rows: list[LayerReport], notes: list[str], errors: dict[str, float]
) -> PruningReport:
    """The report, with rows in the order of the layers."""
    if plan.ties:
        notes = notes + notes_on_units(model, plan.kernels, plan.rules)
    order = [plan.rules.name_of(layer) for outer in outermost_layers(model) for layer in flatten_layers(outer)]
    return PruningReport(tuple(sorted(rows, key=lambda row: order.index(row.layer))), **errors, notes=tuple(notes))
