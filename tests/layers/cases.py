"""Every kind of layer that can be wrapped, with an input for it; shared by the laws."""

from __future__ import annotations

import keras
import numpy as np


@keras.saving.register_keras_serializable(package="tests")
class Scaled(keras.layers.Layer):
    """A user's own layer: one weight of rank two, one of rank one."""

    def __init__(self, units=3, **kwargs):
        super().__init__(**kwargs)
        self.units = units

    def build(self, input_shape):
        self.table = self.add_weight(name="table", shape=(input_shape[-1], self.units))
        self.gain = self.add_weight(name="gain", shape=(self.units,), initializer="ones")

    def call(self, inputs):
        return keras.ops.matmul(inputs, self.table) * self.gain

    def get_config(self):
        return {**super().get_config(), "units": self.units}


@keras.saving.register_keras_serializable(package="tests")
class Naming(Scaled):
    """A user's own layer that names its prunable weights."""

    def build(self, input_shape):
        super().build(input_shape)
        self.spared = self.add_weight(name="spared", shape=(input_shape[-1], self.units))

    def call(self, inputs):
        return super().call(inputs) + keras.ops.matmul(inputs, self.spared)

    def get_prunable_weights(self):
        return [self.table]


@keras.saving.register_keras_serializable(package="tests")
class Block(keras.layers.Layer):
    """A user's own layer without `build()`: Keras builds the layers in it when it is called."""

    def __init__(self, units=8, **kwargs):
        super().__init__(**kwargs)
        self.units = units
        self.first, self.second = keras.layers.Dense(units), keras.layers.Dense(units)

    def call(self, inputs):
        return inputs + self.second(self.first(inputs))

    def get_config(self):
        return {**super().get_config(), "units": self.units}


@keras.saving.register_keras_serializable(package="tests")
class Tied(keras.layers.Layer):
    """The output layer of an autoencoder: it reads the kernel of another layer, and has only a bias of its own."""

    def __init__(self, source, **kwargs):
        super().__init__(**kwargs)
        self.source = source

    def build(self, input_shape):
        self.bias = self.add_weight(name="bias", shape=(self.source.kernel.shape[0],))

    def call(self, inputs):
        return keras.ops.matmul(inputs, keras.ops.transpose(self.source.kernel)) + self.bias

    def get_config(self):
        return {**super().get_config(), "source": keras.saving.serialize_keras_object(self.source)}

    @classmethod
    def from_config(cls, config):
        return cls(**{**config, "source": keras.saving.deserialize_keras_object(config["source"])})


@keras.saving.register_keras_serializable(package="tests")
class Calling(Tied):
    """A layer that both calls another and reads its kernel, beside a kernel of its own."""

    def build(self, input_shape):
        self.own = self.add_weight(name="own", shape=self.source.kernel.shape)

    def call(self, inputs):
        outputs = self.source(inputs)
        return outputs + keras.ops.matmul(inputs, self.source.kernel) + keras.ops.matmul(inputs, self.own) + self.source.bias


def _floats(*shape):
    return np.random.default_rng(1).standard_normal(shape).astype("float32")


def _integers(*shape):
    return np.random.default_rng(1).integers(0, 12, shape).astype("int32")


L = keras.layers

# name -> (layer, input, shapes of the kernels, shapes of the scales)
CASES = {
    "Dense": (lambda: L.Dense(6, activation="relu"), _floats(4, 8), [(8, 6)], [(6,)]),
    "EinsumDense": (lambda: L.EinsumDense("abc,cde->abde", (5, 2, 3)), _floats(4, 5, 8), [(8, 2, 3)], [(2, 3)]),
    "EinsumDense over heads": (
        lambda: L.EinsumDense("abcd,cde->abe", (5, 6)),
        _floats(4, 5, 2, 8),
        [(2, 8, 6)],
        [(6,)],
    ),
    "Conv1D": (lambda: L.Conv1D(6, 3, padding="causal"), _floats(4, 9, 4), [(3, 4, 6)], [(6,)]),
    "Conv2D": (lambda: L.Conv2D(6, 3, strides=2, padding="same"), _floats(4, 9, 9, 4), [(3, 3, 4, 6)], [(6,)]),
    "Conv2D in groups": (lambda: L.Conv2D(6, 3, groups=2), _floats(4, 9, 9, 4), [(3, 3, 2, 6)], [(6,)]),
    "Conv3D": (lambda: L.Conv3D(4, 2), _floats(2, 4, 4, 4, 3), [(2, 2, 2, 3, 4)], [(4,)]),
    "Conv1DTranspose": (lambda: L.Conv1DTranspose(6, 3), _floats(4, 9, 4), [(3, 6, 4)], [(6, 1)]),
    "Conv2DTranspose": (lambda: L.Conv2DTranspose(6, 3), _floats(4, 5, 5, 4), [(3, 3, 6, 4)], [(6, 1)]),
    "Conv3DTranspose": (lambda: L.Conv3DTranspose(4, 2), _floats(2, 4, 4, 4, 3), [(2, 2, 2, 4, 3)], [(4, 1)]),
    "DepthwiseConv1D": (lambda: L.DepthwiseConv1D(3), _floats(4, 9, 4), [(3, 4, 1)], [(4, 1)]),
    "DepthwiseConv2D": (
        lambda: L.DepthwiseConv2D(3, depth_multiplier=2),
        _floats(4, 9, 9, 4),
        [(3, 3, 4, 2)],
        [(4, 2)],
    ),
    "SeparableConv1D": (lambda: L.SeparableConv1D(6, 3), _floats(4, 9, 4), [(3, 4, 1), (1, 4, 6)], [(4, 1), (6,)]),
    "SeparableConv2D": (
        lambda: L.SeparableConv2D(6, 3),
        _floats(4, 9, 9, 4),
        [(3, 3, 4, 1), (1, 1, 4, 6)],
        [(4, 1), (6,)],
    ),
    "Embedding": (lambda: L.Embedding(12, 6), _integers(4, 5), [(12, 6)], [(6,)]),
    "MultiHeadAttention": (
        lambda: L.MultiHeadAttention(2, 4),
        (_floats(4, 5, 8), _floats(4, 7, 8)),
        [(8, 2, 4), (8, 2, 4), (8, 2, 4), (2, 4, 8)],
        [(2, 4), (2, 4), (2, 4), (8,)],
    ),
    "SimpleRNN": (lambda: L.SimpleRNN(6), _floats(4, 5, 8), [(8, 6), (6, 6)], [(6,), (6,)]),
    "LSTM": (lambda: L.LSTM(4, return_sequences=True), _floats(4, 5, 8), [(8, 16), (4, 16)], [(16,), (16,)]),
    "GRU": (lambda: L.GRU(4), _floats(4, 5, 8), [(8, 12), (4, 12)], [(12,), (12,)]),
    "Bidirectional": (
        lambda: L.Bidirectional(L.LSTM(4)),
        _floats(4, 5, 8),
        [(8, 16), (4, 16), (8, 16), (4, 16)],
        [(16,)] * 4,
    ),
    "TimeDistributed": (lambda: L.TimeDistributed(L.Dense(6)), _floats(4, 5, 8), [(8, 6)], [(6,)]),
    "a layer of one's own": (lambda: Scaled(6), _floats(4, 8), [(8, 6)], [(6,)]),
    "a layer that names its weights": (lambda: Naming(6), _floats(4, 8), [(8, 6)], [(6,)]),
    "a layer without build": (lambda: Block(8), _floats(4, 8), [(8, 8), (8, 8)], [(8,), (8,)]),
    "a block of layers": (
        lambda: keras.Sequential([L.Dense(6), L.BatchNormalization(), L.Dense(3)]),
        _floats(4, 8),
        [(8, 6), (6, 3)],
        [(6,), (3,)],
    ),
}


def as_arguments(inputs):
    return inputs if isinstance(inputs, tuple) else (inputs,)


def model_around(layer, inputs):
    """A functional model that ends in a Dense layer with two outputs."""
    arguments = [keras.Input(value.shape[1:], dtype=str(value.dtype)) for value in as_arguments(inputs)]
    x = layer(*arguments)
    if len(x.shape) > 2:
        x = L.Flatten()(x)
    return keras.Model(arguments if len(arguments) > 1 else arguments[0], L.Dense(2, name="head")(x))


def model_inputs(inputs):
    return list(inputs) if isinstance(inputs, tuple) else inputs
