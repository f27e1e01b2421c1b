"""One-shot pruning with calibration samples, layer by layer.

A layer is viewed as a matrix product (`layers/linear.py`). Its inputs come from the model that is being pruned; its targets are
the outputs of the dense layer for the same samples, so errors do not accumulate. Layers behind a pruned layer are fitted as
well, and BatchNormalization is adjusted to its new inputs.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from typing import Any

import keras
import numpy as np
from keras import ops

from keras_renorm.src.calibration.gathering import KernelStatistics
from keras_renorm.src.calibration.observing import LayerCall, observe
from keras_renorm.src.calibration.passes import Passes
from keras_renorm.src.calibration.samples import Samples
from keras_renorm.src.calibration.stages import FittedPart, find_stages
from keras_renorm.src.core.moments import Accumulator, Moments
from keras_renorm.src.core.statistics import Statistics
from keras_renorm.src.kernels import masks
from keras_renorm.src.kernels.report import LayerReport, describe, growth
from keras_renorm.src.layers.kernel_plan import KernelPlan, PruningRules
from keras_renorm.src.layers.kernels import name_within
from keras_renorm.src.rules.criteria.base import CalibratedCriterion, score

# Variance that a feature is taken to have left at least, as a share of what it had.
SMALLEST_VARIANCE = 0.1
# No fit makes the weights of a unit this many times as large as the dense ones, but one to numbers without meaning.
ABSURD_GROWTH = 100
# Rows are taken in pieces of this many numbers: a convolution's patches are many times its inputs.
PIECE = 2**24


def prune_calibrated(
    dense: keras.Model,
    pruned: keras.Model,
    twins: list[tuple[keras.Operation, keras.Operation]],
    plans: dict[int, KernelPlan],
    rules: PruningRules,
    samples: Samples,
    gathered: Mapping[int, KernelStatistics],
    prune_without_data: Callable[[list[KernelPlan]], list[LayerReport]],
    verbose: int,
) -> list[LayerReport]:
    """Prune and renormalize a copy of a model by its outputs on calibration samples.

    Args:
        dense: the model, which is not changed.
        pruned: its copy.
        twins: the layers of both, at any depth, in pairs, and the operations that are sums.
        plans: the kernels to prune, by the `id` of their variable in `pruned`.
        rules: how to prune.
        samples: the calibration samples.
        gathered: for a criterion that uses gradients, the statistics of each kernel, by the `id` of its variable in `pruned`.
        prune_without_data: prunes kernels that cannot be fitted, because the samples do not reach them or their layer is not
            known as a matrix product.
        verbose: whether to show a progress bar.

    Returns:
        A report for each kernel.
    """
    refit = rules.fits
    stages = find_stages(dense, twins, plans, next(iter(samples)), refit)
    found = {id(part.plan) for stage in stages for part in stage}
    reports = prune_without_data([plan for plan in plans.values() if id(plan) not in found])
    passes, scarce = Passes([dense, pruned], samples), {}
    progress = keras.utils.Progbar(len(stages), verbose=verbose, unit_name="layer")
    for stage in stages:
        for part, moments, of_inputs in zip(stage, *_collect(stage, passes, rules)):
            _check_finite(part, moments)
            if part.is_normalization:
                whole = np.ones_like(moments.cross)
                none = np.zeros_like(moments.power)
                _adjust(part.pruned, whole, none, moments, moments.squares(whole, none))
            else:
                known = gathered.get(id(part.products[1].kernel))
                statistics = of_inputs or (known.statistics if known else moments)
                reports.append(_treat(part, moments, statistics, rules))
                if moments.rows < moments.gram.shape[-1]:
                    scarce[part.pruned.name] = moments.gram.shape[-1] / moments.rows
        progress.add(1)
    if scarce:
        times = max(scarce.values())
        warnings.warn(
            f"Argument `calibration` has few samples for layers {list(scarce)}: they saw one row (a sample, or a position in "
            f"it) for every {times:.1f} of their inputs, so their fit leans on the old weights. "
            f"{int(np.ceil(2 * times))} times as many samples would be enough.",
            stacklevel=3,
        )
    return reports


def _collect(stage: list[FittedPart], passes: Passes, rules: PruningRules) -> tuple[list[Moments], list[Statistics | None]]:
    """The moments of each part, and the statistics for the criterion if it needs others.

    Inputs are those of the pruned model, targets those of the dense model.
    """
    accumulators = [Accumulator() for _ in stage]
    statistics = getattr(rules.criterion, "statistics", Moments)
    more = statistics is not Moments and statistics.of == "inputs"
    others = [statistics.accumulator(part.products[0]) if more and part.plan else None for part in stage]
    sums = [part.sum for part in stage if part.sum and getattr(rules.renormalize, "compensates", False)]
    calls = sum(part.calls for part in stage) + len(sums)
    layers = [[getattr(place, model) for place in [*stage, *sums]] for model in ("dense", "pruned")]
    for run_dense, run_pruned in passes.runs(layers):
        wanted = observe(run_dense, layers[0], calls)
        given = observe(run_pruned, layers[1], calls, outputs=False)
        for part, accumulator, other in zip(stage, accumulators, others):
            outputs = [part.outputs_in(call) for call in wanted if call.layer is part.dense]
            inputs = [part.inputs_in(call) for call in given if call.layer is part.pruned]
            missing = _missing(part, wanted, given) if part.sum in sums else None
            for one_input, one_output in zip(inputs, outputs):
                _add_in_pieces(accumulator, part, one_input, one_output, missing)
                if other is not None:
                    other.update(one_input)
    return (
        [accumulator.moments(intercept=part.has_intercept) for part, accumulator in zip(stage, accumulators)],
        [other and other.result() for other in others],
    )


def _missing(part: FittedPart, wanted: list[LayerCall], given: list[LayerCall]) -> Any:
    """The error of the other operands of the sum of a part in the pruned model."""
    (dense,) = (call.inputs for call in wanted if call.layer is part.sum.dense)
    (pruned,) = (call.inputs for call in given if call.layer is part.sum.pruned)
    others = [index for index in range(len(dense)) if index != part.sum.operand]
    return sum(ops.cast(dense[index], "float32") - ops.cast(pruned[index], "float32") for index in others)


def _add_in_pieces(accumulator: Accumulator, part: FittedPart, inputs: Any, outputs: Any, missing: Any) -> None:
    view = part.view
    groups, width, units = view.sizes
    rows = int(np.prod(outputs.shape[1:])) // (groups * units)
    length = max(1, PIECE // max(1, rows * groups * width))
    for start in range(0, len(outputs), length):
        piece = slice(start, start + length)
        targets = ops.cast(view.targets(outputs[piece]), "float32")
        if missing is not None:
            targets = targets + view.targets(missing[piece]) / ops.convert_to_tensor(_gain(part))
        accumulator.add(view.rows(inputs[piece]), targets)


def _gain(part: FittedPart) -> np.ndarray:
    """The factor by which a change of the output of a part reaches its sum, of shape `(groups, 1, units)`."""
    groups, _, units = part.view.sizes
    gain = _factors(part.normalization[0]) if part.normalization else np.ones(groups * units)
    # A channel that normalization nearly closes cannot compensate for an error.
    gain[np.abs(gain) <= 1e-3 * np.abs(gain).max()] = np.inf
    return gain.reshape(groups, 1, units).astype(np.float32)


def _check_finite(part, moments):
    if not all(np.isfinite(one).all() for one in (moments.gram, moments.cross, moments.power)):
        raise ValueError(
            f"Layer '{part.dense.name}' receives or returns NaN or infinity for the samples of argument `calibration`, so it "
            "cannot be fitted. Check the samples' range and the model. Nothing was changed."
        )


def _treat(part: FittedPart, moments: Moments, statistics: Statistics, rules: PruningRules) -> LayerReport:
    """Choose the mask of a layer, if it is to be pruned, by the statistics for the criterion, and fit the kept weights to the
    moments.
    """
    matrix, bias = part.matrix, part.bias
    mask = matrix != 0 if part.plan is None else _choose(part, matrix, moments, statistics, rules)
    kept = np.where(mask, matrix, 0)
    fitted, new_bias, plain_units = kept, bias, 0
    if rules.fits:
        fitted = np.where(mask, rules.renormalize(matrix, mask, moments), 0)
        if not np.isfinite(fitted).all():
            raise ValueError(
                f"Renormalizer {rules.renormalize!r} gave NaN or infinity for layer '{part.dense.name}'. Nothing was changed."
            )
        new_bias = moments.intercept(fitted) if part.has_intercept else bias
        plain = np.linalg.norm(fitted, axis=1) > ABSURD_GROWTH * np.linalg.norm(matrix, axis=1)
        if rules.renormalize.compensates:
            plain |= moments.squares(fitted, new_bias) > (1 + 1e-3) * moments.squares(kept, bias) + 1e-6 * moments.power
        fitted, new_bias = np.where(plain[:, None], kept, fitted), np.where(plain, bias, new_bias)
        plain_units = int(np.count_nonzero(plain & mask.any(axis=1)))
        if part.plan and part.plan.by_units:
            # The layers behind compensate for removed units, and for their constants, too.
            new_bias = np.where(mask.any(axis=1), new_bias, 0)
    elif rules.renormalize is not None:
        fitted = kept * rules.renormalize(matrix, kept, (1,))
    twin = part.products[1]
    twin.kernel.assign(part.view.to_kernel(fitted, tuple(twin.kernel.shape)))
    if twin.bias is not None:
        twin.bias.assign(new_bias.reshape(twin.bias.shape))
    if part.normalization is not None:
        offset = np.zeros_like(bias) if twin.bias is None else new_bias
        _adjust(part.normalization[1], fitted, offset, moments, moments.squares(kept, bias))
        if part.plan and part.plan.by_units:
            silence_normalization(part.normalization[1], ~mask.any(axis=1).reshape(-1))
    layer = part.plan.layer if part.plan else part.pruned
    return LayerReport(
        layer=rules.name_of(layer),
        kernel=name_within(twin.kernel, layer),
        weights=matrix.size,
        kept=int(np.count_nonzero(mask)),
        criterion="-" if part.plan is None else describe(rules.criterion),
        renormalize=describe(rules.renormalize),
        scale=growth(kept, fitted, axis=1),
        error_before=moments.error(kept, bias),
        error_after=moments.error(fitted, new_bias),
        plain_units=plain_units,
    )


def _choose(part: FittedPart, matrix: np.ndarray, moments: Moments, statistics: Statistics, rules: PruningRules) -> np.ndarray:
    shape, plan = tuple(part.products[1].kernel.shape), part.plan
    if plan.keep is not None:
        return part.view.to_matrix(plan.keep)
    # What comes from an input that never varies can move into the bias, so its weights go first.
    constant = np.diagonal(moments.gram, axis1=1, axis2=2)[:, :, None] <= 0

    def mask_of(scores):
        if constant.any():
            lowest, highest = np.float64(scores.min()), np.float64(scores.max())
            scores = np.where(constant, lowest - (highest - lowest) - 1, scores)
        scores = part.view.to_kernel(scores, shape)
        mask = masks.compute_mask(scores, plan.sparsity, plan.pattern, rules.group, plan.kernel.input_axes)
        return part.view.to_matrix(mask)

    if isinstance(rules.criterion, CalibratedCriterion):
        return rules.criterion.select(matrix, statistics, mask_of)
    return mask_of(
        part.view.to_matrix(score(rules.criterion, ops.convert_to_numpy(part.products[0].kernel).astype(np.float32)))
    )


def silence_normalization(layer: keras.layers.BatchNormalization, dead: np.ndarray) -> None:
    """Let a BatchNormalization output zero for dead features, whose inputs are zero."""
    for variable in (layer.gamma, layer.beta, layer.moving_mean):
        if variable is not None:
            variable.assign(np.where(dead, 0, ops.convert_to_numpy(variable)))


def _adjust(
    layer: keras.layers.BatchNormalization, matrix: np.ndarray, bias: np.ndarray, moments: Moments, plain: np.ndarray
) -> None:
    """Adjust a BatchNormalization to its new input `rows @ matrix + bias`, so that it outputs what it did.

    Its statistics move by as much as those of the samples differ between the dense and the pruned model, so that peculiarities
    of the samples cancel. Restoring deviations also amplifies errors: if that is worse than plain pruning, whose mean squared
    errors are `plain`, only the means move.
    """
    old_mean, old_variance = (
        ops.convert_to_numpy(part).astype(np.float64) for part in (layer.moving_mean, layer.moving_variance)
    )
    variance, covariance = moments.output_power(matrix), np.einsum("giu,giu->gu", matrix, moments.cross)
    ratio = np.ones_like(variance)
    np.divide(variance, moments.power, out=ratio, where=moments.power > 0)
    # A feature that lost nearly all it varied by would have its remains, mostly noise, blown up.
    ratio = np.maximum(ratio, SMALLEST_VARIANCE)
    squares = moments.power - 2 * covariance / np.sqrt(ratio) + variance / ratio
    weights = _factors(layer).reshape(plain.shape) ** 2
    if np.sum(weights * squares) > np.sum(weights * plain):
        ratio = np.ones_like(ratio)
    mean = np.einsum("gi,giu->gu", moments.input_mean, matrix) + bias
    mean, dense_mean, ratio = mean.reshape(-1), moments.target_mean.reshape(-1), ratio.reshape(-1)
    layer.moving_mean.assign(mean - np.sqrt(ratio) * (dense_mean - old_mean))
    layer.moving_variance.assign(np.maximum(ratio * (old_variance + layer.epsilon) - layer.epsilon, 0))


def _factors(layer: keras.layers.BatchNormalization) -> np.ndarray:
    """The factor by which a BatchNormalization multiplies each of its features."""
    factors = 1 / np.sqrt(ops.convert_to_numpy(layer.moving_variance).astype(np.float64) + layer.epsilon)
    return factors if layer.gamma is None else factors * ops.convert_to_numpy(layer.gamma)
