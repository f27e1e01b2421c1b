"""One-shot pruning with calibration samples: layer by layer, each fed by the pruned layers before it.

A layer is seen as a matrix product (`layers/linear.py`). Its inputs come from the model that is being pruned, its targets are
what the dense layer computes for the same samples, so errors do not pile up. Layers that are not pruned but come after a
pruned one are refitted too, and BatchNormalization is adjusted to what reaches it now.
"""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable
from typing import Any

import keras
import numpy as np
from keras import ops

from keras_renorm import masks, patterns
from keras_renorm.calibration import Call, Passes, Samples, observe
from keras_renorm.criteria import CalibratedCriterion
from keras_renorm.criteria.base import score
from keras_renorm.layers.kernels import Kernel
from keras_renorm.layers.linear import LinearView, linear_view
from keras_renorm.moments import Accumulator, Moments
from keras_renorm.renorm import CalibratedRenormalizer
from keras_renorm.report import LayerReport, describe, growth

# Variance that a feature is taken to have left at least, as a share of what it had.
SMALLEST_VARIANCE = 0.1
# Rows are taken in pieces of this many numbers: a convolution's patches are many times its inputs.
PIECE = 2**24


@dataclasses.dataclass(frozen=True)
class Rule:
    """How to prune: the arguments of `keras_renorm.prune`, resolved."""

    criterion: Any
    pattern: patterns.Pattern
    group: str
    renormalize: Any


@dataclasses.dataclass(frozen=True)
class Target:
    """A kernel to prune, and how much of it; `layer` is the outermost layer that it is in."""

    layer: keras.Layer
    kernel: Kernel
    sparsity: float


@dataclasses.dataclass
class _Site:
    """A layer that is visited: one with a kernel, or a BatchNormalization."""

    dense: keras.Layer
    pruned: keras.Layer
    view: LinearView
    target: Target | None
    first_call: int
    inputs: int | None
    calls: int = 1
    normalization: keras.Layer | None = None

    @property
    def is_normalization(self) -> bool:
        return isinstance(self.dense, keras.layers.BatchNormalization)

    @property
    def has_intercept(self) -> bool:
        return self.is_normalization or self.normalization is not None or self.dense.bias is not None


def prune_calibrated(
    dense: keras.Model,
    pruned: keras.Model,
    twins: list[tuple[keras.Layer, keras.Layer]],
    targets: dict[int, Target],
    rule: Rule,
    samples: Samples,
    prune_without_data: Callable[[Target], LayerReport],
    verbose: int,
) -> list[LayerReport]:
    """Prune and renormalize a copy of a model by what it computes for calibration samples.

    Args:
        dense: the model to aim at; it stays as it is.
        pruned: its copy.
        twins: the layers of both, at any depth, in pairs.
        targets: the kernels to prune, by the `id` of their variable in `pruned`.
        rule: how to prune.
        samples: the calibration samples.
        prune_without_data: what to do with kernels that cannot be calibrated, because the samples never reach them or their
            layer is not known as a matrix product.
        verbose: whether to show a progress bar.

    Returns:
        A report for each kernel.
    """
    sites = _find_sites(dense, twins, targets, rule, next(iter(samples)))
    found = {id(site.target) for site in sites}
    reports = [prune_without_data(target) for target in targets.values() if id(target) not in found]
    passes, scarce = Passes([dense, pruned], samples), {}
    stages = _stages(sites)
    progress = keras.utils.Progbar(len(stages), verbose=verbose, unit_name="layer")
    for stage in stages:
        for site, moments in zip(stage, _collect(stage, passes)):
            _check_finite(site, moments)
            if site.is_normalization:
                _adjust(site.pruned, moments.input_mean, moments.gram, moments)
            else:
                reports.append(_treat(site, moments, rule))
                if moments.rows < moments.gram.shape[-1]:
                    scarce[site.pruned.name] = moments.gram.shape[-1] / moments.rows
        progress.add(1)
    if scarce:
        times = max(scarce.values())
        warnings.warn(
            f"Argument `calibration` has few samples for layers {list(scarce)}, which have {times:.1f} times as many inputs as "
            f"they saw rows: their fit leans on the old weights. {int(np.ceil(2 * times))} times as many samples would do.",
            stacklevel=3,
        )
    return reports


def _find_sites(dense, twins, targets, rule, batch) -> list[_Site]:
    """The layers to visit, in the order in which the dense model calls them."""
    refit = isinstance(rule.renormalize, CalibratedRenormalizer)
    candidates = {}
    for old, new in twins:
        target = targets.get(id(getattr(new, "kernel", None)))
        view = _view(old) if target or refit else None
        if view is not None:
            candidates[id(old)] = (old, new, view, target)
    calls = observe(lambda: dense(batch, training=False), [old for old, *_ in candidates.values()])
    sites: dict[int, _Site] = {}
    unusable = set()
    for index, call in enumerate(calls):
        old, new, view, target = candidates[id(call.layer)]
        if not _is_linear(call, view):
            unusable.add(id(old))
        elif id(old) in sites:
            sites[id(old)].calls += 1
            sites[id(old)].inputs = None
        else:
            sites[id(old)] = _Site(old, new, view, target, index, id(call.inputs))
    seen = unusable | set(sites)
    silent = [new.name for key, (_, new, _, target) in candidates.items() if target and key not in seen]
    if silent:
        warnings.warn(
            f"The samples of argument `calibration` never reach layers {silent}: they are pruned without data.", stacklevel=4
        )
    usable = [site for key, site in sites.items() if key not in unusable]
    pruned = [site for site in usable if site.target is not None]
    # What comes before all that is pruned is left alone; a target that is no site may be anywhere.
    first = 0 if len(pruned) < len(targets) else pruned[0].first_call
    usable = [site for site in usable if site.first_call >= first]
    _join_normalizations(usable, calls)
    joined = {id(site.normalization) for site in usable}
    return [site for site in usable if id(site.pruned) not in joined]


def _view(layer: keras.Layer) -> LinearView | None:
    if getattr(layer, "lora_enabled", False) or getattr(layer, "quantization_mode", None) is not None or not layer.built:
        return None
    if not isinstance(layer, keras.layers.BatchNormalization):
        return linear_view(layer)
    features = layer.moving_mean.shape[0]

    def by_feature(inputs):
        return ops.reshape(ops.moveaxis(inputs, layer.axis, 0), (features, -1, 1))

    return LinearView(by_feature, by_feature, (features,), ((0,), (), ()))


def _is_linear(call: Call, view: LinearView) -> bool:
    """Whether the call is what the view takes it for: not inside `vmap`, nor in a subclass that computes something else."""
    try:
        inputs, outputs = (ops.convert_to_tensor(ops.convert_to_numpy(t)[:1], "float32") for t in (call.inputs, call.outputs))
    except Exception:
        return False
    if isinstance(call.layer, keras.layers.BatchNormalization):
        return True
    rows, targets = (ops.convert_to_numpy(part)[:, :256] for part in (view.rows(inputs), view.targets(outputs)))
    here = rows @ _matrix(call.layer, view) + _bias(call.layer, view)[:, None]
    # Half precision rounds to 2 ** -8.
    return here.shape == targets.shape and np.allclose(here, targets, rtol=0.02, atol=0.02 * np.abs(targets).max(initial=0))


def _join_normalizations(sites: list[_Site], calls: list[Call]) -> None:
    """A BatchNormalization that takes a layer's very output is adjusted along with that layer, without a pass of its own."""
    makers = {id(call.outputs): call.layer for call in calls}
    by_layer = {id(site.dense): site for site in sites}
    for call in calls:
        before, here = by_layer.get(id(makers.get(id(call.inputs)))), by_layer.get(id(call.layer))
        if before is None or here is None or before.is_normalization or not here.is_normalization:
            continue
        axis = 1 if getattr(before.dense, "data_format", None) == "channels_first" else len(call.inputs.shape) - 1
        linear = before.dense.activation in (None, keras.activations.linear)
        if linear and before.calls == here.calls == 1 and here.dense.axis in (axis, axis - len(call.inputs.shape)):
            before.normalization = here.pruned


def _stages(sites: list[_Site]) -> list[list[_Site]]:
    """Layers that are called with the same tensor, such as query, key and value, share a pass over the samples."""
    stages: dict[Any, list[_Site]] = {}
    for site in sites:
        stages.setdefault(site.inputs or -id(site), []).append(site)
    return list(stages.values())


def _collect(stage: list[_Site], passes: Passes) -> list[Moments]:
    accumulators = [Accumulator() for _ in stage]
    calls = sum(site.calls for site in stage)
    layers = [site.dense for site in stage], [site.pruned for site in stage]
    for run_dense, run_pruned in passes.runs(layers):
        wanted = observe(run_dense, layers[0], calls)
        given = observe(run_pruned, layers[1], calls, outputs=False)
        for site, accumulator in zip(stage, accumulators):
            outputs = [call.inputs if site.is_normalization else call.outputs for call in wanted if call.layer is site.dense]
            inputs = [call.inputs for call in given if call.layer is site.pruned]
            for one_input, one_output in zip(inputs, outputs):
                _add_in_pieces(accumulator, site.view, one_input, one_output)
    return [accumulator.moments(intercept=site.has_intercept) for site, accumulator in zip(stage, accumulators)]


def _add_in_pieces(accumulator, view, inputs, outputs):
    groups, width, units = view.sizes
    rows = int(np.prod(outputs.shape[1:])) // (groups * units)
    length = max(1, PIECE // max(1, rows * groups * width))
    for start in range(0, len(outputs), length):
        piece = slice(start, start + length)
        accumulator.add(view.rows(inputs[piece]), view.targets(outputs[piece]))


def _check_finite(site, moments):
    if not all(np.isfinite(part).all() for part in (moments.gram, moments.cross, moments.power)):
        raise ValueError(
            f"Layer '{site.dense.name}' gets or gives NaN or infinity for the samples of argument `calibration`, so it cannot "
            "be fitted. Check the samples' range and the model. Nothing was changed."
        )


def _matrix(layer, view) -> np.ndarray:
    return view.to_matrix(ops.convert_to_numpy(layer.kernel).astype(np.float64))


def _bias(layer, view) -> np.ndarray:
    groups, _, units = view.sizes
    if layer.bias is None:
        return np.zeros((groups, units))
    return ops.convert_to_numpy(layer.bias).astype(np.float64).reshape(groups, units)


def _treat(site: _Site, moments: Moments, rule: Rule) -> LayerReport:
    """Choose the mask of a layer, if it is to be pruned, and fit what is left."""
    matrix, bias = _matrix(site.dense, site.view), _bias(site.dense, site.view)
    mask = matrix != 0 if site.target is None else _choose(site, matrix, moments, rule)
    kept = np.where(mask, matrix, 0)
    fitted, new_bias = kept, bias
    if isinstance(rule.renormalize, CalibratedRenormalizer):
        fitted = np.where(mask, rule.renormalize(matrix, mask, moments), 0)
        if site.has_intercept:
            new_bias = moments.intercept(fitted)
    elif rule.renormalize is not None:
        fitted = kept * rule.renormalize(matrix, kept, (1,))
    kernel = site.pruned.kernel
    kernel.assign(site.view.to_kernel(fitted, tuple(kernel.shape)))
    mean = np.einsum("gi,giu->gu", moments.input_mean, fitted)
    if site.pruned.bias is not None:
        site.pruned.bias.assign(new_bias.reshape(site.pruned.bias.shape))
        mean = mean + new_bias
    if site.normalization is not None:
        _adjust(site.normalization, mean, moments.output_power(fitted), moments)
    return LayerReport(
        layer=site.pruned.name,
        kernel=kernel.name,
        weights=matrix.size,
        kept=int(np.count_nonzero(mask)),
        criterion="-" if site.target is None else describe(rule.criterion),
        renormalize=describe(rule.renormalize),
        scale=growth(kept, fitted, axis=1),
        error_before=moments.error(kept, bias),
        error_after=moments.error(fitted, new_bias),
    )


def _choose(site: _Site, matrix: np.ndarray, moments: Moments, rule: Rule) -> np.ndarray:
    shape, target = tuple(site.pruned.kernel.shape), site.target

    def mask_of(scores):
        scores = site.view.to_kernel(scores, shape)
        mask = masks.compute_mask(scores, target.sparsity, rule.pattern, rule.group, target.kernel.input_axes)
        return site.view.to_matrix(mask)

    if isinstance(rule.criterion, CalibratedCriterion):
        return rule.criterion.select(matrix, moments, mask_of)
    scores = site.view.to_matrix(score(rule.criterion, ops.convert_to_numpy(site.dense.kernel).astype(np.float32)))
    # What comes from an input that never varies can move into the bias.
    constant = np.diagonal(moments.gram, axis1=1, axis2=2)[:, :, None] <= 0
    return mask_of(np.where(constant, scores.min() - 1, scores))


def _adjust(layer: keras.layers.BatchNormalization, mean: np.ndarray, variance: np.ndarray, moments: Moments) -> None:
    """Let a BatchNormalization give what it gave: its statistics follow those of its input.

    They move by as much as those of the samples do between the dense and the pruned model, so what is merely particular about
    the samples does not get in.
    """
    mean, variance = mean.reshape(-1), variance.reshape(-1)
    dense_mean, dense_variance = moments.target_mean.reshape(-1), moments.power.reshape(-1)
    old_mean, old_variance = (
        ops.convert_to_numpy(part).astype(np.float64) for part in (layer.moving_mean, layer.moving_variance)
    )
    ratio = np.ones_like(variance)
    np.divide(variance, dense_variance, out=ratio, where=dense_variance > 0)
    # A feature that lost nearly all it varied by would have its remains, mostly noise, blown up.
    ratio = np.maximum(ratio, SMALLEST_VARIANCE)
    layer.moving_mean.assign(mean - np.sqrt(ratio) * (dense_mean - old_mean))
    layer.moving_variance.assign(np.maximum(ratio * (old_variance + layer.epsilon) - layer.epsilon, 0))
