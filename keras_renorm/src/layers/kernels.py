"""The prunable weights of a layer, and which of their axes run over the inputs of one unit."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import keras

from keras_renorm.src.core import validation
from keras_renorm.src.core.keras_internals import flatten_layers, own_trainable_variables
from keras_renorm.src.layers.usage import added_weights


@dataclasses.dataclass(frozen=True)
class Kernel:
    """A prunable variable.

    Args:
        variable: the variable.
        input_axes: axes that run over the inputs of one unit. The other axes number the units.
        added: whether the variable is only added to the inputs of the layer, as a position embedding or a class token is. Such
            a variable is pruned only on request.
    """

    variable: keras.Variable
    input_axes: tuple[int, ...]
    added: bool = dataclasses.field(default=False, kw_only=True)

    @property
    def size(self) -> int:
        size = 1
        for side in self.variable.shape:
            size *= side
        return size


def name_within(variable: keras.Variable, layer: keras.Layer) -> str:
    """The path of a variable below a layer that holds it."""
    return variable.path.removeprefix(f"{layer.path}/")


def _last_axis_is_units(*attributes: str) -> Callable:
    def find(layer):
        return [
            Kernel(variable, tuple(range(len(variable.shape) - 1)))
            for variable in (getattr(layer, attribute) for attribute in attributes)
        ]

    return find


def _transposed_convolution(layer):
    rank = len(layer.kernel.shape)
    return [Kernel(layer.kernel, tuple(axis for axis in range(rank) if axis != rank - 2))]


def _depthwise_convolution(layer):
    return [Kernel(layer.kernel, tuple(range(len(layer.kernel.shape) - 2)))]


def _separable_convolution(layer):
    depthwise, pointwise = layer.depthwise_kernel, layer.pointwise_kernel
    return [
        Kernel(depthwise, tuple(range(len(depthwise.shape) - 2))),
        Kernel(pointwise, tuple(range(len(pointwise.shape) - 1))),
    ]


def _einsum_dense(layer):
    operands, output = layer.equation.replace(" ", "").split("->")
    kernel = operands.split(",")[1]
    return [Kernel(layer.kernel, tuple(axis for axis, letter in enumerate(kernel) if letter not in output))]


def _none(layer):
    return []


def _own_layer(layer):
    """The kernels of a user's own layer: those that `get_prunable_weights()` returns, else its trainable weights of rank two or
    more.
    """
    named = hasattr(layer, "get_prunable_weights")
    variables = layer.get_prunable_weights() if named else _own_matrices(layer)
    return [Kernel(variable, tuple(range(len(variable.shape) - 1))) for variable in variables]


def _own_matrices(layer):
    # A frozen layer's count too: it is asked to be pruned, not trained.
    own = own_trainable_variables(layer)
    return [v for v in own if len(v.shape) > 1 and keras.backend.is_float_dtype(v.dtype)]


_one_kernel = _last_axis_is_units("kernel")
_recurrent_cell = _last_axis_is_units("kernel", "recurrent_kernel")

_FINDERS: dict[type, Callable] = {
    keras.layers.Dense: _one_kernel,
    keras.layers.EinsumDense: _einsum_dense,
    keras.layers.Conv1D: _one_kernel,
    keras.layers.Conv2D: _one_kernel,
    keras.layers.Conv3D: _one_kernel,
    keras.layers.Conv1DTranspose: _transposed_convolution,
    keras.layers.Conv2DTranspose: _transposed_convolution,
    keras.layers.Conv3DTranspose: _transposed_convolution,
    keras.layers.DepthwiseConv1D: _depthwise_convolution,
    keras.layers.DepthwiseConv2D: _depthwise_convolution,
    keras.layers.SeparableConv1D: _separable_convolution,
    keras.layers.SeparableConv2D: _separable_convolution,
    keras.layers.Embedding: _last_axis_is_units("embeddings"),
    keras.layers.SimpleRNNCell: _recurrent_cell,
    keras.layers.LSTMCell: _recurrent_cell,
    keras.layers.GRUCell: _recurrent_cell,
    keras.layers.BatchNormalization: _none,
    keras.layers.LayerNormalization: _none,
    keras.layers.GroupNormalization: _none,
    keras.layers.PReLU: _none,
}


def find_kernels(layer: keras.Layer) -> list[Kernel]:
    """Find the prunable weights of a built layer and of the layers inside it.

    Weights that a user's own layer only adds to its inputs, such as position embeddings and class tokens, are left out, unless
    `get_prunable_weights()` returns them. If a layer has no other weights, they are returned and marked as `added`.

    Args:
        layer: a built layer.

    Returns:
        List of `Kernel`, empty if the layer has nothing to prune.

    Raises:
        ValueError: if the layer holds weights that cannot be pruned as they are (LoRA, quantized).
    """
    validation.refuse_legacy_keras(layer, "layer")
    kernels, seen, added = [], set(), set()
    for part in flatten_layers(layer):
        if isinstance(part, keras.layers.SpectralNormalization):
            raise ValueError(f"layer '{part.name}' rewrites its kernel while it trains; prune the layer inside it instead")
        if getattr(part, "lora_enabled", False):
            raise ValueError(f"layer '{part.name}' uses LoRA; merge it first (save and load the weights without LoRA)")
        if getattr(part, "quantization_mode", None) is not None:
            raise ValueError(f"layer '{part.name}' is quantized; prune before quantizing")
        finder = next((_FINDERS[cls] for cls in type(part).__mro__ if cls in _FINDERS), _own_layer)
        if not part.built and finder not in (_none, _own_layer):
            raise ValueError(f"layer '{part.name}' was never built; call it, or the model, on a batch of data first")
        if finder is _own_layer and part.built and not hasattr(part, "get_prunable_weights"):
            added |= added_weights(part, _own_matrices(part))
        for kernel in finder(part):
            if id(kernel.variable) not in seen:
                seen.add(id(kernel.variable))
                kernels.append(kernel)
    multiplied = [kernel for kernel in kernels if id(kernel.variable) not in added]
    return multiplied or [dataclasses.replace(kernel, added=True) for kernel in kernels]
