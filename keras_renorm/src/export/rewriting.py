"""Replaces some layers of a model."""

from __future__ import annotations

import dataclasses
from typing import Any

import keras
import numpy as np
from keras import ops

from keras_renorm.src.models.copying import Copier
from keras_renorm.src.models.graph import Graph, rebuild_model


@dataclasses.dataclass(frozen=True)
class Change:
    """The replacement of a call with one input: layers and their weights.

    The layers are called one after the other or, if `abreast`, all with the same input, and their outputs are concatenated.
    """

    layers: list[tuple[keras.Layer, list[np.ndarray]]]
    abreast: bool = False

    def __call__(self, tensor: Any, *_, **__) -> Any:
        if self.abreast:
            return keras.layers.Concatenate()([layer(tensor) for layer, _ in self.layers])
        for layer, _ in self.layers:
            tensor = layer(tensor)
        return tensor


def rebuild_with(model: keras.Model, graph: Graph, changes: dict[int, Change]) -> keras.Model:
    """A copy of a model with changes, by the `id` of a call."""
    copier = Copier(model)

    def operation_for(call):
        operation = changes[id(call)] if id(call) in changes else copier.copy(call.operation)

        def call_anew(*args, **kwargs):
            args, kwargs = keras.tree.map_structure(counterpart, (args, kwargs))
            return operation(*args, **kwargs)

        return call_anew

    def counterpart(argument):
        return copier.copy(argument) if isinstance(argument, keras.Variable) else argument

    model = rebuild_model(model, graph, operation_for)
    for layer, values in [pair for change in changes.values() for pair in change.layers]:
        for variable, value in zip(getattr(layer, "variables", ()), values, strict=True):
            variable.assign(value)
    return model


def values_of(operation: Any) -> list[np.ndarray]:
    """The values of the variables of an operation; none if it is not a layer."""
    return [ops.convert_to_numpy(variable) for variable in getattr(operation, "variables", ())]
