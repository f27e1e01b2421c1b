import keras
import numpy as np
import pytest

import keras_renorm as kr
from keras_renorm.src.layers.prunable import prunable_layers
from tests import fresh

# Many trainings here end before their schedule does.
pytestmark = pytest.mark.filterwarnings("ignore:The sparsity of .* is .*, not ")

X = np.random.default_rng(0).standard_normal((32, 6)).astype("float32")
Y = np.ones((32, 1), "float32")
# Events at 0, 3, 6 and 9.
SCHEDULE = kr.schedules.PolynomialDecay(0.0, 0.75, begin_step=0, end_step=9, frequency=3)


def make(schedule=SCHEDULE, **compile_arguments):
    model = keras.Sequential(
        [keras.Input((6,)), kr.layers.PrunableDense(8, "relu", pruning_schedule=schedule), kr.layers.PrunableDense(1)]
    )
    model.compile(**{"optimizer": "adam", "loss": "mse", **compile_arguments})
    return model


def fit(model, callback=None, batch_size=8, **arguments):
    """Four batches an epoch."""
    callback = callback or kr.callbacks.UpdatePruning(SCHEDULE)
    arguments = {"epochs": 3, "verbose": 0, "shuffle": False, **arguments}
    return model.fit(X, Y, batch_size=batch_size, callbacks=[callback], **arguments)


class Events(keras.callbacks.Callback):
    """Records the sparsity after every batch."""

    def __init__(self, pruning):
        super().__init__()
        self.pruning, self.seen = pruning, []

    def on_train_batch_end(self, batch, logs=None):
        self.seen.append(prunable_layers(self.model)[0].sparsity)


def masks_of(model):
    return [np.asarray(kernel.mask) for layer in prunable_layers(model) for kernel in layer.masked_kernels]


def test_events_come_at_their_steps():
    pruning = kr.callbacks.UpdatePruning(SCHEDULE)
    events = Events(pruning)
    model = make()
    model.fit(X, Y, batch_size=8, epochs=3, verbose=0, callbacks=[pruning, events])
    expected = [SCHEDULE(step - step % 3)[1] if step < 9 else 0.75 for step in range(1, 13)]
    np.testing.assert_allclose(events.seen, [round(s * 48) / 48 for s in expected])


def test_the_end_is_exactly_the_schedules():
    model = make()
    fit(model)
    assert [layer.sparsity for layer in prunable_layers(model)] == [0.75, 0.75]
    assert kr.summary(model).sparsity == 0.75


def test_logs_history_and_progress_bar_hold_the_sparsity(capsys):
    history = fit(make(), verbose=2, validation_data=(X, Y))
    assert history.history["sparsity"][-1] == 0.75
    assert sorted(history.history["sparsity"]) == history.history["sparsity"]
    assert "val_loss" in history.history
    assert "sparsity: 0.75" in capsys.readouterr().out


def test_tensorboard_shows_the_sparsity(tmp_path, tf):
    callbacks = [kr.callbacks.UpdatePruning(SCHEDULE), keras.callbacks.TensorBoard(tmp_path)]
    make().fit(X, Y, batch_size=8, epochs=3, verbose=0, callbacks=callbacks)
    tags = set()
    for path in tmp_path.rglob("*tfevents*"):
        for event in tf.compat.v1.train.summary_iterator(str(path)):
            tags.update(value.tag for value in event.summary.value)
    assert "epoch_sparsity" in tags


several_steps = pytest.mark.skipif(keras.backend.backend() == "torch", reason="Keras on PyTorch takes one step at a time")


@pytest.mark.parametrize("steps_per_execution", [2, 3, 5])
def test_steps_per_execution(steps_per_execution):
    model = make(steps_per_execution=steps_per_execution)
    fit(model)
    assert kr.summary(model).sparsity == 0.75
    assert {int(layer.pruning_step) for layer in prunable_layers(model)} == {12}


@pytest.mark.parametrize("accumulated", [None, 2, 3])
@pytest.mark.parametrize("steps_per_execution", [1, *(pytest.param(steps, marks=several_steps) for steps in (2, 4, 5))])
def test_every_batch_is_a_step(accumulated, steps_per_execution):
    optimizer = keras.optimizers.SGD(0.01, gradient_accumulation_steps=accumulated)
    schedule = kr.schedules.ConstantSparsity(0.5, 31, end_step=31)
    model = make(schedule, optimizer=optimizer, steps_per_execution=steps_per_execution)
    callback = kr.callbacks.UpdatePruning(schedule)
    # 11 batches: none of the numbers divides them.
    fit(model, callback, batch_size=3, epochs=1)
    assert {int(layer.pruning_step) for layer in prunable_layers(model)} == {11}
    assert callback.sparsity == 0
    fit(model, callback, batch_size=3, initial_epoch=1)
    assert {int(layer.pruning_step) for layer in prunable_layers(model)} == {33}
    assert callback.sparsity == 0.5


@pytest.mark.fresh_optimizer
@pytest.mark.parametrize(
    "arguments",
    [
        dict(jit_compile=True),
        dict(run_eagerly=True),
        dict(optimizer=keras.optimizers.SGD(0.01, gradient_accumulation_steps=2)),
    ],
    ids=["xla", "eager", "accumulation"],
)
def test_ways_to_train(arguments):
    model = make(**arguments)
    fit(model)
    assert kr.summary(model).sparsity == 0.75
    assert {int(layer.pruning_step) for layer in prunable_layers(model)} == {12}


@pytest.mark.parametrize("policy", ["mixed_float16", "mixed_bfloat16"])
@pytest.mark.parametrize("steps_per_execution", [1, pytest.param(2, marks=several_steps)])
def test_mixed_precision(policy, steps_per_execution):
    keras.config.set_dtype_policy(policy)
    try:
        model = make(steps_per_execution=steps_per_execution)
        assert {layer.compute_dtype for layer in prunable_layers(model)} == {policy.removeprefix("mixed_")}
        history = fit(model)
    finally:
        keras.config.set_dtype_policy("float32")
    assert kr.summary(model).sparsity == 0.75
    assert {int(layer.pruning_step) for layer in prunable_layers(model)} == {12}
    assert np.isfinite(history.history["loss"]).all()


def test_each_layer_has_its_own_schedule_or_the_callbacks():
    model = make(kr.schedules.ConstantSparsity(0.5, 0, frequency=1))
    fit(model, kr.callbacks.UpdatePruning(kr.schedules.ConstantSparsity(0.25, 0, frequency=1)))
    assert [layer.sparsity for layer in prunable_layers(model)] == [0.5, 0.25]


def test_goes_on_where_it_stopped():
    uninterrupted, stopped = make(), make()
    stopped.set_weights(uninterrupted.get_weights())
    fit(uninterrupted)
    fit(stopped, epochs=1)
    fit(stopped, epochs=3, initial_epoch=1)
    for one, other in zip(uninterrupted.weights, stopped.weights, strict=True):
        np.testing.assert_allclose(np.asarray(one), np.asarray(other), rtol=1e-6)


FINISH = """
import sys
import keras, numpy as np, keras_renorm as kr
from tests.training.callbacks.test_update_pruning import fit
model = keras.models.load_model(sys.argv[1])
fit(model, initial_epoch=1)
np.savez(sys.argv[2], *[v.numpy() for v in model.weights])
"""


def test_goes_on_in_a_fresh_process(tmp_path):
    uninterrupted, stopped = make(), make()
    stopped.set_weights(uninterrupted.get_weights())
    fit(uninterrupted)
    fit(stopped, epochs=1)
    stopped.save(tmp_path / "half.keras")
    fresh.run(FINISH, tmp_path / "half.keras", tmp_path / "end.npz")
    with np.load(tmp_path / "end.npz") as end:
        for one, key in zip(uninterrupted.weights, end, strict=True):
            np.testing.assert_allclose(np.asarray(one), end[key], rtol=1e-6, atol=1e-7)


def test_a_model_saved_in_the_middle_of_an_epoch_knows_its_step(tmp_path):
    class Save(keras.callbacks.Callback):
        def on_train_batch_end(self, batch, logs=None):
            if batch == 1:
                self.model.save(tmp_path / "middle.keras")

    model = make()
    model.fit(X, Y, batch_size=8, epochs=1, verbose=0, callbacks=[kr.callbacks.UpdatePruning(SCHEDULE), Save()])
    saved = keras.models.load_model(tmp_path / "middle.keras")
    assert {int(layer.pruning_step) for layer in prunable_layers(saved)} == {2}


def test_tfmots_schedule_survives_saving(tmp_path):
    tfmot = pytest.importorskip("tensorflow_model_optimization").sparsity.keras
    schedule = tfmot.PolynomialDecay(0.0, 0.75, begin_step=0, end_step=9, frequency=3)
    model = make(schedule)
    fit(model, kr.callbacks.UpdatePruning(schedule), epochs=1)
    model.save(tmp_path / "model.keras")
    again = keras.models.load_model(tmp_path / "model.keras")
    assert prunable_layers(again)[0].pruning_schedule == SCHEDULE
    fit(again, kr.callbacks.UpdatePruning(schedule))
    assert kr.summary(again).sparsity == 0.75


def test_a_training_loop_of_ones_own(tf):
    model = make()
    optimizer = keras.optimizers.Adam()
    pruning = kr.callbacks.UpdatePruning(SCHEDULE)
    pruning.set_model(model)

    @tf.function
    def train_step(x, y):
        with tf.GradientTape() as tape:
            loss = tf.reduce_mean((model(x, training=True) - y) ** 2)
        optimizer.apply(tape.gradient(loss, [v.value for v in model.trainable_variables]), model.trainable_variables)

    seen = []
    for _ in range(10):
        train_step(X, Y)
        pruning.step()
        seen.append(pruning.sparsity)
    assert seen == sorted(seen)
    assert seen[-1] == 0.75


def test_a_mirrored_strategy(tf):
    with tf.distribute.MirroredStrategy(["CPU:0"]).scope():
        model = make()
    fit(model)
    assert kr.summary(model).sparsity == 0.75


@pytest.mark.skipif(keras.backend.backend() != "tensorflow", reason="Keras builds models when `fit` begins elsewhere")
def test_a_model_without_weights_is_told_apart_from_one_without_layers():
    model = keras.Sequential([kr.layers.PrunableDense(2)])
    model.compile("sgd", "mse")
    with pytest.raises(ValueError, match=r"but no weights yet.*model.build"):
        fit(model, kr.callbacks.UpdatePruning(kr.schedules.ConstantSparsity(0.5, 0)))


def test_no_prunable_layers():
    model = keras.Sequential([keras.Input((6,)), keras.layers.Dense(1)])
    model.compile("sgd", "mse")
    with pytest.raises(ValueError, match=r"has no prunable layers.*keras_renorm.to_prunable"):
        fit(model)


def test_no_schedule():
    with pytest.raises(ValueError, match=r"Layers \['prunable_dense_1'\] have no pruning schedule"):
        fit(make(), kr.callbacks.UpdatePruning())


@pytest.mark.parametrize(
    "schedule", [kr.schedules.ConstantSparsity(0.8, 0), lambda step: (True, 0.8)], ids=["known", "unknown"]
)
def test_a_pattern_that_cannot_follow_the_schedule(schedule):
    layers = [kr.layers.PrunableDense(8, pattern=kr.patterns.NOfM(2, 4), name="a"), kr.layers.PrunableDense(1, name="b")]
    model = keras.Sequential([keras.Input((8,)), *layers])
    model.compile("adam", "mse")
    pruning = kr.callbacks.UpdatePruning(schedule)
    with pytest.raises(ValueError, match=r"Layer 'a' cannot follow its schedule: .* 50% .* sparsity=0.8.*get_layer\('a'\)"):
        model.fit(X[:, :1].repeat(8, 1), Y, verbose=0, callbacks=[pruning])
    assert all(mask.all() for mask in masks_of(model))
    # As in `prune` with a dict: a layer of its own sparsity.
    model.get_layer("a").pruning_schedule = kr.schedules.ConstantSparsity(0.5, 0)
    model.fit(X[:, :1].repeat(8, 1), Y, verbose=0, callbacks=[pruning])
    assert [layer.sparsity for layer in prunable_layers(model)] == [0.5, 0.75]


def test_not_a_schedule():
    with pytest.raises(ValueError, match="`pruning_schedule` must be a schedule"):
        kr.callbacks.UpdatePruning(0.5)


def test_a_kernel_that_became_nan_changes_no_layer():
    model = make()
    second = prunable_layers(model)[1]
    second.kernel.assign(np.full((8, 1), np.nan))
    with pytest.raises(ValueError, match=r"'prunable_dense_1' holds 8 values that are NaN"):
        fit(model, kr.callbacks.UpdatePruning(kr.schedules.ConstantSparsity(0.5, 0)), epochs=1)
    assert all(mask.all() for mask in masks_of(model))


def test_less_than_one_event_is_noticed():
    schedule = kr.schedules.ConstantSparsity(0.5, begin_step=1000)
    model = make(schedule)
    fit(model, kr.callbacks.UpdatePruning(schedule), epochs=1)
    with pytest.warns(UserWarning, match="is 0, not .*: these are the weights of step 4, .* at step 1000"):
        kr.strip(model)


@pytest.mark.parametrize("ours_first", [True, False])
def test_backup_and_restore(ours_first, tmp_path):
    class Interrupted(keras.callbacks.Callback):
        def on_epoch_begin(self, epoch, logs=None):
            if epoch == 2:
                raise KeyboardInterrupt

    def callbacks():
        pair = [kr.callbacks.UpdatePruning(SCHEDULE), keras.callbacks.BackupAndRestore(tmp_path / "backup")]
        return pair if ours_first else pair[::-1]

    with pytest.raises(KeyboardInterrupt):
        make().fit(X, Y, batch_size=8, epochs=4, verbose=0, callbacks=[*callbacks(), Interrupted()])
    model = make()
    model.fit(X, Y, batch_size=8, epochs=4, verbose=0, callbacks=callbacks())
    assert {int(layer.pruning_step) for layer in prunable_layers(model)} == {16}
    assert kr.summary(model).sparsity == 0.75


def test_weights_that_are_restored_keep_their_step(tmp_path):
    model = make()
    fit(model, epochs=1)
    model.save_weights(tmp_path / "w.weights.h5")
    fit(model, epochs=3, initial_epoch=1)
    model.load_weights(tmp_path / "w.weights.h5")
    model.save(tmp_path / "model.keras")
    again = keras.models.load_model(tmp_path / "model.keras")
    assert {int(layer.pruning_step) for layer in prunable_layers(again)} == {4}


def test_early_stopping_restores_masks_and_step(tmp_path):
    model = make()
    stopping = keras.callbacks.EarlyStopping("sparsity", patience=1, restore_best_weights=True, mode="min")
    callbacks = [kr.callbacks.UpdatePruning(SCHEDULE), stopping]
    model.fit(X, Y, batch_size=8, epochs=5, verbose=0, callbacks=callbacks)
    step = {int(layer.pruning_step) for layer in prunable_layers(model)}
    assert step == {4}
    model.save(tmp_path / "model.keras")
    again = keras.models.load_model(tmp_path / "model.keras")
    assert {int(layer.pruning_step) for layer in prunable_layers(again)} == step


@several_steps
@pytest.mark.parametrize("wrap", [kr.optimizers.IrrelevanceDecay, keras.optimizers.LossScaleOptimizer])
def test_every_batch_is_a_step_of_a_wrapped_optimizer(wrap):
    optimizer = wrap(keras.optimizers.Adam(gradient_accumulation_steps=3))
    model = make(optimizer=optimizer, steps_per_execution=4)
    fit(model, batch_size=3)
    assert {int(layer.pruning_step) for layer in prunable_layers(model)} == {33}


def test_steps_per_epoch_beyond_whole_executions(tf):
    data = tf.data.Dataset.from_tensor_slices((X, Y)).batch(4).repeat()
    model = make(steps_per_execution=4)
    # Keras trains two executions of four.
    model.fit(data, steps_per_epoch=5, verbose=0, shuffle=False, callbacks=[kr.callbacks.UpdatePruning(SCHEDULE)])
    assert int(model.optimizer.iterations) == 8
    assert {int(layer.pruning_step) for layer in prunable_layers(model)} == {8}


def test_the_best_weights_come_with_their_step_whatever_the_order():
    model = make()
    stopping = keras.callbacks.EarlyStopping("loss", restore_best_weights=True, baseline=-1.0, patience=1)
    callbacks = [stopping, kr.callbacks.UpdatePruning(SCHEDULE)]
    model.fit(X, Y, batch_size=8, epochs=5, verbose=0, callbacks=callbacks)
    assert {int(layer.pruning_step) for layer in prunable_layers(model)} == {4 * (stopping.best_epoch + 1)}


@pytest.mark.filterwarnings("ignore:Your input ran out of data")
@pytest.mark.parametrize("steps_per_execution", [1, 2, 4])
def test_data_of_unknown_size(steps_per_execution, tf):
    data = tf.data.Dataset.from_generator(
        lambda: ((X[i : i + 8], Y[i : i + 8]) for i in (0, 8, 16, 24, 0)),
        output_signature=(tf.TensorSpec((None, 6)), tf.TensorSpec((None, 1))),
    )
    model = make(steps_per_execution=steps_per_execution)
    model.fit(data, epochs=3, verbose=0, shuffle=False, callbacks=[kr.callbacks.UpdatePruning(SCHEDULE)])
    assert {int(layer.pruning_step) for layer in prunable_layers(model)} == {15}


def test_a_callback_given_another_model():
    one, other = make(), make()
    callback = kr.callbacks.UpdatePruning(kr.schedules.ConstantSparsity(0.5, 0, frequency=1))
    for model in (one, other):
        callback.set_model(model)
        callback.step()
    assert prunable_layers(other)[1].sparsity == 0.5
