"""Rules of attention and recurrent layers."""

from __future__ import annotations

import functools
import inspect

import numpy as np

from keras_renorm.src.models.channels.rule import ChannelRule, bias_of, to_numpy


class Attention(ChannelRule):
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
        """Which weights of each part count, of shape `(inputs, heads, size)`."""
        return {name: self.live(part.kernel) for name, part in self.parts.items()}

    @functools.cached_property
    def output(self):
        """Which weights of the output count, of shape `(heads, size, outputs)`."""
        return self.live(self.layer.output_dense.kernel)

    @functools.cached_property
    def heads(self):
        """Which heads contribute to the output."""
        value_bias = self.layer.value_dense.bias
        heard = self.kernels["value"].any(axis=(0, 2))
        if value_bias is not None:
            heard = heard | (to_numpy(value_bias) != 0).any(axis=1)
        heads = self.output.any(axis=(1, 2)) & heard
        if not heads.any():
            heads[0] = True
        return heads

    def constants(self, inputs):
        constant = ~self.output[self.heads].any(axis=(0, 1))
        return [np.where(constant, bias_of(self.layer.output_dense, len(constant)), np.nan)]

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

    def rebuild(self, inputs, outputs, constants):
        (kept,) = outputs
        layer = self.anew(num_heads=int(self.heads.sum()), output_shape=(int(kept.sum()),))
        read = {role: flags for roles, flags in zip(self.roles, inputs) for role in roles}
        values = []
        for variable in self.layer.weights:
            value = to_numpy(variable)
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


class Recurrent(ChannelRule):
    """A recurrent layer may ignore input channels. All its own units are kept, since they read each other."""

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

    def rebuild(self, inputs, outputs, constants):
        kernel = self.layer.cell.kernel
        return self.anew(), [to_numpy(v)[inputs[0]] if v is kernel else to_numpy(v) for v in self.layer.weights]
