"""How far the layers of a pruned model are from those of the dense model."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import keras
import numpy as np
from keras import ops

from keras_renorm.src.calibration.samples import count_samples, take_samples
from keras_renorm.src.core.keras_internals import inputs_structure, nodes_of
from keras_renorm.src.models.graph import functional_of
from keras_renorm.src.pruning.recovery.lesson import float_values
from keras_renorm.src.pruning.recovery.zeros import kernels_with_zeros

_MOST_SAMPLES = 256


def layer_errors(pruned: keras.Model, model: keras.Model, x: Any, batch_size: int) -> list[tuple[str, float]]:
    """The error of each call of a layer with pruned kernels: the squared error over the squared size of its outputs.

    Layers inside models that are layers are not seen. Nothing is returned for a subclassed model, and for models whose layers
    have outputs of other shapes.
    """
    names = {layer.name for layer, _ in kernels_with_zeros(pruned)}
    found = [_with_layers(one, names) for one in (pruned, model)]
    if None in found:
        return []
    (one, called), (other, others) = found
    if called != others or [tensor.shape for tensor in one.outputs] != [tensor.shape for tensor in other.outputs]:
        return []
    errors, sizes = np.zeros((2, len(called)))
    for start in range(0, min(count_samples(x), _MOST_SAMPLES), batch_size):
        batch = take_samples(x, slice(start, start + batch_size))
        outputs = (float_values(each(batch, training=False)) for each in (one, other))
        for index, (given, wanted) in enumerate(zip(*outputs, strict=True)):
            errors[index] += float(ops.sum(ops.square(wanted - given)))
            sizes[index] += float(ops.sum(ops.square(wanted)))
    return list(zip(called, (errors / np.maximum(sizes, np.finfo("float32").tiny)).tolist()))


def _with_layers(model: keras.Model, names: Collection[str]) -> tuple[keras.Model, list[str]] | None:
    """A model that returns the outputs of some layers, and their names, once for each call."""
    functional = functional_of(model)
    if functional is None:
        return None
    nodes = [node for node in nodes_of(functional) if not node.is_input and node.operation.name in names]
    outputs = [node.outputs[0] for node in nodes]
    return (keras.Model(inputs_structure(functional), outputs), [node.operation.name for node in nodes]) if nodes else None
