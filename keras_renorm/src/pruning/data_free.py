"""Pruning of kernels without fitting them to calibration samples."""

from __future__ import annotations

from typing import Any

import keras
import numpy as np

from keras_renorm.src.calibration.gathering import KernelStatistics
from keras_renorm.src.core import validation
from keras_renorm.src.core.arrays import as_array, masked
from keras_renorm.src.kernels.events import in_float, new_scale
from keras_renorm.src.kernels.report import LayerReport, describe
from keras_renorm.src.layers.kernel_plan import KernelPlan, PruningRules, prune_planned
from keras_renorm.src.layers.kernels import name_within
from keras_renorm.src.models.channels.walks import walk_back
from keras_renorm.src.pruning.plan import Plan
from keras_renorm.src.pruning.units import silence_dead_units


def prune_without_samples(model: keras.Model, plan: Plan) -> tuple[list[LayerReport], list[str], dict[str, float]]:
    """Prune a model in place.

    Returns:
        The rows of the report, notes, and errors, of which there are none.
    """
    rows = prune_backwards(model, plan.kernels, plan.rules)
    silence_dead_units(plan.kernels, plan.ties)
    return rows, [], {}


def prune_backwards(model: keras.Model, plans: list[KernelPlan], rules: PruningRules) -> list[LayerReport]:
    """Prune from the outputs to the inputs, so that it is known which units later layers read."""
    rows, waiting = [], {}
    for plan in plans:
        waiting.setdefault(id(plan.layer), []).append(plan)

    def prune_layer(layer, read=None):
        rows.extend(prune_alone(plan, rules, read) for plan in waiting.pop(id(layer), []))

    walk_back(model, prune_layer, lambda variable: as_array(variable) != 0)
    rows.extend(prune_alone(plan, rules) for left in waiting.values() for plan in left)
    return rows


def prune_alone(
    plan: KernelPlan, rules: PruningRules, read: np.ndarray | None = None, known: KernelStatistics | None = None
) -> LayerReport:
    """Prune a kernel by itself.

    Args:
        plan: the kernel, and how much of it to prune.
        rules: how to prune it.
        read: bool for each unit, whether a later layer reads it. Defaults to `None`: all are read.
        known: the statistics for the criterion, if there are any. Defaults to `None`.
    """
    variable, axes = plan.kernel.variable, plan.kernel.input_axes
    criterion = scored_by = rules.criterion
    renormalize = rules.data_free_renormalize
    values = in_float(as_array(variable))
    if plan.keep is not None:
        mask = plan.keep
        scale = new_scale(values, None, mask, 1.0, renormalize, axes)
    elif plan.sparsity is None:
        if known is None:
            raise ValueError(
                f"Criterion {criterion!r} cannot choose how many weights to keep. {plan.description}: samples "
                "do not show what its inputs carry. Leave the layer out with `layers=`. Nothing was changed."
            )
        mask = known.to_kernel(criterion.select(known.matrix, known.statistics, None))
        scale = new_scale(values, None, mask, 1.0, renormalize, axes)
    else:
        if known is not None:
            scores = known.to_kernel(criterion(known.matrix, known.statistics))
            scored_by = lambda kernel: scores  # noqa: E731
        else:
            criterion = scored_by = rules.data_free_criterion
        mask, scale = prune_planned(plan, rules, values, scored_by, read=read)
    kept = masked(values, mask)
    with np.errstate(over="ignore"):
        np.multiply(kept, scale, out=kept)
    validation.check_finite(kept, f"{plan.description}, scaled by {renormalize!r},")
    variable.assign(kept)
    return LayerReport(
        layer=rules.name_of(plan.layer),
        kernel=name_within(variable, plan.layer),
        weights=mask.size,
        kept=int(np.count_nonzero(mask)),
        criterion=describe(criterion),
        renormalize=describe(renormalize),
        scale=scale_limits(scale, mask, axes),
    )


def scale_limits(scale: Any, mask: np.ndarray, axes: tuple[int, ...]) -> tuple[float, float]:
    """The smallest and the largest scale of units that have weights."""
    factors = np.broadcast_to(scale, [1 if axis in axes else side for axis, side in enumerate(mask.shape)])
    factors = factors[mask.any(axis=axes, keepdims=True)] if mask.any() else np.ones(1)
    return float(factors.min()), float(factors.max())
