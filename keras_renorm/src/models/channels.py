"""How channels go through layers: which are constant, which are read, which come and go together.

A channel is an index of a tensor's last axis. For each kind of layer there is a `Rule`, made for one call of the layer in the
graph of a model; `keras_renorm.compact` asks it about arrays of channels and has it make the smaller layer, `walk_back` asks it
only which channels are read. A new kind of layer is a row of `_KINDS`, and a class here if it is like none of the others.

Wherever a layer is not known (a subclass may do anything), is used in several places or holds something for each channel, it
keeps all its channels.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import math
from collections.abc import Callable, Sequence
from typing import Any

import keras
import numpy as np
from keras import ops

from keras_renorm.src.core.keras_internals import flatten_layers, has_gate, operation_classes
from keras_renorm.src.layers.prunable import PrunableLayer
from keras_renorm.src.models.copying import with_config
from keras_renorm.src.models.graph import ELEMENTWISE_ACTIVATIONS, Call, functional_of, graph_of

L = keras.layers

# Whether a channel is needed, read or kept: bool for each channel. Its value where it is constant: float, NaN where it varies.
Flags = np.ndarray
Values = np.ndarray
# Which weights of a variable are not zero: bool of its shape.
Live = Callable[[keras.Variable], np.ndarray]


class Rule:
    """What is not known keeps all its channels, on both sides.

    Args:
        call: the call.
        live: gives for a variable of the layer which of its weights count; by default those that are not zero.
    """

    known = False
    # The weights that stand between channels, by the names of their variables; `live` is asked about them.
    weights: tuple[str, ...] = ()

    def __init__(self, call: Call, live: Live | None = None):
        self.layer = _plain(call.operation)
        self.call = call
        self.sizes = [_channels(tensor) for tensor in call.inputs]
        self._live = live

    @property
    def variables(self) -> list[keras.Variable]:
        """The variables of the weights that stand between channels."""
        return [getattr(self.layer, name) for name in self.weights]

    @property
    def makers(self) -> list[keras.Variable]:
        """The kernels whose units are the channels of the output."""
        names = ("kernel", "pointwise_kernel", "embeddings") if self.known else ()
        return [getattr(self.layer, name) for name in names if hasattr(self.layer, name)]

    def live(self, variable: keras.Variable) -> np.ndarray:
        return _numpy(variable) != 0 if self._live is None else self._live(variable)

    def units_read(self, needed: Flags) -> Flags | None:
        """Which units of the kernel are read where these channels of the output are needed.

        `None` if its units are no channels of the output.
        """
        return None

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

    def stays(self, inputs: list[Flags], outputs: list[Flags]) -> bool:
        """Whether the layer stays what it is, as all channels do."""
        return all(flags.all() for flags in (*inputs, *outputs))

    def remake(self, inputs: list[Flags], outputs: list[Flags], constants: list[Values]) -> tuple[Any, list[np.ndarray]]:
        """The layer for the channels that are kept, not built yet, and the values of its weights in their order.

        It is asked only where the layer does not stay what it is.
        """
        raise NotImplementedError

    def arguments(self, args: tuple, kwargs: dict[str, Any], outputs: list[Flags]) -> tuple[tuple, dict[str, Any]]:
        """What the layer for the channels that are kept is called with."""
        return args, kwargs

    def anew(self, **changes: Any) -> Any:
        """The layer from its config, not built yet: a copy would be built for all its channels."""
        # An operation is never built.
        changes = {"name": self.layer.name, **changes} if isinstance(self.layer, keras.Layer) else changes
        return with_config(self.layer, **changes)


class ChannelByChannel(Rule):
    """Channel i of the output depends on channel i of the inputs only."""

    known = True

    def __init__(self, call, live=None):
        super().__init__(call, live)
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
        values = [_numpy(weight) for weight in getattr(self.layer, "weights", ())]
        return self.anew(), [value[..., kept] if value.shape[-1:] == kept.shape else value for value in values]


class Elementwise(ChannelByChannel):
    """Each number of the output is a function of the same numbers of the inputs: what it makes of constants, it says itself.

    Of the arguments of an operation, those that hold a value for each channel are cut along with the channels.
    """

    @functools.cached_property
    def arrays(self) -> list[np.ndarray]:
        """The arguments of an operation that are no tensors of the graph and hold a value for each channel."""
        if isinstance(self.layer, keras.Layer):
            return []
        arguments = self.call.node.arguments
        return [_numpy(one) for one in (*arguments.args, *arguments.kwargs.values()) if self._is_wide(one)]

    def _is_wide(self, argument):
        """A size of one is no value for each channel, also where there is one channel only."""
        return not isinstance(argument, keras.KerasTensor) and _numpy(argument).shape[-1:] not in ((), (1,))

    def arguments(self, args, kwargs, outputs):
        if not self.arrays:
            return args, kwargs

        def cut(argument):
            return _cut(argument, outputs[0]) if self._is_wide(argument) else argument

        return tuple(map(cut, args)), {name: cut(argument) for name, argument in kwargs.items()}

    def constants(self, inputs):
        result = np.full(self.size, np.nan)
        if self.call.training or any(np.isnan(one).all() for one in inputs):
            return [result]
        varies = np.logical_or.reduce([np.broadcast_to(np.isnan(one), self.size) for one in inputs])
        tensors = {}
        for tensor, one in zip(self.call.inputs, inputs):
            shape = (1,) * (len(tensor.shape) - 1) + one.shape
            tensors[id(tensor)] = ops.convert_to_tensor(np.where(np.isnan(one), 0, one).reshape(shape), tensor.dtype)
        args, kwargs = self.call.fill_in(tensors)
        # Nothing that the layer does here may change it.
        with keras.StatelessScope():
            made = _numpy(self.layer(*args, **kwargs)).astype(np.float64)
        made = _all_equal(made.reshape(-1, self.size))
        return [np.where(varies | ~np.isfinite(made), np.nan, made)]


class Product(Elementwise):
    """Zero times anything is zero."""

    def constants(self, inputs):
        (result,) = super().constants(inputs)
        factors = [*inputs, *(np.where((one == 0).all(axis=tuple(range(one.ndim - 1))), 0, np.nan) for one in self.arrays)]
        zero = np.logical_or.reduce([np.broadcast_to(one == 0, self.size) for one in factors])
        return [np.where(zero, 0.0, result)]


class Slopes(ChannelByChannel):
    """PReLU: a slope for each place makes different numbers of one constant that is negative."""

    def constants(self, inputs):
        alpha = _numpy(self.layer.alpha).astype(np.float64)
        slopes = np.broadcast_to(_all_equal(alpha.reshape(-1, alpha.shape[-1])), self.size)
        return [np.where(inputs[0] < 0, slopes * inputs[0], inputs[0])]


class ZeroPadding(ChannelByChannel):
    def constants(self, inputs):
        return [np.where(inputs[0] == 0, 0.0, np.nan)]


class Kernel(Rule):
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
        self.mixes = not _is_elementwise(layer.activation)

    def _inputs_first(self, kernel):
        return kernel.swapaxes(-1, -2) if self.transposed else kernel

    @functools.cached_property
    def matrix(self):
        kernel = _numpy(self.layer.kernel).astype(np.float64)
        return self._inputs_first(kernel).reshape(-1, *self._inputs_first(kernel).shape[-2:])

    @functools.cached_property
    def connected(self):
        """Bool of shape `(inputs, outputs)`."""
        live = self._inputs_first(self.live(self.layer.kernel))
        return live.reshape(-1, *live.shape[-2:]).any(axis=0)

    @functools.cached_property
    def bias(self):
        return _bias(self.layer, self.matrix.shape[-1])

    def units_read(self, needed):
        return np.ones_like(needed) if self.mixes else needed

    def foldable(self, values):
        return (values == 0) | (~np.isnan(values) & (not self.sees_edges))

    def folded(self, values, chosen):
        """What constant input channels add to the bias."""
        values = np.where(chosen & self.foldable(values), values, 0)
        return np.einsum("i,tio->o", values, self.matrix) if values.any() else np.zeros(self.matrix.shape[-1])

    def constants(self, inputs):
        varying = ~self.foldable(inputs[0])
        constant = ~self.connected[varying].any(axis=0)
        if self.mixes or not constant.any():
            return [np.full(len(constant), np.nan)]
        before = self.bias + self.folded(inputs[0], ~varying)
        return [np.where(constant, _apply(self.layer.activation, before), np.nan)]

    def reads(self, needed, constants):
        return [(self.connected & self.units_read(needed[0])).any(axis=1) & ~self.foldable(constants[0])]

    def tie(self, inputs, outputs):
        return inputs, [self.units_read(outputs[0])]

    def remake(self, inputs, outputs, constants):
        (read,), (kept,) = inputs, outputs
        bias = (self.bias + self.folded(constants[0], ~read))[kept]
        kernel = self._inputs_first(self._inputs_first(_numpy(self.layer.kernel))[..., read, :][..., kept])
        use_bias = self.layer.bias is not None or bool((bias != 0).any())
        return self.anew(**self.changes(int(kept.sum()), use_bias)), [kernel, bias] if use_bias else [kernel]

    def changes(self, units, use_bias):
        if isinstance(self.layer, L.EinsumDense):
            letters = self.layer.equation.split("->")[1].strip()
            shape = (*self.layer.partial_output_shape[:-1], units)
            return dict(output_shape=shape, bias_axes=letters[-1] if use_bias else None)
        return {"units" if isinstance(self.layer, L.Dense) else "filters": units, "use_bias": use_bias}


class Depthwise(Rule):
    """Each input channel makes `depth_multiplier` output channels."""

    known = True
    weights = ("kernel",)

    def __init__(self, call, live=None):
        super().__init__(call, live)
        self.times = self.layer.kernel.shape[-1]
        self.sees_edges = math.prod(self.layer.kernel_size) > 1 and self.layer.padding != "valid"
        self.mixes = not _is_elementwise(self.layer.activation)

    @functools.cached_property
    def matrix(self):
        kernel = _numpy(self.layer.kernel).astype(np.float64)
        return kernel.reshape(-1, *kernel.shape[-2:])

    @functools.cached_property
    def connected(self):
        """Bool of shape `(inputs, multiplier)`."""
        live = self.live(self.layer.kernel)
        return live.reshape(-1, *live.shape[-2:]).any(axis=0)

    def units_read(self, needed):
        return np.ones_like(needed) if self.mixes else needed

    def constants(self, inputs):
        bias = _bias(self.layer, self.connected.size)
        made = _depthwise_constants(self.matrix, inputs[0], self.sees_edges) + bias
        return [np.full_like(made, np.nan) if self.mixes else _apply(self.layer.activation, made)]

    def reads(self, needed, constants):
        live = self.connected & self.units_read(needed[0]).reshape(-1, self.times)
        return [live.any(axis=1)]

    def tie(self, inputs, outputs):
        kept = inputs[0] | self.units_read(outputs[0]).reshape(-1, self.times).any(axis=1)
        return [kept], [np.repeat(kept, self.times)]

    def remake(self, inputs, outputs, constants):
        kernel = _numpy(self.layer.kernel)[..., inputs[0], :]
        return self.anew(), [kernel] if self.layer.bias is None else [kernel, _numpy(self.layer.bias)[outputs[0]]]


class Separable(Rule):
    """A depthwise convolution and one of single positions in one layer."""

    known = True
    weights = ("depthwise_kernel", "pointwise_kernel")

    def __init__(self, call, live=None):
        super().__init__(call, live)
        layer = self.layer
        self.times = layer.depthwise_kernel.shape[-1]
        self.sees_edges = math.prod(layer.kernel_size) > 1 and layer.padding != "valid"
        self.mixes = not _is_elementwise(layer.activation)

    @functools.cached_property
    def slices(self):
        kernel = _numpy(self.layer.depthwise_kernel).astype(np.float64)
        return kernel.reshape(-1, *kernel.shape[-2:])

    @functools.cached_property
    def matrix(self):
        kernel = _numpy(self.layer.pointwise_kernel).astype(np.float64)
        return kernel.reshape(kernel.shape[-2:])

    @functools.cached_property
    def connected(self):
        """Bool of shape `(inputs * multiplier, outputs)`."""
        depthwise, pointwise = (self.live(variable) for variable in self.variables)
        depthwise = depthwise.reshape(-1, pointwise.shape[-2]).any(axis=0)
        return depthwise[:, None] & pointwise.reshape(pointwise.shape[-2:])

    @functools.cached_property
    def bias(self):
        return _bias(self.layer, self.matrix.shape[-1])

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
        read = self.connected[:, wanted].any(axis=1)
        if not np.isnan(constants[0]).all():
            read = read & np.isnan(self.between(constants[0]))
        return [read.reshape(-1, self.times).any(axis=1)]

    def tie(self, inputs, outputs):
        return inputs, [np.ones_like(outputs[0]) if self.mixes else outputs[0]]

    def remake(self, inputs, outputs, constants):
        (read,), (kept,) = inputs, outputs
        rows = np.repeat(read, self.times)
        lost = np.where(rows, 0, np.nan_to_num(self.between(constants[0])))
        bias = (self.bias + lost @ self.matrix)[kept]
        use_bias = self.layer.bias is not None or bool((bias != 0).any())
        depthwise, pointwise = map(_numpy, self.variables)
        values = [depthwise[..., read, :], pointwise[..., rows, :][..., kept], bias]
        return self.anew(filters=int(kept.sum()), use_bias=use_bias), values if use_bias else values[:2]


class Embedding(Rule):
    """What it looks up is not a matter of channels; what it finds is."""

    known = True

    def constants(self, inputs):
        table = _numpy(self.layer.embeddings)
        return [np.where(np.ptp(table, axis=0) == 0, table[0].astype(np.float64), np.nan)]

    def tie(self, inputs, outputs):
        return [np.ones_like(one) for one in inputs], outputs

    def remake(self, inputs, outputs, constants):
        return self.anew(output_dim=int(outputs[0].sum())), [_numpy(self.layer.embeddings)[:, outputs[0]]]


class Tiled(Rule):
    """Flatten, or a Reshape to or from a vector: the channels of one side are repeated on the other."""

    known = True

    def __init__(self, call, live=None):
        super().__init__(call, live)
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
            return self.anew(), []
        return self.anew(target_shape=_reshaped(self.call.outputs[0], outputs[0])), []


class SameChannels(ChannelByChannel):
    """A Reshape that leaves the last axis alone."""

    def remake(self, inputs, outputs, constants):
        return self.anew(target_shape=_reshaped(self.call.outputs[0], outputs[0])), []


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

    def remake(self, inputs, outputs, constants):
        return self.anew(), []

    def _split(self, flags):
        return np.split(flags, np.cumsum(self.sizes)[:-1])


class Attention(Rule):
    """Multi-head attention: input channels that no head reads, output channels, and whole heads."""

    known = True

    def __init__(self, call, live=None):
        super().__init__(call, live)
        layer = self.layer
        args, kwargs = call.node.arguments.args, call.node.arguments.kwargs
        bound = inspect.signature(layer.call).bind(*args, **kwargs).arguments
        self.parts = {"query": layer.query_dense, "key": layer.key_dense, "value": layer.value_dense}
        named = {name: bound.get(name) for name in self.parts}
        named["key"] = named["value"] if named["key"] is None else named["key"]
        self.roles = [[name for name, tensor in named.items() if tensor is key] for key in call.node.input_tensors]

    @property
    def variables(self):
        return [*(part.kernel for part in self.parts.values()), self.layer.output_dense.kernel]

    @functools.cached_property
    def kernels(self):
        """Which weights of each part count, shape `(inputs, heads, size)`."""
        return {name: self.live(part.kernel) for name, part in self.parts.items()}

    @functools.cached_property
    def output(self):
        """Which weights of the output count, shape `(heads, size, outputs)`."""
        return self.live(self.layer.output_dense.kernel)

    @functools.cached_property
    def heads(self):
        """Which heads do something."""
        value_bias = self.layer.value_dense.bias
        heard = self.kernels["value"].any(axis=(0, 2))
        if value_bias is not None:
            heard = heard | (_numpy(value_bias) != 0).any(axis=1)
        heads = self.output.any(axis=(1, 2)) & heard
        if not heads.any():
            heads[0] = True
        return heads

    def constants(self, inputs):
        constant = ~self.output[self.heads].any(axis=(0, 1))
        return [np.where(constant, _bias(self.layer.output_dense, len(constant)), np.nan)]

    def reads(self, needed, constants):
        answers = []
        for roles, size, values in zip(self.roles, self.sizes, constants):
            read = [self.kernels[role][:, self.heads].any(axis=(1, 2)) for role in roles]
            answers.append(np.logical_or.reduce(read) & (values != 0) if roles else np.ones(size, bool))
        return answers

    def tie(self, inputs, outputs):
        return [one if roles else np.ones_like(one) for one, roles in zip(inputs, self.roles)], outputs

    def stays(self, inputs, outputs):
        return self.heads.all() and super().stays(inputs, outputs)

    def remake(self, inputs, outputs, constants):
        (kept,) = outputs
        layer = self.anew(num_heads=int(self.heads.sum()), output_shape=(int(kept.sum()),))
        read = {role: flags for roles, flags in zip(self.roles, inputs) for role in roles}
        values = []
        for variable in self.layer.weights:
            value = _numpy(variable)
            role = next((name for name, part in self.parts.items() if any(variable is v for v in part.weights)), None)
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

    @property
    def variables(self):
        return [self.layer.cell.kernel]

    def reads(self, needed, constants):
        read = self.live(self.layer.cell.kernel).any(axis=1) & (constants[0] != 0)
        return [read, *(np.ones(size, bool) for size in self.sizes[1:])]

    def tie(self, inputs, outputs):
        rest, made = super().tie(inputs, outputs)
        return [inputs[0], *rest[1:]], made

    def remake(self, inputs, outputs, constants):
        kernel = self.layer.cell.kernel
        return self.anew(), [_numpy(v)[inputs[0]] if v is kernel else _numpy(v) for v in self.layer.weights]


def rule_of(call: Call, live: Live | None = None) -> Rule:
    """What is known of a call; a plain `Rule` if nothing is."""
    make = _KINDS.get(_kind(call.operation), Rule)
    sizes = [_channels(tensor) for tensor in (*call.inputs, *call.outputs)]
    if (
        call.times > 1
        or not sizes
        or None in sizes
        or len(call.outputs) != 1
        or _has_other_weights(_plain(call.operation))
        or _names_channels(_plain(call.operation))
        or _draws_in_every_call(call)
    ):
        return Rule(call, live)
    kind = make if isinstance(make, type) else (make(call) or Rule)
    if kind not in (Rule, Attention, Recurrent) and not _has_only_inputs(call):
        return Rule(call, live)
    return kind(call, live)


def walk_back(model: keras.Model, visit: Callable[[keras.Layer, Flags], None], live: Live) -> None:
    """Visit the layers with one kernel from the outputs of a model to its inputs.

    A unit whose output meets only pruned weights does nothing for the network, and its own weights are the first that can go.

    Args:
        model: a built model. Layers inside layers, in models that are called several times, and in a subclassed model, are not
            visited: everything of theirs is taken to be read.
        visit: called as `visit(layer, read)` with a bool for each unit of the layer: whether anything reads it.
        live: gives for a variable which of its weights count, bool and shaped like it. It is asked about a kernel after its
            layer was visited.
    """
    # A Sequential model that Keras could not trace has no outputs.
    if functional_of(model) is None or not getattr(model, "outputs", None):
        return
    graph = graph_of(model)
    tensors = {id(tensor): tensor for call in graph.calls for tensor in (*call.inputs, *call.outputs)}
    needed = {key: np.zeros(_channels(tensor) or 1, bool) for key, tensor in tensors.items()}
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


def _plain(operation: Any) -> Any:
    """The layer inside a wrapper with masks; anything else as it is."""
    return operation.layer if isinstance(operation, PrunableLayer) and hasattr(operation, "layer") else operation


def _kind(operation: Any) -> type:
    """The class of a layer, of a prunable one that of its plain counterpart."""
    plain = _plain(operation)
    return plain.plain_class if isinstance(plain, PrunableLayer) else type(plain)


def _has_other_weights(operation: Any) -> bool:
    """Whether LoRA, quantization or a gate of attention gave it weights that its kind does not tell of."""
    parts = flatten_layers(operation) if isinstance(operation, keras.Layer) else ()
    return has_gate(operation) or any(
        getattr(part, "lora_enabled", False) or getattr(part, "quantization_mode", None) is not None for part in parts
    )


def _names_channels(operation: Any) -> bool:
    """Whether something that is no weight may hold a value for each channel: a scale, the shape of noise, an initializer."""
    parts = flatten_layers(operation) if isinstance(operation, keras.Layer) else (operation,)
    rules = (keras.initializers.Initializer, keras.regularizers.Regularizer, keras.constraints.Constraint)
    held = [item for part in parts for item in vars(part).items()]
    held += [item for _, value in held if isinstance(value, rules) for item in vars(value).items()]
    return any(_is_sequence(value) for name, value in held if not (name in _GEOMETRY or name.startswith("_")))


def _is_sequence(value: Any) -> bool:
    if isinstance(value, (list, tuple, dict, set)):
        return True
    # Whether something is a tensor takes long to say.
    if value is None or isinstance(value, (bool, int, float, str, keras.Variable, keras.Layer)) or callable(value):
        return False
    return (isinstance(value, np.ndarray) or ops.is_tensor(value)) and len(value.shape) > 0


def _draws_in_every_call(call: Call) -> bool:
    """Whether it draws random numbers also when the model is not trained: for fewer channels it would draw others."""
    layer = call.operation
    return bool(call.training) and isinstance(layer, keras.Layer) and len(layer.variables) > len(layer.weights)


def _has_only_inputs(call: Call) -> bool:
    """Whether a call has no arguments that its rule does not know: a layer its inputs alone, an operation known ones."""
    arguments = call.node.arguments
    given = [*arguments.args, *(value for name, value in arguments.kwargs.items() if name != "training")]
    given = [one for one in given if one is not None]
    if isinstance(call.operation, keras.Layer):
        return len(given) == 1 and all(isinstance(one, keras.KerasTensor) for one in keras.tree.flatten(given))
    return all(isinstance(one, keras.KerasTensor) or _can_be_cut(one, _channels(call.outputs[0])) for one in given)


def _can_be_cut(argument: Any, size: int) -> bool:
    """Whether an argument of an operation is a number, or has one number, or one a channel, on its last axis.

    A variable of several numbers may be trained, and used elsewhere: it stays what it is.
    """
    if isinstance(argument, (str, list, tuple, dict)):
        return False
    array = _numpy(argument)
    if array.dtype.kind not in "biuf" or (isinstance(argument, keras.Variable) and array.size > 1):
        return False
    return array.shape[-1:] in ((), (1,), (size,))


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


def tied_tensors(rules: list[Rule]) -> Callable[[int], int]:
    """Gives for the `id` of a tensor a number that tensors share whose channels come and go together, one by one."""
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


def _usable_kernel(call: Call) -> type | None:
    layer = _plain(call.operation)
    return Kernel if getattr(layer, "groups", 1) == 1 and _channels_last(layer) else None


def _usable_einsum(call: Call) -> type | None:
    """Those that do what a Dense layer does."""
    layer = _plain(call.operation)
    operands, output = layer.equation.replace(" ", "").split("->")
    inputs, kernel = operands.split(",")
    plain = len(kernel) == 2 and kernel[0] == inputs[-1] and kernel[1] == output[-1] and inputs[:-1] == output[:-1]
    return _usable_kernel(call) if plain and (layer.bias is None or len(layer.bias.shape) == 1) else None


def _if_channels_last(kind: type) -> Callable[[Call], type | None]:
    return lambda call: kind if _channels_last(_plain(call.operation)) else None


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


# Attributes of layers, initializers and constraints that are sequences and say nothing of single channels.
_GEOMETRY = {"axis", "call_signature_parameters", "cropping", "dilation_rate", "input_spec", "kernel_shape", "kernel_size"}
_GEOMETRY |= {"masked_kernels", "padding", "partial_output_shape", "pool_size", "shared_axes", "size", "state_size", "strides"}
_GEOMETRY |= {"target_shape"}
_CHANNEL_BY_CHANNEL = (
    *(L.MaxPooling1D, L.MaxPooling2D, L.MaxPooling3D, L.AveragePooling1D, L.AveragePooling2D, L.AveragePooling3D),
    *(L.GlobalMaxPooling1D, L.GlobalMaxPooling2D, L.GlobalMaxPooling3D),
    *(L.GlobalAveragePooling1D, L.GlobalAveragePooling2D, L.GlobalAveragePooling3D),
    *(L.Cropping1D, L.Cropping2D, L.Cropping3D, L.UpSampling1D, L.UpSampling2D, L.UpSampling3D),
)
_ELEMENTWISE = (
    *(L.ReLU, L.LeakyReLU, L.ELU, L.Dropout, L.SpatialDropout1D, L.SpatialDropout2D, L.SpatialDropout3D),
    *(L.GaussianDropout, L.GaussianNoise, L.Identity, L.Rescaling, L.Add, L.Subtract, L.Average, L.Maximum, L.Minimum),
)
_ELEMENTWISE_OPERATIONS = operation_classes(
    *("Add", "Subtract", "Divide", "TrueDivide", "Maximum", "Minimum", "Power", "Negative", "Absolute", "Abs", "Square"),
    *("Sqrt", "Exp", "Tanh", "Clip", "Relu", "Relu6", "LeakyRelu", "Elu", "Selu", "Celu", "Gelu", "Silu", "Sigmoid"),
    *("LogSigmoid", "Softplus", "Softsign", "HardSigmoid", "HardSilu"),
)
_KINDS: dict[type, Any] = {
    **{cls: _if_channels_last(ChannelByChannel) for cls in _CHANNEL_BY_CHANNEL},
    **{cls: Elementwise for cls in (*_ELEMENTWISE, *_ELEMENTWISE_OPERATIONS)},
    **{cls: _if_channels_last(ZeroPadding) for cls in (L.ZeroPadding1D, L.ZeroPadding2D, L.ZeroPadding3D)},
    L.Multiply: Product,
    **dict.fromkeys(operation_classes("Multiply"), Product),
    L.PReLU: Slopes,
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


def _bias(layer: keras.Layer, units: int) -> np.ndarray:
    return np.zeros(units) if layer.bias is None else _numpy(layer.bias).astype(np.float64)


def _cut(argument: Any, kept: Flags) -> Any:
    """Some channels of an argument of an operation, a tensor or an array."""
    some = _numpy(argument)[..., kept]
    return ops.convert_to_tensor(some) if ops.is_tensor(argument) else some


def _reshaped(tensor: Any, kept: Flags) -> tuple[int, ...]:
    return (*tensor.shape[1:-1], int(kept.sum()))


def _numpy(value: Any) -> np.ndarray:
    return np.asarray(ops.convert_to_numpy(value))
