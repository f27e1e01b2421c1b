"""One-shot pruning with calibration samples: fit the kernels, and fall back to plain pruning where that is better."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import keras
import numpy as np

from keras_renorm.src.calibration.fitting import prune_calibrated
from keras_renorm.src.calibration.gathering import KernelStatistics, gather_statistics
from keras_renorm.src.calibration.output_error import OutputError
from keras_renorm.src.calibration.samples import Samples
from keras_renorm.src.core.arrays import as_array, for_another, masked
from keras_renorm.src.core.keras_internals import flatten_layers
from keras_renorm.src.core.moments import Moments
from keras_renorm.src.kernels.events import in_float, new_scale
from keras_renorm.src.kernels.report import LayerReport, describe
from keras_renorm.src.layers.kernel_plan import KernelPlan, PruningRules
from keras_renorm.src.models.channels.table import is_sum
from keras_renorm.src.pruning.data_free import prune_alone, prune_backwards, scale_limits
from keras_renorm.src.pruning.plan import Plan
from keras_renorm.src.pruning.units import silence_dead_units


def prune_with_samples(
    dense: keras.Model, pruned: keras.Model, copies: Mapping[int, Any], plan: Plan, samples: Samples, verbose: int
) -> tuple[list[LayerReport], list[str], dict[str, float]]:
    """Prune and fit a copy of a model.

    Args:
        dense: the model.
        pruned: its copy, which is pruned.
        copies: the objects of the copy, by the `id` of the objects of the model.
        plan: what to prune, and how.
        samples: the calibration samples.
        verbose: whether to show a progress bar.

    Returns:
        The rows of the report, notes, and the errors of the outputs.
    """
    rules = plan.rules
    layers = flatten_layers(dense, include_self=False)
    twins = [(one, copies[id(one)]) for one in (*layers, *_sums_of_tensors(dense))]
    distance = OutputError(dense, samples)
    # Kernels that cannot be fitted may still be scored.
    gathered = gather_statistics(pruned, samples, rules.statistics) if rules.statistics is not Moments else {}
    rows = prune_calibrated(
        dense,
        pruned,
        twins,
        {id(one.kernel.variable): one for one in plan.kernels},
        rules,
        samples,
        gathered if rules.needs_labels else {},
        lambda unfitted: _prune_unfitted(unfitted, rules, gathered, lambda: distance(pruned)),
        verbose,
    )
    silence_dead_units(plan.kernels, plan.ties)
    return _unless_plain_is_nearer(pruned, twins, plan, rows, distance) if rules.fits else (rows, [], {})


def _sums_of_tensors(model: keras.Model) -> list[keras.Operation]:
    """The operations of a model that are written as `x + y`."""
    functions = [part for part in flatten_layers(model) if isinstance(part, keras.Function)]
    operations = [operation for function in functions for operation in function.operations]
    return [one for one in operations if is_sum(one) and not isinstance(one, keras.Layer)]


def _prune_unfitted(
    plans: list[KernelPlan], rules: PruningRules, gathered: dict[int, KernelStatistics], error: Callable[[], float]
) -> list[LayerReport]:
    """Prune kernels that cannot be fitted to samples. They are rescaled only if outputs are then closer to the dense ones."""
    without = dataclasses.replace(rules, renormalize=None) if rules.fits else rules
    before = [in_float(as_array(plan.kernel.variable)).copy() for plan in plans]
    rows = [prune_alone(plan, without, known=gathered.get(id(plan.kernel.variable))) for plan in plans]
    renormalize = rules.data_free_renormalize
    if not (rules.fits and plans) or renormalize is None:
        return rows
    plain, plain_error = [in_float(as_array(plan.kernel.variable)).copy() for plan in plans], error()
    scales = [
        new_scale(one, None, left != 0, 1.0, renormalize, plan.kernel.input_axes)
        for plan, one, left in zip(plans, before, plain)
    ]
    for plan, left, scale in zip(plans, plain, scales):
        plan.kernel.variable.assign(left * scale)
    if error() < plain_error:
        return [
            dataclasses.replace(
                row, renormalize=describe(renormalize), scale=scale_limits(scale, left != 0, plan.kernel.input_axes)
            )
            for row, plan, left, scale in zip(rows, plans, plain, scales)
        ]
    for plan, left in zip(plans, plain):
        plan.kernel.variable.assign(left)
    return rows


def _unless_plain_is_nearer(
    pruned: keras.Model,
    twins: list[tuple[keras.Operation, keras.Operation]],
    plan: Plan,
    rows: list[LayerReport],
    distance: OutputError,
) -> tuple[list[LayerReport], list[str], dict[str, float]]:
    """Keep the calibrated model, unless plain pruning gives outputs that are closer to the dense ones on its own samples.

    Plain pruning keeps the weights that calibration chose, or the weights that `prune` chooses without samples.

    Returns:
        The rows of the report, notes on what was undone, and the errors of the outputs.
    """
    weights = [[getattr(one, "weights", ()) for one in pair] for pair in twins]
    variables = list({id(new): (old, new) for pair in weights for old, new in zip(*pair)}.values())

    def values():
        return [as_array(new).copy() for _, new in variables]

    def plain_by_the_same_masks():
        for one, mask in zip(plan.kernels, masks_chosen):
            one.kernel.variable.assign(masked(in_float(as_array(one.kernel.variable)), mask))
        kept = [
            dataclasses.replace(row, renormalize="none", scale=(1.0, 1.0), error_before=None, error_after=None, plain_units=0)
            for row in rows
        ]
        return [row for row in kept if row.criterion != "-"]

    def plain_without_samples():
        return prune_backwards(pruned, plan.kernels, PruningRules(plan.rules.data_free_criterion, plan.rules.group, None))

    masks_chosen = [as_array(one.kernel.variable) != 0 for one in plan.kernels]
    best, best_rows, error = values(), rows, distance(pruned)
    errors = {"error": error, "plain_error": np.inf}
    ways = [plain_by_the_same_masks]
    if all(one.sparsity is not None for one in plan.kernels):
        ways.append(plain_without_samples)
    for way in ways:
        for old, new in variables:
            new.assign(for_another(old))
        plain_rows = way()
        silence_dead_units(plan.kernels, plan.ties)
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
