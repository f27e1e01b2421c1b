import copy
import pickle

import keras
import numpy as np
import pytest
from keras import ops

import keras_renorm as kr
from keras_renorm.src.layers.plain_variables import plain_values
from keras_renorm.src.layers.prunable import prunable_layers, sparsity_of
from tests import fresh
from tests.layers.cases import CASES, Calling, Naming, Scaled, Tied, as_arguments, model_around, model_inputs
from tests.outputs import outputs

EVERY_LAYER = pytest.mark.parametrize("name", list(CASES))


def to_numpy(value):
    return ops.convert_to_numpy(value)


@EVERY_LAYER
def test_finds_the_kernels(name):
    make, inputs, kernels, scales = CASES[name]
    layer = kr.layers.RenormalizedPruning(make())
    layer(*as_arguments(inputs))
    assert [tuple(kernel.variable.shape) for kernel in layer.masked_kernels] == kernels
    assert [tuple(kernel.mask.shape) for kernel in layer.masked_kernels] == kernels
    assert [tuple(kernel.scale.shape) for kernel in layer.masked_kernels] == scales
    assert len({variable.path for variable in layer.variables}) == len(layer.variables)


@EVERY_LAYER
def test_masks_of_ones_change_nothing(name):
    make, inputs, _, _ = CASES[name]
    inner = make()
    layer = kr.layers.RenormalizedPruning(inner)
    np.testing.assert_allclose(
        to_numpy(layer(*as_arguments(inputs))), to_numpy(inner(*as_arguments(inputs))), rtol=1e-6, atol=1e-6
    )


@EVERY_LAYER
@pytest.mark.parametrize("renormalize", [None, "l1"])
def test_computes_with_the_effective_kernels(name, renormalize):
    make, inputs, _, _ = CASES[name]
    inner = make()
    layer = kr.layers.RenormalizedPruning(inner, group="unit", renormalize=renormalize)
    layer(*as_arguments(inputs))
    layer.update_masks(0.5)
    pruned = to_numpy(layer(*as_arguments(inputs)))
    for kernel in layer.masked_kernels:
        scale = to_numpy(kernel.scale)
        assert (scale == 1).all() == (renormalize is None or kernel.mask.numpy().all())
        kernel.variable.assign(to_numpy(kernel.variable) * to_numpy(kernel.mask) * scale)
    np.testing.assert_allclose(pruned, to_numpy(inner(*as_arguments(inputs))), rtol=1e-5, atol=1e-6)


@EVERY_LAYER
def test_pruned_weights_neither_count_nor_move(name):
    make, inputs, _, _ = CASES[name]
    layer = kr.layers.RenormalizedPruning(make())
    model = model_around(layer, inputs)
    model.compile(keras.optimizers.SGD(0.5), "mse")
    layer.update_masks(0.5)
    x, y = model_inputs(inputs), np.ones((len(as_arguments(inputs)[0]), 2), "float32")
    before = [to_numpy(kernel.variable).copy() for kernel in layer.masked_kernels]
    given = outputs(model, x)
    model.train_on_batch(x, y)
    for kernel, old in zip(layer.masked_kernels, before):
        moved, mask = to_numpy(kernel.variable) != old, to_numpy(kernel.mask)
        assert not moved[~mask].any()
    assert any((to_numpy(kernel.variable) != old).any() for kernel, old in zip(layer.masked_kernels, before))
    for kernel, old in zip(layer.masked_kernels, before):
        kernel.variable.assign(np.where(to_numpy(kernel.mask), old, 1e6))
    head = model.get_layer("head")
    head.set_weights([np.ones_like(weight) for weight in head.get_weights()])
    wild = outputs(model, x)
    for kernel, old in zip(layer.masked_kernels, before):
        kernel.variable.assign(np.where(to_numpy(kernel.mask), old, np.inf))
    np.testing.assert_array_equal(wild, outputs(model, x))
    assert np.isfinite(given).all()


@EVERY_LAYER
def test_config_round_trip(name):
    layer = kr.layers.RenormalizedPruning(
        CASES[name][0](),
        pruning_schedule=kr.schedules.PolynomialDecay(0.0, 0.8, 0, 10, frequency=2),
        criterion=kr.criteria.Random(3),
        pattern=kr.patterns.Block((2, 1)),
        group="unit",
        renormalize=kr.renorm.L2(max_scale=3.0),
        regrow=True,
    )
    again = kr.layers.RenormalizedPruning.from_config(layer.get_config())
    assert again.get_config() == layer.get_config()
    assert again.pruning_schedule == layer.pruning_schedule
    assert again.renormalize == kr.renorm.L2(max_scale=3.0)


FINISH = """
import sys
import keras, numpy as np, keras_renorm as kr
import tests.layers.cases as cases
name, path, out = sys.argv[1:]
keras.utils.set_random_seed(3)
model = keras.models.load_model(path)
inputs = cases.model_inputs(cases.CASES[name][1])
y = np.ones((len(cases.as_arguments(cases.CASES[name][1])[0]), 2), "float32")
model.fit(inputs, y, batch_size=4, epochs=6, initial_epoch=3, shuffle=False, verbose=0,
          callbacks=[kr.callbacks.UpdatePruning()])
np.savez(out, *[v.numpy() for v in model.weights])
"""


@pytest.mark.slow
@EVERY_LAYER
def test_goes_on_in_a_fresh_process_as_if_never_stopped(name, tmp_path):
    make, inputs, _, _ = CASES[name]
    y = np.ones((len(as_arguments(inputs)[0]), 2), "float32")

    def start():
        keras.utils.set_random_seed(3)
        schedule = kr.schedules.PolynomialDecay(0.1, 0.7, begin_step=0, end_step=6, frequency=2)
        model = model_around(kr.layers.RenormalizedPruning(make(), schedule, renormalize="l2"), inputs)
        model.compile("adam", "mse")
        return model

    def fit(model, **epochs):
        callbacks = [kr.callbacks.UpdatePruning(kr.schedules.ConstantSparsity(0.5, 0))]
        model.fit(model_inputs(inputs), y, batch_size=4, shuffle=False, verbose=0, callbacks=callbacks, **epochs)

    uninterrupted = start()
    fit(uninterrupted, epochs=6)
    stopped = start()
    fit(stopped, epochs=3)
    stopped.save(tmp_path / "half.keras")
    fresh.run(FINISH, name, tmp_path / "half.keras", tmp_path / "end.npz")
    with np.load(tmp_path / "end.npz") as end:
        for variable, key in zip(uninterrupted.weights, end, strict=True):
            np.testing.assert_allclose(end[key], to_numpy(variable), rtol=1e-5, atol=1e-6, err_msg=variable.path)


def test_attention_takes_its_own_arguments():
    layer = kr.layers.RenormalizedPruning(keras.layers.MultiHeadAttention(2, 4))
    x = np.ones((2, 5, 8), "float32")
    outputs, scores = layer(x, x, return_attention_scores=True, use_causal_mask=True)
    assert outputs.shape == (2, 5, 8)
    assert scores.shape == (2, 2, 5, 5)


def test_masks_of_sequences_pass_through():
    embedding = kr.layers.RenormalizedPruning(keras.layers.Embedding(9, 4, mask_zero=True))
    inputs = keras.Input((5,), dtype="int32")
    model = keras.Model(inputs, kr.layers.RenormalizedPruning(keras.layers.LSTM(3))(embedding(inputs)))
    plain = kr.strip(model)
    x = np.array([[1, 2, 0, 0, 0], [3, 4, 5, 6, 0]])
    np.testing.assert_allclose(outputs(model, x), outputs(plain, x), rtol=1e-6)
    assert not np.allclose(outputs(model, x)[0], outputs(model, np.array([[1, 2, 7, 7, 7]] * 2))[0])


def test_state_and_losses_of_the_inner_layer_are_kept():
    inner = keras.Sequential(
        [keras.layers.Dense(4, activity_regularizer="l2", kernel_regularizer="l2"), keras.layers.BatchNormalization()]
    )
    layer = kr.layers.RenormalizedPruning(inner)
    x = np.random.default_rng(0).standard_normal((16, 3)).astype("float32") + 5
    layer(x, training=True)
    assert len(layer.losses) == 2
    moving_mean = inner.layers[1].moving_mean
    assert np.abs(to_numpy(moving_mean)).max() > 0
    before = to_numpy(moving_mean).copy()
    layer(x, training=False)
    np.testing.assert_array_equal(to_numpy(moving_mean), before)


def test_a_stateful_layer_keeps_its_state():
    inner = keras.layers.LSTM(4, stateful=True)
    layer = kr.layers.RenormalizedPruning(inner)
    twin = keras.layers.LSTM(4, stateful=True)
    x = np.random.default_rng(0).standard_normal((2, 3, 5)).astype("float32")
    twin.build(x.shape)
    layer.build(x.shape)
    twin.set_weights(inner.get_weights())
    for _ in range(3):
        np.testing.assert_allclose(to_numpy(layer(x)), to_numpy(twin(x)), rtol=1e-6)
    assert layer.stateful
    layer.reset_state()
    twin.reset_state()
    np.testing.assert_allclose(to_numpy(layer(x)), to_numpy(twin(x)), rtol=1e-6)


@pytest.mark.filterwarnings("ignore:Layer .* does not have a `quantize` method")
@pytest.mark.filterwarnings("ignore:.*were skipped because they do not support quantization")
def test_quantizing_the_inner_layer_is_refused():
    model = keras.Sequential([keras.Input((5, 8)), keras.layers.EinsumDense("abc,cd->abd", output_shape=(5, 4))])
    model = kr.to_prunable(model)
    model.quantize("int8")
    with pytest.raises(ValueError, match="no longer has the kernels.*strip"):
        model(np.ones((2, 5, 8), "float32"))


def test_dropout_inside_draws_anew():
    layer = kr.layers.RenormalizedPruning(keras.layers.LSTM(8, dropout=0.5))
    x = np.ones((2, 3, 4), "float32")
    first, second = to_numpy(layer(x, training=True)), to_numpy(layer(x, training=True))
    assert not np.array_equal(first, second)


def test_dtype_policy_of_the_inner_layer():
    layer = kr.layers.RenormalizedPruning(keras.layers.Dense(3, dtype="mixed_bfloat16"))
    assert keras.backend.standardize_dtype(layer(np.ones((2, 4), "float32")).dtype) == "bfloat16"
    assert layer.masked_kernels[0].variable.dtype == "float32"


def test_attributes_of_the_inner_layer_are_reachable():
    model = keras.Sequential([keras.Input((5,), dtype="int32"), keras.layers.Embedding(9, 4, name="emb")])
    model = kr.to_prunable(model)
    layer = model.get_layer("emb")
    assert layer.embeddings is layer.layer.embeddings
    assert layer.input_dim == 9
    assert layer.get_config()["layer"]["config"]["output_dim"] == layer.output_dim == 4
    # Of its own, where it has one; never private ones.
    assert layer.weights is not layer.layer.weights
    assert not hasattr(layer, "_embeddings")
    with pytest.raises(AttributeError, match="has no attribute 'kernel'"):
        layer.kernel  # noqa: B018
    assert kr.layers.RenormalizedPruning(keras.layers.TimeDistributed(keras.layers.Dense(2))).layer.layer.units == 2
    assert kr.layers.RenormalizedPruning(Naming()).get_prunable_weights.__self__.units == 3


def test_attributes_of_a_layer_that_is_not_there_yet():
    bare = kr.layers.RenormalizedPruning.__new__(kr.layers.RenormalizedPruning)
    assert not hasattr(bare, "layer")
    assert not hasattr(bare, "embeddings")


def test_copies():
    layer = kr.layers.RenormalizedPruning(keras.layers.EinsumDense("ab,bc->ac", 4))
    model = keras.Sequential([keras.Input((3,)), layer])
    layer.update_masks(0.5)
    x = np.ones((2, 3), "float32")
    for again in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), copy.copy(model)):
        np.testing.assert_array_equal(to_numpy(again(x)), to_numpy(model(x)))
        assert again.layers[0].equation == "ab,bc->ac"


# Layers that use a layer with masks of its own.


def autoencoder(tied=Tied, **pruning):
    keras.utils.set_random_seed(5)
    inputs = keras.Input((6,))
    encode = kr.layers.PrunableDense(4, group="unit", renormalize="l2", name="encode", **pruning)
    return keras.Model(inputs, kr.layers.RenormalizedPruning(tied(encode, name="decode"))(encode(inputs)))


def by_hand(model, x):
    """What the plain autoencoder computes with the effective kernel."""
    encode, decode = model.layers[1:]
    kernel = to_numpy(encode.masked_kernels[0].effective())
    return (x @ kernel + to_numpy(encode.bias)) @ kernel.T + to_numpy(decode.bias)


DATA = np.random.default_rng(0).standard_normal((8, 6)).astype("float32")


def test_a_tied_layer_reads_the_effective_kernel(tmp_path):
    schedule = kr.schedules.PolynomialDecay(0.2, 0.5, begin_step=0, end_step=4, frequency=2)
    model = autoencoder(pruning_schedule=schedule)
    model.compile("adam", "mse", run_eagerly=True)
    assert len(model.weights) == len(model.layers[1].weights) + 1
    assert prunable_layers(model) == [model.layers[1]]
    model.layers[1].update_masks(1 / 3)
    assert to_numpy(model.layers[1].scale).min() > 1
    np.testing.assert_allclose(to_numpy(model(DATA)), by_hand(model, DATA), rtol=1e-5, atol=1e-6)
    hidden = to_numpy(model.layers[1].kernel)[~to_numpy(model.layers[1].mask)]
    model.fit(DATA, DATA, batch_size=2, verbose=0, callbacks=[kr.callbacks.UpdatePruning()])
    assert sparsity_of(model) == model.layers[1].sparsity == 0.5
    assert [row.layer for row in kr.summary(model).rows] == ["encode"]
    np.testing.assert_allclose(to_numpy(model(DATA, training=True)), by_hand(model, DATA), rtol=1e-5, atol=1e-6)
    assert np.isin(hidden, to_numpy(model.layers[1].kernel)).all()
    model.save(tmp_path / "tied.keras")
    again = keras.models.load_model(tmp_path / "tied.keras")
    assert len(again.weights) == len(model.weights)
    assert again.layers[2].source is again.layers[1]
    np.testing.assert_array_equal(to_numpy(again(DATA)), to_numpy(model(DATA)))
    again.layers[1].update_masks(2 / 3)
    np.testing.assert_allclose(to_numpy(again(DATA)), by_hand(again, DATA), rtol=1e-5, atol=1e-6)


APPLY = """
import sys
import keras, numpy as np, keras_renorm
import tests.layers.cases
folder = sys.argv[1]
model = keras.models.load_model(f"{folder}/tied.keras")
np.save(f"{folder}/y.npy", model.predict_on_batch(np.load(f"{folder}/x.npy")))
"""


@pytest.mark.slow
def test_a_tied_layer_in_a_fresh_process(tmp_path):
    model = autoencoder()
    model.layers[1].update_masks(1 / 3)
    model.save(tmp_path / "tied.keras")
    np.save(tmp_path / "x.npy", DATA)
    fresh.run(APPLY, tmp_path)
    np.testing.assert_allclose(np.load(tmp_path / "y.npy"), by_hand(model, DATA), rtol=1e-5, atol=1e-6)


def test_plain_weights_fit_into_tied_layers(tmp_path):
    inputs = keras.Input((6,))
    encode = keras.layers.Dense(4)
    plain = keras.Model(inputs, Tied(encode)(encode(inputs)))
    plain.save_weights(tmp_path / "plain.weights.h5")
    for load in (lambda model: model.load_weights(tmp_path / "plain.weights.h5"), lambda m: m.set_weights(plain.get_weights())):
        model = autoencoder()
        model.layers[1].update_masks(1 / 3)
        load(model)
        np.testing.assert_allclose(to_numpy(model(DATA)), to_numpy(plain(DATA)), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("shape", [(3, 6), (3, 2, 6)])
@pytest.mark.parametrize("wrapped", [False, True])
def test_scales_are_applied_once_where_the_prunable_layer_is_called(shape, wrapped):
    x = np.random.default_rng(1).standard_normal(shape).astype("float32")
    pruning = dict(group="unit", renormalize="l2")
    source = kr.layers.PrunableDense(4, activation="relu", **pruning)
    if wrapped:
        source = kr.layers.RenormalizedPruning(keras.layers.Dense(4, activation="relu"), **pruning)
    source(x)
    source.update_masks(1 / 3)
    layer = kr.layers.RenormalizedPruning(Calling(source), **pruning)
    layer(x)
    layer.update_masks(0.5)
    assert [tuple(kernel.variable.shape) for kernel in layer.masked_kernels] == [(6, 4)]
    shared, own = (to_numpy(part.masked_kernels[0].effective()) for part in (source, layer))
    expected = np.maximum(x @ shared + to_numpy(source.bias), 0) + x @ shared + x @ own + to_numpy(source.bias)
    np.testing.assert_allclose(to_numpy(layer(x)), expected, rtol=1e-5, atol=1e-6)
    assert [value.shape for value in plain_values(layer)] == [(6, 4), (6, 4), (4,)]
    # Alone it is what it was.
    np.testing.assert_allclose(to_numpy(source(x)), np.maximum(x @ shared + to_numpy(source.bias), 0), rtol=1e-5, atol=1e-6)


def test_a_layer_without_a_kernel():
    with pytest.raises(ValueError, match="Layer 're' .*has nothing to prune.*get_prunable_weights"):
        kr.layers.RenormalizedPruning(keras.layers.ReLU(name="re"))(np.ones((2, 3)))


def test_not_a_layer():
    with pytest.raises(TypeError, match="`layer` must be a `keras.Layer`"):
        kr.layers.RenormalizedPruning("dense")


def test_a_layer_that_is_prunable_already():
    with pytest.raises(ValueError, match="prunable already"):
        kr.layers.RenormalizedPruning(kr.layers.PrunableDense(3))


def test_a_layer_of_tf_keras():
    tf_keras = pytest.importorskip("tf_keras")
    with pytest.raises(TypeError, match=r"object of `tf_keras`.*import keras"):
        kr.layers.RenormalizedPruning(tf_keras.layers.Dense(3))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"criterion": "magnitud"}, "`criterion` is not known.*magnitude"),
        ({"pattern": "blocks"}, "`pattern` is not known"),
        ({"group": "filter"}, "`group` must be one of"),
        ({"renormalize": "l3"}, "`renormalize` is not known"),
        ({"pruning_schedule": 0.5}, "`pruning_schedule` must be a schedule"),
        ({"pattern": "unit", "group": "unit"}, "Pass `group='layer'`"),
    ],
)
def test_wrong_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        kr.layers.RenormalizedPruning(Scaled(), **arguments)
