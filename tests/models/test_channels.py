import keras
import numpy as np
import pytest
from keras import ops

import keras_renorm as kr
from keras_renorm.src.models.channels.walks import find_ties, walk_back
from tests.outputs import outputs
from tests.pruning.test_compaction import KERNELS, LAWS, deafen, randomize, sequential

L = keras.layers


def units_read(model, masks=None):
    """What `walk_back` says is read, layer by layer."""
    seen = {}
    named = {id(layer.kernel): (masks or {}).get(layer.name) for layer in model._flatten_layers() if hasattr(layer, "kernel")}

    def live(variable):
        mask = named.get(id(variable))
        return np.ones(variable.shape, bool) if mask is None else mask

    walk_back(model, lambda layer, read: seen.update({layer.name: read.tolist()}), live)
    return seen


def only(shape, *kept):
    mask = np.zeros(shape, bool)
    for index in kept:
        mask[index] = True
    return mask


def test_a_chain():
    model = keras.Sequential([keras.Input((2,)), L.Dense(3, "relu", name="a"), L.Dropout(0.5), L.Dense(2, name="b")])
    assert units_read(model) == {"a": [True] * 3, "b": [True] * 2}
    assert units_read(model, {"b": only((3, 2), (1, 0))})["a"] == [False, True, False]


def test_from_the_outputs_to_the_inputs():
    model = keras.Sequential([keras.Input((2,)), *(L.Dense(2, "relu", name=name) for name in "abc")])
    masks = {"c": only((2, 2), (1, 0), (1, 1)), "b": only((2, 2), (0, 1), (1, 0))}
    assert units_read(model, masks) == {"c": [True, True], "b": [False, True], "a": [True, False]}


def test_convolutions_flatten_and_normalization():
    model = keras.Sequential(
        [
            keras.Input((4, 4, 1)),
            L.Conv2D(3, 3, padding="same", name="conv"),
            L.BatchNormalization(),
            L.ReLU(),
            L.MaxPooling2D(),
            L.Flatten(),
            L.Dense(2, name="fc"),
        ]
    )
    # Flatten lays (2, 2, 3) out with channels innermost: inputs 4 and 7 are channel 1.
    assert units_read(model, {"fc": only((12, 2), (4, 0), (7, 1))})["conv"] == [False, True, False]


def test_residual_and_concatenating_graphs():
    inputs = keras.Input((4, 4, 2))
    x = L.Conv2D(2, 1, name="a")(inputs)
    y = L.Conv2D(2, 1, name="b")(x)
    z = L.Concatenate()([L.Add()([x, y]), L.Conv2D(2, 1, name="c")(x)])
    model = keras.Model(inputs, L.Dense(1, name="fc")(L.GlobalAveragePooling2D()(z)))
    seen = units_read(model, {"fc": only((4, 1), (1, 0)), "b": only((1, 1, 2, 2), (0, 0, 0, 1)), "c": only((1, 1, 2, 2))})
    assert seen["b"] == [False, True]
    assert seen["c"] == [False, False]
    assert seen["a"] == [True, True]  # channel 0 through b, channel 1 through the sum


@pytest.mark.parametrize("activation", ["softmax", lambda x: x])
def test_what_may_mix_channels_reads_them_all(activation):
    model = keras.Sequential([keras.Input((2,)), L.Dense(3, activation, name="a"), L.Dense(2, name="b")])
    assert units_read(model, {"b": only((3, 2), (1, 0))})["a"] == [True] * 3
    inner = {"b": only((3, 2), (1, 0)), "a": None}
    before = keras.Sequential([keras.Input((2,)), L.Dense(2, name="first"), *model.layers])
    assert units_read(before, inner)["first"] == [True, True]


@pytest.mark.parametrize(
    "layer",
    [L.LSTM(3, return_sequences=True), L.LayerNormalization(), L.Softmax(), L.Lambda(lambda x: x[..., ::-1])],
    ids=lambda layer: type(layer).__name__,
)
def test_an_unknown_layer_reads_everything(layer):
    model = keras.Sequential([keras.Input((4, 3)), L.Dense(3, name="a"), layer, L.Dense(2, name="b")])
    assert units_read(model, {"b": only((3, 2), (1, 0))})["a"] == [True] * 3


def test_a_layer_called_twice_takes_everything_to_be_read():
    layer = L.Dense(2, name="shared")
    inputs = keras.Input((2,))
    model = keras.Model(inputs, L.Dense(1, name="out")(layer(layer(inputs))))
    assert "shared" not in units_read(model, {"out": only((2, 1), (0, 0))})


def test_weights_that_nothing_reads_go_first():
    model = keras.Sequential([keras.Input((2,)), L.Dense(2, use_bias=False, name="a"), L.Dense(2, use_bias=False, name="b")])
    model.set_weights([np.array([[9.0, 1.0], [8.0, 2.0]]), np.array([[0.1, 0.2], [3.0, 4.0]])])
    pruned = kr.prune(model, 0.5, renormalize=None)
    np.testing.assert_array_equal(pruned.get_weights()[1], [[0, 0], [3, 4]])
    np.testing.assert_array_equal(pruned.get_weights()[0], [[0, 1], [0, 2]])
    x = np.ones((1, 2), "float32")
    alone = kr.prune(model, {"b": 0.5}, renormalize=None)
    np.testing.assert_array_equal(outputs(pruned, x), outputs(alone, x))


def test_and_in_training_too():
    model = kr.to_prunable(
        keras.Sequential([keras.Input((2,)), L.Dense(2, use_bias=False, name="a"), L.Dense(2, use_bias=False, name="b")])
    )
    for layer, kernel in zip(model.layers, ([[9.0, 1.0], [8.0, 2.0]], [[0.1, 0.2], [3.0, 4.0]])):
        layer.kernel.assign(kernel)
    pruning = kr.callbacks.UpdatePruning(kr.schedules.ConstantSparsity(0.5, 0))
    pruning.set_model(model)
    pruning.step()
    np.testing.assert_array_equal(model.get_layer("b").mask.numpy(), [[False, False], [True, True]])
    np.testing.assert_array_equal(model.get_layer("a").mask.numpy(), [[False, True], [False, True]])


class Flipped(L.Dense):
    def call(self, inputs, training=None):
        return super().call(inputs, training=training)[..., ::-1]


def test_a_subclass_may_do_anything():
    model = keras.Sequential([keras.Input((2,)), L.Dense(3, name="a"), Flipped(3, name="b"), L.Dense(2, name="c")])
    assert set(units_read(model, {"c": only((3, 2), (1, 0))})) == {"a", "c"}
    assert units_read(model, {"c": only((3, 2), (1, 0))})["a"] == [True] * 3


def test_a_layer_that_a_nested_model_calls_too():
    layer = L.Dense(2, name="shared")
    inner_inputs, inputs = keras.Input((2,)), keras.Input((2,))
    inner = keras.Model(inner_inputs, L.Dense(1)(layer(inner_inputs)))
    model = keras.Model(inputs, [L.Dense(1, name="out")(layer(inputs)), inner(inputs)])
    assert "shared" not in units_read(model, {"out": only((2, 1), (0, 0))})


@pytest.mark.parametrize("name", [name for name in LAWS if name not in ("on its own inputs", "captured variable", "zeros")])
def test_compact_takes_out_what_the_walk_calls_unread(name):
    """One answer of both, but for constants: half of the inputs of the last layer are not read."""
    model = randomize(LAWS[name][0](), seed=3)
    deafen(model.get_layer("b"), slice(1, None, 2))
    seen = {}
    walk_back(
        model,
        lambda layer, read: seen.update({layer.name: int(read.sum())}),
        lambda variable: ops.convert_to_numpy(variable) != 0,
    )
    small = kr.compact(model)
    assert small.get_layer("a").kernel.shape[-1] == seen["a"]
    assert {name: small.get_layer(name).bias.shape[0] for name in seen if "conv" not in name or "depth" not in name} == seen


@pytest.mark.parametrize(
    "layer", [lambda: L.DepthwiseConv2D(3, name="d"), lambda: L.PReLU(shared_axes=[1, 2], name="d")], ids=["depthwise", "prelu"]
)
def test_units_unread_behind_depthwise_and_prelu(layer):
    inputs = keras.Input((6, 6, 2))
    model = keras.Model(inputs, L.Conv2D(3, 1, name="b")(layer()(L.Conv2D(8, 3, name="a")(inputs))))
    deafen(model.get_layer("b"), [0, 2, 5, 6])
    read = units_read(model, {"b": ops.convert_to_numpy(model.get_layer("b").kernel) != 0})
    assert read["a"] == [False, True, False, True, True, False, False, True]
    kernel = kr.prune(model, {"a": 0.5}, renormalize=None).get_layer("a").kernel
    assert not ops.convert_to_numpy(kernel)[..., [0, 2, 5, 6]].any()


@pytest.mark.parametrize("name", list(KERNELS))
def test_the_walk_and_compact_agree_on_kernels_of_every_kind(name):
    shape, make = KERNELS[name]
    pooling = (L.GlobalMaxPooling1D, L.GlobalMaxPooling2D, L.GlobalMaxPooling3D)[len(shape) - 2]
    model = sequential(shape, make(5, "a"), L.ReLU(), make(6, "b"), pooling(), L.Dense(4, name="out"))
    deafen(model.get_layer("out"), [0, 3])
    seen = {}
    walk_back(
        model,
        lambda layer, read: seen.update({layer.name: int(read.sum())}),
        lambda variable: ops.convert_to_numpy(variable) != 0,
    )
    small = kr.compact(model)
    # A separable convolution has two kernels and is not visited.
    assert set(seen) == ({"out"} if "separable" in name else {"a", "b", "out"})
    assert {layer.name: layer.output.shape[-1] for layer in small.layers if layer.name in ("b", "out")} == {"b": 4, "out": 4}
    assert {layer.name: layer.output.shape[-1] for layer in small.layers if layer.name in seen} == seen


def test_a_depthwise_channel_of_which_one_product_is_read():
    """Channel 0 makes outputs 0 and 1, channel 1 makes 2 and 3: one that is read is enough."""
    image = keras.Input((4, 4, 1))
    x = L.Conv2D(2, 1, name="maker")(image)
    x = L.DepthwiseConv2D(3, depth_multiplier=2, name="depthwise")(x)
    model = keras.Model(image, L.Dense(2, name="fc")(L.GlobalAveragePooling2D()(x)))
    assert units_read(model, {"fc": only((4, 2), (1, 0))})["maker"] == [True, False]
    assert units_read(model, {"fc": only((4, 2), (2, 1), (3, 0))})["maker"] == [False, True]


def test_a_layer_without_bias_gets_none_where_none_is_needed():
    layers = [L.Dense(3, use_bias=False, name="a"), L.Dense(2, use_bias=False, name="b")]
    model = keras.Sequential([keras.Input((2,)), *layers])
    layers[0].kernel.assign([[1.0, 0.0, 2.0], [3.0, 0.0, 4.0]])
    smaller = kr.compact(model)
    assert [layer.use_bias for layer in smaller.layers] == [False, False]
    assert [tuple(layer.kernel.shape) for layer in smaller.layers] == [(2, 2), (2, 2)]


@pytest.mark.parametrize(("size", "padding", "units"), [(1, "same", 1), (3, "valid", 1), (3, "same", 2)])
@pytest.mark.parametrize("kind", [L.DepthwiseConv2D, L.SeparableConv2D])
def test_constants_pass_where_a_kernel_sees_no_edge(kind, size, padding, units):
    """A constant channel is constant behind a kernel that sees no padding, and can be taken out with the bias that it is."""
    image = keras.Input((4, 4, 1))
    x = L.Conv2D(2, 1, name="maker")(image)
    arguments = {"filters": 2} if kind is L.SeparableConv2D else {}
    x = kind(kernel_size=size, padding=padding, name="middle", **arguments)(x)
    model = keras.Model(image, L.Dense(2, name="fc")(L.GlobalAveragePooling2D()(x)))
    maker = model.get_layer("maker")
    maker.set_weights([np.array([[[[1.0, 0.0]]]]), np.array([0.0, 5.0])])
    samples = np.random.default_rng(0).standard_normal((2, 4, 4, 1)).astype("float32")
    smaller = kr.compact(model)
    np.testing.assert_allclose(
        ops.convert_to_numpy(smaller(samples)), ops.convert_to_numpy(model(samples)), rtol=1e-4, atol=1e-5
    )
    assert smaller.get_layer("maker").filters == units


def test_a_separable_convolution_that_mixes_channels_has_no_constants():
    image = keras.Input((4, 4, 1))
    x = L.Conv2D(2, 1, name="maker")(image)
    x = L.SeparableConv2D(3, 1, activation="softmax", name="middle")(x)
    model = keras.Model(image, L.Dense(2, name="fc")(L.GlobalAveragePooling2D()(x)))
    model.get_layer("maker").set_weights([np.array([[[[1.0, 0.0]]]]), np.array([0.0, 5.0])])
    samples = np.random.default_rng(0).standard_normal((2, 4, 4, 1)).astype("float32")
    smaller = kr.compact(model)
    np.testing.assert_allclose(
        ops.convert_to_numpy(smaller(samples)), ops.convert_to_numpy(model(samples)), rtol=1e-4, atol=1e-5
    )
    assert smaller.get_layer("middle").filters == 3


class Subclassed(keras.Model):
    def __init__(self):
        super().__init__()
        self.first, self.last = L.Dense(4, name="first"), L.Dense(2, name="last")

    def call(self, inputs):
        return self.last(self.first(inputs))


def test_a_subclassed_model_shows_nothing():
    model = Subclassed()
    model(np.zeros((1, 3), "float32"))
    assert units_read(model) == {}
    ties = find_ties(model)
    assert (ties.groups, ties.of_outputs, ties.normalizations) == ({}, set(), {})


def test_normalizations_belong_to_the_kernels_in_front_of_them():
    inputs = keras.Input((6, 6, 2))
    x = L.Conv2D(4, 1, name="a")(inputs)
    one, other = L.BatchNormalization(name="one")(x), L.BatchNormalization(name="other")(x)
    y = L.BatchNormalization(name="third")(L.Conv2D(4, 1, name="b")(L.Add()([one, other])))
    model = keras.Model(inputs, L.BatchNormalization(name="outside")(L.ReLU()(L.Conv2D(4, 1, name="c")(y))))
    ties = find_ties(model)
    found = {name: [layer.name for layer in ties.normalizations[id(model.get_layer(name).kernel)]] for name in ("a", "b", "c")}
    assert found == {"a": ["one", "other"], "b": ["third"], "c": []}
    groups = {name: ties.groups[id(model.get_layer(name).kernel)] for name in ("a", "b", "c")}
    assert len(set(groups.values())) == 3
    assert ties.of_outputs == {groups["c"]}
