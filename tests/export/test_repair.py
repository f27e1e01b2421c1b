import keras
import numpy as np
import pytest

import keras_renorm as kr
from keras_renorm.src.runtimes import xnnpack

L = keras.layers


def mobilenet(strides_padding="explicit", head="conv", side=32):
    """Padded as in keras.applications: on one side only where there are strides."""
    x = inputs = keras.Input((side, side, 3))
    x = L.ReLU(6)(L.BatchNormalization()(L.Conv2D(8, 3, 2, "same", use_bias=False, name="first")(x)))
    for index, strides in enumerate((1, 2, 2)):
        if strides == 2 and strides_padding == "explicit":
            x = L.ZeroPadding2D(((0, 1), (0, 1)))(x)
            x = L.DepthwiseConv2D(3, strides, name=f"depthwise_{index}")(x)
        else:
            x = L.DepthwiseConv2D(3, strides, "same", name=f"depthwise_{index}")(x)
        x = L.Conv2D(16, 1, activation="relu", name=f"pointwise_{index}")(x)
    if head == "conv":
        x = L.Dropout(0.1)(L.GlobalAveragePooling2D(keepdims=True)(x))
        x = L.Reshape((10,))(L.Conv2D(10, 1, name="head")(x))
    else:
        x = L.Dense(10, name="head")(L.GlobalAveragePooling2D()(x))
    return keras.Model(inputs, L.Activation("softmax")(x))


def away_from_start(model, generator):
    for variable in model.variables:
        variable.assign(np.asarray(variable) + 0.3 * generator.random(variable.shape))
    return model


def outputs(model, images):
    return np.asarray(model(images, training=False))


@pytest.mark.parametrize("padding", ["explicit", "same"])
def test_repaired_networks_qualify_and_compute_the_same(padding, generator):
    model = away_from_start(mobilenet(padding), generator)
    before = [np.array(variable) for variable in model.variables]
    repaired = kr.export.repair(model)
    assert len(xnnpack.find_breakers(xnnpack.nodes_of(model))) == 3
    assert xnnpack.find_breakers(xnnpack.nodes_of(repaired)) == []
    assert len(repaired.repair_notes) == 4
    images = generator.random((4, 32, 32, 3)).astype("float32")
    # The first row and column are where the moved image differs.
    images[:, 0] = images[:, :, 0] = 0
    np.testing.assert_allclose(outputs(repaired, images), outputs(model, images), atol=1e-6)
    for variable, value in zip(model.variables, before, strict=True):
        np.testing.assert_array_equal(variable, value)


def test_the_border_is_all_that_differs(generator):
    model = keras.Sequential([keras.Input((16, 16, 3)), L.Conv2D(4, 3, 2, "same")])
    repaired = kr.export.repair(model)
    images = generator.random((2, 16, 16, 3)).astype("float32")
    new, old = outputs(repaired, images), outputs(model, images)
    np.testing.assert_allclose(new[:, 1:, 1:], old[:, 1:, 1:], atol=1e-6)
    assert np.abs(new - old)[:, 0].max() > 1e-3


def test_a_5x5_convolution_looks_elsewhere_and_says_so(generator):
    model = keras.Sequential([keras.Input((16, 16, 4)), L.DepthwiseConv2D(5, 2, "same", name="wide")])
    repaired = kr.export.repair(model)
    assert "outputs change: fine-tune" in repaired.repair_notes[0]
    images = generator.random((2, 16, 16, 4)).astype("float32")
    # It looks one pixel further up and left.
    moved = np.pad(images, ((0, 0), (0, 1), (0, 1), (0, 0)))[:, 1:, 1:]
    np.testing.assert_allclose(outputs(repaired, moved)[:, 1:-1, 1:-1], outputs(model, images)[:, 1:-1, 1:-1], atol=1e-6)


@pytest.mark.parametrize("flatten", [None, L.Flatten(), L.Reshape((6,))], ids=["image", "Flatten", "Reshape"])
def test_heads(flatten, generator):
    x = inputs = keras.Input((8, 8, 4))
    x = L.GlobalAveragePooling2D(keepdims=True)(x)
    x = L.Conv2D(6, 1, activation="softmax")(L.Conv2D(5, 1, use_bias=False, activation="relu")(x))
    model = away_from_start(keras.Model(inputs, x if flatten is None else flatten(x)), generator)
    repaired = kr.export.repair(model)
    assert not any(isinstance(layer, L.Conv2D) for layer in repaired.layers)
    images = generator.random((3, 8, 8, 4)).astype("float32")
    assert outputs(repaired, images).shape == outputs(model, images).shape
    np.testing.assert_allclose(outputs(repaired, images), outputs(model, images), atol=1e-6)


def test_squeeze_and_excitation_is_not_a_head():
    x = inputs = keras.Input((8, 8, 4))
    weights = L.Conv2D(4, 1, activation="sigmoid")(L.GlobalAveragePooling2D(keepdims=True)(x))
    assert kr.export.repair(keras.Model(inputs, L.Multiply()([x, weights]))).repair_notes == ()


@pytest.mark.parametrize(
    "layer",
    [
        L.DepthwiseConv2D(3, 2),
        L.DepthwiseConv2D(3, 1, "same"),
        L.DepthwiseConv2D(3, 2, "same", depth_multiplier=2),
        L.DepthwiseConv2D(7, 2, "same"),
        L.Conv2D(3, 3, 2, "same", groups=3),
        L.Conv2D(4, 5, 2, "same"),
    ],
    ids=lambda layer: layer.name,
)
def test_what_cannot_be_repaired_stays(layer, generator):
    model = keras.Sequential([keras.Input((16, 16, 3)), layer])
    repaired = kr.export.repair(model)
    assert repaired.repair_notes == ()
    images = generator.random((2, 16, 16, 3)).astype("float32")
    np.testing.assert_array_equal(outputs(repaired, images), outputs(model, images))


def test_odd_and_unknown_sides_stay():
    for side in (15, None):
        model = keras.Sequential([keras.Input((side, side, 3)), L.DepthwiseConv2D(3, 2, "same")])
        assert kr.export.repair(model).repair_notes == ()


def test_prunable_and_compiled_models():
    model = keras.Sequential([keras.Input((16, 16, 3)), L.Conv2D(4, 3, 2, "same"), L.GlobalAveragePooling2D(), L.Dense(2)])
    model.compile("sgd", "mse")
    repaired = kr.export.repair(kr.to_prunable(model))
    assert repaired.compiled
    assert isinstance(repaired, keras.Sequential)
    assert type(repaired.layers[-1]) is L.Dense


def test_what_is_no_graph():
    class Own(keras.Model):
        def call(self, x):
            return x

    own = Own()
    own.build((1, 2))
    with pytest.raises(ValueError, match="must be a Sequential or Functional model"):
        kr.export.repair(own)
