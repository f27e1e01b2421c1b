"""One-shot pruning of a trained model."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable
from typing import Any

import keras
import numpy as np

from keras_renorm.src.calibration.fitting import Rule, prune_calibrated, silence_normalization
from keras_renorm.src.calibration.gathering import KernelStatistics, gather_statistics
from keras_renorm.src.calibration.output_error import OutputError
from keras_renorm.src.calibration.samples import Samples
from keras_renorm.src.calibration.scaling import warn_of_odd_samples
from keras_renorm.src.calibration.stages import Target
from keras_renorm.src.core import names, validation
from keras_renorm.src.core.arrays import as_array, for_another, masked
from keras_renorm.src.core.keras_internals import flatten_layers
from keras_renorm.src.core.moments import Moments
from keras_renorm.src.kernels import masks
from keras_renorm.src.kernels.events import in_float, new_scale, prune_kernel
from keras_renorm.src.kernels.report import LayerReport, PruningReport, describe
from keras_renorm.src.layers.kernels import Kernel, find_kernels, name_within
from keras_renorm.src.layers.prunable import prunable_layers
from keras_renorm.src.models.channels import Ties, find_ties, walk_back
from keras_renorm.src.models.model_copies import copy_model
from keras_renorm.src.pruning.compaction import units_that_stay
from keras_renorm.src.pruning.conversion import strip
from keras_renorm.src.pruning.selection import choose_layers, kernels_by_layer, outermost_layers
from keras_renorm.src.rules import allocation as allocations
from keras_renorm.src.rules import criteria, patterns, renorm
from keras_renorm.src.rules.criteria.base import CalibratedCriterion, score
from keras_renorm.src.rules.criteria.magnitude import Magnitude
from keras_renorm.src.rules.renorm import CalibratedRenormalizer
from keras_renorm.src.runtimes.targets import by_name, choose_patterns, names_of, unique_names


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
    batch_size: int = 128,
    verbose: int | str = "auto",
) -> keras.Model:
    """Prune a trained model in one shot and renormalize what is left, without training and without labels.

    With calibration samples, a few hundred to a few thousand of what the model will see, layers are pruned in the order in
    which the model calls them. Each is fed by the pruned layers before it and fitted to what the dense model computes. Layers
    that come after a pruned one are fitted too, with the zeros that they have, and BatchNormalization is adjusted to its new
    input. What ends farther from the dense model's outputs on these samples than plain pruning is not kept: the report says so.

    The model passed in stays as it is.

    Args:
        model: a built model: Sequential, Functional, or a subclassed one with a `get_config()`.
        sparsity: fraction of the weights to remove, in [0, 1), over all kernels of the chosen layers; or a dict of layer name
            (or glob) to sparsity, to prune those layers alone; a name goes before a glob, an earlier glob before a later one;
            `"user/fc1"` is layer `"fc1"` of the model `"user"` within this one.
            `None` with a criterion that chooses the count itself.
        criterion: what scores the weights: `"magnitude"`, `"random"`, or a callable `kernel -> scores`; with samples also
            `"activation"`, `"activity"`, `"obs"` and `"admm"`, with labels `"taylor"`, and
            `keras_renorm.criteria.Activity(share)`, which chooses the count itself. `"auto"` is `"admm"` with samples, else
            `"magnitude"`.
        pattern: which weights live and die together: `"unstructured"`, `"unit"`, `"block"`, `"n_of_m"`, or an instance. With
            `"unit"`, units that meet in sums go together, what is gone gives zero (`keras_renorm.compact` then takes it out),
            and layers that make the model's outputs stay whole, unless `layers` names them. Notes of the report say which
            units `compact` cannot take out, and why. Or a dict of layer name (or glob)
            to pattern; layers that it does not name are `"unstructured"`.
        group: `"layer"` or `"unit"`: which weights compete with each other.
        allocation: how the sparsity is divided among kernels: `"uniform"`, `"global"`, `"erk"`, `"lamp"`, `"balanced"` (the
            mean of uniform and erk), or a callable (see `keras_renorm.allocation`). A dict as `sparsity` needs none.
        renormalize: `"l1"`, `"l2"`, a renormalizer, or `None` for plain pruning; with samples also `"moments"` and `"lstsq"`.
            `"auto"` is `"lstsq"` with samples, else the data-free one that measures best: `L2()` with `group="unit"`,
            `L2(max_scale=2)` with `group="layer"`. Kernels that samples cannot serve (recurrent, embedding, your own layers)
            get the latter where the outputs for the samples are then nearer than without.
        calibration: unlabelled samples: an array, a list or a dict of arrays (one an input), a `tf.data.Dataset`, a
            `keras.utils.PyDataset`, or a generator of batches; of batches `(x, y)`, `x` is taken. A criterion that needs
            labels, `"taylor"`, wants `(x, y)` or such batches, and a model that is compiled with its loss.
        layers: which layers, as in `keras_renorm.to_prunable`.
        target: the runtime that is to be fast, which chooses the pattern of each layer that no dict names: `"litert"` (1x4
            blocks in Dense, single weights in 1x1 convolutions of networks that XNNPACK computes sparsely, whole units in
            other convolutions), or `"litert-int8"` (1x16 blocks in Dense, whole units). See `keras_renorm.export.explain`.
        batch_size: how many samples to run at once, where they come as arrays.
        verbose: `"auto"`, 0, 1, or 2: the progress bar over the layers while samples are used. `"auto"` shows it where Keras
            logs interactively.

    Returns:
        A new model of plain Keras layers, whose kernels hold zeros. It is compiled if `model` was, with a fresh optimizer. Its
        attribute `pruning_report` says what each layer got; it is not saved with the model.

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
    calibrated, verbose = calibration is not None, validation.check_verbose(verbose)
    validation.check_choice(group, names.GROUPS, "group")
    rule = Rule(
        criterion=criteria.get(criterion, calibrated),
        group=group,
        renormalize=renorm.get(renormalize, group, calibrated),
    )
    if isinstance(sparsity, dict):
        if layers is not None:
            raise ValueError("Pass either a dict as `sparsity` or `layers`, not both: the dict names the layers.")
        layers = list(sparsity)
    _check_count(rule, sparsity, pattern, target)
    for value in sparsity.values() if isinstance(sparsity, dict) else [] if sparsity is None else [sparsity]:
        validation.check_sparsity(value)
        if not isinstance(pattern, dict):
            patterns.get(pattern).check(value, group)
    allocation = allocations.get(allocation)
    if prunable_layers(model):
        model = strip(model)
    chosen = choose_layers(model, layers, "sparsity" if isinstance(sparsity, dict) else "layers")
    patterns_of = choose_patterns(pattern, target, model, list(chosen.values()))
    chosen = {key: layer for key, layer in chosen.items() if patterns_of[key] is not None}
    if layers is None:
        chosen = _without_outputs(model, chosen, patterns_of)
    kernels = kernels_by_layer(model)
    for layer in chosen.values():
        for kernel in kernels[id(layer)]:
            validation.check_finite(as_array(kernel.variable), _name(kernel, layer))
    with contextlib.ExitStack() as stack:
        statistics = getattr(rule.criterion, "statistics", Moments)
        labels = statistics.of == "gradients"
        samples = stack.enter_context(Samples(calibration, model, batch_size, labels)) if calibrated else None
        if calibrated:
            warn_of_odd_samples(model, samples)
        first = keras.tree.map_structure(lambda leaf: leaf[:1], next(iter(samples))) if calibrated else None
        pruned, copies = copy_model(model, inputs=first)
        rule = dataclasses.replace(rule, names=unique_names(pruned))
        targets = _targets(pruned, {copies[key]: patterns_of[key] for key in chosen}, sparsity, allocation)
        for one in targets:
            if one.sparsity is not None:
                one.pattern.check(one.sparsity, group)
        ties = find_ties(pruned) if any(one.by_units for one in targets) else None
        if ties:
            targets = _together(targets, ties, rule)
        notes, errors = [], {}
        if calibrated:
            twins = [(layer, copies[id(layer)]) for layer in flatten_layers(model, include_self=False)]
            distance = OutputError(model, samples)
            # Kernels that cannot be fitted may still be scored.
            gathered = gather_statistics(pruned, samples, statistics) if statistics is not Moments else {}
            rows = prune_calibrated(
                model,
                pruned,
                twins,
                {id(target.kernel.variable): target for target in targets},
                rule,
                samples,
                gathered if labels else {},
                lambda alone: _prune_alone(alone, rule, gathered, lambda: distance(pruned)),
                verbose,
            )
        else:
            rows = _prune_backwards(pruned, targets, rule)
        if ties:
            _silence(targets, ties)
        if calibrated and isinstance(rule.renormalize, CalibratedRenormalizer):
            rows, notes, errors = _unless_plain_is_nearer(pruned, twins, targets, rows, rule, distance, ties)
    if ties:
        notes += _notes_on_units(pruned, targets, rule)
    order = [rule.name_of(layer) for outer in outermost_layers(pruned) for layer in flatten_layers(outer)]
    rows = tuple(sorted(rows, key=lambda row: order.index(row.layer)))
    pruned.pruning_report = PruningReport(rows, **errors, notes=tuple(notes))
    return pruned


def _targets(
    model: keras.Model, patterns_of: dict[keras.Layer, patterns.Pattern], sparsity: Any, allocation: Any
) -> list[Target]:
    found = kernels_by_layer(model)
    kernels = [(layer, kernel) for layer in patterns_of for kernel in found[id(layer)]]
    if isinstance(sparsity, dict):
        names = names_of(model)
        sparsities = [by_name(sparsity, names[id(layer)]) for layer, _ in kernels]
    elif sparsity is None:
        sparsities = [None] * len(kernels)
    else:
        values = [as_array(kernel.variable).astype(np.float32, copy=False) for _, kernel in kernels]
        most = [patterns_of[layer].most for layer, _ in kernels]
        sparsities = allocations.allocate(values, sparsity, allocation, most)
    return [Target(layer, kernel, patterns_of[layer], one) for (layer, kernel), one in zip(kernels, sparsities)]


def _without_outputs(model: keras.Model, chosen: dict[int, keras.Layer], patterns_of: dict) -> dict[int, keras.Layer]:
    """Leave out layers whose units would go and are the model's outputs: without them it would be another model."""
    by_units = {key for key in chosen if patterns_of[key].by_units}
    if not by_units:
        return chosen
    ties = find_ties(model)
    inner = {
        key: layer
        for key, layer in chosen.items()
        if key not in by_units
        or not any(ties.groups.get(id(kernel.variable)) in ties.of_outputs for kernel in find_kernels(layer))
    }
    if not inner:
        raise ValueError(
            f"With pattern 'unit', model '{model.name}' has nothing to prune: all its units are outputs. Name the layers with "
            "`layers=` to prune outputs."
        )
    return inner


def _together(targets: list[Target], ties: Ties, rule: Rule) -> list[Target]:
    """Choose the units of layers that meet in sums for all of them at once: a sum is dead only where all its operands are.

    A unit's score is the sum of its scores in these layers, each relative to the layer's mean.
    """
    criterion = Magnitude() if isinstance(rule.criterion, CalibratedCriterion) else rule.criterion
    groups: dict[Any, list[Target]] = {}
    for target in targets:
        if target.by_units:
            groups.setdefault(ties.groups.get(id(target.kernel.variable), id(target)), []).append(target)
    chosen = {}
    for members in groups.values():
        units = []
        for target in members:
            scores = score(criterion, as_array(target.kernel.variable)).sum(axis=target.kernel.input_axes)
            units.append(scores.reshape(-1) / max(scores.mean(), np.finfo(np.float32).tiny))
        if len(members) > 1 and len({len(one) for one in units}) == 1:
            sizes = [target.kernel.size for target in members]
            sparsity = float(np.average([target.sparsity for target in members], weights=sizes))
            kept = masks.compute_mask(np.sum(units, axis=0)[None], sparsity, members[0].pattern)[0]
            for target in members:
                chosen[id(target)] = _spread(kept, target.kernel)
    return [dataclasses.replace(target, keep=chosen.get(id(target))) for target in targets]


def _spread(units: np.ndarray, kernel: Kernel) -> np.ndarray:
    """From one value a unit to one a weight."""
    shape = tuple(kernel.variable.shape)
    return np.broadcast_to(units.reshape([1 if axis in kernel.input_axes else n for axis, n in enumerate(shape)]), shape)


def _silence(targets: list[Target], ties: Ties) -> None:
    """Let units without weights give zero: their biases go, and what normalization makes of them."""
    for target in (one for one in targets if one.by_units):
        variable = target.kernel.variable
        alive = (as_array(variable) != 0).any(axis=target.kernel.input_axes).reshape(-1)
        for layer in flatten_layers(target.layer):
            bias = getattr(layer, "bias", None)
            is_maker = any(variable is getattr(layer, name, None) for name in ("kernel", "pointwise_kernel"))
            if is_maker and bias is not None and tuple(bias.shape) == alive.shape:
                bias.assign(np.where(alive, as_array(bias), 0))
        for layer in ties.normalizations.get(id(variable), []):
            silence_normalization(layer, ~alive)


def _notes_on_units(model: keras.Model, targets: list[Target], rule: Rule) -> tuple[str, ...]:
    """Say where whole units went for nothing: `compact` cannot take them out."""
    by_units = [target for target in targets if target.by_units]
    reasons = units_that_stay(model, [target.kernel for target in by_units])
    layers: dict[str, list[str]] = {}
    for target in by_units:
        if id(target.kernel.variable) in reasons:
            layers.setdefault(reasons[id(target.kernel.variable)], []).append(rule.name_of(target.layer))
    return tuple(
        f"`keras_renorm.compact` cannot take out the units that {list(dict.fromkeys(names))} lost: {reason}."
        for reason, names in layers.items()
    )


def _prune_backwards(model: keras.Model, targets: list[Target], rule: Rule) -> list[LayerReport]:
    """Prune from the outputs to the inputs, so that it is known which units are still read."""
    rows, waiting = [], {}
    for target in targets:
        waiting.setdefault(id(target.layer), []).append(target)

    def prune_layer(layer, read=None):
        rows.extend(_prune_without_data(target, rule, read) for target in waiting.pop(id(layer), []))

    walk_back(model, prune_layer, lambda variable: as_array(variable) != 0)
    rows.extend(_prune_without_data(target, rule) for left in waiting.values() for target in left)
    return rows


def _prune_alone(
    targets: list[Target], rule: Rule, gathered: dict[int, KernelStatistics], error: Callable[[], float]
) -> list[LayerReport]:
    """Prune kernels that samples cannot serve; where a fit was asked for, they are scaled only if that is nearer."""
    fitted = isinstance(rule.renormalize, CalibratedRenormalizer)
    without = dataclasses.replace(rule, renormalize=None) if fitted else rule
    before = [in_float(as_array(target.kernel.variable)).copy() for target in targets]
    rows = [_prune_without_data(target, without, known=gathered.get(id(target.kernel.variable))) for target in targets]
    renormalize = renorm.get("auto", rule.group)
    if not (fitted and targets) or renormalize is None:
        return rows
    plain, plain_error = [in_float(as_array(target.kernel.variable)).copy() for target in targets], error()
    scales = [
        new_scale(one, None, left != 0, 1.0, renormalize, target.kernel.input_axes)
        for target, one, left in zip(targets, before, plain)
    ]
    for target, left, scale in zip(targets, plain, scales):
        target.kernel.variable.assign(left * scale)
    if error() < plain_error:
        return [
            dataclasses.replace(
                row, renormalize=describe(renormalize), scale=_limits(scale, left != 0, target.kernel.input_axes)
            )
            for row, target, left, scale in zip(rows, targets, plain, scales)
        ]
    for target, left in zip(targets, plain):
        target.kernel.variable.assign(left)
    return rows


def _unless_plain_is_nearer(
    pruned: keras.Model,
    twins: list[tuple[keras.Layer, keras.Layer]],
    targets: list[Target],
    rows: list[LayerReport],
    rule: Rule,
    distance: OutputError,
    ties: Ties | None,
) -> tuple[list[LayerReport], list[str], dict[str, float]]:
    """Keep what calibration made of a model, unless plain pruning gives outputs that are nearer for its own samples.

    Plain pruning keeps the weights that calibration chose, or those that `prune` chooses without samples.

    Returns:
        The rows of the report, notes on what was taken back, and the errors of the outputs.
    """
    variables = list({id(new): (old, new) for pair in twins for old, new in zip(*(one.weights for one in pair))}.values())

    def values():
        return [as_array(new).copy() for _, new in variables]

    def plain_by_the_same_masks():
        for target, mask in zip(targets, masks_chosen):
            target.kernel.variable.assign(masked(in_float(as_array(target.kernel.variable)), mask))
        kept = [
            dataclasses.replace(row, renormalize="none", scale=(1.0, 1.0), error_before=None, error_after=None, plain_units=0)
            for row in rows
        ]
        return [row for row in kept if row.criterion != "-"]

    def plain_without_samples():
        criterion = Magnitude() if isinstance(rule.criterion, CalibratedCriterion) else rule.criterion
        return _prune_backwards(pruned, targets, Rule(criterion, rule.group, None))

    masks_chosen = [as_array(target.kernel.variable) != 0 for target in targets]
    best, best_rows, error = values(), rows, distance(pruned)
    errors = {"error": error, "plain_error": np.inf}
    ways = [plain_by_the_same_masks]
    if all(target.sparsity is not None for target in targets):
        ways.append(plain_without_samples)
    for way in ways:
        for old, new in variables:
            new.assign(for_another(old))
        plain_rows = way()
        if ties:
            _silence(targets, ties)
        plain_error = distance(pruned)
        errors["plain_error"] = min(errors["plain_error"], plain_error)
        # (Below a millionth there is only rounding to compare.)
        if not np.isfinite(errors["error"]) or errors["error"] > max(1e-6, plain_error):
            best, best_rows, errors["error"] = values(), plain_rows, plain_error
    for (_, new), value in zip(variables, best):
        new.assign(value)
    notes = [
        f"Layer '{row.layer}': {row.plain_units} units keep their plain weights; what the fit gave them was worse."
        for row in best_rows
        if row.plain_units
    ]
    if best_rows is not rows:
        notes.append(
            "The whole model is pruned plainly: on the samples its outputs are then nearer to the dense model's than after the "
            f"fit (an error of {errors['error']:.3g}, not {error:.3g})."
        )
    return best_rows, notes, errors


def _limits(scale: Any, mask: np.ndarray, axes: tuple[int, ...]) -> tuple[float, float]:
    """The smallest and the largest scale of units that have weights."""
    factors = np.broadcast_to(scale, [1 if axis in axes else side for axis, side in enumerate(mask.shape)])
    factors = factors[mask.any(axis=axes, keepdims=True)] if mask.any() else np.ones(1)
    return float(factors.min()), float(factors.max())


def _prune_without_data(
    target: Target, rule: Rule, read: np.ndarray | None = None, known: KernelStatistics | None = None
) -> LayerReport:
    """Prune a kernel on its own; `known` are the statistics that the criterion asks for, if there are some."""
    variable, axes = target.kernel.variable, target.kernel.input_axes
    criterion = scored_by = rule.criterion
    renormalize = rule.renormalize
    if isinstance(renormalize, CalibratedRenormalizer):
        renormalize = renorm.get("auto", rule.group)
    values = in_float(as_array(variable))
    if target.keep is not None:
        mask = target.keep
        scale = new_scale(values, None, mask, 1.0, renormalize, axes)
    elif target.sparsity is None:
        if known is None:
            raise ValueError(
                f"Criterion {criterion!r} cannot choose how many weights stay. {_name(target.kernel, target.layer)}: samples "
                "do not show what its inputs carry. Leave the layer out with `layers=`. Nothing was changed."
            )
        mask = known.to_kernel(criterion.select(known.matrix, known.statistics, None))
        scale = new_scale(values, None, mask, 1.0, renormalize, axes)
    else:
        if known is not None:
            scores = known.to_kernel(criterion(known.matrix, known.statistics))
            scored_by = lambda kernel: scores  # noqa: E731
        elif isinstance(criterion, CalibratedCriterion):
            criterion = scored_by = Magnitude()
        mask, scale = prune_kernel(
            values,
            target.sparsity,
            scored_by,
            target.pattern,
            rule.group,
            renormalize,
            axes,
            read=read,
            description=_name(target.kernel, target.layer),
        )
    kept = masked(values, mask)
    with np.errstate(over="ignore"):
        np.multiply(kept, scale, out=kept)
    validation.check_finite(kept, f"{_name(target.kernel, target.layer)}, scaled by {renormalize!r},")
    variable.assign(kept)
    return LayerReport(
        layer=rule.name_of(target.layer),
        kernel=name_within(variable, target.layer),
        weights=mask.size,
        kept=int(np.count_nonzero(mask)),
        criterion=describe(criterion),
        renormalize=describe(renormalize),
        scale=_limits(scale, mask, axes),
    )


def _check_count(rule: Rule, sparsity: Any, pattern: Any, target: str | None) -> None:
    """Either the criterion says how many weights stay, or the sparsity does."""
    if getattr(rule.criterion, "chooses_count", False):
        if sparsity is not None:
            raise ValueError(
                f"Criterion {rule.criterion!r} chooses how many weights stay. Received: sparsity={sparsity!r}. "
                "Leave `sparsity` out, or the share."
            )
        if target is not None or isinstance(pattern, dict) or patterns.get(pattern) != patterns.Unstructured():
            raise ValueError(
                f"Criterion {rule.criterion!r} chooses which weights go together. Received: pattern={pattern!r}, "
                f"target={target!r}. Leave `pattern` and `target` out, or the share."
            )
    elif sparsity is None:
        raise ValueError(
            "Argument `sparsity` must be a number in [0, 1), or a dict of layer name to number. Received: sparsity=None."
        )


def _name(kernel, layer):
    return f"Kernel '{kernel.variable.path}' of layer '{layer.name}'"
