"""The base class of all rules on channels, and what they share.

A channel is an index of the last axis of a tensor. A rule tells for one call of a layer which channels are constant, which are
read, and which are kept or removed together.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import keras
import numpy as np
from keras import ops

from keras_renorm.src.layers.prunable import PrunableLayer
from keras_renorm.src.models.graph import ELEMENTWISE_ACTIVATIONS, GraphCall
from keras_renorm.src.models.rebuilding import with_config

# Whether a channel is needed, read or kept: bool for each channel. Its value where it is constant: float, NaN where it varies.
Flags = np.ndarray


Values = np.ndarray


# Which weights of a variable are not zero: bool of its shape.
Live = Callable[[keras.Variable], np.ndarray]


class ChannelRule:
    """The rule of an unknown layer: it keeps all its channels, on both sides.

    Args:
        call: the call.
        live: returns for a variable of the layer which of its weights count. Defaults to `None`: those that are not zero.
    """

    known = False
    # The weights that stand between channels, by the names of their variables; `live` is asked about them.
    weights: tuple[str, ...] = ()

    def __init__(self, call: GraphCall, live: Live | None = None):
        self.layer = plain_layer(call.operation)
        self.call = call
        self.sizes = [channels_of(tensor) for tensor in call.inputs]
        self._live = live

    @property
    def variables(self) -> list[keras.Variable]:
        """The variables of the weights between channels."""
        return [getattr(self.layer, name) for name in self.weights]

    @property
    def makers(self) -> list[keras.Variable]:
        """The kernels whose units are the channels of the output."""
        names = ("kernel", "pointwise_kernel", "embeddings") if self.known else ()
        return [getattr(self.layer, name) for name in names if hasattr(self.layer, name)]

    def live(self, variable: keras.Variable) -> np.ndarray:
        return to_numpy(variable) != 0 if self._live is None else self._live(variable)

    def units_read(self, needed: Flags) -> Flags | None:
        """The units of the kernel that are read if these channels of the output are needed.

        `None` if its units are not channels of the output.
        """
        return None

    def constants(self, inputs: list[Values]) -> list[Values]:
        """The constant channels of the outputs, from those of the inputs."""
        return [np.full(channels_of(tensor) or 1, np.nan) for tensor in self.call.outputs]

    def reads(self, needed: list[Flags], constants: list[Values]) -> list[Flags]:
        """The channels of the inputs that are needed for these channels of the outputs.

        A constant input channel is not needed if the layer that is built without it can compensate for it.
        """
        return [np.ones(size or 1, bool) for size in self.sizes]

    def tie(self, inputs: list[Flags], outputs: list[Flags]) -> tuple[list[Flags], list[Flags]]:
        """The channels that must be kept beyond those that are asked for."""
        return [np.ones_like(one) for one in inputs], [np.ones_like(one) for one in outputs]

    def stays(self, inputs: list[Flags], outputs: list[Flags]) -> bool:
        """Whether the layer is kept as it is, since all its channels are."""
        return all(flags.all() for flags in (*inputs, *outputs))

    def rebuild(self, inputs: list[Flags], outputs: list[Flags], constants: list[Values]) -> tuple[Any, list[np.ndarray]]:
        """The layer for the channels that are kept, not built yet, and the values of its weights in their order.

        It is called only if the layer is not kept as it is.
        """
        raise NotImplementedError

    def arguments(self, args: tuple, kwargs: dict[str, Any], outputs: list[Flags]) -> tuple[tuple, dict[str, Any]]:
        """The arguments for the layer of the channels that are kept."""
        return args, kwargs

    def anew(self, **changes: Any) -> Any:
        """The layer from its config, not built yet: a copy would be built for all its channels."""
        # An operation is never built.
        changes = {"name": self.layer.name, **changes} if isinstance(self.layer, keras.Layer) else changes
        return with_config(self.layer, **changes)


def plain_layer(operation: Any) -> Any:
    """The layer inside a prunable wrapper; any other layer as it is."""
    return operation.layer if isinstance(operation, PrunableLayer) and hasattr(operation, "layer") else operation


def channels_of(tensor: Any) -> int | None:
    return tensor.shape[-1] if len(tensor.shape) > 1 else None


def is_channels_last(layer: keras.Layer) -> bool:
    return getattr(layer, "data_format", "channels_last") != "channels_first"


def is_elementwise(activation: Any) -> bool:
    return activation is None or activation in ELEMENTWISE_ACTIVATIONS


def apply_activation(activation: Any, values: Values) -> Values:
    if activation is None:
        return values
    made = to_numpy(activation(ops.convert_to_tensor(np.nan_to_num(values), "float32"))).astype(np.float64)
    return np.where(np.isnan(values), np.nan, made)


def agreed_values(rows: Sequence[Values]) -> Values:
    """The values on which all rows agree; NaN elsewhere."""
    first = rows[0]
    return np.where(np.logical_and.reduce([row == first for row in rows]), first, np.nan)


def bias_of(layer: keras.Layer, units: int) -> np.ndarray:
    return np.zeros(units) if layer.bias is None else to_numpy(layer.bias).astype(np.float64)


def cut_argument(argument: Any, kept: Flags) -> Any:
    """The kept channels of an argument of an operation, a tensor or an array."""
    some = to_numpy(argument)[..., kept]
    return ops.convert_to_tensor(some) if ops.is_tensor(argument) else some


def reshaped(tensor: Any, kept: Flags) -> tuple[int, ...]:
    return (*tensor.shape[1:-1], int(kept.sum()))


def to_numpy(value: Any) -> np.ndarray:
    return np.asarray(ops.convert_to_numpy(value))
