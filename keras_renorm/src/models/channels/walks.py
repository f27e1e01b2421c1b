"""Walks through the graph of a model by the rules: which units are read, and which are kept or removed together."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import keras
import numpy as np

from keras_renorm.src.models.channels.elementwise import ChannelByChannel
from keras_renorm.src.models.channels.kernels import Depthwise
from keras_renorm.src.models.channels.rule import ChannelRule, Flags, Live, channels_of
from keras_renorm.src.models.channels.table import rule_of
from keras_renorm.src.models.graph import functional_of, graph_of

L = keras.layers


def walk_back(model: keras.Model, visit: Callable[[keras.Layer, Flags], None], live: Live) -> None:
    """Visit the layers with one kernel from the outputs of a model to its inputs.

    A unit whose output meets only pruned weights has no effect, so its own weights are the first to remove.

    Args:
        model: a built model. Layers inside layers, in models that are called several times, and in subclassed models are not
            visited: all their units count as read.
        visit: called as `visit(layer, read)` with a bool for each unit of the layer: whether a later layer reads it.
        live: returns for a variable which of its weights count, as a bool array of its shape. It is called for a kernel after
            the visit of its layer.
    """
    # A Sequential model that Keras could not trace has no outputs.
    if functional_of(model) is None or not getattr(model, "outputs", None):
        return
    graph = graph_of(model)
    tensors = {id(tensor): tensor for call in graph.calls for tensor in (*call.inputs, *call.outputs)}
    needed = {key: np.zeros(channels_of(tensor) or 1, bool) for key, tensor in tensors.items()}
    varying = {key: np.full(len(flags), np.nan) for key, flags in needed.items()}
    for tensor in keras.tree.flatten(functional_of(model).outputs):
        if graph.canonical(tensor) in needed:
            needed[graph.canonical(tensor)][:] = True
    for call in reversed(graph.calls):
        rule = rule_of(call, live)
        wanted = [needed[id(tensor)] for tensor in call.outputs]
        units = rule.units_read(wanted[0]) if len(wanted) == 1 else None
        if units is not None:
            visit(call.operation, units)
        for tensor, flags in zip(call.inputs, rule.reads(wanted, [varying[id(tensor)] for tensor in call.inputs])):
            needed[id(tensor)] |= flags


@dataclasses.dataclass(frozen=True)
class Ties:
    """Which kernels make channels that must be kept or removed together.

    Args:
        groups: by the `id` of the variable of a kernel, a number. Kernels with the same number make units that are added or
            multiplied.
        of_outputs: the numbers of kernels whose units are, channel by channel, outputs of the model.
        normalizations: by the `id` of the variable of a kernel, the BatchNormalization layers that take its outputs.
    """

    groups: dict[int, int]
    of_outputs: set[int]
    normalizations: dict[int, list[keras.Layer]]


def find_ties(model: keras.Model) -> Ties:
    """The ties of the units of a model; empty for a subclassed model."""
    functional = functional_of(model)
    if functional is None:
        return Ties({}, set(), {})
    graph = graph_of(model)
    rules = [rule_of(call) for call in graph.calls]
    root = tied_tensors(rules)
    made, normalizations = {}, {}
    for rule in rules:
        inputs, outputs = rule.call.inputs, rule.call.outputs
        if isinstance(rule.layer, L.BatchNormalization) and rule.known:
            normalizations.setdefault(id(inputs[0]), []).append(rule.layer)
        made.update((id(variable), id(outputs[0])) for variable in rule.makers)
    return Ties(
        {key: root(tensor) for key, tensor in made.items()},
        {root(graph.canonical(tensor)) for tensor in functional.outputs},
        {key: normalizations.get(tensor, []) for key, tensor in made.items()},
    )


def tied_tensors(rules: list[ChannelRule]) -> Callable[[int], int]:
    """A function from the `id` of a tensor to a number. Tensors with the same number keep and lose the same channels."""
    roots: dict[int, int] = {}

    def root(key):
        while key in roots:
            key = roots[key]
        return key

    for rule in rules:
        tensors = [*rule.call.outputs]
        if isinstance(rule, ChannelByChannel):
            tensors += [tensor for tensor, wide in zip(rule.call.inputs, rule.wide) if wide]
        elif isinstance(rule, Depthwise) and rule.times == 1:
            tensors += rule.call.inputs
        first, *rest = {root(id(tensor)) for tensor in tensors}
        roots.update(dict.fromkeys(rest, first))
    return root
