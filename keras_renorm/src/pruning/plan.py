"""The plan of one-shot pruning: the arguments of `prune`, resolved once."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import keras
import numpy as np

from keras_renorm.src.core import validation
from keras_renorm.src.core.arrays import as_array
from keras_renorm.src.layers.kernel_plan import KernelPlan, PruningRules
from keras_renorm.src.models.channels.walks import Ties, find_ties
from keras_renorm.src.pruning.selection import choose_with_patterns, kernels_by_layer
from keras_renorm.src.pruning.units import choose_tied_units, without_outputs
from keras_renorm.src.rules import allocation as allocations
from keras_renorm.src.rules import patterns
from keras_renorm.src.runtimes.targets import by_name, names_of, unique_names


@dataclasses.dataclass(frozen=True)
class Request:
    """The arguments of `prune` that do not depend on the copy of the model, checked.

    Args:
        rules: how to prune.
        sparsity: a number, a dict of layer name to number, or `None`.
        allocation: how the sparsity is divided among the kernels.
        patterns_of: the pattern of each chosen layer of the model, by the `id` of the layer.
    """

    rules: PruningRules
    sparsity: float | dict[str, float] | None
    allocation: Callable
    patterns_of: dict[int, patterns.Pattern]


@dataclasses.dataclass(frozen=True)
class Plan:
    """What to prune in a copy of a model, and how.

    Args:
        kernels: the kernels to prune.
        rules: how to prune them.
        ties: the units of the model that are added to each other; `None` if no whole units are removed.
    """

    kernels: list[KernelPlan]
    rules: PruningRules
    ties: Ties | None


def resolve_request(
    model: keras.Model,
    rules: PruningRules,
    sparsity: Any,
    pattern: Any,
    allocation: Any,
    layers: Any,
    target: str | None,
) -> Request:
    """Resolve the arguments of `prune` for a model without prunable layers; see there."""
    names_layers = isinstance(sparsity, dict)
    selected, argument = (list(sparsity), "sparsity") if names_layers else (layers, "layers")
    chosen, patterns_of = choose_with_patterns(model, selected, pattern, target, argument)
    if layers is None and not names_layers:
        chosen = without_outputs(model, chosen, patterns_of)
    kernels = kernels_by_layer(model)
    for key, layer in chosen.items():
        for kernel in kernels[key]:
            plan = KernelPlan(layer, kernel, patterns_of[key], None)
            validation.check_finite(as_array(kernel.variable), plan.description)
    return Request(rules, sparsity, allocation, {key: patterns_of[key] for key in chosen})


def check_sparsity(rules: PruningRules, sparsity: Any, pattern: Any, layers: Any, target: str | None) -> None:
    """Raise `ValueError` if the sparsity is not possible with the other arguments of `prune`."""
    if isinstance(sparsity, dict) and layers is not None:
        raise ValueError("Pass either a dict as `sparsity` or `layers`, not both: the dict names the layers.")
    _check_count(rules, sparsity, pattern, target)
    for value in sparsity.values() if isinstance(sparsity, dict) else [] if sparsity is None else [sparsity]:
        validation.check_sparsity(value)
        if not isinstance(pattern, dict):
            patterns.get(pattern).check(value, rules.group)


def make_plan(request: Request, pruned: keras.Model, copies: Mapping[int, Any]) -> Plan:
    """Plan the kernels of a copy of the model.

    Args:
        request: the checked arguments.
        pruned: the copy.
        copies: the objects of the copy, by the `id` of the objects of the model.
    """
    rules = dataclasses.replace(request.rules, names=unique_names(pruned))
    kernels = _plan_kernels(pruned, {copies[key]: pattern for key, pattern in request.patterns_of.items()}, request)
    for one in kernels:
        if one.sparsity is not None:
            one.pattern.check(one.sparsity, rules.group)
    ties = find_ties(pruned) if any(one.by_units for one in kernels) else None
    if ties:
        kernels = choose_tied_units(kernels, ties, rules)
    return Plan(kernels, rules, ties)


def _plan_kernels(model: keras.Model, patterns_of: dict[keras.Layer, patterns.Pattern], request: Request) -> list[KernelPlan]:
    found, sparsity = kernels_by_layer(model), request.sparsity
    kernels = [(layer, kernel) for layer in patterns_of for kernel in found[id(layer)]]
    if isinstance(sparsity, dict):
        called = names_of(model)
        sparsities = [by_name(sparsity, called[id(layer)]) for layer, _ in kernels]
    elif sparsity is None:
        sparsities = [None] * len(kernels)
    else:
        values = [as_array(kernel.variable).astype(np.float32, copy=False) for _, kernel in kernels]
        most = [patterns_of[layer].most for layer, _ in kernels]
        sparsities = allocations.allocate(values, sparsity, request.allocation, most)
    return [KernelPlan(layer, kernel, patterns_of[layer], one) for (layer, kernel), one in zip(kernels, sparsities)]


def _check_count(rules: PruningRules, sparsity: Any, pattern: Any, target: str | None) -> None:
    """Raise unless exactly one of criterion and sparsity decides how many weights are kept."""
    if getattr(rules.criterion, "chooses_count", False):
        if sparsity is not None:
            raise ValueError(
                f"Criterion {rules.criterion!r} chooses how many weights to keep. Received: sparsity={sparsity!r}. "
                "Leave `sparsity` out, or the share."
            )
        if target is not None or isinstance(pattern, dict) or patterns.get(pattern) != patterns.Unstructured():
            raise ValueError(
                f"Criterion {rules.criterion!r} chooses which weights are removed together. Received: pattern={pattern!r}, "
                f"target={target!r}. Leave `pattern` and `target` out, or the share."
            )
    elif sparsity is None:
        raise ValueError(
            "Argument `sparsity` must be a number in [0, 1), or a dict of layer name to number. Received: sparsity=None."
        )
