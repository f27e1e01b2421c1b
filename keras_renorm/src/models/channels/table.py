"""The table of rules: what each kind of layer does to channels.

`rule_of` makes the rule for one call of a layer in the graph of a model. `keras_renorm.compact` asks a rule about arrays of
channels and has it make the smaller layer; `walk_back` asks it which channels are read. A new kind of layer is a row of
`_KINDS`, and a class if it is like no other kind.

A layer of an unknown kind (a subclass may do anything), a layer that is called in several places, and a layer that holds a
value for each channel keep all their channels.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import keras
import numpy as np
from keras import ops

from keras_renorm.src.core.keras_internals import flatten_layers, has_gate, operation_classes
from keras_renorm.src.layers.prunable import PrunableLayer
from keras_renorm.src.models.channels.elementwise import (
    ChannelByChannel,
    Concatenated,
    Elementwise,
    Product,
    SameChannels,
    Slopes,
    Tiled,
    ZeroPadding,
)
from keras_renorm.src.models.channels.kernels import Depthwise, Embedding, KernelRule, Separable
from keras_renorm.src.models.channels.rule import (
    ChannelRule,
    Live,
    channels_of,
    is_channels_last,
    is_elementwise,
    plain_layer,
    to_numpy,
)
from keras_renorm.src.models.channels.sequences import Attention, Recurrent
from keras_renorm.src.models.graph import GraphCall

L = keras.layers


def rule_of(call: GraphCall, live: Live | None = None) -> ChannelRule:
    """The rule of a call; a plain `ChannelRule` if its layer is not known."""
    make = _KINDS.get(_kind(call.operation), ChannelRule)
    sizes = [channels_of(tensor) for tensor in (*call.inputs, *call.outputs)]
    if (
        call.times > 1
        or not sizes
        or None in sizes
        or len(call.outputs) != 1
        or _has_other_weights(plain_layer(call.operation))
        or _names_channels(plain_layer(call.operation), set(sizes))
        or _draws_in_every_call(call)
    ):
        return ChannelRule(call, live)
    kind = make if isinstance(make, type) else (make(call) or ChannelRule)
    if kind not in (ChannelRule, Attention, Recurrent) and not _has_only_inputs(call):
        return ChannelRule(call, live)
    return kind(call, live)


def is_sum(operation: Any) -> bool:
    """Whether a layer or an operation adds its inputs."""
    return _kind(operation) in _SUMS


def _kind(operation: Any) -> type:
    """The class of a layer; for a prunable layer, of its plain counterpart."""
    plain = plain_layer(operation)
    return plain.plain_class if isinstance(plain, PrunableLayer) else type(plain)


def _has_other_weights(operation: Any) -> bool:
    """Whether the layer has weights that its kind does not have: of LoRA, quantization or a gate of attention."""
    parts = flatten_layers(operation) if isinstance(operation, keras.Layer) else ()
    return has_gate(operation) or any(
        getattr(part, "lora_enabled", False) or getattr(part, "quantization_mode", None) is not None for part in parts
    )


def _names_channels(operation: Any, sizes: set[int]) -> bool:
    """Whether an attribute may hold a value for each channel, or their number: a scale, an initializer, a shape of noise.

    Args:
        operation: the layer or operation.
        sizes: the numbers of channels of its inputs and outputs.
    """
    parts = flatten_layers(operation) if isinstance(operation, keras.Layer) else (operation,)
    rules = (keras.initializers.Initializer, keras.regularizers.Regularizer, keras.constraints.Constraint)
    held = [item for part in parts for item in vars(part).items()]
    held += [item for _, value in held if isinstance(value, rules) for item in vars(value).items()]
    return any(_has_side(value, sizes) for name, value in held if not (name in _GEOMETRY or name.startswith("_")))


def _has_side(value: Any, sizes: set[int]) -> bool:
    """Whether a sequence or an array has as many items as there are channels along any axis, or contains their number."""
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, (list, tuple, set)):
        return len(value) in sizes or any(_has_side(one, sizes) or (type(one) is int and one in sizes) for one in value)
    # Whether something is a tensor takes long to say.
    if value is None or isinstance(value, (bool, int, float, str, keras.Variable, keras.Layer)) or callable(value):
        return False
    return (isinstance(value, np.ndarray) or ops.is_tensor(value)) and not sizes.isdisjoint(value.shape)


def _draws_in_every_call(call: GraphCall) -> bool:
    """Whether the call draws random numbers in inference, too. For fewer channels it would draw others."""
    layer = call.operation
    return bool(call.training) and isinstance(layer, keras.Layer) and len(layer.variables) > len(layer.weights)


def _has_only_inputs(call: GraphCall) -> bool:
    """Whether a call has only arguments that its rule knows."""
    arguments = call.node.arguments
    given = [*arguments.args, *(value for name, value in arguments.kwargs.items() if name != "training")]
    given = [one for one in given if one is not None]
    if isinstance(call.operation, keras.Layer):
        return len(given) == 1 and all(isinstance(one, keras.KerasTensor) for one in keras.tree.flatten(given))
    return all(isinstance(one, keras.KerasTensor) or _can_be_cut(one, channels_of(call.outputs[0])) for one in given)


def _can_be_cut(argument: Any, size: int) -> bool:
    """Whether an argument of an operation is a number, or has one number, or one for each channel, on its last axis.

    A variable of several numbers may be trained and used elsewhere, so it is not cut.
    """
    if isinstance(argument, (str, list, tuple, dict)):
        return False
    array = to_numpy(argument)
    if array.dtype.kind not in "biuf" or (isinstance(argument, keras.Variable) and array.size > 1):
        return False
    return array.shape[-1:] in ((), (1,), (size,))


def _usable_kernel(call: GraphCall) -> type | None:
    layer = plain_layer(call.operation)
    return KernelRule if getattr(layer, "groups", 1) == 1 and is_channels_last(layer) else None


def _usable_einsum(call: GraphCall) -> type | None:
    """The rule of an EinsumDense that computes what a Dense layer computes."""
    layer = plain_layer(call.operation)
    operands, output = layer.equation.replace(" ", "").split("->")
    inputs, kernel = operands.split(",")
    plain = len(kernel) == 2 and kernel[0] == inputs[-1] and kernel[1] == output[-1] and inputs[:-1] == output[:-1]
    return _usable_kernel(call) if plain and (layer.bias is None or len(layer.bias.shape) == 1) else None


def _if_channels_last(kind: type) -> Callable[[GraphCall], type | None]:
    return lambda call: kind if is_channels_last(plain_layer(call.operation)) else None


def _activation(call: GraphCall) -> type | None:
    return Elementwise if is_elementwise(call.operation.activation) else None


def _normalization(call: GraphCall) -> type | None:
    return Elementwise if call.operation.axis in (-1, len(call.inputs[0].shape) - 1) else None


def _reshape(call: GraphCall) -> type | None:
    before, after = (tensor.shape[1:] for tensor in (call.inputs[0], call.outputs[0]))
    if isinstance(call.operation, L.Flatten) and not is_channels_last(call.operation):
        return None
    if None in before or None in after:
        return None
    if before[-1] == after[-1]:
        return ChannelByChannel if isinstance(call.operation, L.Flatten) else SameChannels
    return Tiled if 1 in (len(before), len(after)) else None


def _concatenate(call: GraphCall) -> type | None:
    rank = len(call.inputs[0].shape)
    return Concatenated if call.operation.axis in (-1, rank - 1) else ChannelByChannel


# Attributes of layers, initializers and constraints that say nothing of single channels, whatever their length is.
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


_SUMS = {L.Add, *operation_classes("Add")}


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
