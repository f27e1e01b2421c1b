"""Training steps that leave the mask out on the way forward give what those with it give."""

import keras
import numpy as np
import pytest

import keras_renorm as kr
from keras_renorm.src.training import settling
from keras_renorm.src.training.callbacks import update_pruning

K = keras.optimizers
SETTLING = {
    "sgd": lambda: K.SGD(0.05, momentum=0.9, nesterov=True, weight_decay=0.01),
    "adam": lambda: K.Adam(0.01, amsgrad=True),
    "adamw": lambda: K.AdamW(0.01, weight_decay=0.1),
    "adamax": lambda: K.Adamax(0.01),
    "nadam": lambda: K.Nadam(0.01),
    "rmsprop": lambda: K.RMSprop(0.01, momentum=0.5, centered=True),
    "adagrad": lambda: K.Adagrad(0.1),
    "adadelta": lambda: K.Adadelta(1.0),
    "lion": lambda: K.Lion(0.001),
    "average": lambda: K.Adam(0.01, use_ema=True, ema_overwrite_frequency=7),
    "accumulated": lambda: K.Adam(0.01, gradient_accumulation_steps=3),
    "clipped": lambda: K.SGD(0.1, momentum=0.9, global_clipnorm=0.1),
    "irrelevance decay": lambda: kr.optimizers.IrrelevanceDecay(K.Adam(0.01)),
    "scaled loss": lambda: K.LossScaleOptimizer(K.Adam(0.01)),
}
NOT_SETTLING = {"ftrl": K.Ftrl, "lamb": K.Lamb, "muon": K.Muon, "adafactor": lambda: K.Adafactor(0.01)}
needs_settling = pytest.mark.skipif(keras.backend.backend() != "tensorflow", reason="layers settle on TensorFlow only")


def is_settled(model):
    function = model.train_function
    return isinstance(function, settling.SettlingTrainFunction) and function.is_settled(model.layers[0].masked_kernels[0])


class Watch(keras.callbacks.Callback):
    """Whether a kernel was settled after each batch."""

    def __init__(self):
        super().__init__()
        self.settled = []

    def on_train_batch_end(self, batch, logs=None):
        self.settled.append(is_settled(self.model))


ONE_EVENT = kr.schedules.ConstantSparsity(0.5, begin_step=4, end_step=4)


def trained(optimizer, epochs=2, callbacks=(), schedule=ONE_EVENT, **pruning):
    keras.utils.set_random_seed(3)
    layers = [kr.layers.PrunableDense(8, "tanh", **pruning), kr.layers.PrunableDense(2, **pruning)]
    model = keras.Sequential([keras.Input((6,)), *layers])
    model.compile(optimizer, "mse")
    generator = np.random.default_rng(0)
    x = generator.standard_normal((120, 6)).astype("float32")
    y = np.stack([x[:, 0] * x[:, 1], x[:, 2]], 1)
    pruning = kr.callbacks.UpdatePruning(schedule)
    model.fit(x, y, batch_size=4, epochs=epochs, shuffle=False, verbose=0, callbacks=[pruning, *callbacks])
    return model


@needs_settling
@pytest.mark.parametrize("name", SETTLING)
def test_settled_steps_give_what_others_give(name, monkeypatch):
    watch = Watch()
    settled = trained(SETTLING[name](), epochs=1, callbacks=[watch])
    assert sum(watch.settled) > 15
    assert settling.innermost(settled.optimizer).iterations > 0
    monkeypatch.setattr(update_pruning, "settle", lambda model: None)
    other = trained(SETTLING[name](), epochs=1)
    for one, two in zip(settled.layers, other.layers):
        mask = keras.ops.convert_to_numpy(one.mask)
        kernel, expected = (keras.ops.convert_to_numpy(layer.kernel) for layer in (one, two))
        np.testing.assert_array_equal(mask, keras.ops.convert_to_numpy(two.mask))
        assert not mask.all()
        assert (kernel[~mask] == 0).all()
        np.testing.assert_allclose(kernel[mask], expected[mask], rtol=2e-4, atol=1e-5)


@needs_settling
@pytest.mark.parametrize("name", NOT_SETTLING)
def test_optimizers_that_would_move_zeros_do_not_settle(name):
    watch = Watch()
    trained(NOT_SETTLING[name](), callbacks=[watch])
    assert not any(watch.settled)


@needs_settling
def test_events_that_change_nothing_do_not_unsettle():
    watch, every_step = Watch(), kr.schedules.ConstantSparsity(0.5, begin_step=4, frequency=1)
    trained("adam", epochs=1, callbacks=[watch], schedule=every_step)
    assert watch.settled == [False] * 13 + [True] * 17


@needs_settling
def test_events_that_change_masks_do():
    watch, twice = Watch(), kr.schedules.PolynomialDecay(0.3, 0.6, begin_step=4, end_step=20, frequency=16)
    trained("adam", epochs=1, callbacks=[watch], schedule=twice)
    assert watch.settled == [False] * 13 + [True] * 6 + [False] * 10 + [True]


@needs_settling
@pytest.mark.parametrize("pruning", [dict(regrow=True), dict(kernel_constraint="non_neg")], ids=str)
def test_kernels_that_may_change_do_not_settle(pruning):
    watch = Watch()
    trained("adam", callbacks=[watch], **pruning)
    assert not any(watch.settled)


@needs_settling
def test_nothing_is_settled_after_training_and_a_kernel_may_be_set():
    model = trained("adam")
    layer = model.layers[0]
    assert not is_settled(model)
    x = np.ones((3, 6), "float32")
    before = keras.ops.convert_to_numpy(layer(x, training=True))
    mask = keras.ops.convert_to_numpy(layer.mask)
    layer.kernel.assign(np.where(mask, keras.ops.convert_to_numpy(layer.kernel), 100.0))
    np.testing.assert_allclose(keras.ops.convert_to_numpy(layer(x, training=True)), before, rtol=1e-6)


@needs_settling
def test_a_kernel_that_is_set_between_epochs_is_masked():
    class Fill(keras.callbacks.Callback):
        def on_epoch_begin(self, epoch, logs=None):
            if epoch == 1:
                self.model.layers[0].kernel.assign_add(np.full((6, 8), 100.0))

    watch = Watch()
    model = trained("adam", callbacks=[Fill(), watch])
    assert not any(watch.settled[30:38])
    assert watch.settled[-1]
    layer = model.layers[0]
    assert (keras.ops.convert_to_numpy(layer.kernel)[~keras.ops.convert_to_numpy(layer.mask)] == 0).all()


@needs_settling
def test_a_model_with_a_train_step_of_its_own_does_not_settle():
    class Own(keras.Sequential):
        def train_step(self, data):
            return super().train_step(data)

    model = Own([keras.Input((6,)), kr.layers.PrunableDense(2)])
    model.compile("adam", "mse")
    watch = Watch()
    pruning = kr.callbacks.UpdatePruning(kr.schedules.ConstantSparsity(0.5, 0, 0))
    model.fit(np.ones((80, 6)), np.ones((80, 2)), batch_size=4, verbose=0, callbacks=[pruning, watch])
    assert len(watch.settled) == 20
    assert not any(watch.settled)


class Interrupt(keras.callbacks.Callback):
    """Ctrl-C while kernels are settled."""

    def on_train_batch_end(self, batch, logs=None):
        if batch == 15:
            assert is_settled(self.model)
            raise KeyboardInterrupt


def interrupted():
    model, schedule = make_small(), kr.schedules.ConstantSparsity(0.5, 0, 0)
    with pytest.raises(KeyboardInterrupt):
        model.fit(X, Y, batch_size=2, verbose=0, callbacks=[kr.callbacks.UpdatePruning(schedule), Interrupt()])
    return model


X = np.random.default_rng(0).standard_normal((40, 6)).astype("float32")
Y = X[:, :2] * X[:, 1:3]


def make_small():
    keras.utils.set_random_seed(0)
    model = keras.Sequential([keras.Input((6,)), kr.layers.PrunableDense(8, "tanh"), kr.layers.PrunableDense(2)])
    model.compile("adam", "mse")
    return model


def fill(model):
    """Let masked weights have other values than zero."""
    for layer in model.layers:
        mask = keras.ops.convert_to_numpy(layer.mask)
        layer.kernel.assign(np.where(mask, keras.ops.convert_to_numpy(layer.kernel), 5.0))


def assert_masked(model):
    """What is masked does not count in training, whoever trains."""
    inputs = keras.ops.convert_to_tensor(X)
    expected = keras.ops.convert_to_numpy(model(inputs, training=False))
    np.testing.assert_allclose(keras.ops.convert_to_numpy(model(inputs, training=True)), expected, atol=1e-5)
    loss = np.mean((expected - Y) ** 2)
    # Of an epoch of one batch: what it is before the step.
    assert model.fit(X, Y, batch_size=40, verbose=0).history["loss"][0] == pytest.approx(loss, rel=1e-4)


@pytest.mark.fresh_optimizer
@needs_settling
@pytest.mark.parametrize("then", ["fill", "muon", "compiled", "another optimizer", "another model"])
def test_nothing_is_settled_after_an_interrupted_training(then):
    model = interrupted()
    if then == "muon":
        model.compile(keras.optimizers.Muon(0.01), "mse")
        model.fit(X, Y, batch_size=2, verbose=0)
        assert np.abs(
            keras.ops.convert_to_numpy(model.layers[0].kernel)[~keras.ops.convert_to_numpy(model.layers[0].mask)]
        ).any()
    elif then == "another optimizer":
        model.optimizer = keras.optimizers.Muon(0.01)
        model.optimizer.build(model.trainable_variables)
        model.make_train_function(force=True)
        model.fit(X, Y, batch_size=2, verbose=0)
    else:
        fill(model)
    if then == "compiled":
        model.compile("adam", "mse")
    if then == "another model":
        model = keras.Sequential([keras.Input((6,)), *model.layers])
        model.compile("adam", "mse")
    assert_masked(model)


@needs_settling
def test_one_batch_after_an_interrupted_training():
    model = interrupted()
    fill(model)
    loss = np.mean((keras.ops.convert_to_numpy(model(X)) - Y) ** 2)
    assert model.train_on_batch(X, Y) == pytest.approx(loss, rel=1e-4)


@needs_settling
@pytest.mark.parametrize("what", ["kernel", "mask", "weights", "optimizer"])
def test_what_other_callbacks_do_in_an_epoch_counts(what):
    class Change(keras.callbacks.Callback):
        def on_train_batch_begin(self, batch, logs=None):
            if batch != 15:
                return
            layer = self.model.layers[0]
            assert is_settled(self.model)
            if what == "kernel":
                layer.kernel.assign_add(np.full((6, 8), 5.0))
            elif what == "mask":
                layer.mask.assign(np.zeros((6, 8), bool))
            elif what == "weights":
                self.model.set_weights([value if value.dtype == bool else value + 5 for value in self.model.get_weights()])
            else:
                self.model.optimizer = keras.optimizers.Muon()

        def on_train_batch_end(self, batch, logs=None):
            if batch == 15:
                self.settled = is_settled(self.model)

    change, model = Change(), make_small()
    pruning = kr.callbacks.UpdatePruning(kr.schedules.ConstantSparsity(0.5, 0, 0))
    model.fit(X, Y, batch_size=2, verbose=0, callbacks=[pruning, change])
    assert not change.settled


def test_settling_is_not_a_weight():
    layer = kr.layers.PrunableDense(2)
    layer.build((None, 3))
    assert [weight.name for weight in layer.weights] == ["kernel", "bias", "mask", "scale", "pruning_step"]
