import keras
import pytest

from keras_renorm.src.runtimes import xnnpack
from keras_renorm.src.runtimes.xnnpack import Node, find_breakers

L = keras.layers


def node(name, kind, source, **shape):
    return Node(name=name, kind=kind, inputs=(source,), outputs=(name,), **shape)


def entry(name="entry", source="image", **changes):
    shape = dict(kernel=(3, 3), strides=(2, 2), padding=(1, 1, 1, 1), channels=3)
    return node(name, "conv", source, **shape | changes)


def network(*middle, first=None, end="mean"):
    nodes = [first or entry(), node("pointwise", "conv", "entry", channels=8, zeros=9, weights=10)]
    nodes += middle
    return [*nodes, node("end", end, nodes[-1].name)]


def test_a_network_that_qualifies():
    depthwise = node("depthwise", "depthwise", "pointwise", kernel=(5, 5), strides=(2, 2), padding=(2, 2, 2, 2))
    assert find_breakers(network(depthwise, node("relu", "elementwise", "depthwise"))) == []
    assert xnnpack.pointwise_zeros(network()) == 0.9


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        (
            dict(kind="conv", kernel=(3, 3), padding=(1, 1, 1, 1), channels=8),
            "3x3 convolution with strides .1, 1. on 8 channels",
        ),
        (dict(kind="conv", strides=(2, 2)), "1x1 convolution with strides .2, 2."),
        (dict(kind="conv", plain=False), "without padding, groups"),
        (dict(kind="depthwise", kernel=(3, 3), strides=(2, 2), padding=(0, 1, 0, 1)), "margins .0, 1, 0, 1. instead of equal"),
        (dict(kind="depthwise", kernel=(3, 3), strides=(2, 2), padding=None), "padding 'same' instead of equal"),
        (dict(kind="conv", kernel=(3, 3), strides=(2, 2), padding=None, channels=8), "Only the first convolution"),
        (dict(kind="depthwise", kernel=(3, 3)), "padded by 0. Pad by 1 on all sides"),
        (dict(kind="depthwise", kernel=(7, 7), padding=(3, 3, 3, 3)), "Supported are depthwise convolutions of 3x3"),
        (dict(kind="depthwise", kernel=(3, 3), strides=(3, 3), padding=(1, 1, 1, 1)), "with strides 1 or 2"),
        (dict(kind="depthwise", kernel=(3, 3), dilation=(2, 2), padding=(1, 1, 1, 1)), "without dilation"),
        (dict(kind="depthwise", kernel=(3, 3), plain=False, padding=(1, 1, 1, 1)), "depth multiplier"),
        (dict(kind="a Softmax"), "is a Softmax, for which there is no kernel"),
    ],
)
def test_what_breaks_the_path(broken, message):
    (breaker,) = find_breakers(network(node("broken", source="pointwise", **broken)))
    assert breaker.layer == "broken"
    import re

    assert re.search(message, str(breaker))


def test_the_first_convolution():
    for change in (
        dict(channels=4),
        dict(strides=(1, 1)),
        dict(padding=(0, 1, 0, 1)),
        dict(kernel=(5, 5), padding=(2, 2, 2, 2)),
    ):
        (breaker,) = find_breakers(network(first=entry(**change)))
        assert breaker.layer == "entry"


def test_ends():
    (breaker,) = find_breakers(network(end="a Flatten"))
    assert "global average pooling" in breaker.reason
    (breaker,) = find_breakers([node("pointwise", "conv", "image"), node("end", "mean", "pointwise")])
    assert "reads the input of the model" in breaker.reason
    (breaker,) = find_breakers([*network(), node("second_output", "a Dense", "pointwise")])
    assert (breaker.layer, "is also read by 'second_output'" in breaker.reason) == ("pointwise", True)
    with pytest.raises(ValueError, match="no 1x1 convolution"):
        find_breakers([entry(), node("end", "mean", "entry")])


@pytest.mark.parametrize(
    ("arguments", "margins"),
    [
        (((3, 3), (1, 1), (1, 1), (8, 8)), (1, 1, 1, 1)),
        (((3, 3), (2, 2), (1, 1), (8, 8)), (0, 1, 0, 1)),
        (((3, 3), (2, 2), (1, 1), (7, 8)), (1, 1, 0, 1)),
        (((5, 5), (2, 2), (1, 1), (8, 8)), (1, 2, 1, 2)),
        (((3, 3), (1, 1), (2, 2), (None, None)), (2, 2, 2, 2)),
        (((3, 3), (2, 2), (1, 1), (None, 8)), None),
        (((1, 1), (2, 2), (1, 1), (8, 8)), (0, 0, 0, 0)),
    ],
)
def test_same_padding_by_hand(arguments, margins):
    assert xnnpack.same_padding(*arguments) == margins


def mobile(padding=1, activation="relu", normalize=True):
    """A network of depthwise and 1x1 convolutions."""
    x = inputs = keras.Input((32, 32, 3))
    x = L.ZeroPadding2D(padding)(x)
    x = L.Conv2D(8, 3, 2, use_bias=False)(x)
    x = L.ReLU(6)(L.BatchNormalization()(x) if normalize else x)
    for filters, strides in ((16, 1), (16, 2), (32, 1)):
        x = L.ZeroPadding2D(1)(x)
        x = L.DepthwiseConv2D(3, strides)(x)
        y = L.Conv2D(filters, 1, activation=activation)(x)
        x = L.Add()([y, L.Conv2D(filters, 1)(x)])
    return keras.Model(inputs, L.Dense(10)(L.GlobalAveragePooling2D()(x)))


def test_models_of_keras():
    assert find_breakers(xnnpack.nodes_of(mobile())) == []
    (breaker,) = find_breakers(xnnpack.nodes_of(mobile(padding=((0, 1), (0, 1)))))
    assert breaker.layer.startswith("conv2d")
    assert "a Conv2D, for which there is no kernel" in str(find_breakers(xnnpack.nodes_of(mobile(activation="softmax")))[0])
    separable = [L.ZeroPadding2D(1), L.Conv2D(8, 3, 2), L.SeparableConv2D(16, 3, padding="same"), L.GlobalAveragePooling2D()]
    assert find_breakers(xnnpack.nodes_of(keras.Sequential([keras.Input((32, 32, 3)), *separable]))) == []


def test_normalization_that_nothing_takes_in():
    x = inputs = keras.Input((32, 32, 3))
    x = L.Conv2D(8, 3, 2, activation="relu")(L.ZeroPadding2D(1)(x))
    x = L.GlobalAveragePooling2D()(L.Conv2D(8, 1)(L.BatchNormalization(name="normal")(x)))
    (breaker,) = find_breakers(xnnpack.nodes_of(keras.Model(inputs, x)))
    assert breaker.layer == "normal"


def test_odd_sides_need_no_repair():
    layers = [L.Conv2D(8, 3, 2, "same"), L.Conv2D(8, 1), L.DepthwiseConv2D(3, 2, "same"), L.GlobalAveragePooling2D()]
    for side, count in ((33, 0), (32, 2)):
        model = keras.Sequential(
            [keras.Input((side, side, 3)), *[type(layer).from_config(layer.get_config()) for layer in layers]]
        )
        assert len(find_breakers(xnnpack.nodes_of(model))) == count
