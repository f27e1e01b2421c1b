"""What was asked and is not there is said: where, how much, why, and what to do."""

import warnings

import keras
import numpy as np
import pytest

import keras_renorm as kr
from keras_renorm.src.layers.prunable import prunable_layers
from keras_renorm.src.pruning import delivery

X = np.random.default_rng(0).standard_normal((32, 8)).astype("float32")
Y = np.ones((32, 1), "float32")
Decay = kr.schedules.PolynomialDecay


def make(**pruning):
    model = keras.Sequential([keras.Input((8,)), kr.layers.PrunableDense(16, "relu", name="a", **pruning)])
    model.add(kr.layers.PrunableDense(1, name="b"))
    model.compile("adam", "mse")
    return model


def fit(model, schedule, *others, epochs=2, **arguments):
    """Four batches an epoch."""
    pruning = kr.callbacks.UpdatePruning(schedule)
    return model.fit(X, Y, batch_size=8, epochs=epochs, verbose=0, callbacks=[pruning, *others], **arguments)


def said(record):
    return [str(one.message) for one in record if one.category is UserWarning]


def shown(model):
    """The one sentence of the summary, which `strip` says, too."""
    (note,) = kr.summary(model).notes
    with pytest.warns(UserWarning, match="The sparsity of|ever ran") as record:
        kr.strip(model)
    assert said(record) == [note]
    assert note.count(". ") == 0
    return note


def first_best():
    """Stops after the second epoch and restores the first."""
    return keras.callbacks.EarlyStopping("sparsity", mode="min", patience=1, restore_best_weights=True)


def test_weights_of_an_earlier_epoch():
    model, schedule = make(), Decay(0.0, 0.75, 0, 16, power=1, frequency=4)
    with pytest.warns(UserWarning, match="The sparsity") as record:
        fit(model, schedule, first_best(), epochs=4)
    note = shown(model)
    assert said(record) == [note]
    # A quarter of .75, that is 24 of 128 weights and 3 of 16.
    assert note == (
        "The sparsity of layers ['a', 'b'] is 0.1875, not 0.75: the weights of step 4 were restored, and the "
        "schedule ends at step 16; choose among later epochs only, with `EarlyStopping(..., "
        "start_from_epoch=...)`, or in a second `fit` with the callbacks that choose."
    )


def test_a_checkpoint_from_before_the_end(tmp_path):
    model, path = make(), str(tmp_path / "best.keras")
    best = keras.callbacks.ModelCheckpoint(path, "sparsity", mode="min", save_best_only=True)
    fit(model, Decay(0.0, 0.75, 0, 8, power=1, frequency=4), best)
    assert kr.summary(model).notes == ()
    # The schedule is the callback's, and yet the file knows what it asked for.
    note = shown(keras.models.load_model(path))
    assert "is 0.375, not 0.75: these are the weights of step 4, and the schedule ends at step 8" in note
    model.load_weights(path)
    assert "the weights of step 4 were restored" in shown(model)


def test_a_schedule_that_ends_beyond_training():
    model, schedule = make(), Decay(0.0, 0.75, 0, 16, power=1, frequency=4)
    with pytest.warns(UserWarning, match="is 0.1875, not 0.75: these are the weights of step 4") as record:
        fit(model, schedule, epochs=1)
    # Not again, as more trainings may come.
    fit(model, schedule, epochs=2, initial_epoch=1)
    assert len(said(record)) == 1
    assert "is 0.375, not 0.75: these are the weights of step 8, and the schedule" in shown(model)
    fit(model, schedule, epochs=4, initial_epoch=2)
    assert kr.summary(model).notes == ()
    assert kr.summary(model).sparsity == 0.75


def test_an_event_that_is_still_to_come():
    model = make()
    with pytest.warns(UserWarning, match="is 0, not 0.5: these are the weights of step 4.* ends at step 100;"):
        fit(model, kr.schedules.ConstantSparsity(0.5, 100), epochs=1)


def test_an_end_that_is_no_event():
    model = make()
    # Events at 0 and 3: three quarters of .75 at the second, in whole weights.
    with pytest.warns(UserWarning, match=r"the last event came at step 3, before `end_step=4`; choose a `frequency` that"):
        fit(model, Decay(0.0, 0.75, 0, 4, power=1, frequency=3))
    assert "The sparsity of layers ['a', 'b'] is 0.5625, not 0.75" in shown(model)
    # Trained on, as it is.
    fit(model, Decay(0.0, 0.75, 0, 4, power=1, frequency=3))
    assert "before `end_step=4`" in shown(model)


def test_a_second_schedule_whose_steps_are_over():
    class Before(keras.callbacks.Callback):
        def on_train_batch_end(self, batch, logs=None):
            self.said = said(record)

    model, before = make(), Before()
    fit(model, Decay(0.0, 0.5, 0, 4, frequency=2))
    with pytest.warns(UserWarning, match="The sparsity") as record:
        fit(model, Decay(0.5, 0.75, 0, 4, frequency=2), before)
    note = shown(model)
    assert said(record) == before.said == [note]
    assert note.endswith(
        "is 0.5, not 0.75: this training began at step 8, after the last event of the schedule at step 4; steps are "
        "counted from the first training of the model, so add 8 to `begin_step` and `end_step`."
    )
    fit(model, Decay(0.5, 0.75, 16, 20, frequency=2), epochs=1)
    assert kr.summary(model).sparsity == 0.75
    assert kr.summary(model).notes == ()


def test_a_second_constant_sparsity_has_events_to_come():
    model = make()
    fit(model, HALF)
    fit(model, kr.schedules.ConstantSparsity(0.75, 0, frequency=12))
    assert kr.summary(model).sparsity == 0.75


def test_training_on_with_a_schedule_that_is_over():
    model, schedule = make(), Decay(0.0, 0.75, 0, 4, frequency=2)
    fit(model, schedule)
    fit(model, schedule)
    assert kr.summary(model).notes == ()


def test_what_a_pattern_cannot_give():
    # Runs of four and four and two inputs: of ten weights of a unit four can go.
    model = keras.Sequential([keras.Input((10,)), kr.layers.PrunableDense(4, name="a", pattern=kr.patterns.NOfM(2, 4))])
    model.compile("adam", "mse")
    with pytest.warns(UserWarning, match=r"The sparsity of layer 'a' is 0.4, not 0.5: NOfM\(n=2, m=4\) cannot remove more"):
        model.fit(np.ones((8, 10)), np.ones((8, 4)), verbose=0, callbacks=[kr.callbacks.UpdatePruning(HALF)])


HALF = kr.schedules.ConstantSparsity(0.5, 0)


def test_masks_that_were_changed():
    model = make()
    fit(model, HALF)
    model.get_layer("a").mask.assign(np.ones((8, 16), bool))
    assert (
        "layer 'a' is 0, not 0.5: the last event came at step 0, and the masks were changed afterwards; prune again"
        in shown(model)
    )


@pytest.mark.parametrize("pattern", ["unstructured", "block", "unit", "n_of_m"])
def test_rounding_is_no_shortfall(pattern):
    model = make(pattern=pattern)
    fit(model, kr.schedules.ConstantSparsity(0.47, 0), epochs=1)
    assert kr.summary(model).notes == ()


def test_a_schedule_that_does_not_tell_its_end():
    def schedule(step):
        return True, min(0.1 * step, 0.7)

    model = make()
    with pytest.warns(UserWarning, match="is 0.3.*, not 0.7: the weights of step 4 were restored"):
        fit(model, schedule, first_best(), epochs=4)


def test_layers_that_no_training_pruned():
    model = make(pruning_schedule=HALF)
    assert shown(model).startswith("No pruning event ever ran: layers ['a'] have a schedule")


def test_more_than_was_asked_is_no_shortfall():
    model = make()
    fit(model, HALF)
    for layer in prunable_layers(model):
        layer.update_masks(0.75)
    assert delivery.shortfall(model) is None


def test_nothing_stays_behind_in_the_history():
    model = make()
    history = fit(model, HALF)
    assert "on_train_end" not in vars(history)


BEST_AFTER_THE_LAST_EVENT = Decay(0.0, 0.75, 0, 8, frequency=4)


def test_early_stopping_from_the_last_event_on():
    model = make()
    # The second epoch ends with the last event: it and later ones may be the best.
    stopping = keras.callbacks.EarlyStopping("loss", patience=2, restore_best_weights=True, start_from_epoch=1, baseline=-1.0)
    fit(model, BEST_AFTER_THE_LAST_EVENT, stopping, epochs=6)
    assert stopping.best_epoch >= 1
    assert kr.summary(model).sparsity == 0.75


def test_best_weights_of_a_second_fit(tmp_path):
    model, path = make(), str(tmp_path / "best.keras")
    fit(model, BEST_AFTER_THE_LAST_EVENT, epochs=2)
    stopping = keras.callbacks.EarlyStopping("loss", patience=1, restore_best_weights=True, baseline=-1.0)
    best = keras.callbacks.ModelCheckpoint(path, "loss", mode="min", save_best_only=True)
    fit(model, BEST_AFTER_THE_LAST_EVENT, stopping, best, epochs=6, initial_epoch=2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert kr.summary(kr.strip(model)).sparsity == kr.summary(kr.strip(keras.models.load_model(path))).sparsity == 0.75
