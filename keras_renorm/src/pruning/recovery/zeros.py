"""Zeros that remain while a pruned model is trained, whatever its layers and its optimizer are."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import keras
import numpy as np
from keras import ops

from keras_renorm.src.core.arrays import as_array
from keras_renorm.src.layers.kernels import Kernel
from keras_renorm.src.models.channels.walks import find_ties
from keras_renorm.src.pruning.selection import kernels_by_layer, outermost_layers
from keras_renorm.src.pruning.units import biases_of


class KeepZeros(keras.constraints.Constraint):
    """Keeps values of a variable at zero. Every optimizer of Keras applies a constraint after each step.

    Args:
        mask: bool array of the shape of the variable: `True` for values that may change.
        inner: the constraint that the variable had before, or `None`.
    """

    def __init__(self, mask: np.ndarray, inner: Callable | None):
        self._mask, self._inner = ops.convert_to_tensor(mask), inner

    def __call__(self, value: Any) -> Any:
        value = ops.convert_to_tensor(value if self._inner is None else self._inner(value))
        return ops.where(self._mask, value, ops.zeros((), value.dtype))


@contextlib.contextmanager
def zeros_held(model: keras.Model) -> Iterator[None]:
    """While the context is open, training keeps the zeros of kernels, and units without weights output zero."""
    before = []
    try:
        for variable, mask in _masks(model):
            before.append((variable, variable.constraint))
            variable.constraint = KeepZeros(mask, variable.constraint)
        yield
    finally:
        for variable, constraint in reversed(before):
            variable.constraint = constraint


def kernels_with_zeros(model: keras.Model) -> Iterator[tuple[keras.Layer, Kernel]]:
    """The pruned kernels of a model, each with its layer."""
    found = kernels_by_layer(model)
    for layer in outermost_layers(model):
        kernels = found[id(layer)]
        for kernel in () if isinstance(kernels, ValueError) else kernels:
            if not as_array(kernel.variable).all():
                yield layer, kernel


def _masks(model: keras.Model) -> Iterator[tuple[keras.Variable, np.ndarray]]:
    """The variables with zeros to keep, each with a mask of the values that may change."""
    ties = find_ties(model)
    for layer, kernel in kernels_with_zeros(model):
        mask = as_array(kernel.variable) != 0
        yield kernel.variable, mask
        alive = mask.any(axis=kernel.input_axes).reshape(-1)
        behind = ties.normalizations.get(id(kernel.variable), [])
        of_units = [*biases_of(layer, kernel), *(one for part in behind for one in (part.gamma, part.beta))]
        for variable in of_units:
            if variable is not None and not alive.all():
                # A unit without weights may have a bias.
                yield variable, alive | (as_array(variable) != 0)
