"""Each layer class of `keras.layers` that can be built, made with what it needs, for laws that hold for all of them."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import keras
import numpy as np

L = keras.layers

_VECTOR, _SEQUENCE, _IMAGE, _VOLUME = (8,), (6, 8), (8, 8, 3), (4, 4, 4, 2)
_RNG = np.random.default_rng(0)


class _Bias(L.Wrapper):
    def call(self, inputs):
        return self.layer(inputs) + 1.0


def _adapted(layer: keras.Layer, data: Any) -> keras.Layer:
    layer.adapt(data)
    return layer


_RANDOM_WITH_FACTOR = (
    *("Brightness", "ColorDegeneration", "Contrast", "Hue", "Rotation", "Saturation", "Sharpness", "Zoom"),
    *("Grayscale", "Invert"),
)


def _texts():
    return _adapted(L.TextVectorization(output_sequence_length=5), ["red green", "blue red", "green dog"])


# How to make a layer that needs arguments, or is worth having with others than its defaults.
MAKE: dict[str, Callable[[], keras.Layer]] = {
    "Activation": lambda: L.Activation("relu"),
    "ActivityRegularization": lambda: L.ActivityRegularization(0.1),
    "AdaptiveAveragePooling1D": lambda: L.AdaptiveAveragePooling1D(3),
    "AdaptiveAveragePooling2D": lambda: L.AdaptiveAveragePooling2D(4),
    "AdaptiveAveragePooling3D": lambda: L.AdaptiveAveragePooling3D(2),
    "AdaptiveMaxPooling1D": lambda: L.AdaptiveMaxPooling1D(3),
    "AdaptiveMaxPooling2D": lambda: L.AdaptiveMaxPooling2D(4),
    "AdaptiveMaxPooling3D": lambda: L.AdaptiveMaxPooling3D(2),
    **{f"AveragePooling{rank}D": lambda rank=rank: getattr(L, f"AveragePooling{rank}D")(2) for rank in (1, 2, 3)},
    **{f"MaxPooling{rank}D": lambda rank=rank: getattr(L, f"MaxPooling{rank}D")(2) for rank in (1, 2, 3)},
    "AlphaDropout": lambda: L.AlphaDropout(0.2),
    "Bidirectional": lambda: L.Bidirectional(L.GRU(3, return_sequences=True)),
    "CategoryEncoding": lambda: L.CategoryEncoding(num_tokens=4, output_mode="multi_hot"),
    "CenterCrop": lambda: L.CenterCrop(4, 4),
    **{f"Conv{rank}D": lambda rank=rank: getattr(L, f"Conv{rank}D")(4, 2) for rank in (1, 2, 3)},
    **{f"Conv{rank}DTranspose": lambda rank=rank: getattr(L, f"Conv{rank}DTranspose")(4, 2) for rank in (1, 2, 3)},
    "ConvLSTM1D": lambda: L.ConvLSTM1D(2, 2),
    "ConvLSTM2D": lambda: L.ConvLSTM2D(2, 2),
    "ConvLSTM3D": lambda: L.ConvLSTM3D(2, 2),
    "Cropping3D": lambda: L.Cropping3D(1),
    "Dense": lambda: L.Dense(6, "relu", kernel_regularizer="l2"),
    "DepthwiseConv1D": lambda: L.DepthwiseConv1D(2),
    "DepthwiseConv2D": lambda: L.DepthwiseConv2D(2),
    "Discretization": lambda: _adapted(L.Discretization(num_bins=4), _RNG.standard_normal((64, 8))),
    "Dot": lambda: L.Dot(axes=2),
    "Dropout": lambda: L.Dropout(0.3),
    "EinsumDense": lambda: L.EinsumDense("abc,cd->abd", (6, 5), bias_axes="d"),
    "Embedding": lambda: L.Embedding(4, 5),
    "GRU": lambda: L.GRU(4),
    "GaussianDropout": lambda: L.GaussianDropout(0.3),
    "GaussianNoise": lambda: L.GaussianNoise(0.3),
    "GroupNormalization": lambda: L.GroupNormalization(groups=1),
    "GroupedQueryAttention": lambda: L.GroupQueryAttention(4, 4, 2),
    "HashedCrossing": lambda: L.HashedCrossing(5),
    "Hashing": lambda: L.Hashing(4),
    "IntegerLookup": lambda: _adapted(L.IntegerLookup(), np.array([0, 1, 7])),
    "LSTM": lambda: L.LSTM(4, return_sequences=True),
    "Lambda": lambda: L.Lambda(lambda x: x * 2.0),
    "MultiHeadAttention": lambda: L.MultiHeadAttention(2, 4),
    "MelSpectrogram": lambda: L.MelSpectrogram(num_mel_bins=4, sampling_rate=100, fft_length=16, sequence_stride=8),
    "Normalization": lambda: _adapted(L.Normalization(), 100 + 50 * _RNG.standard_normal((64, 8))),
    "Permute": lambda: L.Permute((2, 1)),
    "Pipeline": lambda: L.Pipeline([L.Rescaling(0.5), L.RandomFlip()]),
    "RNN": lambda: L.RNN(L.LSTMCell(4)),
    **{f"Random{name}": lambda name=name: getattr(L, f"Random{name}")(0.2) for name in _RANDOM_WITH_FACTOR},
    "RandomPosterization": lambda: L.RandomPosterization(4),
    "RandomTranslation": lambda: L.RandomTranslation(0.2, 0.2),
    "RepeatVector": lambda: L.RepeatVector(3),
    "Rescaling": lambda: L.Rescaling(1 / 3, 0.5),
    "Reshape": lambda: L.Reshape((2, 4)),
    "Resizing": lambda: L.Resizing(4, 4),
    "ReversibleEmbedding": lambda: L.ReversibleEmbedding(4, 5),
    "STFTSpectrogram": lambda: L.STFTSpectrogram(frame_length=16, frame_step=8, fft_length=16),
    "SeparableConv1D": lambda: L.SeparableConv1D(4, 2),
    "SeparableConv2D": lambda: L.SeparableConv2D(4, 2),
    "SimpleRNN": lambda: L.SimpleRNN(4, stateful=False),
    "SpatialDropout1D": lambda: L.SpatialDropout1D(0.3),
    "SpatialDropout2D": lambda: L.SpatialDropout2D(0.3),
    "SpatialDropout3D": lambda: L.SpatialDropout3D(0.3),
    "SpectralNormalization": lambda: L.SpectralNormalization(L.Dense(4)),
    "StringLookup": lambda: _adapted(L.StringLookup(), np.array(["a", "c"])),
    "TernaryDense": lambda: L.TernaryDense(4),
    "TextVectorization": _texts,
    "TimeDistributed": lambda: L.TimeDistributed(L.Dense(3)),
    "Wrapper": lambda: _Bias(L.Dense(4)),
}
_BY_RANK = {"1D": _SEQUENCE, "2D": _IMAGE, "3D": _VOLUME}
_IMAGES = (
    *("AugMix", "AutoContrast", "CenterCrop", "ContrastLimitedAdaptiveHistogramEqualization", "CutMix", "Equalization"),
    *("Mosaic", "MixUp", "Pipeline", "RandAugment", "Resizing", "Solarization", "MaxNumBoundingBoxes"),
)
_TWICE = ("Add", "Average", "Concatenate", "Dot", "Maximum", "Minimum", "Multiply", "Subtract")
# Name: shapes of the inputs (without the batch) and their type; for those that no rule below covers.
_INPUTS: dict[str, tuple[list[tuple], str]] = {
    **{name: ([_SEQUENCE, _SEQUENCE], "float32") for name in _TWICE},
    **{name: ([_SEQUENCE, _SEQUENCE], "float32") for name in ("Attention", "AdditiveAttention")},
    **{name: ([_SEQUENCE, _SEQUENCE], "float32") for name in ("MultiHeadAttention", "GroupedQueryAttention")},
    **{f"ConvLSTM{rank}D": ([(3, *_BY_RANK[f"{rank}D"])], "float32") for rank in (1, 2, 3)},
    **{name: ([_SEQUENCE], "float32") for name in ("Bidirectional", "EinsumDense", "GRU", "LSTM", "Masking", "RNN")},
    **{name: ([_SEQUENCE], "float32") for name in ("Permute", "SimpleRNN", "TimeDistributed")},
    **{name: ([(64,)], "float32") for name in ("MelSpectrogram",)},
    **{name: ([(64, 1)], "float32") for name in ("STFTSpectrogram",)},
    **{name: ([_VECTOR], "int32") for name in ("CategoryEncoding", "Embedding", "Hashing", "IntegerLookup")},
    "ReversibleEmbedding": ([_VECTOR], "int32"),
    "HashedCrossing": ([(1,), (1,)], "int32"),
    "StringLookup": ([_VECTOR], "string"),
    "TextVectorization": ([(1,)], "string"),
}
# Why there is no model with the layer.
NOT_A_LAYER_OF_A_MODEL = {
    "FlaxLayer": "needs JAX",
    "JaxLayer": "needs JAX",
    "TorchModuleWrapper": "needs PyTorch",
    "TFSMLayer": "needs a SavedModel",
    "InputLayer": "stands in every model",
    "Layer": "computes nothing",
    "GRUCell": "is called by RNN",
    "LSTMCell": "is called by RNN",
    "SimpleRNNCell": "is called by RNN",
    "StackedRNNCells": "is called by RNN",
    "MaxNumBoundingBoxes": "takes bounding boxes only",
    "RandomCrop": "gives another shape in inference than it says",
}


def layer_classes() -> dict[str, type]:
    """The classes of `keras.layers`, each once, by their own names."""
    found = {cls.__name__: cls for _, cls in inspect.getmembers(L, inspect.isclass) if issubclass(cls, L.Layer)}
    return {name: cls for name, cls in sorted(found.items()) if name not in NOT_A_LAYER_OF_A_MODEL}


def make_layer(name: str) -> keras.Layer:
    return MAKE[name]() if name in MAKE else layer_classes()[name]()


def input_specs(name: str) -> tuple[list[tuple], str]:
    if name in _INPUTS:
        return _INPUTS[name]
    if name in _IMAGES or name.startswith("Random"):
        return [_IMAGE], "float32"
    rank = next((rank for rank in _BY_RANK if rank in name), None)
    return [_BY_RANK.get(rank, _VECTOR)], "float32"


def call(layer: keras.Layer, tensors: list) -> Any:
    """The layer called on as many tensors as it takes."""
    if isinstance(layer, (L.MultiHeadAttention, L.GroupQueryAttention)):
        return layer(*tensors)
    return layer(tensors if len(tensors) > 1 else tensors[0])


def head(tensor: Any, name: str) -> Any:
    """A Dense layer over whatever a layer gave, so that there is something to prune."""
    tensor = keras.ops.cast(tensor, "float32") if tensor.dtype != "float32" else tensor
    if len(tensor.shape) == 1:
        tensor = keras.ops.expand_dims(tensor, -1)
    return L.Dense(3, name=name)(tensor if len(tensor.shape) == 2 else L.Flatten()(tensor))


def model_of(name: str) -> keras.Model:
    """A layer that is called twice, a frozen one, and one within another model, each with a Dense layer behind it."""
    shapes, dtype = input_specs(name)
    inputs = [keras.Input(shape, dtype=dtype) for shape in shapes]
    again = [keras.Input(shape, dtype=dtype) for shape in shapes]
    layer, frozen, nested = make_layer(name), make_layer(name), make_layer(name)
    within = [keras.Input(shape, dtype=dtype) for shape in shapes]
    inner = keras.Model(within, head(call(nested, within), "inner_head"), name="inner")
    outputs = [
        head(call(layer, inputs), "head"),
        head(call(layer, again), "head_again"),
        head(call(frozen, inputs), "frozen_head"),
    ]
    frozen.trainable = False
    return keras.Model([*inputs, *again], L.Add()([*outputs, inner(inputs if len(inputs) > 1 else inputs[0])]))


def inputs_of(name: str, samples: int = 2) -> list:
    generator = np.random.default_rng(1)
    shapes, dtype = input_specs(name)
    made = []
    for shape in (*shapes, *shapes):
        shape = (samples, *shape)
        if dtype == "string":
            made.append(keras.ops.convert_to_tensor(np.array(["a", "b c", "red"])[generator.integers(0, 3, shape)]))
        elif dtype == "int32":
            made.append(generator.integers(0, 4, shape).astype(dtype))
        else:
            made.append(generator.random(shape).astype(dtype))
    return made


def small_model_of(name: str) -> keras.Model:
    """A layer with a Dense layer behind it."""
    shapes, dtype = input_specs(name)
    inputs = [keras.Input(shape, dtype=dtype) for shape in shapes]
    return keras.Model(inputs, head(call(make_layer(name), inputs), "head"))
