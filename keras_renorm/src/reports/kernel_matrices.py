"""Kernels as matrices of inputs and units, to be drawn."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import keras
import numpy as np
from keras import ops

from keras_renorm.src.core import validation
from keras_renorm.src.layers.kernels import find_kernels, name_within
from keras_renorm.src.layers.prunable import PrunableLayer, prunable_layers
from keras_renorm.src.pruning.selection import outermost_layers
from keras_renorm.src.rules.criteria.base import CalibratedCriterion
from keras_renorm.src.rules.criteria.magnitude import Magnitude


@dataclasses.dataclass(frozen=True)
class KernelMatrix:
    """A kernel as a matrix of inputs and units, with its mask; `scale` is `None` in a plain layer."""

    name: str
    values: np.ndarray
    kept: np.ndarray
    effective: np.ndarray
    scale: np.ndarray | None
    criterion: Any


def kernel_matrices(model: keras.Layer) -> Iterator[KernelMatrix]:
    """All kernels of a model or of a layer."""
    if isinstance(model, keras.Model):
        validation.check_model(model)
    layers = list(outermost_layers(model)) if isinstance(model, keras.Model) else [model]
    found = [one for layer in layers for one in _kernels_of(layer)]
    if not found:
        raise ValueError(f"'{model.name}' has no kernel to draw. Received: {model!r}.")
    yield from found


def _kernels_of(layer: keras.Layer) -> list[KernelMatrix]:
    parts = prunable_layers(layer)
    if parts:
        return [_masked(layer, part, one) for part in parts for one in part.masked_kernels]
    try:
        return [_plain(layer, one) for one in find_kernels(layer)]
    except ValueError:
        # What cannot be pruned is not drawn.
        return []


def _masked(layer: keras.Layer, part: PrunableLayer, one: Any) -> KernelMatrix:
    criterion = Magnitude() if isinstance(part.criterion, CalibratedCriterion) else part.criterion
    arrays = (ops.convert_to_numpy(value) for value in (one.variable, one.mask, one.effective()))
    matrices = [_matrix(array, one.input_axes) for array in arrays]
    return KernelMatrix(_name(layer, one), *matrices, ops.convert_to_numpy(one.scale), criterion)


def _plain(layer: keras.Layer, one: Any) -> KernelMatrix:
    values = _matrix(ops.convert_to_numpy(one.variable), one.input_axes)
    return KernelMatrix(_name(layer, one), values, values != 0, values, None, Magnitude())


def _name(layer: keras.Layer, one: Any) -> str:
    inner = name_within(one.variable, layer)
    return layer.name if inner in ("kernel", f"{layer.name}/kernel") else f"{layer.name}: {inner}"


def kernel_matrix(layer: keras.Layer, index: int) -> KernelMatrix:
    if not isinstance(layer, keras.Layer):
        raise TypeError(f"Argument `layer` must be a Keras layer. Received: layer={layer!r} (of type {type(layer)}).")
    found = _kernels_of(layer)
    if not 0 <= index < len(found):
        raise ValueError(
            f"Argument `kernel` must be less than the number of kernels that layer '{layer.name}' has, which is {len(found)}. "
            f"Received: kernel={index}."
        )
    return found[index]


def _matrix(array: np.ndarray, input_axes: tuple[int, ...]) -> np.ndarray:
    """Inputs (all the positions of a filter) by units."""
    array = np.asarray(array, bool if array.dtype == bool else "float32")
    inputs = [array.shape[axis] for axis in input_axes]
    return np.moveaxis(array, input_axes, range(len(input_axes))).reshape(int(np.prod(inputs)), -1)
