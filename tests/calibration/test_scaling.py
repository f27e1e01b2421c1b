import re

import keras
import numpy as np
import pytest
from keras import ops

from keras_renorm.src.calibration.samples import Samples
from keras_renorm.src.calibration.scaling import warn_of_odd_samples
from tests.pruning.test_conversion import shared

L = keras.layers


def with_normalization(deviation):
    """As trained on inputs of a deviation."""
    model = keras.Sequential([keras.Input((8, 8, 3)), L.Conv2D(4, 3), L.BatchNormalization(name="bn"), L.ReLU()])
    model.get_layer("bn").moving_variance.assign(np.full(4, deviation**2))
    return model


def adapted(deviation):
    return keras.Sequential([keras.Input((8, 8, 3)), L.Normalization(mean=[0.5] * 3, variance=[deviation**2] * 3, name="norm")])


def rescaling(scale):
    return keras.Sequential([keras.Input((8, 8, 3)), L.Rescaling(scale, name="rescaling"), L.Conv2D(4, 3)])


@pytest.mark.parametrize(
    ("model", "factor", "message"),
    [
        (lambda: with_normalization(0.5), 1, None),
        (lambda: with_normalization(0.5), 255, "at layer 'bn' they deviate"),
        (lambda: with_normalization(100.0), 255, None),
        (lambda: with_normalization(100.0), 1, "at layer 'bn' they deviate"),
        (lambda: with_normalization(1.0), 255, None),  # Its statistics are those of a new layer.
        (lambda: adapted(0.3), 1, None),
        (lambda: adapted(0.3), 255, "at layer 'norm' they deviate"),
        (lambda: rescaling(1 / 255), 255, None),
        (lambda: rescaling(1 / 255), 1, "layer 'rescaling' makes numbers of them that differ by 0.0039 at most"),
        (lambda: rescaling(2.0), 1, None),
    ],
)
def test_samples_in_another_scaling_are_warned_of(model, factor, message, generator):
    model = model()
    samples = Samples(factor * generator.random((32, 8, 8, 3)).astype("float32"), model, 32)
    if message is None:
        warn_of_odd_samples(model, samples)
        return
    with pytest.warns(UserWarning, match="not scaled like.*" + message):
        warn_of_odd_samples(model, samples)


def test_constant_samples_are_warned_of(generator):
    varied = generator.random((5, 6)).astype("float32")
    constant = np.ones((5, 6), "float32")
    constant[:, 2] = 7
    model = shared()
    one, two = (tensor.name for tensor in model.inputs)
    for arrays, names in (([varied, constant], [two]), ([constant, constant], [one, two])):
        with pytest.warns(UserWarning, match=re.escape(f"all the same for input {names}")):
            warn_of_odd_samples(model, Samples(arrays, model, 2))
    warn_of_odd_samples(model, Samples([varied, varied], model, 2))
    warn_of_odd_samples(model, Samples([constant[:1], constant[:1]], model, 2))
    late = np.concatenate([constant, varied])
    warn_of_odd_samples(model, Samples([late, late], model, 2))


def test_masks_may_be_the_same_for_all_samples(generator):
    inputs = [keras.Input((4,)), keras.Input((4,), dtype="int32")]
    model = keras.Model(inputs, L.Dense(2)(inputs[0]) + ops.sum(ops.cast(inputs[1], "float32")))
    warn_of_odd_samples(model, Samples([generator.random((5, 4)), np.ones((5, 4), "int32")], model, 2))
