"""Laws over random Functional graphs: what is made of a model computes what the model computes.

Ten graphs run with the suite, 500 more with `pytest -m slow`. A failure names the seed of its graph.
"""

import keras
import numpy as np
import pytest
from keras import ops

import keras_renorm as kr
from keras_renorm.src.layers.prunable import prunable_layers

L = keras.layers
ACTIVATIONS = [None, "relu", "tanh", "gelu", "softmax"]


class Grower:
    """Adds random layers to random tensors of a graph."""

    def __init__(self, seed):
        self.generator = np.random.default_rng(seed)
        self.inputs, self.samples, self.tensors = [], [], []
        for _ in range(self.pick([1, 1, 1, 2, 3])):
            self.tensors.append(self.start(self.pick(["image", "image", "sequence", "vector", "tokens"])))
        for _ in range(self.generator.integers(3, 9)):
            self.grow(self.tensors[-1] if self.chance(0.6) else self.pick(self.tensors))

    def pick(self, options):
        return options[self.generator.integers(len(options))]

    def chance(self, share):
        return self.generator.random() < share

    def units(self):
        return int(self.generator.integers(2, 9))

    def activation(self):
        return self.pick(ACTIVATIONS)

    def start(self, kind):
        shape = {"image": (6, 6, 3), "sequence": (6, 4), "vector": (7,), "tokens": (6,)}[kind]
        if kind == "tokens":
            self.inputs.append(keras.Input(shape, dtype="int32"))
            self.samples.append(self.generator.integers(0, 9, (16, *shape)).astype("int32"))
            return L.Embedding(9, self.units())(self.inputs[-1])
        self.inputs.append(keras.Input(shape))
        self.samples.append(self.generator.standard_normal((16, *shape)).astype("float32"))
        if self.chance(0.3):
            normalization = L.Normalization()
            normalization.adapt(3 * self.samples[-1] + 2)
            return normalization(self.inputs[-1])
        return self.inputs[-1]

    def grow(self, x):
        """One more tensor, of `x` and perhaps of others."""
        step = self.pick([self.layer, self.layer, self.layer, self.elementwise, self.merge, self.with_constant, self.composite])
        self.tensors.append(step(x))

    def layer(self, x):
        """A layer with a kernel, or one that changes the shape."""
        units, activation = self.units(), self.activation()
        if len(x.shape) == 2:
            makes = [L.Dense(units, activation), L.Dense(units, activation, use_bias=False), L.Reshape((1, x.shape[-1]))]
        elif len(x.shape) == 3:
            makes = [
                *(L.Dense(units, activation), L.Conv1D(units, 3, padding="same", activation=activation)),
                *(L.SeparableConv1D(units, 2, padding="same"), L.DepthwiseConv1D(2, padding="same", depth_multiplier=2)),
                *(L.EinsumDense("abc,cd->abd", (x.shape[1], units), bias_axes="d"), L.GlobalAveragePooling1D(), L.Flatten()),
                *(L.LSTM(units, return_sequences=True), L.GRU(units), L.Bidirectional(L.LSTM(units))),
            ]
        else:
            padding = self.pick(["same", "valid"]) if min(x.shape[1:3]) >= 3 else "same"
            makes = [
                *(L.Conv2D(units, 3, padding=padding, activation=activation), L.Conv2D(units, 1, use_bias=False)),
                L.DepthwiseConv2D(3, padding=padding, depth_multiplier=self.pick([1, 2]), activation=self.pick(["relu", None])),
                *(L.SeparableConv2D(units, 3, padding=padding), L.Conv2DTranspose(units, 2, padding="same")),
                *(L.MaxPooling2D(2, padding="same"), L.AveragePooling2D(2, padding="same"), L.ZeroPadding2D(1)),
                *(L.GlobalAveragePooling2D(), L.GlobalMaxPooling2D(), L.Flatten()),
            ]
        return self.pick(makes)(x)

    def elementwise(self, x):
        return self.pick(
            [
                *(L.BatchNormalization(), L.LayerNormalization(), L.Activation(self.activation()), L.Dropout(0.5)),
                *(L.LeakyReLU(), L.PReLU(shared_axes=list(range(1, len(x.shape) - 1)) or None), L.Rescaling(0.5, 0.1)),
            ]
        )(x)

    def merge(self, x):
        """Two or three tensors that agree in all sides, or in all but the channels; if there is no other, with a new one."""
        alike = [one for one in self.tensors if one is not x and one.shape[:-1] == x.shape[:-1]]
        if alike and self.chance(0.4):
            return L.Concatenate()([x, self.pick(alike)])
        same = [one for one in alike if one.shape == x.shape] or [L.Dense(x.shape[-1], self.activation())(x)]
        return self.pick([L.Add, L.Subtract, L.Multiply, L.Average, L.Maximum])()([x, self.pick(same)])

    def with_constant(self, x):
        values = np.linspace(-1, 1, x.shape[-1]).astype("float32")
        return self.pick(
            [lambda: x + values, lambda: x * values, lambda: ops.subtract(values, x), lambda: x * 0.5, lambda: x + 1.0]
        )()

    def composite(self, x):
        """A model in the model, a layer that is used twice, or attention."""
        width = x.shape[-1]
        if len(x.shape) == 3 and self.chance(0.5):
            return L.MultiHeadAttention(2, 3)(x, x)
        if self.chance(0.4):
            shared = L.Dense(width, "relu")
            return L.Add()([shared(x), shared(L.Dense(width)(x))])
        inner = keras.Input(x.shape[1:])
        y = L.Dense(width)(L.BatchNormalization()(L.Dense(self.units(), "relu")(inner)))
        return keras.Model(inner, y + inner if self.chance(0.5) else y)(x)

    def finish(self):
        """One output or two, of a kernel each, that read the last tensors."""

        def vector(x):
            return x if len(x.shape) == 2 else L.Flatten()(x)

        last = L.Dense(3, name="last")(L.Concatenate()([vector(one) for one in (self.tensors[-1], *self.tensors)]))
        outputs = [last, L.Dense(2, "sigmoid")(vector(self.tensors[-1]))] if self.chance(0.3) else last
        model = keras.Model(self.inputs if len(self.inputs) > 1 else self.inputs[0], outputs)
        adapted = {id(one) for part in model.layers if isinstance(part, L.Normalization) for one in part.variables}
        for variable in model.variables:
            if len(variable.shape) == 1 and "float" in variable.dtype and id(variable) not in adapted:
                value = ops.convert_to_numpy(variable)
                value = value + 0.3 * self.generator.standard_normal(value.shape)
                variable.assign(np.abs(value) + 0.1 if "variance" in variable.name else value)
        for layer in model.layers:
            layer.trainable = not self.chance(0.1)
        return model


def random_model(seed):
    """A model, and 16 samples for it."""
    keras.utils.set_random_seed(seed)
    grower = Grower(seed)
    return grower.finish(), grower.samples if len(grower.samples) > 1 else grower.samples[0]


def outputs_of(model, samples):
    return [ops.convert_to_numpy(one) for one in keras.tree.flatten(model(samples, training=False))]


def assert_same(model, other, samples):
    for one, another in zip(outputs_of(model, samples), outputs_of(other, samples), strict=True):
        np.testing.assert_allclose(another, one, atol=2e-5 * max(1, np.abs(one).max()))


def error(model, other, samples):
    return sum(np.sum((one - another) ** 2) for one, another in zip(outputs_of(model, samples), outputs_of(other, samples)))


def copies(model, samples, tmp_path):
    prunable = kr.to_prunable(model)
    assert_same(model, prunable, samples)
    assert_same(model, kr.strip(prunable), samples)


def masks(model, samples, tmp_path):
    size = sum(kernel.size for layer in prunable_layers(kr.to_prunable(model)) for kernel in layer.masked_kernels)
    pruned = kr.prune(model, 0.6, renormalize=None)
    before, after = model.get_weights(), pruned.get_weights()
    gone = [np.not_equal(one, another) for one, another in zip(before, after, strict=True)]
    assert all(not another[places].any() for another, places in zip(after, gone))
    assert sum(map(np.count_nonzero, gone)) == round(0.6 * size)
    model.set_weights(after)
    assert_same(model, pruned, samples)


def units(model, samples, tmp_path):
    try:
        pruned = kr.prune(model, 0.4, pattern="unit")
    except ValueError as error:
        if "all its units are outputs" not in str(error):
            raise
        return
    small = kr.compact(pruned)
    assert_same(pruned, small, samples)
    assert small.count_params() <= pruned.count_params()


def calibrated(model, samples, tmp_path):
    plain = kr.prune(model, 0.6, renormalize=None)
    fitted = kr.prune(model, 0.6, calibration=samples, verbose=0)
    assert error(model, fitted, samples) <= error(model, plain, samples) * 1.001 + 1e-9


def exported(model, samples, tmp_path):
    pruned = kr.prune(model, 0.6)
    report = kr.export_tflite(pruned, tmp_path / "model.tflite", samples=samples)
    assert report.difference <= 1e-4 * report.output_range


@pytest.mark.parametrize("law", [copies, masks, units])
@pytest.mark.parametrize("seed", range(10))
def test_laws(seed, law, tmp_path):
    law(*random_model(seed), tmp_path)


@pytest.mark.slow
# The statistics of the models are drawn, and there are few samples.
@pytest.mark.filterwarnings("ignore:(Argument `calibration` has few|The samples of argument `calibration` are not):UserWarning")
@pytest.mark.parametrize("law", [copies, masks, units, calibrated])
@pytest.mark.parametrize("seed", range(10, 510))
def test_laws_of_many(seed, law, tmp_path):
    law(*random_model(seed), tmp_path)


@pytest.mark.slow
@pytest.mark.skipif(keras.backend.backend() != "tensorflow", reason="export needs TensorFlow")
@pytest.mark.parametrize("seed", range(10, 510, 10))
def test_laws_of_files(seed, tmp_path):
    exported(*random_model(seed), tmp_path)
