"""Layers as matrix products: `targets = rows @ matrix + bias`, for each group of units that share their inputs.

The rows of a convolution are its patches. To be calibrated, a kind of layer needs one function here and one row of `_VIEWS`.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import keras
import numpy as np
from keras import ops

L = keras.layers


@dataclasses.dataclass(frozen=True)
class LinearView:
    """The inputs, the outputs and the kernel of a layer as those of a matrix product.

    Args:
        rows: maps the inputs of the layer to a tensor of shape `(groups, rows, inputs)`.
        targets: maps the outputs of the layer before its activation to a tensor of shape `(groups, rows, units)`.
        split: shape that the kernel is first reshaped to (the filters of a grouped convolution are split into groups and
            filters).
        axes: the axes of that shape that are groups, inputs and units.
    """

    rows: Callable[[Any], Any]
    targets: Callable[[Any], Any]
    split: tuple[int, ...]
    axes: tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]

    @property
    def sizes(self) -> tuple[int, int, int]:
        """The numbers of groups, of inputs in each, and of units in each."""
        return tuple(math.prod(self.split[axis] for axis in part) for part in self.axes)

    def to_matrix(self, kernel: np.ndarray) -> np.ndarray:
        """From an array of the shape of the kernel to an array of shape `(groups, inputs, units)`."""
        return kernel.reshape(self.split).transpose(sum(self.axes, ())).reshape(self.sizes)

    def to_kernel(self, matrix: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
        """From an array of shape `(groups, inputs, units)` to an array of the shape of the kernel."""
        order = sum(self.axes, ())
        moved = matrix.reshape([self.split[axis] for axis in order])
        return moved.transpose(np.argsort(order)).reshape(shape)


def linear_view(layer: keras.Layer) -> LinearView | None:
    """How to see a built layer as a matrix product; `None` if it is not one, or has a bias that is not one number a unit.

    Args:
        layer: a built layer with one kernel.

    Example:

    >>> import keras, numpy as np
    >>> from keras_renorm.src.layers.linear import linear_view
    >>> layer = keras.layers.Conv1D(4, kernel_size=3)
    >>> _ = layer(np.ones((2, 8, 5)))
    >>> tuple(linear_view(layer).rows(np.ones((2, 8, 5))).shape)  # 2 x 6 positions, 3 x 5 inputs
    (1, 12, 15)
    """
    make = next((_VIEWS[cls] for cls in type(layer).__mro__ if cls in _VIEWS), None)
    return make(layer) if make and layer.built else None


@dataclasses.dataclass(frozen=True)
class LinearPart:
    """A matrix product within a layer. Nearly every layer is one matrix product; a separable convolution is two.

    Args:
        layer: the layer.
        kernel: the weights of the product.
        bias: the bias of the product, or `None`.
        view: the layer as a matrix product.
        taps: number of weights that join an input channel with a unit.
        feed: maps the inputs of the layer to the inputs of this product.
    """

    layer: keras.Layer
    kernel: keras.Variable
    bias: keras.Variable | None
    view: LinearView
    taps: int
    feed: Callable[[Any], Any]


def linear_parts(layer: keras.Layer) -> list[LinearPart]:
    """The matrix products of a built layer (not of layers inside it), in the order in which they are computed.

    The list is empty if the layer is not known to consist of matrix products.
    """
    if isinstance(layer, (L.SeparableConv1D, L.SeparableConv2D)) and layer.built:
        return _separable_convolution(layer)
    view = linear_view(layer)
    if view is None:
        return []
    taps = math.prod(getattr(layer, "kernel_size", ()))
    return [LinearPart(layer, layer.kernel, layer.bias, view, taps, lambda inputs: inputs)]


def _dense(layer):
    split = tuple(layer.kernel.shape)
    return LinearView(
        lambda inputs: ops.reshape(inputs, (1, -1, split[0])),
        lambda outputs: ops.reshape(outputs, (1, -1, split[1])),
        split,
        ((), (0,), (1,)),
    )


def _einsum_dense(layer):
    operands, output = layer.equation.replace(" ", "").split("->")
    inputs, kernel = operands.split(",")
    contracted = [letter for letter in kernel if letter not in output]
    shared = [letter for letter in kernel if letter in inputs and letter in output]
    units = [letter for letter in kernel if letter not in inputs]
    size = dict(zip(kernel, layer.kernel.shape))

    def mover(letters, last):
        def move(tensor):
            named = letters
            if "." in named:
                free = "ABCDEFGHIJ"[: len(tensor.shape) - len(named.replace(".", ""))]
                named = named.replace("...", free)
            between = [letter for letter in named if letter not in shared + last]
            order = [named.index(letter) for letter in shared + between + last]
            sizes = [math.prod(size[letter] for letter in part) for part in (shared, last)]
            return ops.reshape(ops.transpose(tensor, order), (sizes[0], -1, sizes[1]))

        return move

    if output[0] != inputs[0] or inputs[0] in kernel:
        # Samples are not what the first axis of inputs and outputs numbers.
        return None
    axes = tuple(tuple(kernel.index(letter) for letter in part) for part in (shared, contracted, units))
    if layer.bias is not None and [letter for letter in output if letter in layer.bias_axes] != shared + units:
        return None
    return LinearView(mover(inputs, contracted), mover(output, units), tuple(layer.kernel.shape), axes)


def _to_channels_last(tensor, layer):
    return ops.moveaxis(tensor, 1, -1) if layer.data_format == "channels_first" else tensor


def _patches(layer, inputs):
    """Tensor `(samples, *output positions, taps, channels)` of the patch of each position of a convolution."""
    inputs = _to_channels_last(inputs, layer)
    padding, starts, counts = [(0, 0)], [], []
    for size, taps, stride, dilation in zip(inputs.shape[1:-1], layer.kernel_size, layer.strides, layer.dilation_rate):
        reach = (taps - 1) * dilation
        total = {"valid": 0, "causal": reach, "same": max((-(-size // stride) - 1) * stride + reach + 1 - size, 0)}[
            layer.padding
        ]
        before = total if layer.padding == "causal" else total // 2
        padding.append((before, total - before))
        starts.append(range(0, reach + 1, dilation))
        counts.append((size + total - reach - 1) // stride + 1)
    padded = ops.pad(inputs, [*padding, (0, 0)]) if any(map(any, padding)) else inputs
    windows = [
        padded[(slice(None), *(slice(at, at + (n - 1) * s + 1, s) for at, n, s in zip(tap, counts, layer.strides)))]
        for tap in _product(starts)
    ]
    return ops.stack(windows, axis=-2)


def _product(ranges):
    return [tuple(r[i] for r, i in zip(ranges, index)) for index in np.ndindex(*map(len, ranges))]


def _grouped(tensor, groups):
    """`(..., taps, groups * n)` -> `(groups, rows, taps * n)`."""
    *_, taps, channels = tensor.shape
    tensor = ops.reshape(tensor, (-1, taps, groups, channels // groups))
    return ops.reshape(ops.transpose(tensor, (2, 0, 1, 3)), (groups, -1, taps * channels // groups))


def _convolution(layer):
    groups, rank = layer.groups, layer.rank
    *head, filters = layer.kernel.shape
    return LinearView(
        lambda inputs: _grouped(_patches(layer, inputs), groups),
        lambda outputs: _grouped(ops.expand_dims(_to_channels_last(outputs, layer), -2), groups),
        (*head, groups, filters // groups),
        ((rank + 1,), tuple(range(rank + 1)), (rank + 2,)),
    )


def _depthwise_convolution(layer):
    split = tuple(layer.kernel.shape)
    rank, channels = layer.rank, split[-2]
    return LinearView(
        lambda inputs: _grouped(_patches(layer, inputs), channels),
        lambda outputs: _grouped(ops.expand_dims(_to_channels_last(outputs, layer), -2), channels),
        split,
        ((rank,), tuple(range(rank)), (rank + 1,)),
    )


def _separable_convolution(layer):
    def depthwise(inputs):
        return ops.depthwise_conv(
            inputs,
            layer.depthwise_kernel,
            strides=layer.strides,
            padding=layer.padding,
            dilation_rate=layer.dilation_rate,
            data_format=layer.data_format,
        )

    def pointwise_rows(inputs):
        return _grouped(ops.expand_dims(_to_channels_last(inputs, layer), -2), 1)

    split, rank = tuple(layer.depthwise_kernel.shape), layer.rank
    first = LinearView(
        lambda inputs: _grouped(_patches(layer, inputs), split[-2]),
        lambda outputs: _grouped(ops.expand_dims(_to_channels_last(outputs, layer), -2), split[-2]),
        split,
        ((rank,), tuple(range(rank)), (rank + 1,)),
    )
    shape = tuple(layer.pointwise_kernel.shape)
    second = LinearView(pointwise_rows, pointwise_rows, shape, ((), tuple(range(rank + 1)), (rank + 1,)))
    return [
        LinearPart(layer, layer.depthwise_kernel, None, first, math.prod(layer.kernel_size), lambda inputs: inputs),
        LinearPart(layer, layer.pointwise_kernel, layer.bias, second, 1, depthwise),
    ]


def _transposed_convolution(layer):
    *taps, filters, channels = layer.kernel.shape
    inputs_per_unit = math.prod(taps) * channels
    # Its own operation with a one-hot kernel: whatever the backend pads and crops, rows and outputs agree.
    one_hot = np.eye(inputs_per_unit, dtype="float32").reshape(*taps, channels, inputs_per_unit).swapaxes(-1, -2)

    def rows(inputs):
        spread = ops.conv_transpose(
            ops.cast(inputs, "float32"),
            one_hot,
            strides=list(layer.strides),
            padding=layer.padding,
            output_padding=layer.output_padding,
            data_format=layer.data_format,
            dilation_rate=layer.dilation_rate,
        )
        return ops.reshape(_to_channels_last(spread, layer), (1, -1, inputs_per_unit))

    rank = layer.rank
    return LinearView(
        rows,
        lambda outputs: ops.reshape(_to_channels_last(outputs, layer), (1, -1, filters)),
        tuple(layer.kernel.shape),
        ((), (*range(rank), rank + 1), (rank,)),
    )


_VIEWS: dict[type, Callable[[Any], LinearView]] = {
    L.Dense: _dense,
    L.EinsumDense: _einsum_dense,
    L.Conv1D: _convolution,
    L.Conv2D: _convolution,
    L.Conv3D: _convolution,
    L.DepthwiseConv1D: _depthwise_convolution,
    L.DepthwiseConv2D: _depthwise_convolution,
    L.Conv1DTranspose: _transposed_convolution,
    L.Conv2DTranspose: _transposed_convolution,
    L.Conv3DTranspose: _transposed_convolution,
}
