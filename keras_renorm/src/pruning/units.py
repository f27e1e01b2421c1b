"""Structured pruning: what is special where whole units are removed."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import keras
import numpy as np

from keras_renorm.src.calibration.fitting import silence_normalization
from keras_renorm.src.core.arrays import as_array
from keras_renorm.src.core.keras_internals import flatten_layers
from keras_renorm.src.kernels import masks
from keras_renorm.src.layers.kernel_plan import KernelPlan, PruningRules
from keras_renorm.src.layers.kernels import Kernel, find_kernels
from keras_renorm.src.models.channels.walks import Ties, find_ties
from keras_renorm.src.pruning.compaction import units_that_stay
from keras_renorm.src.rules.criteria.base import score


def without_outputs(model: keras.Model, chosen: dict[int, keras.Layer], patterns_of: dict) -> dict[int, keras.Layer]:
    """Leave out layers of which whole units would be removed and are outputs of the model."""
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


def choose_tied_units(plans: list[KernelPlan], ties: Ties, rules: PruningRules) -> list[KernelPlan]:
    """Choose the same units in layers whose outputs are added: a unit of a sum is dead only if it is dead in all operands.

    The score of a unit is the sum of its scores in these layers, each relative to the mean of the layer.
    """
    groups: dict[Any, list[KernelPlan]] = {}
    for plan in plans:
        if plan.by_units:
            groups.setdefault(ties.groups.get(id(plan.kernel.variable), id(plan)), []).append(plan)
    chosen = {}
    for members in groups.values():
        units = []
        for plan in members:
            scores = score(rules.data_free_criterion, as_array(plan.kernel.variable)).sum(axis=plan.kernel.input_axes)
            units.append(scores.reshape(-1) / max(scores.mean(), np.finfo(np.float32).tiny))
        if len(members) > 1 and len({len(one) for one in units}) == 1:
            sizes = [plan.kernel.size for plan in members]
            sparsity = float(np.average([plan.sparsity for plan in members], weights=sizes))
            kept = masks.compute_mask(np.sum(units, axis=0)[None], sparsity, members[0].pattern)[0]
            for plan in members:
                chosen[id(plan)] = _spread(kept, plan.kernel)
    return [dataclasses.replace(plan, keep=chosen.get(id(plan))) for plan in plans]


def _spread(units: np.ndarray, kernel: Kernel) -> np.ndarray:
    """Repeat the value of each unit for all its weights."""
    shape = tuple(kernel.variable.shape)
    return np.broadcast_to(units.reshape([1 if axis in kernel.input_axes else n for axis, n in enumerate(shape)]), shape)


def silence_dead_units(plans: Sequence[KernelPlan], ties: Ties | None) -> None:
    """Let units without weights output zero: clear their biases, and silence the normalization behind them."""
    if ties is None:
        return
    for plan in (one for one in plans if one.by_units):
        alive = (as_array(plan.kernel.variable) != 0).any(axis=plan.kernel.input_axes).reshape(-1)
        for bias in biases_of(plan.layer, plan.kernel):
            bias.assign(np.where(alive, as_array(bias), 0))
        for layer in ties.normalizations.get(id(plan.kernel.variable), []):
            silence_normalization(layer, ~alive)


def biases_of(layer: keras.Layer, kernel: Kernel) -> list[keras.Variable]:
    """The biases within a layer that are added to the outputs of a kernel, one number for each unit."""
    names = ("kernel", "pointwise_kernel")
    makers = [one for one in flatten_layers(layer) if any(kernel.variable is getattr(one, name, None) for name in names)]
    biases = [one.bias for one in makers if getattr(one, "bias", None) is not None]
    units = kernel.size // math.prod(kernel.variable.shape[axis] for axis in kernel.input_axes)
    return [bias for bias in biases if tuple(bias.shape) == (units,)]


def notes_on_units(model: keras.Model, plans: Sequence[KernelPlan], rules: PruningRules) -> list[str]:
    """Notes on removed units that `compact` cannot take out."""
    by_units = [plan for plan in plans if plan.by_units]
    reasons = units_that_stay(model, [plan.kernel for plan in by_units])
    layers: dict[str, list[str]] = {}
    for plan in by_units:
        if id(plan.kernel.variable) in reasons:
            layers.setdefault(reasons[id(plan.kernel.variable)], []).append(rules.name_of(plan.layer))
    return [
        f"`keras_renorm.compact` cannot take out the units that {list(dict.fromkeys(names))} lost: {reason}."
        for reason, names in layers.items()
    ]
