import keras
import numpy as np
import pytest
from keras import ops

from keras_renorm.src.calibration.observing import observe
from tests.calibration.test_samples import small_model

L = keras.layers


def test_observing_shows_pre_activations_and_leaves_no_trace(generator):
    model = small_model()
    images = generator.standard_normal((6, 5)).astype("float32")
    attributes = [sorted(layer.__dict__) for layer in model.layers]
    first, second = observe(lambda: model(images), model.layers[1:])
    kernel, bias = (ops.convert_to_numpy(weight) for weight in model.layers[1].weights)
    np.testing.assert_allclose(ops.convert_to_numpy(first.outputs), images @ kernel + bias, atol=1e-5)
    np.testing.assert_allclose(
        ops.convert_to_numpy(second.inputs), np.maximum(ops.convert_to_numpy(first.outputs), 0), atol=1e-6
    )
    (only,) = observe(lambda: model(images), [model.layers[2]], calls=1, outputs=False)
    assert only.outputs is None
    assert [sorted(layer.__dict__) for layer in model.layers] == attributes
    with pytest.raises(ZeroDivisionError):
        observe(lambda: 1 / 0, model.layers[1:])
    assert [sorted(layer.__dict__) for layer in model.layers] == attributes


def test_observing_a_layer_called_twice_named_twice_and_with_a_call_of_its_own(generator):
    layer, after = L.Dense(4, "relu"), L.Dense(4)
    inputs = keras.Input((4,))
    model = keras.Model(inputs, after(layer(layer(inputs))))
    images = generator.standard_normal((3, 4)).astype("float32")
    doubled = lambda inputs: 2 * inputs  # noqa: E731
    object.__setattr__(after, "call", doubled)
    calls = observe(lambda: model(images), [layer, after, layer])
    assert [call.layer for call in calls] == [layer, layer, after]
    np.testing.assert_allclose(
        ops.convert_to_numpy(calls[1].inputs), np.maximum(ops.convert_to_numpy(calls[0].outputs), 0), atol=1e-6
    )
    np.testing.assert_allclose(ops.convert_to_numpy(calls[2].outputs), 2 * ops.convert_to_numpy(calls[2].inputs))
    assert "call" not in layer.__dict__
    assert after.__dict__["call"] is doubled


def test_an_exception_within_a_layer_leaves_no_trace():
    class Broken(L.Dense):
        def call(self, inputs, training=None):
            raise ZeroDivisionError

    layer = Broken(2, "relu")
    layer.build((None, 3))
    with pytest.raises(ZeroDivisionError):
        observe(lambda: layer(np.ones((1, 3), "float32")), [layer])
    assert "call" not in layer.__dict__
    assert layer.activation is keras.activations.relu
