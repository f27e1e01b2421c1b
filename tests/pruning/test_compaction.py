import keras
import numpy as np
import pytest
from keras import ops

import keras_renorm as kr
from keras_renorm.src.models.channels import walks

L = keras.layers


def randomize(model, seed=0):
    generator = np.random.default_rng(seed)
    for variable in model.variables:
        if "float" in keras.backend.standardize_dtype(variable.dtype):
            value = generator.standard_normal(variable.shape) * (0.5 if len(variable.shape) > 1 else 1)
            variable.assign(np.abs(value) + 0.3 if "variance" in variable.name else value)
    return model


def kill(layer, units, biases=True):
    """Take all weights of some units (along the last axis) away, and their biases."""
    for variable in layer.trainable_variables[: None if biases else 1]:
        value = ops.convert_to_numpy(variable).copy()
        value[..., units] = 0
        variable.assign(value)


def deafen(layer, inputs):
    """Take all weights that read some inputs away."""
    value = ops.convert_to_numpy(layer.kernel).copy()
    value[..., inputs, :] = 0
    layer.kernel.assign(value)


def samples(model, count=5, seed=1):
    generator = np.random.default_rng(seed)
    made = []
    for tensor in model.inputs:
        if "int" in tensor.dtype:
            made.append(generator.integers(0, 5, (count, *tensor.shape[1:])).astype(tensor.dtype))
        else:
            made.append(generator.standard_normal((count, *tensor.shape[1:])).astype("float32"))
    return made if len(made) > 1 else made[0]


def same_outputs(model, small):
    x = samples(model)
    before, after = (keras.tree.flatten(one(x, training=False)) for one in (model, small))
    for one, other in zip(before, after, strict=True):
        one, other = ops.convert_to_numpy(one), ops.convert_to_numpy(other)
        np.testing.assert_allclose(one, other, atol=1e-5 * max(1, np.abs(one).max()))


def check(model, sizes):
    """Compact, compare the outputs, and compare the shapes of the first weights of some layers."""
    before = [weight.copy() for weight in model.get_weights()]
    small = kr.compact(model)
    same_outputs(model, small)
    assert {name: tuple(small.get_layer(name).variables[0].shape) for name in sizes} == sizes
    assert all(np.array_equal(one, other) for one, other in zip(before, model.get_weights()))
    return small


def sequential(shape, *layers, dtype="float32"):
    return randomize(keras.Sequential([keras.Input(shape, dtype=dtype), *layers]))


# What goes.


def test_units_that_nothing_reads():
    model = sequential((4,), L.Dense(6, "relu", name="a"), L.Dense(5, "tanh", name="b"), L.Dense(3, name="c"))
    deafen(model.get_layer("b"), [0, 2])
    deafen(model.get_layer("c"), [4])
    small = check(model, {"a": (4, 4), "b": (4, 4), "c": (4, 3)})
    assert type(small) is keras.Sequential
    assert small.name == model.name


def test_what_only_dead_units_read_goes_too():
    model = sequential((4,), L.Dense(3, "relu", name="a"), L.Dense(2, "relu", name="b"), L.Dense(3, name="c"))
    kernel = np.array([[1, 0], [0, 1], [1, 1]], "float32")
    model.get_layer("b").kernel.assign(kernel)
    deafen(model.get_layer("c"), [0])
    check(model, {"a": (4, 2), "b": (2, 1), "c": (1, 3)})


@pytest.mark.parametrize("activation", ["relu", "sigmoid", "gelu", None])
def test_constants_move_into_the_bias(activation):
    model = sequential(
        (4,), L.Dense(6, activation, name="a"), L.Dense(5, "relu", use_bias=False, name="b"), L.Dense(3, name="c")
    )
    kill(model.get_layer("a"), [1, 3], biases=False)
    small = check(model, {"a": (4, 4), "b": (4, 5)})
    assert small.get_layer("b").use_bias


def test_constants_of_constants():
    model = sequential((4,), L.Dense(3, "relu", name="a"), L.Dense(2, "tanh", name="b"), L.Dense(3, name="c"))
    kill(model.get_layer("a"), [0], biases=False)
    model.get_layer("b").kernel.assign([[1, 1], [0, 1], [0, 1]])
    check(model, {"a": (4, 2), "b": (2, 1), "c": (1, 3)})


def test_a_layer_keeps_one_unit_at_least():
    model = sequential((4,), L.Dense(3, "relu", name="a"), L.Dense(2, name="b"))
    kill(model.get_layer("a"), slice(None), biases=False)
    check(model, {"a": (4, 1), "b": (1, 2)})


def test_outputs_stay_whatever_they_are():
    model = sequential((4,), L.Dense(3, name="a"), L.Dense(3, name="b"))
    kill(model.get_layer("b"), [1])
    check(model, {"a": (4, 3), "b": (3, 3)})


def test_softmax_in_between_needs_all_units():
    model = sequential((4,), L.Dense(4, "softmax", name="a"), L.Dense(2, name="b"))
    deafen(model.get_layer("b"), [1])
    kill(model.get_layer("a"), [2])
    check(model, {"a": (4, 4)})


# Kinds of layers: a dead second channel of "a" goes through to "b", in the middle what is tested.
BETWEEN = {
    "nothing": ((8, 8, 3), lambda: []),
    "normalization": ((8, 8, 3), lambda: [L.BatchNormalization(), L.ReLU()]),
    "activations": ((8, 8, 3), lambda: [L.LeakyReLU(), L.ELU(), L.Activation("swish"), L.PReLU(shared_axes=[1, 2])]),
    "prelu": ((8, 8, 3), lambda: [L.PReLU()]),
    "max pooling": ((8, 8, 3), lambda: [L.MaxPooling2D(padding="same", strides=3)]),
    "average pooling": ((8, 8, 3), lambda: [L.AveragePooling2D(3, padding="same", strides=2)]),
    "upsampling, cropping": ((8, 8, 3), lambda: [L.UpSampling2D(), L.Cropping2D(1), L.SpatialDropout2D(0.5), L.Dropout(0.5)]),
    "padding": ((8, 8, 3), lambda: [L.ZeroPadding2D(1)]),
    "reshape": ((8, 8, 3), lambda: [L.Reshape((4, 16, 4))]),
    "rescaling": ((8, 8, 3), lambda: [L.Rescaling(2.0, 0.5)]),
    "identity": ((8, 8, 3), lambda: [L.Identity(), L.GaussianNoise(0.1)]),
}


@pytest.mark.parametrize("how", ["unread", "zero", "constant"])
@pytest.mark.parametrize("name", list(BETWEEN))
def test_channels_go_through(name, how):
    shape, layers = BETWEEN[name]
    model = sequential(shape, L.Conv2D(4, 3, padding="same", name="a"), *layers(), L.Conv2D(5, 3, name="b"))
    if how == "unread":
        deafen(model.get_layer("b"), [1])
    else:
        kill(model.get_layer("a"), [1], biases=how == "zero")
    # What is padded with zeros and what has a slope for each place is no longer constant.
    stays = (how == "constant" and name in ("padding",)) or (how == "constant" and name == "prelu" and _negative(model))
    check(model, {"a": (3, 3, 3, 4 if stays else 3), "b": (3, 3, 4 if stays else 3, 5)})


def _negative(model):
    return float(model.get_layer("a").bias[1]) < 0


def test_constants_at_the_edge_of_a_padded_convolution_stay():
    model = sequential((6, 6, 2), L.Conv2D(4, 1, name="a"), L.Conv2D(3, 3, padding="same", name="b"))
    kill(model.get_layer("a"), [1], biases=False)
    check(model, {"a": (1, 1, 2, 4)})
    kill(model.get_layer("a"), [1])
    check(model, {"a": (1, 1, 2, 3), "b": (3, 3, 3, 3)})


KERNELS = {
    "conv1d": ((9, 3), lambda units, name: L.Conv1D(units, 3, name=name)),
    "conv1d causal": ((9, 3), lambda units, name: L.Conv1D(units, 3, padding="causal", dilation_rate=2, name=name)),
    "conv2d": ((7, 7, 3), lambda units, name: L.Conv2D(units, 3, strides=2, padding="same", name=name)),
    "conv3d": ((5, 5, 5, 3), lambda units, name: L.Conv3D(units, 2, name=name)),
    "conv2d transposed": ((4, 4, 3), lambda units, name: L.Conv2DTranspose(units, 3, strides=2, padding="same", name=name)),
    "conv1d transposed": ((4, 3), lambda units, name: L.Conv1DTranspose(units, 3, name=name)),
    "separable": ((7, 7, 3), lambda units, name: L.SeparableConv2D(units, 3, depth_multiplier=2, name=name)),
    "separable same": ((7, 7, 3), lambda units, name: L.SeparableConv2D(units, 3, padding="same", name=name)),
    "separable 1d": ((7, 3), lambda units, name: L.SeparableConv1D(units, 3, name=name)),
    "dense": ((7, 3), lambda units, name: L.Dense(units, name=name)),
    "einsum": ((7, 3), lambda units, name: L.EinsumDense("xya,ab->xyb", (None, units), bias_axes="b", name=name)),
    "einsum without bias": ((7, 3), lambda units, name: L.EinsumDense("...a,ab->...b", units, name=name)),
}


@pytest.mark.parametrize("how", ["unread", "zero", "constant"])
@pytest.mark.parametrize("name", list(KERNELS))
def test_kernels_of_every_kind(name, how):
    """Twice the same kind in a row, with the channels of the first one and of the second one dead."""
    shape, make = KERNELS[name]
    model = sequential(
        shape, make(5, "a"), L.ReLU(), make(6, "b"), L.GlobalMaxPooling1D() if len(shape) == 2 else L.Flatten(), L.Dense(4)
    )
    a, b = model.get_layer("a"), model.get_layer("b")
    axis = -2 if "transposed" in name else -1
    for layer, dead in ((a, [1, 2]), (b, [0])):
        kernel = getattr(layer, "pointwise_kernel", getattr(layer, "kernel", None))
        value = np.moveaxis(ops.convert_to_numpy(kernel).copy(), axis, -1)
        if how != "unread":
            value[..., dead] = 0
        kernel.assign(np.moveaxis(value, -1, axis))
        if how == "zero" and layer.bias is not None:
            bias = ops.convert_to_numpy(layer.bias).copy()
            bias[dead] = 0
            layer.bias.assign(bias)
    if how == "unread":
        kernel = b.depthwise_kernel if "separable" in name else b.kernel
        value = np.moveaxis(ops.convert_to_numpy(kernel).copy(), -1 if "transposed" in name else -2, 0)
        value[[1, 2]] = 0
        kernel.assign(np.moveaxis(value, 0, -1 if "transposed" in name else -2))
    small = kr.compact(model)
    same_outputs(model, small)
    padded = any(word in name for word in ("same", "causal", "transposed")) or name == "conv2d"
    if how in ("unread", "zero") or not padded:
        assert small.get_layer("a").count_params() < a.count_params()
        assert small.get_layer("b").count_params() < b.count_params()


@pytest.mark.parametrize("multiplier", [1, 2])
@pytest.mark.parametrize("how", ["unread", "zero", "constant", "depthwise"])
@pytest.mark.parametrize("padding", ["same", "valid"])
def test_depthwise_convolutions(multiplier, how, padding):
    depthwise = L.DepthwiseConv2D(3, depth_multiplier=multiplier, padding=padding, activation="relu", name="d")
    model = sequential((6, 6, 3), L.Conv2D(4, 1, name="a"), depthwise, L.Conv2D(5, 1, name="b"))
    if how == "unread":
        deafen(model.get_layer("b"), np.arange(multiplier, 2 * multiplier))
    elif how == "depthwise":
        kernel = ops.convert_to_numpy(depthwise.kernel).copy()
        kernel[:, :, 1] = 0
        depthwise.kernel.assign(kernel)
    else:
        kill(model.get_layer("a"), [1], biases=how == "zero")
    left = 4 if how == "constant" and padding == "same" else 3
    check(model, {"a": (1, 1, 3, left), "d": (3, 3, left, multiplier), "b": (1, 1, left * multiplier, 5)})


def test_flatten_and_the_way_back():
    model = sequential(
        (4, 4, 2), L.Conv2D(3, 3, name="a"), L.Flatten(), L.Dense(12, name="b"), L.Reshape((2, 2, 3)), L.Conv2D(2, 1, name="c")
    )
    deafen(model.get_layer("c"), [2])
    kernel = ops.convert_to_numpy(model.get_layer("b").kernel).copy().reshape(4, 3, 12)
    kernel[:, 0] = 0
    model.get_layer("b").kernel.assign(kernel.reshape(12, 12))
    check(model, {"a": (3, 3, 2, 2), "b": (8, 8), "c": (1, 1, 2, 2)})


def test_embeddings():
    model = sequential((6,), L.Embedding(5, 4, name="words"), L.Dense(3, name="b"), dtype="int32")
    deafen(model.get_layer("b"), [1])
    table = ops.convert_to_numpy(model.get_layer("words").embeddings).copy()
    table[:, 2] = 0.5
    model.get_layer("words").embeddings.assign(table)
    check(model, {"words": (5, 2), "b": (2, 3)})


@pytest.mark.parametrize("kind", [L.LSTM, L.GRU, L.SimpleRNN])
def test_recurrent_layers_read_less(kind):
    model = sequential((6, 3), L.Dense(5, name="a"), kind(4, return_sequences=True, name="rnn"), L.Dense(2, name="b"))
    cell = model.get_layer("rnn").cell
    kernel = ops.convert_to_numpy(cell.kernel).copy()
    kernel[[0, 3]] = 0
    cell.kernel.assign(kernel)
    check(model, {"a": (3, 3), "rnn": (3, kernel.shape[1])})


def attention_model(**arguments):
    query, value = keras.Input((5, 3)), keras.Input((4, 3))
    q, v = L.Dense(6, name="q")(query), L.Dense(7, name="v")(value)
    x = L.MultiHeadAttention(3, 4, value_dim=5, name="attention", **arguments)(q, v)
    return randomize(keras.Model([query, value], L.Dense(2, name="b")(x)))


@pytest.mark.parametrize("arguments", [{}, dict(use_bias=False), dict(output_shape=8)], ids=str)
def test_attention(arguments):
    model = attention_model(**arguments)
    attention = model.get_layer("attention")
    for part, inputs in ((attention.query_dense, [1]), (attention.key_dense, [2, 3]), (attention.value_dense, [2, 4])):
        kernel = ops.convert_to_numpy(part.kernel).copy()
        kernel[inputs] = 0
        part.kernel.assign(kernel)
    output = ops.convert_to_numpy(attention.output_dense.kernel).copy()
    output[0] = 0
    attention.output_dense.kernel.assign(output)
    deafen(model.get_layer("b"), [4])
    small = check(model, {"q": (3, 5), "v": (3, 6)})
    assert small.get_layer("attention").query_dense.kernel.shape == (5, 2, 4)
    assert small.get_layer("attention").output_dense.kernel.shape[-1] == output.shape[-1] - 1


@pytest.mark.parametrize("kind", ["depthwise", "separable", "convolution"])
def test_softmax_over_channels_needs_them_all(kind):
    make = {
        "depthwise": lambda: L.DepthwiseConv2D(3, activation="softmax", name="d"),
        "separable": lambda: L.SeparableConv2D(4, 3, activation="softmax", name="d"),
        "convolution": lambda: L.Conv2D(4, 3, activation="softmax", name="d"),
    }[kind]
    model = sequential((6, 6, 3), L.Conv2D(4, 1, name="a"), make(), L.Conv2D(5, 1, name="b"))
    deafen(model.get_layer("b"), [1])
    small = check(model, {"a": (1, 1, 3, 4), "b": (1, 1, 4, 5)})
    # One that is constant before the softmax is not after it; what makes it need not be there.
    kill(model.get_layer("a"), [2], biases=False)
    small = kr.compact(model)
    same_outputs(model, small)
    assert tuple(small.get_layer("b").kernel.shape) == (1, 1, 4, 5)


@pytest.mark.parametrize(
    ("shared", "bias", "left"),
    [
        (None, -1.0, 4),  # each place makes something else of it
        (None, 1.0, 3),
        ([1, 2], -1.0, 3),
    ],
)
def test_slopes_for_each_place_or_each_channel(shared, bias, left):
    model = sequential((4, 4, 2), L.Conv2D(4, 1, name="a"), L.PReLU(shared_axes=shared), L.Conv2D(3, 3, name="b"))
    kill(model.get_layer("a"), [1], biases=False)
    model.get_layer("a").bias.assign([0.5, bias, 0.5, -0.5])
    check(model, {"a": (1, 1, 2, left), "b": (3, 3, left, 3)})


@pytest.mark.parametrize(("bias", "heads"), [(0.0, 2), (0.5, 3)])
def test_a_head_without_values_may_have_a_bias(bias, heads):
    model = attention_model()
    attention = model.get_layer("attention")
    kernel = ops.convert_to_numpy(attention.value_dense.kernel).copy()
    kernel[:, 1] = 0
    attention.value_dense.kernel.assign(kernel)
    biases = ops.convert_to_numpy(attention.value_dense.bias).copy()
    biases[1] = bias
    attention.value_dense.bias.assign(biases)
    assert check(model, {}).get_layer("attention").query_dense.kernel.shape[1] == heads


def test_attention_without_any_head_keeps_one():
    model = attention_model()
    output = model.get_layer("attention").output_dense.kernel
    output.assign(ops.zeros_like(output))
    assert check(model, {}).get_layer("attention").query_dense.kernel.shape[1] == 1


@pytest.mark.parametrize(("kind", "states"), [(L.LSTM, 2), (L.GRU, 1), (L.SimpleRNN, 1)])
def test_initial_states_are_read_whole(kind, states):
    inputs, other = keras.Input((6, 3)), keras.Input((3,))
    x = L.Dense(5, name="a")(inputs)
    initial = [L.Dense(4, name=f"state{index}")(other) for index in range(states)]
    x = kind(4, name="rnn")(x, initial_state=initial)
    model = randomize(keras.Model([inputs, other], L.Dense(2, name="b")(x)))
    cell = model.get_layer("rnn").cell
    kernel = ops.convert_to_numpy(cell.kernel).copy()
    kernel[[0, 3]] = 0
    cell.kernel.assign(kernel)
    kill(model.get_layer("state0"), [1])
    check(model, {"a": (3, 3), "state0": (3, 4), "rnn": (3, kernel.shape[1]), "b": (4, 2)})


@pytest.mark.parametrize(("data_format", "left"), [("channels_last", 2), ("channels_first", 3)])
def test_flatten_may_move_channels(data_format, left):
    model = sequential((2, 2, 2), L.Conv2D(3, 1, name="a"), L.Flatten(data_format=data_format), L.Dense(2, name="b"))
    # Where channels are innermost, these are all inputs of the second one.
    deafen(model.get_layer("b"), [1, 4, 7, 10])
    check(model, {"a": (1, 1, 2, left)})


@pytest.mark.parametrize(("multiplier", "together"), [(1, True), (2, False)])
def test_units_on_both_sides_of_a_depthwise_convolution_meet_in_sums(multiplier, together):
    """Where it makes one channel of each."""
    inputs = keras.Input((6, 6, 2))
    x = L.Conv2D(4, 1, name="a")(inputs)
    x = L.DepthwiseConv2D(3, padding="same", depth_multiplier=multiplier, name="d")(x)
    other = L.Conv2D(4 * multiplier, 1, name="other")(inputs)
    model = randomize(keras.Model(inputs, L.Conv2D(2, 1, name="b")(L.Add()([x, other]))))
    ties = walks.find_ties(model)
    groups = {name: ties.groups[id(model.get_layer(name).kernel)] for name in ("a", "other", "b")}
    assert (groups["a"] == groups["other"]) == together
    assert ties.of_outputs == {groups["b"]}


def test_heads_go_alone():
    model = attention_model()
    attention = model.get_layer("attention")
    output = ops.convert_to_numpy(attention.output_dense.kernel).copy()
    output[1] = 0
    attention.output_dense.kernel.assign(output)
    small = check(model, {"q": (3, 6), "v": (3, 7)})
    assert small.get_layer("attention").num_heads == 2


# Graphs.


def residual(merge):
    inputs = keras.Input((6, 6, 3))
    a = L.Conv2D(4, 3, padding="same", name="a")(inputs)
    b = L.BatchNormalization()(L.Conv2D(4, 3, padding="same", use_bias=False, name="b")(inputs))
    x = L.ReLU()(merge([a, b]))
    c = L.Conv2D(x.shape[-1], 3, padding="same", name="c")(x)
    x = merge([x, c])
    return randomize(keras.Model(inputs, L.Dense(2, name="d")(L.GlobalAveragePooling2D()(x))))


@pytest.mark.parametrize("merge", [L.Add, L.Subtract, L.Multiply, L.Average, L.Maximum, L.Minimum])
def test_merged_channels_go_together(merge):
    model = residual(lambda operands: merge()(operands))
    deafen(model.get_layer("c"), [1, 2])
    deafen(model.get_layer("d"), [2])
    check(model, {"a": (3, 3, 3, 3), "b": (3, 3, 3, 3), "c": (3, 3, 3, 3), "d": (3, 2)})


def test_concatenated_channels_go_alone():
    model = residual(lambda operands: L.Concatenate()(operands))
    deafen(model.get_layer("c"), [1, 6])
    deafen(model.get_layer("d"), [1, 8, 15])
    check(model, {"a": (3, 3, 3, 3), "b": (3, 3, 3, 4), "c": (3, 3, 7, 6), "d": (13, 2)})


def test_a_closed_gate_closes_what_it_multiplies():
    """Squeeze and excitation with a hard gate that is zero for one channel."""
    inputs = keras.Input((6, 6, 3))
    x = L.Conv2D(4, 3, name="a")(inputs)
    gate = L.Dense(4, "relu", name="gate")(L.GlobalAveragePooling2D(keepdims=True)(x))
    model = randomize(keras.Model(inputs, L.Conv2D(2, 1, name="b")(L.Multiply()([x, gate]))))
    kill(model.get_layer("gate"), [2])
    deafen(model.get_layer("gate"), [2])
    check(model, {"a": (3, 3, 3, 3), "gate": (3, 3), "b": (1, 1, 3, 2)})


def test_operations_and_broadcasts():
    inputs = keras.Input((6, 3))
    x = L.Dense(4, name="a")(inputs)
    y = x + L.Dense(4, name="b")(inputs)
    y = y * L.Dense(1, name="one")(inputs) - 0.5
    model = randomize(keras.Model(inputs, L.Dense(2, name="c")(y)))
    deafen(model.get_layer("c"), [3])
    check(model, {"a": (3, 3), "b": (3, 3), "one": (3, 1), "c": (3, 2)})


def test_models_within_models():
    inner_input = keras.Input((5,))
    inner = keras.Model(inner_input, L.Dense(4, "relu", name="a")(L.Dense(3, "relu", name="b")(inner_input)), name="inner")
    block = keras.Sequential([keras.Input((4,)), L.Dense(6, "relu", name="a"), L.Dense(3, name="c")], name="block")
    inputs = keras.Input((4,))
    model = randomize(keras.Model(inputs, L.Dense(2, name="d")(block(inner(L.Dense(5, "relu", name="e")(inputs))))))
    deafen(inner.get_layer("a"), [1])
    deafen(inner.get_layer("b"), [0, 4])
    deafen(block.get_layer("c"), [5])
    check(model, {"e": (4, 3), "b": (3, 2), "a": (2, 4), "a_1": (4, 5), "c": (5, 3)})


def test_several_inputs_and_outputs_as_dicts():
    one, other = keras.Input((4,), name="one"), keras.Input((3,), name="other")
    x = L.Dense(6, "relu", name="a")(L.Concatenate()([one, other]))
    model = keras.Model({"one": one, "other": other}, {"y": L.Dense(2, name="b")(x), "z": L.Dense(1, name="c")(x)})
    randomize(model)
    deafen(model.get_layer("b"), [0, 1])
    deafen(model.get_layer("c"), [1, 2])
    small = kr.compact(model)
    assert small.get_layer("a").kernel.shape == (7, 5)
    x = {"one": np.ones((2, 4), "float32"), "other": np.ones((2, 3), "float32")}
    for key, value in model(x).items():
        np.testing.assert_allclose(ops.convert_to_numpy(value), ops.convert_to_numpy(small(x)[key]), atol=1e-5)


# What it does not know.


class Own(keras.Layer):
    def call(self, x):
        return ops.flip(x, axis=-1)


def test_what_it_does_not_know_stays_whole():
    shared = L.Dense(4, "relu", name="shared")
    inputs = keras.Input((4,))
    x = shared(shared(inputs))
    x = Own(name="own")(L.Dense(5, name="a")(x))
    model = randomize(keras.Model(inputs, L.Dense(2, name="b")(L.Dense(6, name="c")(x))))
    deafen(model.get_layer("a"), [1])
    deafen(model.get_layer("c"), [2])
    deafen(model.get_layer("b"), [0])
    small = check(model, {"shared": (4, 4), "a": (4, 5), "c": (5, 5), "b": (5, 2)})
    assert small.compaction_report.left_whole == ("shared", "own")
    assert "Left whole: shared, own" in str(small.compaction_report)


def test_layers_with_weights_of_another_kind_stay_whole():
    model = sequential((4,), L.Dense(6, name="a"), L.Dense(5, name="lora"), L.Dense(3, name="b"))
    deafen(model.get_layer("b"), [1])
    deafen(model.get_layer("lora"), [2])
    model.get_layer("lora").enable_lora(2)
    small = check(model, {"a": (4, 6), "b": (5, 3)})
    assert small.compaction_report.left_whole == ("lora",)


@pytest.mark.parametrize("layer", [lambda: L.Conv2D(4, 3, groups=2, name="g"), lambda: L.LayerNormalization(name="g")])
def test_groups_and_layer_normalization_stay_whole(layer):
    model = sequential((6, 6, 2), L.Conv2D(4, 3, name="a"), layer(), L.Conv2D(2, 1, name="b"))
    deafen(model.get_layer("b"), [1])
    small = check(model, {"a": (3, 3, 2, 4), "b": (1, 1, 4, 2)})
    assert small.compaction_report.left_whole == ("g",)


def test_subclassed_models_are_refused():
    class Mine(keras.Model):
        def __init__(self):
            super().__init__()
            self.layer = L.Dense(2)

        def call(self, x):
            return self.layer(x)

    model = Mine()
    model(np.ones((1, 3)))
    with pytest.raises(ValueError, match="must be a Sequential or Functional model"):
        kr.compact(model)
    with pytest.raises(TypeError, match=r"must be a `keras.Model`"):
        kr.compact("model")


def test_subclasses():
    class WithACall(keras.Model):
        def call(self, x):
            return 2 * super().call(x)

    class WithAStep(keras.Sequential):
        pass

    inputs = keras.Input((3,))
    with pytest.raises(ValueError, match=r"must be a Sequential or Functional model.*WithACall"):
        kr.compact(WithACall(inputs, L.Dense(2)(inputs)))
    with pytest.warns(UserWarning, match=r"is a WithAStep, the smaller one a plain one"):
        assert type(kr.compact(WithAStep([keras.Input((3,)), L.Dense(2)]))) is keras.Sequential
    # Within a model it stays what it is.
    doubling = WithACall(inputs, L.Dense(3)(inputs))
    graph = keras.Model(inputs, L.Dense(2)(doubling(L.Dense(3)(inputs))))
    assert doubling in graph.layers


# Together with the rest.


def test_prunable_layers_report_and_saving(tmp_path):
    model = sequential((8,), L.Dense(16, "relu", name="a"), L.Dense(12, "relu", name="b"), L.Dense(3, name="c"))
    model.compile("adam", "mse")
    prunable = kr.to_prunable(model, layers=["a", "b"], pattern="unit", renormalize="l2")
    for name, sparsity in (("a", 0.5), ("b", 0.25)):
        prunable.get_layer(name).update_masks(sparsity)
    small = check(prunable, {"a": (8, 8), "b": (8, 9), "c": (9, 3)})
    assert small.compiled
    report = small.compaction_report
    assert (report.parameters_before, report.parameters_after) == (16 * 9 + 17 * 12 + 39, 8 * 9 + 9 * 9 + 30)
    assert next((row.layer, row.before, row.after) for row in report.rows) == ("a", (8, 16), (8, 8))
    assert "total" in str(report)
    small.save(tmp_path / "small.keras")
    same_outputs(prunable, keras.models.load_model(tmp_path / "small.keras"))


def test_nothing_to_remove():
    model = sequential((8,), L.Dense(16, "relu"), L.Dense(3))
    small = kr.compact(model)
    same_outputs(model, small)
    assert small.compaction_report.rows == ()
    assert small.count_params() == model.count_params()


@pytest.mark.parametrize("seed", range(4))
def test_random_residual_networks(seed):
    """Unit pruning of a residual network and whatever constants it leaves: the same outputs, fewer parameters."""
    generator = np.random.default_rng(seed)
    model = residual(lambda operands: (L.Add if seed % 2 else L.Concatenate)()(operands))
    dead = generator.permutation(4)[:2]
    for name in "abc":
        kill(model.get_layer(name), dead, biases=bool(seed // 2))
    # At the edges of a padded convolution a constant is not one.
    deafen(model.get_layer("c"), dead)
    small = kr.compact(model)
    same_outputs(model, small)
    assert small.count_params() < model.count_params()


# The law: the compacted model computes what the model computes, which stays as it is, and can be trained.

VECTOR = np.linspace(-1, 1, 8).astype("float32")
IMAGE = (6, 6, 2)


def dense(between):
    """Half of the units of "a" are dead on the way to "b"."""

    def make():
        inputs = keras.Input((5,))
        x = between(L.Dense(8, name="a")(inputs))
        return keras.Model(inputs, L.Dense(3, name="b")(x))

    return make


def conv(between):
    def make():
        inputs = keras.Input(IMAGE)
        x = between(L.Conv2D(8, 3, name="a")(inputs))
        return keras.Model(inputs, L.Conv2D(3, 1, name="b")(x))

    return make


def steps(between):
    def make():
        inputs = keras.Input((6, 4))
        x = between(L.Dense(8, name="a")(inputs))
        return keras.Model(inputs, L.Dense(3, name="b")(x))

    return make


def chain(*layers):
    return lambda x: keras.Sequential(layers)(x)


def nested_training(x):
    block = keras.Sequential([keras.Input((8,)), L.BatchNormalization(), L.Dropout(0.5)])
    return block(x, training=True)


def called_twice(x):
    block = keras.Sequential([keras.Input((8,)), L.Dense(8, "relu")])
    return block(block(x))


def on_its_own_inputs():
    base = keras.Sequential([keras.Input((5,)), L.Dense(8, name="a"), L.Dense(4, name="c")])
    (inputs,) = base.inputs
    return keras.Model(inputs, [base.outputs[0], L.Dense(3, name="b")(base(inputs))])


def captured():
    inputs = keras.Input((5,))
    layer = L.Dense(8, name="a")
    x = L.Dense(8, name="c")(layer(inputs))
    return keras.Model(inputs, L.Dense(3, name="b")(ops.einsum("bu,iu->bi", x, layer.kernel)))


def variable_argument():
    inputs = keras.Input((5,))
    x = L.Dense(8, name="a")(inputs) * keras.Variable(VECTOR, trainable=False)
    return keras.Model(inputs, L.Dense(3, name="b")(x))


def frozen():
    model = dense(lambda x: L.Dense(8, name="c")(x))()
    model.get_layer("c").trainable = False
    return model


LAWS = {
    # Arguments that are no tensors: half of the units can go but where a variable is used.
    "x + vector": (dense(lambda x: x + VECTOR), True),
    "vector - x": (dense(lambda x: ops.subtract(VECTOR, x)), True),
    "x / tensor": (dense(lambda x: x / ops.convert_to_tensor(VECTOR + 2)), True),
    "vector / x": (dense(lambda x: ops.divide(VECTOR + 3, ops.exp(ops.tanh(x)))), True),
    "maximum": (dense(lambda x: ops.maximum(x, VECTOR)), True),
    "keyword": (dense(lambda x: ops.minimum(x, x2=VECTOR)), True),
    "power": (dense(lambda x: ops.tanh(x) ** 2), True),
    "row": (dense(lambda x: x + VECTOR[None]), True),
    "table": (steps(lambda x: x * np.outer(np.arange(6), VECTOR).astype("float32")), True),
    "column": (steps(lambda x: x * np.arange(6, dtype="float32")[:, None]), True),
    "column that is added": (steps(lambda x: x + np.arange(6, dtype="float32")[:, None]), False),
    "number": (dense(lambda x: 2 * x - np.float32(1)), True),
    "zeros": (dense(lambda x: x * np.array([1, 1, 0, 1] * 2, "float32")), True),
    "clip": (dense(lambda x: ops.clip(x, -1, 1)), True),
    "variable": (variable_argument, False),
    "broadcast to channels": (dense(lambda x: L.Dense(1)(x) + VECTOR), None),
    # Layers that hold values a channel.
    "rescaling by channel": (dense(lambda x: L.Rescaling((VECTOR + 2).tolist())(x)), False),
    "rescaling by array": (dense(lambda x: L.Rescaling(2.0, VECTOR)(x)), False),
    "noise shape": (steps(lambda x: L.Dropout(0.5, noise_shape=(None, 1, 8))(x)), False),
    "initializer": (dense(lambda x: L.Dense(8, bias_initializer=keras.initializers.Constant(VECTOR))(x)), False),
    "normalization": (dense(lambda x: L.Normalization(mean=VECTOR.tolist(), variance=(VECTOR + 2).tolist())(x)), False),
    "layer normalization": (dense(lambda x: L.LayerNormalization()(x)), False),
    "prelu": (conv(lambda x: L.PReLU()(x)), True),
    "prelu, channels share": (conv(lambda x: L.PReLU(shared_axes=[3])(x)), True),
    "prelu, places share": (conv(lambda x: L.PReLU(shared_axes=[1, 2])(x)), True),
    "batch normalization": (conv(lambda x: L.BatchNormalization()(x)), True),
    # What is random in training, and what is called as in training.
    "dropout": (dense(lambda x: L.Dropout(0.5)(x)), True),
    "spatial dropout": (conv(lambda x: L.SpatialDropout2D(0.5)(x)), True),
    "gaussian": (dense(lambda x: L.GaussianNoise(0.5)(L.GaussianDropout(0.5)(x))), True),
    "alpha dropout": (dense(lambda x: L.AlphaDropout(0.5)(x)), False),
    "random contrast": (conv(lambda x: L.RandomFlip()(x)), False),
    "dropout in training": (dense(lambda x: L.Dropout(0.5)(x, training=True)), False),
    "noise in training": (dense(lambda x: L.GaussianNoise(0.5)(x, training=True)), False),
    "normalization in training": (dense(lambda x: L.BatchNormalization()(x, training=True)), None),
    "normalization not in training": (dense(lambda x: L.BatchNormalization()(x, training=False)), True),
    "model in training": (dense(nested_training), False),
    "attention with dropout": (steps(lambda x: L.MultiHeadAttention(2, 3, dropout=0.5)(x, x)), True),
    "recurrent with dropout": (steps(lambda x: L.LSTM(4, dropout=0.5, return_sequences=True)(x)), None),
    # Graphs.
    "shared layer": (dense(lambda x: [shared := L.Dense(8), shared(shared(x))][1]), False),
    "shared activation": (dense(lambda x: [shared := L.ReLU(), shared(L.Dense(8)(shared(x)))][1]), False),
    "nested": (dense(chain(L.Dense(8, "relu"), L.Dropout(0.5))), True),
    "nested, twice": (dense(called_twice), False),
    "on its own inputs": (on_its_own_inputs, None),
    "captured variable": (captured, False),
    "frozen": (frozen, True),
}


@pytest.mark.parametrize("name", list(LAWS))
def test_the_law(name):
    make, shrinks = LAWS[name]
    model = randomize(make(), seed=3)
    for layer in (layer for layer in model._flatten_layers() if hasattr(layer, "kernel") and layer.name != "b"):
        kill(layer, slice(1, None, 2), biases=layer.name == "a")
    before = [ops.convert_to_numpy(variable).copy() for variable in model.variables]
    small = kr.compact(model)
    x = samples(model)
    # Both draw from the states that they have.
    with keras.StatelessScope():
        outputs = [keras.tree.flatten(one(x)) for one in (model, small)]
    for one, other in zip(*outputs, strict=True):
        one, other = map(ops.convert_to_numpy, (one, other))
        np.testing.assert_allclose(one, other, atol=1e-5 * np.abs(one).max())
    assert all(np.array_equal(one, ops.convert_to_numpy(other)) for one, other in zip(before, model.variables, strict=True))
    if shrinks is not None:
        assert (small.get_layer("a").kernel.shape[-1] < 8) == shrinks
    assert len(small.trainable_variables) == len(model.trainable_variables)
    small.compile("sgd", "mse", run_eagerly=True)
    values = small.get_layer("a").get_weights()
    small.train_on_batch(
        x, [np.zeros(one.shape) for one in outputs[0]] if len(outputs[0]) > 1 else np.zeros(outputs[0][0].shape)
    )
    assert not np.array_equal(values[0], small.get_layer("a").get_weights()[0])
    # What is trained is the small model alone.
    assert all(np.array_equal(one, ops.convert_to_numpy(other)) for one, other in zip(before, model.variables, strict=True))


ATTRIBUTES = {
    "geometry": ((7, 7), True),
    "nested geometry": (((1, 2), [3]), True),
    "values": ([0.0] * 8, False),
    "array": (np.ones((1, 8)), False),
    "shape": ((None, 8), False),
    "nested shape": ({"shape": [(None, 1, 8)]}, False),
}


@pytest.mark.parametrize("name", ATTRIBUTES)
def test_an_attribute_that_is_not_known_counts_if_it_may_hold_a_value_for_each_channel(name):
    value, shrinks = ATTRIBUTES[name]
    layer = L.Dense(8, name="a")
    # As a later release of Keras may set.
    object.__setattr__(layer, "new_attribute", value)
    model = randomize(keras.Sequential([keras.Input((5,)), layer, L.Dense(3, name="b")]))
    kill(layer, slice(1, None, 2))
    assert (kr.compact(model).count_params() < model.count_params()) == shrinks
