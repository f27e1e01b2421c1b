"""How channels go through layers: which are constant, which are read, which come and go together.

A channel is an index of a tensor's last axis. For each kind of layer there is a `Rule`, made for one call of the layer in the
graph of a model; `keras_renorm.compact` asks it about arrays of channels and has it make the smaller layer. A new kind of layer
is a row of `_KINDS`, and a class here if it is like none of the others.
"""

from __future__ import annotations

import dataclasses
import inspect
import math
from collections.abc import Callable, Sequence
from typing import Any

import keras
import numpy as np
from keras import ops
from keras.src.ops import numpy as operations

from keras_renorm.conversion import copy_layer
from keras_renorm.graph import CHANNEL_BY_CHANNEL, ELEMENTWISE_ACTIVATIONS, Call, functional_of, graph_of

L = keras.layers

# Whether a channel is needed, read or kept: bool for each channel. Its value where it is constant: float, NaN where it varies.
Flags = np.ndarray
Values = np.ndarray


class Rule:
    """What is not known keeps all its channels, on both sides."""

    known = False

    def __init__(self, call: Call):
        self.layer = call.operation
        self.call = call
        self.sizes = [_channels(tensor) for tensor in call.inputs]

    def constants(self, inputs: list[Values]) -> list[Values]:
        """The constant channels of the outputs, from those of the inputs."""
        return [np.full(_channels(tensor) or 1, np.nan) for tensor in self.call.outputs]

    def reads(self, needed: list[Flags], constants: list[Values]) -> list[Flags]:
        """Which channels of the inputs are needed for channels of the outputs.

        An input channel that is constant is not, if the layer made without it can make up for it.
        """
        return [np.ones(size or 1, bool) for size in self.sizes]

    def tie(self, inputs: list[Flags], outputs: list[Flags]) -> tuple[list[Flags], list[Flags]]:
        """What has to be kept beyond what is asked for, as the layer cannot do otherwise."""
        return [np.ones_like(one) for one in inputs], [np.ones_like(one) for one in outputs]

    def remake(self, inputs: list[Flags], outputs: list[Flags], constants: list[Values]) -> tuple[Any, list[np.ndarray | None]]:
        """The layer for the channels that are kept, and the values of its variables (`None`: as they are)."""
        return copy_layer(self.layer), self.values()

    def values(self) -> list[np.ndarray]:
        return [_numpy(variable) for variable in getattr(self.layer, "variables", ())]


class ChannelByChannel(Rule):
    """Channel i of the output depends on channel i of the inputs only."""

    known = True

    def __init__(self, call):
        super().__init__(call)
        self.size = _channels(call.outputs[0])
        # Inputs of one channel are broadcast.
        self.wide = [size == self.size for size in self.sizes]

    def constants(self, inputs):
        return [_all_equal([one for one, wide in zip(inputs, self.wide) if wide])]

    def reads(self, needed, constants):
        return [needed[0] if wide else np.ones(size, bool) for size, wide in zip(self.sizes, self.wide)]

    def tie(self, inputs, outputs):
        kept = np.logical_or.reduce([*outputs, *(one for one, wide in zip(inputs, self.wide) if wide)])
        return [kept if wide else np.ones_like(one) for one, wide in zip(inputs, self.wide)], [kept]

    def remake(self, inputs, outputs, constants):
        (kept,) = outputs
        # But not the states of random number generators.
        values = [v[..., kept] if v.shape[-1:] == kept.shape and v.dtype.kind != "u" else v for v in self.values()]
        return copy_layer(self.layer), values


class Elementwise(ChannelByChannel):
    """Each number of the output is a function of the same numbers of the inputs: what it makes of constants, it says itself."""

    def constants(self, inputs):
        result = np.full(self.size, np.nan)
        if len(inputs) == len(self.call.node.input_tensors) and not any(np.isnan(one).all() for one in inputs):
            varies = np.logical_or.reduce([np.broadcast_to(np.isnan(one), self.size) for one in inputs])
            at = [np.where(np.isnan(one), 0, one) for one in inputs]
            shapes = [(1,) * (len(tensor.shape) - 1) + one.shape for tensor, one in zip(self.call.inputs, at)]
            tensors = {
                id(key): ops.convert_to_tensor(one.reshape(shape), key.dtype)
                for key, one, shape in zip(self.call.node.input_tensors, at, shapes)
            }
            args, kwargs = self.call.node.arguments.fill_in(tensors)
            made = _numpy(self.layer(*args, **kwargs)).astype(np.float64)
            # A slope for each place makes different numbers of one constant.
            result = np.where(varies, np.nan, _all_equal(made.reshape(-1, self.size)))
        return [result]


class Product(Elementwise):
    """Zero times anything is zero."""

    def constants(self, inputs):
        (result,) = super().constants(inputs)
        zero = np.logical_or.reduce([np.broadcast_to(one == 0, self.size) for one in inputs])
        return [np.where(zero, 0.0, result)]


class ZeroPadding(ChannelByChannel):
    def constants(self, inputs):
        return [np.where(inputs[0] == 0, 0.0, np.nan)]


class Kernel(Rule):
    """A kernel between all input and all output channels: Dense, convolutions, transposed convolutions, EinsumDense."""

    known = True

    def __init__(self, call):
        super().__init__(call)
        layer = self.layer
        self.transposed = isinstance(layer, (L.Conv1DTranspose, L.Conv2DTranspose, L.Conv3DTranspose))
        kernel = _numpy(layer.kernel).astype(np.float64)
        self.kernel = kernel.swapaxes(-1, -2) if self.transposed else kernel
        self.matrix = self.kernel.reshape(-1, *self.kernel.shape[-2:])
        self.bias = np.zeros(self.matrix.shape[-1]) if layer.bias is None else _numpy(layer.bias).astype(np.float64)
        # Where zeros are put around the input, what is constant in it is not constant for the kernel.
        self.sees_edges = math.prod(getattr(layer, "kernel_size", ())) > 1 and (self.transposed or layer.padding != "valid")
        self.sees_edges |= self.transposed and max(layer.strides) > 1
        self.mixes = not _is_elementwise(layer.activation)

    def foldable(self, values):
        return (values == 0) | (~np.isnan(values) & (not self.sees_edges))

    def folded(self, values, chosen):
        """What constant input channels add to the bias."""
        return np.einsum("i,tio->o", np.where(chosen & self.foldable(values), values, 0), self.matrix)

    def constants(self, inputs):
        varying = ~self.foldable(inputs[0])
        constant = ~(self.matrix[:, varying] != 0).any(axis=(0, 1))
        if self.mixes or not constant.any():
            return [np.full(len(constant), np.nan)]
        before = self.bias + self.folded(inputs[0], ~varying)
        return [np.where(constant, _apply(self.layer.activation, before), np.nan)]

    def reads(self, needed, constants):
        wanted = np.ones_like(needed[0]) if self.mixes else needed[0]
        return [(self.matrix[:, :, wanted] != 0).any(axis=(0, 2)) & ~self.foldable(constants[0])]

    def tie(self, inputs, outputs):
        return inputs, [np.ones_like(outputs[0]) if self.mixes else outputs[0]]

    def remake(self, inputs, outputs, constants):
        (read,), (kept,) = inputs, outputs
        bias = (self.bias + self.folded(constants[0], ~read))[kept]
        kernel = self.kernel[..., read, :][..., kept]
        kernel = kernel.swapaxes(-1, -2) if self.transposed else kernel
        use_bias = self.layer.bias is not None or bool((bias != 0).any())
        layer = copy_layer(self.layer, **self.changes(int(kept.sum()), use_bias))
        return layer, [kernel, bias] if use_bias else [kernel]

    def changes(self, units, use_bias):
        if isinstance(self.layer, L.EinsumDense):
            letters = self.layer.equation.split("->")[1].strip()
            shape = (*self.layer.partial_output_shape[:-1], units)
            return dict(output_shape=shape, bias_axes=letters[-1] if use_bias else None)
        return {"units" if isinstance(self.layer, L.Dense) else "filters": units, "use_bias": use_bias}


class Depthwise(Rule):
    """Each input channel makes `depth_multiplier` output channels."""

    known = True

    def __init__(self, call):
        super().__init__(call)
        kernel = _numpy(self.layer.kernel).astype(np.float64)
        self.kernel, self.times = kernel, kernel.shape[-1]
        self.matrix = kernel.reshape(-1, *kernel.shape[-2:])
        bias = self.layer.bias
        self.bias = np.zeros(self.matrix[0].size) if bias is None else _numpy(bias).astype(np.float64)
        self.sees_edges = len(self.matrix) > 1 and self.layer.padding != "valid"
        self.mixes = not _is_elementwise(self.layer.activation)

    def constants(self, inputs):
        made = _depthwise_constants(self.matrix, inputs[0], self.sees_edges) + self.bias
        return [np.full_like(made, np.nan) if self.mixes else _apply(self.layer.activation, made)]

    def reads(self, needed, constants):
        wanted = np.ones_like(needed[0]) if self.mixes else needed[0]
        live = (self.matrix != 0).any(axis=0) & wanted.reshape(-1, self.times)
        return [live.any(axis=1)]

    def tie(self, inputs, outputs):
        kept = inputs[0] | (outputs[0] | self.mixes).reshape(-1, self.times).any(axis=1)
        return [kept], [np.repeat(kept, self.times)]

    def remake(self, inputs, outputs, constants):
        values = [self.kernel[..., inputs[0], :], self.bias[outputs[0]]]
        return copy_layer(self.layer), values if self.layer.bias is not None else values[:1]


class Separable(Rule):
    """A depthwise convolution and one of single positions in one layer."""

    known = True

    def __init__(self, call):
        super().__init__(call)
        layer = self.layer
        self.depthwise = _numpy(layer.depthwise_kernel).astype(np.float64)
        self.pointwise = _numpy(layer.pointwise_kernel).astype(np.float64)
        self.times = self.depthwise.shape[-1]
        self.slices = self.depthwise.reshape(-1, *self.depthwise.shape[-2:])
        self.matrix = self.pointwise.reshape(self.pointwise.shape[-2:])
        self.bias = np.zeros(self.matrix.shape[-1]) if layer.bias is None else _numpy(layer.bias).astype(np.float64)
        self.sees_edges = len(self.slices) > 1 and layer.padding != "valid"
        self.mixes = not _is_elementwise(layer.activation)

    def between(self, values):
        return _depthwise_constants(self.slices, values, self.sees_edges)

    def constants(self, inputs):
        between = self.between(inputs[0])
        constant = ~(self.matrix[np.isnan(between)] != 0).any(axis=0)
        before = self.bias + np.nan_to_num(between) @ self.matrix
        if self.mixes:
            return [np.full_like(before, np.nan)]
        return [np.where(constant, _apply(self.layer.activation, before), np.nan)]

    def reads(self, needed, constants):
        wanted = np.ones_like(needed[0]) if self.mixes else needed[0]
        read = (self.matrix[:, wanted] != 0).any(axis=1) & np.isnan(self.between(constants[0]))
        return [read.reshape(-1, self.times).any(axis=1)]

    def tie(self, inputs, outputs):
        return inputs, [np.ones_like(outputs[0]) if self.mixes else outputs[0]]

    def remake(self, inputs, outputs, constants):
        (read,), (kept,) = inputs, outputs
        rows = np.repeat(read, self.times)
        lost = np.where(rows, 0, np.nan_to_num(self.between(constants[0])))
        bias = (self.bias + lost @ self.matrix)[kept]
        use_bias = self.layer.bias is not None or bool((bias != 0).any())
        values = [self.depthwise[..., read, :], self.pointwise[..., rows, :][..., kept], bias]
        layer = copy_layer(self.layer, filters=int(kept.sum()), use_bias=use_bias)
        return layer, values if use_bias else values[:2]


class Embedding(Rule):
    """What it looks up is not a matter of channels; what it finds is."""

    known = True

    def __init__(self, call):
        super().__init__(call)
        self.table = _numpy(self.layer.embeddings)

    def constants(self, inputs):
        return [np.where(np.ptp(self.table, axis=0) == 0, self.table[0].astype(np.float64), np.nan)]

    def tie(self, inputs, outputs):
        return [np.ones_like(one) for one in inputs], outputs

    def remake(self, inputs, outputs, constants):
        return copy_layer(self.layer, output_dim=int(outputs[0].sum())), [self.table[:, outputs[0]]]


class Tiled(Rule):
    """Flatten, or a Reshape to or from a vector: the channels of one side are repeated on the other."""

    known = True

    def __init__(self, call):
        super().__init__(call)
        self.before, self.after = self.sizes[0], _channels(call.outputs[0])

    def constants(self, inputs):
        if self.after >= self.before:
            return [np.tile(inputs[0], self.after // self.before)]
        return [_all_equal(list(inputs[0].reshape(-1, self.after)))]

    def reads(self, needed, constants):
        return [self._to_inputs(needed[0])]

    def tie(self, inputs, outputs):
        few = inputs[0].reshape(-1, min(self.before, self.after)).any(axis=0)
        few = few | outputs[0].reshape(-1, len(few)).any(axis=0)
        return [np.tile(few, self.before // len(few))], [np.tile(few, self.after // len(few))]

    def _to_inputs(self, flags):
        if self.after >= self.before:
            return flags.reshape(-1, self.before).any(axis=0)
        return np.tile(flags, self.before // self.after)

    def remake(self, inputs, outputs, constants):
        if isinstance(self.layer, L.Flatten):
            return copy_layer(self.layer), []
        return copy_layer(self.layer, target_shape=_reshaped(self.call.outputs[0], outputs[0])), []


class SameChannels(ChannelByChannel):
    """A Reshape that leaves the last axis alone."""

    def remake(self, inputs, outputs, constants):
        return copy_layer(self.layer, target_shape=_reshaped(self.call.outputs[0], outputs[0])), []


class Concatenated(Rule):
    """Channels of all inputs one after the other."""

    known = True

    def constants(self, inputs):
        return [np.concatenate(inputs)]

    def reads(self, needed, constants):
        return self._split(needed[0])

    def tie(self, inputs, outputs):
        kept = [one | other for one, other in zip(inputs, self._split(outputs[0]))]
        return kept, [np.concatenate(kept)]

    def _split(self, flags):
        return np.split(flags, np.cumsum(self.sizes)[:-1])


class Attention(Rule):
    """Multi-head attention: input channels that no head reads, output channels, and whole heads."""

    known = True

    def __init__(self, call):
        super().__init__(call)
        layer = self.layer
        args, kwargs = call.node.arguments.args, call.node.arguments.kwargs
        bound = inspect.signature(layer.call).bind(*args, **kwargs).arguments
        self.parts = {"query": layer.query_dense, "key": layer.key_dense, "value": layer.value_dense}
        named = {name: bound.get(name) for name in self.parts}
        named["key"] = named["value"] if named["key"] is None else named["key"]
        self.roles = [[name for name, tensor in named.items() if tensor is key] for key in call.node.input_tensors]
        self.kernels = {name: _numpy(part.kernel) for name, part in self.parts.items()}
        self.output = _numpy(layer.output_dense.kernel)
        self.bias = np.zeros(self.output.shape[-1])
        value_bias = np.zeros(self.kernels["value"].shape[1:])
        if layer.output_dense.bias is not None:
            self.bias = _numpy(layer.output_dense.bias).astype(np.float64)
            value_bias = _numpy(layer.value_dense.bias)
        silent = ~((self.kernels["value"] != 0).any(axis=(0, 2)) | (value_bias != 0).any(axis=1))
        self.heads = (self.output != 0).any(axis=(1, 2)) & ~silent
        if not self.heads.any():
            self.heads[0] = True

    def constants(self, inputs):
        constant = ~(self.output[self.heads] != 0).any(axis=(0, 1))
        return [np.where(constant, self.bias, np.nan)]

    def reads(self, needed, constants):
        answers = []
        for roles, size, values in zip(self.roles, self.sizes, constants):
            read = [(self.kernels[role][:, self.heads] != 0).any(axis=(1, 2)) for role in roles]
            answers.append(np.logical_or.reduce(read) & (values != 0) if roles else np.ones(size, bool))
        return answers

    def tie(self, inputs, outputs):
        return [one if roles else np.ones_like(one) for one, roles in zip(inputs, self.roles)], outputs

    def remake(self, inputs, outputs, constants):
        (kept,) = outputs
        layer = copy_layer(self.layer, num_heads=int(self.heads.sum()), output_shape=(int(kept.sum()),))
        read = {role: flags for roles, flags in zip(self.roles, inputs) for role in roles}
        values = []
        for variable in self.layer.variables:
            value = _numpy(variable)
            role = next((name for name, part in self.parts.items() if any(variable is v for v in part.variables)), None)
            if variable is self.layer.output_dense.kernel:
                value = value[self.heads][..., kept]
            elif variable is self.layer.output_dense.bias:
                value = value[kept]
            elif role and variable is self.parts[role].kernel:
                value = value[read[role]][:, self.heads]
            elif role:
                value = value[self.heads]
            values.append(value)
        return layer, values


class Recurrent(Rule):
    """A recurrent layer reads some channels; its own units all stay, as they read each other."""

    known = True

    def reads(self, needed, constants):
        read = (_numpy(self.layer.cell.kernel) != 0).any(axis=1) & (constants[0] != 0)
        return [read, *(np.ones(size, bool) for size in self.sizes[1:])]

    def tie(self, inputs, outputs):
        rest, made = super().tie(inputs, outputs)
        return [inputs[0], *rest[1:]], made

    def remake(self, inputs, outputs, constants):
        values = [
            _numpy(variable)[inputs[0]] if variable is self.layer.cell.kernel else _numpy(variable)
            for variable in self.layer.variables
        ]
        return copy_layer(self.layer), values


def rule_of(call: Call) -> Rule:
    """What is known of a call; a plain `Rule` if nothing is."""
    make = _KINDS.get(type(call.operation), Rule)
    sizes = [_channels(tensor) for tensor in (*call.inputs, *call.outputs)]
    if call.times > 1 or not sizes or None in sizes or len(call.outputs) != 1 or _has_other_weights(call.operation):
        return Rule(call)
    return make(call) if isinstance(make, type) else (make(call) or Rule)(call)


def _has_other_weights(operation: Any) -> bool:
    """Whether LoRA, quantization or a gate of attention gave it weights that its kind does not tell of."""
    parts = operation._flatten_layers() if isinstance(operation, keras.Layer) else ()
    return getattr(operation, "_use_gate", False) or any(
        getattr(part, "lora_enabled", False) or getattr(part, "quantization_mode", None) is not None for part in parts
    )


@dataclasses.dataclass(frozen=True)
class Ties:
    """Which kernels make channels that have to come and go together.

    Args:
        groups: by the `id` of a kernel's variable, a number that kernels share whose units meet in sums or products.
        of_outputs: the numbers of those whose units are, channel by channel, outputs of the model.
        normalizations: by the `id` of a kernel's variable, the BatchNormalization layers that take what it makes.
    """

    groups: dict[int, int]
    of_outputs: set[int]
    normalizations: dict[int, list[keras.Layer]]


def find_ties(model: keras.Model) -> Ties:
    """How the units of a model hang together; nothing is known of a subclassed one."""
    functional = functional_of(model)
    if functional is None:
        return Ties({}, set(), {})
    graph = graph_of(model)
    roots: dict[int, int] = {}

    def root(key):
        while key in roots:
            key = roots[key]
        return key

    def join(tensors):
        first, *rest = {root(id(tensor)) for tensor in tensors}
        roots.update(dict.fromkeys(rest, first))

    made, normalizations = {}, {}
    for rule in map(rule_of, graph.calls):
        inputs, outputs = rule.call.inputs, rule.call.outputs
        if isinstance(rule, ChannelByChannel):
            join([*(tensor for tensor, wide in zip(inputs, rule.wide) if wide), *outputs])
        elif isinstance(rule, Depthwise) and rule.times == 1:
            join([*inputs, *outputs])
        if isinstance(rule.layer, L.BatchNormalization) and rule.known:
            normalizations.setdefault(id(inputs[0]), []).append(rule.layer)
        for name in ("kernel", "pointwise_kernel", "embeddings"):
            if rule.known and hasattr(rule.layer, name):
                made[id(getattr(rule.layer, name))] = id(outputs[0])
    return Ties(
        {key: root(tensor) for key, tensor in made.items()},
        {root(graph.canonical(tensor)) for tensor in functional.outputs},
        {key: normalizations.get(tensor, []) for key, tensor in made.items()},
    )


def _usable_kernel(call: Call) -> type | None:
    layer = call.operation
    return Kernel if getattr(layer, "groups", 1) == 1 and _channels_last(layer) else None


def _usable_einsum(call: Call) -> type | None:
    """Those that do what a Dense layer does."""
    layer = call.operation
    operands, output = layer.equation.replace(" ", "").split("->")
    inputs, kernel = operands.split(",")
    plain = len(kernel) == 2 and kernel[0] == inputs[-1] and kernel[1] == output[-1] and inputs[:-1] == output[:-1]
    return _usable_kernel(call) if plain and (layer.bias is None or len(layer.bias.shape) == 1) else None


def _if_channels_last(kind: type) -> Callable[[Call], type | None]:
    return lambda call: kind if _channels_last(call.operation) else None


def _activation(call: Call) -> type | None:
    return Elementwise if _is_elementwise(call.operation.activation) else None


def _normalization(call: Call) -> type | None:
    return Elementwise if call.operation.axis in (-1, len(call.inputs[0].shape) - 1) else None


def _reshape(call: Call) -> type | None:
    before, after = (tensor.shape[1:] for tensor in (call.inputs[0], call.outputs[0]))
    if isinstance(call.operation, L.Flatten) and not _channels_last(call.operation):
        return None
    if None in before or None in after:
        return None
    if before[-1] == after[-1]:
        return ChannelByChannel if isinstance(call.operation, L.Flatten) else SameChannels
    return Tiled if 1 in (len(before), len(after)) else None


def _concatenate(call: Call) -> type | None:
    rank = len(call.inputs[0].shape)
    return Concatenated if call.operation.axis in (-1, rank - 1) else ChannelByChannel


_ELEMENTWISE = (
    *(L.ReLU, L.LeakyReLU, L.ELU, L.Dropout, L.SpatialDropout1D, L.SpatialDropout2D, L.SpatialDropout3D),
    *(L.GaussianDropout, L.GaussianNoise, L.Identity, L.Rescaling, L.Add, L.Subtract, L.Average, L.Maximum, L.Minimum),
)
_KINDS: dict[type, Any] = {
    **{cls: _if_channels_last(ChannelByChannel) for cls in CHANNEL_BY_CHANNEL},
    **{cls: Elementwise for cls in _ELEMENTWISE},
    **{cls: _if_channels_last(ZeroPadding) for cls in (L.ZeroPadding1D, L.ZeroPadding2D, L.ZeroPadding3D)},
    L.Multiply: Product,
    L.PReLU: Elementwise,
    L.Activation: _activation,
    L.BatchNormalization: _normalization,
    **{cls: _usable_kernel for cls in (L.Dense, L.Conv1D, L.Conv2D, L.Conv3D)},
    **{cls: _usable_kernel for cls in (L.Conv1DTranspose, L.Conv2DTranspose, L.Conv3DTranspose)},
    L.EinsumDense: _usable_einsum,
    **{cls: _if_channels_last(Depthwise) for cls in (L.DepthwiseConv1D, L.DepthwiseConv2D)},
    **{cls: _if_channels_last(Separable) for cls in (L.SeparableConv1D, L.SeparableConv2D)},
    L.Embedding: Embedding,
    L.Flatten: _reshape,
    L.Reshape: _reshape,
    L.Concatenate: _concatenate,
    L.MultiHeadAttention: Attention,
    **{cls: Recurrent for cls in (L.LSTM, L.GRU, L.SimpleRNN)},
    operations.Add: Elementwise,
    operations.Subtract: Elementwise,
    operations.Multiply: Product,
}


def _channels(tensor: Any) -> int | None:
    return tensor.shape[-1] if len(tensor.shape) > 1 else None


def _channels_last(layer: keras.Layer) -> bool:
    return getattr(layer, "data_format", "channels_last") != "channels_first"


def _is_elementwise(activation: Any) -> bool:
    return activation is None or activation in ELEMENTWISE_ACTIVATIONS


def _apply(activation: Any, values: Values) -> Values:
    if activation is None:
        return values
    made = _numpy(activation(ops.convert_to_tensor(np.nan_to_num(values), "float32"))).astype(np.float64)
    return np.where(np.isnan(values), np.nan, made)


def _all_equal(rows: Sequence[Values]) -> Values:
    """What all rows agree on."""
    first = rows[0]
    return np.where(np.logical_and.reduce([row == first for row in rows]), first, np.nan)


def _depthwise_constants(slices: np.ndarray, values: Values, sees_edges: bool) -> Values:
    """What each slice, of shape `(taps, channels, multiplier)`, makes of a constant input."""
    dead = ~(slices != 0).any(axis=0)
    usable = (values == 0) | (not sees_edges)
    made = np.where(usable[:, None], values[:, None] * slices.sum(axis=0), np.nan)
    return np.where(dead, 0.0, made).reshape(-1)


def _reshaped(tensor: Any, kept: Flags) -> tuple[int, ...]:
    return (*tensor.shape[1:-1], int(kept.sum()))


def _numpy(value: Any) -> np.ndarray:
    return np.asarray(ops.convert_to_numpy(value))
