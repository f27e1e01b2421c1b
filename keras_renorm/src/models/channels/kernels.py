"""Rules of layers with a kernel: Dense, convolutions of every kind, embeddings."""

from __future__ import annotations

import functools
import math

import keras
import numpy as np

from keras_renorm.src.models.channels.rule import ChannelRule, Values, apply_activation, bias_of, is_elementwise, to_numpy

L = keras.layers


class KernelRule(ChannelRule):
    """A kernel between all input and all output channels: Dense, convolutions, transposed convolutions, EinsumDense."""

    known = True
    weights = ("kernel",)

    def __init__(self, call, live=None):
        super().__init__(call, live)
        layer = self.layer
        self.transposed = isinstance(layer, (L.Conv1DTranspose, L.Conv2DTranspose, L.Conv3DTranspose))
        # Where zeros are put around the input, what is constant in it is not constant for the kernel.
        self.sees_edges = math.prod(getattr(layer, "kernel_size", ())) > 1 and (self.transposed or layer.padding != "valid")
        self.sees_edges |= self.transposed and max(layer.strides) > 1
        self.mixes = not is_elementwise(layer.activation)

    def _inputs_first(self, kernel):
        return kernel.swapaxes(-1, -2) if self.transposed else kernel

    @functools.cached_property
    def matrix(self):
        kernel = to_numpy(self.layer.kernel).astype(np.float64)
        return self._inputs_first(kernel).reshape(-1, *self._inputs_first(kernel).shape[-2:])

    @functools.cached_property
    def connected(self):
        """Bool of shape `(inputs, outputs)`."""
        live = self._inputs_first(self.live(self.layer.kernel))
        return live.reshape(-1, *live.shape[-2:]).any(axis=0)

    @functools.cached_property
    def bias(self):
        return bias_of(self.layer, self.matrix.shape[-1])

    def units_read(self, needed):
        return np.ones_like(needed) if self.mixes else needed

    def foldable(self, values):
        return (values == 0) | (~np.isnan(values) & (not self.sees_edges))

    def folded(self, values, chosen):
        """The contribution of constant input channels to the bias."""
        values = np.where(chosen & self.foldable(values), values, 0)
        return np.einsum("i,tio->o", values, self.matrix) if values.any() else np.zeros(self.matrix.shape[-1])

    def constants(self, inputs):
        varying = ~self.foldable(inputs[0])
        constant = ~self.connected[varying].any(axis=0)
        if self.mixes or not constant.any():
            return [np.full(len(constant), np.nan)]
        before = self.bias + self.folded(inputs[0], ~varying)
        return [np.where(constant, apply_activation(self.layer.activation, before), np.nan)]

    def reads(self, needed, constants):
        return [(self.connected & self.units_read(needed[0])).any(axis=1) & ~self.foldable(constants[0])]

    def tie(self, inputs, outputs):
        return inputs, [self.units_read(outputs[0])]

    def rebuild(self, inputs, outputs, constants):
        (read,), (kept,) = inputs, outputs
        bias = (self.bias + self.folded(constants[0], ~read))[kept]
        kernel = self._inputs_first(self._inputs_first(to_numpy(self.layer.kernel))[..., read, :][..., kept])
        use_bias = self.layer.bias is not None or bool((bias != 0).any())
        return self.anew(**self.changes(int(kept.sum()), use_bias)), [kernel, bias] if use_bias else [kernel]

    def changes(self, units, use_bias):
        if isinstance(self.layer, L.EinsumDense):
            letters = self.layer.equation.split("->")[1].strip()
            shape = (*self.layer.partial_output_shape[:-1], units)
            return dict(output_shape=shape, bias_axes=letters[-1] if use_bias else None)
        return {"units" if isinstance(self.layer, L.Dense) else "filters": units, "use_bias": use_bias}


class Depthwise(ChannelRule):
    """Each input channel makes `depth_multiplier` output channels."""

    known = True
    weights = ("kernel",)

    def __init__(self, call, live=None):
        super().__init__(call, live)
        self.times = self.layer.kernel.shape[-1]
        self.sees_edges = math.prod(self.layer.kernel_size) > 1 and self.layer.padding != "valid"
        self.mixes = not is_elementwise(self.layer.activation)

    @functools.cached_property
    def matrix(self):
        kernel = to_numpy(self.layer.kernel).astype(np.float64)
        return kernel.reshape(-1, *kernel.shape[-2:])

    @functools.cached_property
    def connected(self):
        """Bool of shape `(inputs, multiplier)`."""
        live = self.live(self.layer.kernel)
        return live.reshape(-1, *live.shape[-2:]).any(axis=0)

    def units_read(self, needed):
        return np.ones_like(needed) if self.mixes else needed

    def constants(self, inputs):
        bias = bias_of(self.layer, self.connected.size)
        made = _depthwise_constants(self.matrix, inputs[0], self.sees_edges) + bias
        return [np.full_like(made, np.nan) if self.mixes else apply_activation(self.layer.activation, made)]

    def reads(self, needed, constants):
        live = self.connected & self.units_read(needed[0]).reshape(-1, self.times)
        return [live.any(axis=1)]

    def tie(self, inputs, outputs):
        kept = inputs[0] | self.units_read(outputs[0]).reshape(-1, self.times).any(axis=1)
        return [kept], [np.repeat(kept, self.times)]

    def rebuild(self, inputs, outputs, constants):
        kernel = to_numpy(self.layer.kernel)[..., inputs[0], :]
        return self.anew(), [kernel] if self.layer.bias is None else [kernel, to_numpy(self.layer.bias)[outputs[0]]]


class Separable(ChannelRule):
    """A depthwise convolution followed by a 1x1 convolution, in one layer."""

    known = True
    weights = ("depthwise_kernel", "pointwise_kernel")

    def __init__(self, call, live=None):
        super().__init__(call, live)
        layer = self.layer
        self.times = layer.depthwise_kernel.shape[-1]
        self.sees_edges = math.prod(layer.kernel_size) > 1 and layer.padding != "valid"
        self.mixes = not is_elementwise(layer.activation)

    @functools.cached_property
    def slices(self):
        kernel = to_numpy(self.layer.depthwise_kernel).astype(np.float64)
        return kernel.reshape(-1, *kernel.shape[-2:])

    @functools.cached_property
    def matrix(self):
        kernel = to_numpy(self.layer.pointwise_kernel).astype(np.float64)
        return kernel.reshape(kernel.shape[-2:])

    @functools.cached_property
    def connected(self):
        """Bool of shape `(inputs * multiplier, outputs)`."""
        depthwise, pointwise = (self.live(variable) for variable in self.variables)
        depthwise = depthwise.reshape(-1, pointwise.shape[-2]).any(axis=0)
        return depthwise[:, None] & pointwise.reshape(pointwise.shape[-2:])

    @functools.cached_property
    def bias(self):
        return bias_of(self.layer, self.matrix.shape[-1])

    def between(self, values):
        return _depthwise_constants(self.slices, values, self.sees_edges)

    def constants(self, inputs):
        between = self.between(inputs[0])
        constant = ~(self.matrix[np.isnan(between)] != 0).any(axis=0)
        before = self.bias + np.nan_to_num(between) @ self.matrix
        if self.mixes:
            return [np.full_like(before, np.nan)]
        return [np.where(constant, apply_activation(self.layer.activation, before), np.nan)]

    def reads(self, needed, constants):
        wanted = np.ones_like(needed[0]) if self.mixes else needed[0]
        read = self.connected[:, wanted].any(axis=1)
        if not np.isnan(constants[0]).all():
            read = read & np.isnan(self.between(constants[0]))
        return [read.reshape(-1, self.times).any(axis=1)]

    def tie(self, inputs, outputs):
        return inputs, [np.ones_like(outputs[0]) if self.mixes else outputs[0]]

    def rebuild(self, inputs, outputs, constants):
        (read,), (kept,) = inputs, outputs
        rows = np.repeat(read, self.times)
        lost = np.where(rows, 0, np.nan_to_num(self.between(constants[0])))
        bias = (self.bias + lost @ self.matrix)[kept]
        use_bias = self.layer.bias is not None or bool((bias != 0).any())
        depthwise, pointwise = map(to_numpy, self.variables)
        values = [depthwise[..., read, :], pointwise[..., rows, :][..., kept], bias]
        return self.anew(filters=int(kept.sum()), use_bias=use_bias), values if use_bias else values[:2]


class Embedding(ChannelRule):
    """An embedding: only its outputs have channels."""

    known = True

    def constants(self, inputs):
        table = to_numpy(self.layer.embeddings)
        return [np.where(np.ptp(table, axis=0) == 0, table[0].astype(np.float64), np.nan)]

    def tie(self, inputs, outputs):
        return [np.ones_like(one) for one in inputs], outputs

    def rebuild(self, inputs, outputs, constants):
        return self.anew(output_dim=int(outputs[0].sum())), [to_numpy(self.layer.embeddings)[:, outputs[0]]]


def _depthwise_constants(slices: np.ndarray, values: Values, sees_edges: bool) -> Values:
    """The output of each slice, of shape `(taps, channels, multiplier)`, for a constant input."""
    dead = ~(slices != 0).any(axis=0)
    usable = (values == 0) | (not sees_edges)
    made = np.where(usable[:, None], values[:, None] * slices.sum(axis=0), np.nan)
    return np.where(dead, 0.0, made).reshape(-1)
