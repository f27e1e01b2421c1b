"""Rules of layers whose output channel i depends on channel i of the inputs only, and of layers that move channels."""

from __future__ import annotations

import functools

import keras
import numpy as np
from keras import ops

from keras_renorm.src.models.channels.rule import ChannelRule, agreed_values, channels_of, cut_argument, reshaped, to_numpy

L = keras.layers


class ChannelByChannel(ChannelRule):
    """Channel i of the output depends on channel i of the inputs only."""

    known = True

    def __init__(self, call, live=None):
        super().__init__(call, live)
        self.size = channels_of(call.outputs[0])
        # Inputs of one channel are broadcast.
        self.wide = [size == self.size for size in self.sizes]

    def constants(self, inputs):
        return [agreed_values([one for one, wide in zip(inputs, self.wide) if wide])]

    def reads(self, needed, constants):
        return [needed[0] if wide else np.ones(size, bool) for size, wide in zip(self.sizes, self.wide)]

    def tie(self, inputs, outputs):
        kept = np.logical_or.reduce([*outputs, *(one for one, wide in zip(inputs, self.wide) if wide)])
        return [kept if wide else np.ones_like(one) for one, wide in zip(inputs, self.wide)], [kept]

    def rebuild(self, inputs, outputs, constants):
        (kept,) = outputs
        values = [to_numpy(weight) for weight in getattr(self.layer, "weights", ())]
        return self.anew(), [value[..., kept] if value.shape[-1:] == kept.shape else value for value in values]


class Elementwise(ChannelByChannel):
    """Each number of the output is a function of the same numbers of the inputs. The operation itself computes the outputs of
    constants.

    Arguments of an operation that hold a value for each channel are cut along with the channels.
    """

    @functools.cached_property
    def arrays(self) -> list[np.ndarray]:
        """The arguments of an operation that are no tensors of the graph and hold a value for each channel."""
        if isinstance(self.layer, keras.Layer):
            return []
        arguments = self.call.node.arguments
        return [to_numpy(one) for one in (*arguments.args, *arguments.kwargs.values()) if self._is_wide(one)]

    def _is_wide(self, argument):
        """Whether an argument holds a value for each channel. A size of one does not, even if there is only one channel."""
        return not isinstance(argument, keras.KerasTensor) and to_numpy(argument).shape[-1:] not in ((), (1,))

    def arguments(self, args, kwargs, outputs):
        if not self.arrays:
            return args, kwargs

        def cut(argument):
            return cut_argument(argument, outputs[0]) if self._is_wide(argument) else argument

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
            made = to_numpy(self.layer(*args, **kwargs)).astype(np.float64)
        made = agreed_values(made.reshape(-1, self.size))
        return [np.where(varies | ~np.isfinite(made), np.nan, made)]


class Product(Elementwise):
    """A product: zero times anything is zero."""

    def constants(self, inputs):
        (result,) = super().constants(inputs)
        factors = [*inputs, *(np.where((one == 0).all(axis=tuple(range(one.ndim - 1))), 0, np.nan) for one in self.arrays)]
        zero = np.logical_or.reduce([np.broadcast_to(one == 0, self.size) for one in factors])
        return [np.where(zero, 0.0, result)]


class Slopes(ChannelByChannel):
    """PReLU: a slope for each position makes different outputs of the same negative constant."""

    def constants(self, inputs):
        alpha = to_numpy(self.layer.alpha).astype(np.float64)
        slopes = np.broadcast_to(agreed_values(alpha.reshape(-1, alpha.shape[-1])), self.size)
        return [np.where(inputs[0] < 0, slopes * inputs[0], inputs[0])]


class ZeroPadding(ChannelByChannel):
    def constants(self, inputs):
        return [np.where(inputs[0] == 0, 0.0, np.nan)]


class SameChannels(ChannelByChannel):
    """A Reshape that keeps the last axis."""

    def rebuild(self, inputs, outputs, constants):
        return self.anew(target_shape=reshaped(self.call.outputs[0], outputs[0])), []


class Concatenated(ChannelRule):
    """The channels of all inputs, one after the other."""

    known = True

    def constants(self, inputs):
        return [np.concatenate(inputs)]

    def reads(self, needed, constants):
        return self._split(needed[0])

    def tie(self, inputs, outputs):
        kept = [one | other for one, other in zip(inputs, self._split(outputs[0]))]
        return kept, [np.concatenate(kept)]

    def rebuild(self, inputs, outputs, constants):
        return self.anew(), []

    def _split(self, flags):
        return np.split(flags, np.cumsum(self.sizes)[:-1])


class Tiled(ChannelRule):
    """Flatten, or a Reshape to or from a vector: the channels of one side are repeated on the other."""

    known = True

    def __init__(self, call, live=None):
        super().__init__(call, live)
        self.before, self.after = self.sizes[0], channels_of(call.outputs[0])

    def constants(self, inputs):
        if self.after >= self.before:
            return [np.tile(inputs[0], self.after // self.before)]
        return [agreed_values(list(inputs[0].reshape(-1, self.after)))]

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

    def rebuild(self, inputs, outputs, constants):
        if isinstance(self.layer, L.Flatten):
            return self.anew(), []
        return self.anew(target_shape=reshaped(self.call.outputs[0], outputs[0])), []
