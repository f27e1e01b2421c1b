import keras
import numpy as np
import pytest
from keras import ops

import keras_renorm as kr
from keras_renorm.src.calibration import gradients
from keras_renorm.src.calibration.gathering import gather_statistics
from keras_renorm.src.calibration.gradients import loss_gradients
from keras_renorm.src.calibration.samples import Samples
from keras_renorm.src.core.statistics import Gradients
from keras_renorm.src.kernels.masks import compute_mask
from keras_renorm.src.pruning.conversion import plain_copy

L = keras.layers


def line(**options):
    """One weight an input, without bias, and its squared error."""
    model = keras.Sequential([keras.Input((2,)), L.Dense(1, use_bias=False, kernel_initializer="ones", **options)])
    model.compile(loss="mse")
    return model


X, Y = np.array([[1.0, 2.0], [0.0, 1.0]], "float32"), np.array([[1.0], [3.0]], "float32")


def test_by_hand():
    """Outputs 3 and 1 are off by 2 and -2; the gradient is the mean of twice that times the inputs."""
    model = line()
    (gradient,) = loss_gradients(model, (X, Y), [model.layers[0].kernel])
    np.testing.assert_allclose(gradient, [[2.0], [2.0]])
    np.testing.assert_array_equal(ops.convert_to_numpy(model.layers[0].kernel), 1)
    (weighted,) = loss_gradients(model, (X, Y, np.array([2.0, 0.0], "float32")), [model.layers[0].kernel])
    np.testing.assert_allclose(weighted / weighted[0], [[1.0], [2.0]])


def test_neither_regularization_nor_being_frozen_counts():
    model = line(kernel_regularizer="l2")
    model.layers[0].trainable = False
    (frozen,) = loss_gradients(model, (X, Y), [model.layers[0].kernel])
    model.layers[0].trainable = True
    (trained,) = loss_gradients(model, (X, Y), [model.layers[0].kernel])
    np.testing.assert_allclose([frozen, trained], np.full((2, 2, 1), 2.0), rtol=1e-5)


def test_a_loss_of_ones_own_and_what_a_loss_does_not_reach():
    class Own(keras.Model):
        def compute_loss(self, x=None, y=None, y_pred=None, sample_weight=None, training=True):
            return ops.mean(y_pred[0])

    inputs = keras.Input((2,))
    used, unused = L.Dense(1, use_bias=False), L.Dense(1, use_bias=False)
    model = Own(inputs, [used(inputs), unused(inputs)])
    model.compile()
    one, other = loss_gradients(model, (X, Y), [used.kernel, unused.kernel])
    np.testing.assert_allclose(one, X.mean(axis=0)[:, None])
    np.testing.assert_array_equal(other, 0)


def sparse():
    keras.utils.set_random_seed(0)
    model = keras.Sequential(
        [
            keras.Input((6,), dtype="int32"),
            kr.layers.RenormalizedPruning(L.Embedding(10, 4)),
            kr.layers.RenormalizedPruning(L.LSTM(5)),
            kr.layers.PrunableDense(4, "relu", kernel_regularizer="l2"),
            L.Dense(3),
        ]
    )
    model.compile(loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    for layer in model.layers[:3]:
        layer.update_masks(0.5)
    generator = np.random.default_rng(0)
    return model, generator.integers(0, 10, (16, 6)).astype("int32"), generator.integers(0, 3, 16)


def test_masked_weights_have_the_gradient_of_the_plain_model():
    model, x, y = sparse()
    plain, variables = plain_copy(model)
    masked = [kernel for layer in model.layers[:3] for kernel in layer.masked_kernels]
    before = [ops.convert_to_numpy(variable) for variable in model.variables]
    found = loss_gradients(model, (x, y), [*(kernel.variable for kernel in masked), model.layers[-1].kernel])
    wanted = [variables[id(kernel.variable)] for kernel in masked] + [plain.layers[-1].kernel]
    for gradient, other in zip(found, loss_gradients(plain, (x, y), wanted)):
        np.testing.assert_allclose(gradient, other, rtol=1e-4, atol=1e-7)
    for kernel, gradient in zip(masked, found):
        assert np.count_nonzero(gradient[~ops.convert_to_numpy(kernel.mask)])
    for variable, value in zip(model.variables, before):
        np.testing.assert_array_equal(ops.convert_to_numpy(variable), value)


def test_growing_by_gradient():
    """A step of RigL: the smallest tenth of the weights goes, as many with the largest gradients come back."""
    model, x, y = sparse()
    layer = model.layers[2]
    (kernel,) = layer.masked_kernels
    before, scale = ops.convert_to_numpy(kernel.mask), ops.convert_to_numpy(kernel.scale)
    values = np.abs(ops.convert_to_numpy(kernel.effective()))
    with Samples((x, y), model, 8, labels=True) as samples:
        known = gather_statistics(model, samples, Gradients)[id(kernel.variable)]
    gradient = np.abs(known.to_kernel(known.statistics.mean))
    kept = compute_mask(np.where(before, values, -1), 0.6)
    mask = kept | compute_mask(np.where(before, -1, gradient), 0.9)
    layer.assign_masks([(mask, scale)])
    assert np.count_nonzero(mask) == np.count_nonzero(before)
    assert np.count_nonzero(mask & ~before) == mask.size // 10
    assert gradient[mask & ~before].min() >= gradient[~mask & ~before].max()


@pytest.mark.parametrize("loss", [None, "not compiled"])
def test_without_a_loss(loss):
    model = keras.Sequential([keras.Input((2,)), L.Dense(1)])
    if loss is None:
        model.compile(optimizer="sgd")
    with pytest.raises(ValueError, match=r"has no loss.*`model.compile\(loss=...\)`.*compile=False"):
        loss_gradients(model, (X, Y), [model.layers[0].kernel])


def test_a_backend_without_gradients(monkeypatch):
    monkeypatch.setattr(gradients, "_DIFFERENTIATORS", {"another": None})
    with pytest.raises(ValueError, match=r"backend '.*', which does not compute gradients.*\['another'\]"):
        loss_gradients(line(), (X, Y), [])
