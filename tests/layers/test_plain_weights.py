"""Weights of a plain model fit into the same model with prunable layers; its own states come back with their masks."""

import pathlib

import keras
import numpy as np
import pytest
from keras import ops

import keras_renorm as kr
from keras_renorm.src.layers.prunable import NEVER, prunable_layers

L = keras.layers
DATA = pathlib.Path(__file__).parents[1] / "data"


def plain_net(**units):
    """Every place of a kernel: drop-in, wrapped, wrapped block, within a wrapper of Keras, within a nested model, plain."""
    image = keras.Input((5, 5, 2))
    x = L.Conv2D(4, 3, name="conv")(L.Normalization(name="norm")(image))
    x = keras.Sequential([keras.Input((3, 3, 4)), L.BatchNormalization(), L.Conv2D(4, 1)], name="nested")(x)
    x = L.Reshape((9, 4))(x)
    x = L.TimeDistributed(L.Dense(4, name="inner"), name="each")(x)
    x = L.Bidirectional(L.LSTM(2, return_sequences=True), name="both")(x)
    x = L.MultiHeadAttention(2, 2, name="attention")(x, x)
    x = L.Dense(4, name="first")(L.Flatten()(x))
    x = L.Dense(4, name="second")(x)
    return keras.Model(image, L.Dense(units.get("units", 2), name="head")(x))


@pytest.fixture(scope="module")
def trained():
    keras.utils.set_random_seed(3)
    model = plain_net()
    model.get_layer("norm").adapt(np.random.default_rng(0).normal(5, 3, (64, 5, 5, 2)))
    for variable in model.weights:
        if not variable.path.startswith("norm/"):
            variable.assign(np.abs(ops.convert_to_numpy(variable)) + np.random.default_rng(1).uniform(0.1, 0.5, variable.shape))
    return model


def pruned_net(**units):
    """Its prunable counterpart in the middle of a training; `second` is plain in it."""
    kernels = [L.Conv2D, L.TimeDistributed, L.Bidirectional, L.MultiHeadAttention, "first", "head"]
    model = kr.to_prunable(plain_net(**units), layers=kernels, renormalize="l2")
    for layer in prunable_layers(model):
        layer.update_masks(0.5)
        layer.count_steps(64, write=True)
    return model


def outputs_of(model):
    return ops.convert_to_numpy(model(np.random.default_rng(2).normal(5, 3, (4, 5, 5, 2))))


def assert_is(model, plain):
    np.testing.assert_allclose(outputs_of(model), outputs_of(plain), rtol=1e-5, atol=1e-6)
    for layer in prunable_layers(model):
        assert layer.sparsity == 0
        assert int(ops.convert_to_numpy(layer.pruning_step)) == NEVER
        assert all((ops.convert_to_numpy(kernel.scale) == 1).all() for kernel in layer.masked_kernels)


def test_set_weights_of_a_model(trained):
    model = pruned_net()
    # Keras' `set_weights` does not tell Normalization either.
    model.get_layer("norm").set_weights(trained.get_layer("norm").get_weights())
    model.get_layer("norm").finalize_state()
    model.set_weights(trained.get_weights())
    assert_is(model, trained)


def test_set_weights_of_each_layer(trained):
    model = pruned_net()
    for ours, theirs in zip(model.layers, trained.layers, strict=True):
        ours.set_weights(theirs.get_weights())
    model.get_layer("norm").finalize_state()
    assert_is(model, trained)


@pytest.mark.parametrize("name", ["plain.weights.h5", "plain.keras", "plain.weights.json"])
def test_load_weights(trained, tmp_path, name):
    if name.endswith(".json"):
        trained.save_weights(tmp_path / name, max_shard_size=1e-6)
    elif name.endswith(".keras"):
        trained.save(tmp_path / name)
    else:
        trained.save_weights(tmp_path / name)
    model = pruned_net()
    model.load_weights(tmp_path / name)
    assert_is(model, trained)


@pytest.mark.filterwarnings("ignore:You are saving your model as an HDF5 file")
@pytest.mark.parametrize("by_name", [False, True])
def test_load_weights_of_the_legacy_format(trained, tmp_path, by_name):
    trained.save(tmp_path / "plain.h5")
    model = pruned_net()
    model.load_weights(tmp_path / "plain.h5", by_name=by_name)
    assert_is(model, trained)


@pytest.mark.filterwarnings("ignore:You are saving your model as an HDF5 file")
def test_by_name_leaves_other_layers_as_they_are(tmp_path):
    inputs = keras.Input((4,))
    plain = keras.Model(inputs, L.Dense(3, name="shared")(inputs))
    plain.save(tmp_path / "plain.h5")
    model = keras.Sequential([keras.Input((4,)), kr.layers.PrunableDense(3, name="shared"), kr.layers.PrunableDense(3)])
    for layer in model.layers:
        layer.update_masks(0.5)
    other = model.layers[1].get_weights()
    model.load_weights(tmp_path / "plain.h5", by_name=True)
    np.testing.assert_array_equal(model.layers[0].get_weights()[0], plain.get_weights()[0])
    assert model.layers[0].sparsity == 0
    for before, after in zip(other, model.layers[1].get_weights(), strict=True):
        np.testing.assert_array_equal(before, after)


# What Keras says on its second way through a model of which a layer failed.
@pytest.mark.filterwarnings("ignore:Skipping nested container")
def test_skip_mismatch_leaves_what_does_not_fit_as_it_is(trained, tmp_path):
    trained.save_weights(tmp_path / "plain.weights.h5")
    model = pruned_net(units=3)
    head = model.get_layer("head").get_weights()
    with pytest.raises(ValueError, match="1 objects could not be loaded"):
        model.load_weights(tmp_path / "plain.weights.h5")
    with pytest.warns(UserWarning, match=r"1 objects could not be loaded(.|\n)*'head' expected shape \(4, 3\)"):
        model.load_weights(tmp_path / "plain.weights.h5", skip_mismatch=True)
    for before, after in zip(head, model.get_layer("head").get_weights(), strict=True):
        np.testing.assert_array_equal(before, after)
    assert model.get_layer("conv").sparsity == 0
    model.get_layer("head").set_weights(pruned_net(units=3).get_layer("head").get_weights())
    assert model.get_layer("head").sparsity == 0.5


def test_the_optimizer_goes_on(tmp_path):
    x, y = np.ones((4, 6)), np.ones((4, 2))
    nets = [keras.Sequential([keras.Input((6,)), dense(3), dense(2)]) for dense in (L.Dense, kr.layers.PrunableDense)]
    for net in nets:
        net.compile("adam", "mse", run_eagerly=True)
        net.train_on_batch(x, y)
    plain, model = nets
    plain.train_on_batch(x, y)
    plain.save_weights(tmp_path / "plain.weights.h5")
    model.load_weights(tmp_path / "plain.weights.h5")
    for ours, theirs in zip(model.optimizer.variables, plain.optimizer.variables, strict=True):
        np.testing.assert_array_equal(ops.convert_to_numpy(ours), ops.convert_to_numpy(theirs))
    assert model.train_on_batch(x, y) == pytest.approx(plain.train_on_batch(x, y), rel=1e-6)


class Subclassed(keras.Model):
    """Keras stores `first` by the name of the attribute, and `second` by that of its class."""

    def __init__(self, dense):
        super().__init__()
        self.first, self.second = dense(5), dense(3)

    def call(self, inputs):
        return self.second(self.first(inputs))


def wrapped_dense(units):
    return kr.layers.RenormalizedPruning(L.Dense(units))


@pytest.mark.parametrize("dense", [kr.layers.PrunableDense, wrapped_dense])
def test_a_subclassed_model(dense, tmp_path):
    x = np.random.default_rng(0).standard_normal((2, 4))
    plain, model = Subclassed(L.Dense), Subclassed(dense)
    for net in (plain, model):
        net(x)
    plain.save_weights(tmp_path / "plain.weights.h5")
    loads = [
        lambda: model.load_weights(tmp_path / "plain.weights.h5"),
        lambda: keras.saving.load_weights(model, tmp_path / "plain.weights.h5"),
        lambda: model.set_weights(plain.get_weights()),
    ]
    for load in loads:
        model.first.update_masks(0.5)
        load()
        np.testing.assert_allclose(ops.convert_to_numpy(model(x)), ops.convert_to_numpy(plain(x)), rtol=1e-6)


@pytest.mark.filterwarnings("ignore:The sparsity of")
@pytest.mark.parametrize("name", ["set_weights", "load_own_variables", "mask_zeros"])
def test_plain_weights_are_not_settled(tf, name):
    class Load(keras.callbacks.Callback):
        def on_train_batch_begin(self, batch, logs=None):
            if batch == 15:
                function, layer = self.model.train_function, self.model.layers[0]
                assert function.is_settled(layer.masked_kernels[0])
                loads[name](layer)
                assert not function.is_settled(layer.masked_kernels[0])

    model = keras.Sequential([keras.Input((2,)), kr.layers.PrunableDense(2)])
    values = model.get_weights()[:2]
    loads = {
        "set_weights": lambda layer: layer.set_weights(values),
        "load_own_variables": lambda layer: layer.load_own_variables({str(i): value for i, value in enumerate(values)}),
        "mask_zeros": lambda layer: layer.mask_zeros(),
    }
    model.compile("adam", "mse")
    pruning = kr.callbacks.UpdatePruning(kr.schedules.ConstantSparsity(0.5, 0, 0))
    model.fit(np.ones((40, 2)), np.ones((40, 2)), batch_size=2, verbose=0, callbacks=[pruning, Load()])


def test_zeros_become_the_masks_where_asked():
    layer = kr.layers.PrunableDense(2)
    layer.build((None, 2))
    layer.set_weights([np.array([[1.0, 0.0], [0.0, 2.0]]), np.zeros(2)])
    assert layer.sparsity == 0
    layer.mask_zeros()
    np.testing.assert_array_equal(ops.convert_to_numpy(layer.mask), [[True, False], [False, True]])


def test_quantized_values_are_refused(tmp_path):
    # Two values of int8 and float32, shaped like kernel and bias.
    plain = keras.Sequential([keras.Input((3,)), L.Dense(2, use_bias=False)])
    plain.layers[0].quantize("int8")
    plain.save_weights(tmp_path / "int8.weights.h5")
    model = keras.Sequential([keras.Input((3,)), kr.layers.PrunableDense(2)])
    with pytest.raises(ValueError, match="float32 for 'kernel', but int8 is stored: the layer was quantized"):
        model.load_weights(tmp_path / "int8.weights.h5")


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ([np.ones((3, 2))], r"must hold 5 arrays for 'fc'.*or 2, as its plain counterpart has them. Received: 1 arrays"),
        ([np.ones((2, 3)), np.ones(2)], r"of shape \(3, 2\) for 'fc/kernel'. Received: shape=\(2, 3\). Nothing was changed"),
    ],
)
def test_weights_that_do_not_fit_change_nothing(weights, message):
    layer = kr.layers.PrunableDense(2, name="fc")
    layer.build((None, 3))
    layer.update_masks(0.5)
    before = layer.get_weights()
    with pytest.raises(ValueError, match=message):
        layer.set_weights(weights)
    for one, other in zip(before, layer.get_weights(), strict=True):
        np.testing.assert_array_equal(one, other)


def test_a_training_goes_on_after_plain_weights(tmp_path):
    """Within `fit`, the step goes on where the callback has it, and is saved with the model."""
    model = keras.Sequential([keras.Input((4,)), kr.layers.PrunableDense(2)])
    model.compile("sgd", "mse", run_eagerly=True)
    plain = [np.ones((4, 2)), np.zeros(2)]
    load = keras.callbacks.LambdaCallback(on_epoch_begin=lambda epoch, logs: model.set_weights(plain) if epoch else None)
    update = kr.callbacks.UpdatePruning(kr.schedules.PolynomialDecay(0.0, 0.5, 0, 4, frequency=2))
    model.fit(np.ones((6, 4)), np.ones((6, 2)), batch_size=2, epochs=2, verbose=0, callbacks=[load, update])
    assert model.layers[0].sparsity == 0.5
    assert int(ops.convert_to_numpy(model.layers[0].pruning_step)) == 6


# The states of a model with prunable layers hold kernels and masks of the same moment.


def compiled_net(optimizer="adam"):
    model = keras.Sequential([keras.Input((6,)), kr.layers.PrunableDense(5, activation="relu"), L.Dense(2)])
    model.compile(optimizer, "mse", run_eagerly=True)
    return model


X = np.random.default_rng(0).standard_normal((16, 6)).astype("float32")
Y = X[:, :2] ** 2


def predict(model):
    return ops.convert_to_numpy(model(X))


SCHEDULE = kr.schedules.PolynomialDecay(0.1, 0.8, begin_step=0, end_step=12, frequency=4)


class Remember(keras.callbacks.Callback):
    """The outputs and the sparsity at the end of every epoch."""

    def __init__(self):
        super().__init__()
        self.outputs, self.sparsity = [], []

    def on_epoch_end(self, epoch, logs=None):
        self.outputs.append(predict(self.model))
        self.sparsity.append(self.model.layers[0].sparsity)


def fit(model, *callbacks, **arguments):
    seen = Remember()
    callbacks = [kr.callbacks.UpdatePruning(SCHEDULE), seen, *callbacks]
    model.fit(X, Y, batch_size=4, verbose=0, callbacks=callbacks, **{"epochs": 3, **arguments})
    return seen


@pytest.mark.filterwarnings("ignore:The sparsity of .*, not:UserWarning")
def test_early_stopping_restores_kernels_with_their_masks():
    model = compiled_net()
    stop = keras.callbacks.EarlyStopping(monitor="sparsity", mode="min", restore_best_weights=True, patience=9)
    seen = fit(model, stop)
    assert stop.best_epoch == 0
    assert seen.sparsity[0] < seen.sparsity[-1]
    assert model.layers[0].sparsity == seen.sparsity[0]
    np.testing.assert_array_equal(predict(model), seen.outputs[0])


def test_checkpoints_hold_masks(tmp_path):
    model = compiled_net()
    seen = fit(model, keras.callbacks.ModelCheckpoint(tmp_path / "{epoch}.weights.h5", save_weights_only=True))
    for epoch in (1, 3, 2):
        model.load_weights(tmp_path / f"{epoch}.weights.h5")
        assert model.layers[0].sparsity == seen.sparsity[epoch - 1]
        np.testing.assert_array_equal(predict(model), seen.outputs[epoch - 1])


def test_backup_and_restore_goes_on_with_masks(tmp_path):
    whole, halted = compiled_net(), compiled_net()
    halted.set_weights(whole.get_weights())
    seen = fit(whole, shuffle=False)

    def interrupt(epoch, logs):
        if epoch == 2:
            raise KeyboardInterrupt

    backup = [keras.callbacks.BackupAndRestore(tmp_path), keras.callbacks.LambdaCallback(on_epoch_begin=interrupt)]
    with pytest.raises(KeyboardInterrupt):
        fit(halted, *backup, shuffle=False)
    again = compiled_net()
    fit(again, backup[0], shuffle=False)
    assert again.layers[0].sparsity == seen.sparsity[-1]
    np.testing.assert_allclose(predict(again), seen.outputs[-1], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("overwrite", [None, 4])
def test_averages_of_weights_are_masked(overwrite):
    model = compiled_net(keras.optimizers.Adam(0.1, use_ema=True, ema_momentum=0.9, ema_overwrite_frequency=overwrite))
    fit(model, keras.callbacks.SwapEMAWeights(swap_on_epoch=True) if overwrite is None else keras.callbacks.Callback())
    stripped = kr.strip(model)
    assert np.mean(stripped.layers[0].get_weights()[0] == 0) == model.layers[0].sparsity == 0.8
    x, training = ops.convert_to_tensor(X), dict(training=True)
    np.testing.assert_allclose(*[ops.convert_to_numpy(net(x, **training)) for net in (model, stripped)], rtol=1e-5, atol=1e-6)


def test_states_carry_masks_through_stateless_calls():
    model = compiled_net()
    before = predict(model)
    variables = model.non_trainable_variables
    state = [ops.convert_to_tensor(variable) for variable in variables]
    place = next(i for i, variable in enumerate(variables) if variable is model.layers[0].mask)
    state[place] = ops.zeros(model.layers[0].mask.shape, "bool")
    trainable = [ops.convert_to_tensor(variable) for variable in model.trainable_variables]
    outputs, _ = model.stateless_call(trainable, state, X)
    bias = [ops.convert_to_numpy(layer.bias) for layer in model.layers]
    expected = np.maximum(bias[0], 0) @ model.layers[1].get_weights()[0] + bias[1]
    np.testing.assert_allclose(ops.convert_to_numpy(outputs), np.tile(expected, (16, 1)), rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(predict(model), before)


def test_a_clone_takes_all_weights():
    model = compiled_net()
    model.layers[0].update_masks(0.5)
    clone = keras.models.clone_model(model)
    clone.set_weights(model.get_weights())
    np.testing.assert_array_equal(predict(clone), predict(model))


def test_parameters_are_counted_with_masks_scales_and_step():
    layer = compiled_net().layers[0]
    assert layer.count_params() == (6 * 5 + 5) + 6 * 5 + 5 + 1
    assert sum(np.prod(weight.shape) for weight in layer.trainable_weights) == 6 * 5 + 5


@pytest.mark.filterwarnings("ignore:The sparsity of .*, not:UserWarning")
def test_a_model_saved_before_plain_weights_fitted():
    saved = np.load(DATA / "half_trained.npz")
    generator = np.random.default_rng(0)
    x = [generator.standard_normal(shape).astype("float32") for shape in ((8, 6, 6, 2), (8, 4, 3))]
    model = keras.models.load_model(DATA / "half_trained.keras")
    again = keras.models.clone_model(model)
    again.load_weights(DATA / "half_trained.keras")
    for net in (model, again):
        for variable, name in zip(net.weights, saved.files[1:], strict=True):
            np.testing.assert_array_equal(ops.convert_to_numpy(variable), saved[name])
        np.testing.assert_allclose(net.predict_on_batch(x), saved["outputs"], rtol=1e-5, atol=1e-6)
    go_on = kr.callbacks.UpdatePruning(kr.schedules.ConstantSparsity(0.5, 0))
    model.fit(x, np.ones((8, 2)), batch_size=2, verbose=0, callbacks=[go_on])
    assert model.get_layer("lstm").sparsity == pytest.approx(0.7, abs=0.02)
