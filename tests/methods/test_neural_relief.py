import functools

import keras
import numpy as np
import pytest
from keras import ops

import keras_renorm as kr
from tests.outputs import outputs

L = keras.layers
X = np.random.default_rng(0).standard_normal((256, 8)).astype("float32")
Y = (X[:, :1] - 0.5 * X[:, 1:2]).astype("float32")
FIT = dict(x=X, y=Y, epochs=3, batch_size=64)


def sequential(layers, shape=(8,), optimizer=None, seed=3):
    keras.utils.set_random_seed(seed)
    model = keras.Sequential([keras.Input(shape), *layers])
    model.compile(optimizer or keras.optimizers.Adam(0.02), "mse")
    return model


def make(optimizer=None):
    model = sequential(
        [L.Dense(16, "relu", name="a"), L.Dense(12, "relu", name="b"), L.Dense(1, name="c")], optimizer=optimizer
    )
    model.set_weights(trained_weights())
    return model


@functools.cache
def trained_weights():
    model = sequential([L.Dense(16, "relu"), L.Dense(12, "relu"), L.Dense(1)])
    model.fit(**FIT, verbose=0)
    return model.get_weights()


def relieve(model=None, data=X, fit=FIT, **arguments):
    arguments = {"alpha_conv": 0.9, "alpha_dense": 0.9, "rounds": 2, "metric": "loss", "verbose": 0, **arguments}
    return kr.methods.neural_relief(model or make(), data, fit=fit, **arguments)


class Still:
    """A training that changes nothing."""

    def __init__(self, answers=(1.0,) * 20):
        self.answers = iter(answers)

    def __call__(self, model):
        return {"quality": next(self.answers)}


def without_training(model, data, answers=(1.0,) * 20, **arguments):
    arguments = {"metric": "quality", "mode": "max", "evaluate": lambda model: 1.0, **arguments}
    return relieve(model, data, Still(answers), **arguments)


def kept(model, name):
    return ops.convert_to_numpy(model.get_layer(name).kernel) != 0


# The rule.


def test_each_unit_keeps_the_smallest_set_that_reaches_the_share():
    """Inputs of mean sizes 1, 2, 4: the scores of weights 4, 1, 1 are 4, 2, 4, those of 0, 3, 1 are 0, 6, 4."""
    model = sequential([L.Dense(2, use_bias=False, name="fc")], (3,))
    model.get_layer("fc").kernel.assign([[4, 0], [1, 3], [1, 1]])
    data = np.array([[1, -3, 4], [-1, 1, 4]], "float32")
    for share, expected in ((0.4, [[1, 0], [0, 1], [0, 0]]), (0.7, [[1, 0], [0, 1], [1, 1]]), (0.9, [[1, 0], [1, 1], [1, 1]])):
        found = without_training(model, data, alpha_dense=share, rounds=1)
        np.testing.assert_array_equal(kept(found.model, "fc"), np.array(expected, bool))


def test_convolutions_and_other_layers_have_their_own_share():
    model = sequential([L.Conv2D(6, 3, name="conv"), L.GlobalAveragePooling2D(), L.Dense(3, name="fc")], (6, 6, 5))
    data = np.random.default_rng(0).standard_normal((32, 6, 6, 5)).astype("float32")
    found = without_training(model, data, alpha_conv=0.6, alpha_dense=1.0, rounds=1)
    slices = kept(found.model, "conv").reshape(9, 5, 6)
    assert (slices.all(axis=0) == slices.any(axis=0)).all()
    assert 0.2 < slices.mean() < 0.8
    assert kept(found.model, "fc").all()
    found = without_training(model, data, alpha_conv=1.0, alpha_dense=0.6, rounds=1)
    fc = kept(found.model, "fc")
    assert not fc.all()
    assert kept(found.model, "conv")[..., fc.any(axis=1)].all()


def test_units_that_are_zero_or_unread_go_with_all_their_connections():
    model = sequential([L.Dense(4, "relu", name="a"), L.Dense(3, name="b")])
    a, b = model.get_layer("a"), model.get_layer("b")
    bias = np.zeros(4, "float32")
    bias[1] = -1e3
    a.bias.assign(bias)
    weights = np.ones((4, 3), "float32")
    weights[2] = 0
    b.kernel.assign(weights)
    found = without_training(model, X, alpha_dense=1.0, rounds=1)
    np.testing.assert_array_equal(kept(found.model, "a").any(axis=0), [True, False, False, True])
    np.testing.assert_array_equal(kept(found.model, "b").all(axis=1), [True, False, False, True])
    assert found.history[1].details["units"] == {"a": 2, "b": 3}
    # Two units of 8 + 1 parameters and 3 outgoing ones each; two of the latter were zero to begin with.
    assert found.history[0].details["parameters"] - found.history[1].details["parameters"] == 2 * (9 + 3)
    np.testing.assert_allclose(outputs(found.model, X), outputs(model, X), atol=1e-5)


@pytest.mark.parametrize("merge", ["add", "concatenate"])
def test_dead_units_of_merging_graphs(merge):
    """A channel of a sum is dead where all its makers are; of a concatenation, each on its own."""
    keras.utils.set_random_seed(0)
    inputs = keras.Input((6, 6, 3))
    one = L.Conv2D(4, 3, padding="same", name="one")(inputs)
    other = L.BatchNormalization(name="bn")(L.Conv2D(4, 3, padding="same", use_bias=False, name="other")(inputs))
    merged = L.Add()([one, other]) if merge == "add" else L.Concatenate()([one, other])
    last = L.Conv2D(2, 1, name="last")
    model = keras.Model(inputs, last(L.ReLU()(merged)))
    model.compile("sgd", "mse")
    kernel = ops.convert_to_numpy(last.kernel).copy()
    kernel[:, :, 1] = 0
    last.kernel.assign(kernel)
    data = np.random.default_rng(0).standard_normal((16, 6, 6, 3)).astype("float32")
    found = without_training(model, data, alpha_conv=1.0, rounds=1)
    alive = [True, False, True, True]
    np.testing.assert_array_equal(kept(found.model, "one").any(axis=(0, 1, 2)), alive)
    np.testing.assert_array_equal(kept(found.model, "other").any(axis=(0, 1, 2)), alive if merge == "add" else [True] * 4)
    np.testing.assert_allclose(outputs(found.model, data), outputs(model, data), atol=1e-5)
    # Its normalization parameters do not count any more.
    lost = found.history[0].details["parameters"] - found.history[1].details["parameters"]
    assert lost == 27 + 1 + 2 + (27 + 2 if merge == "add" else 0)


# The rounds.


@pytest.mark.parametrize("optimizer", ["adam", "sgd"])
def test_on_real_training(optimizer):
    optimizer = keras.optimizers.Adam(0.02) if optimizer == "adam" else keras.optimizers.SGD(0.05, momentum=0.9)
    model = make(optimizer)
    before = model.get_weights()
    found = relieve(model, rounds=3, fit=dict(FIT, epochs=20))
    parameters = [row.details["parameters"] for row in found.history]
    assert parameters == sorted(parameters, reverse=True)
    assert found.compression == parameters[0] / parameters[-1] > 1.5
    assert found.history[-1].metric < 0.1
    assert all(np.array_equal(one, other) for one, other in zip(before, model.get_weights()))
    assert kr.summary(found.model).sparsity == pytest.approx(found.sparsity)
    assert found.history[0].epochs == 0
    assert found.history[0].metric == pytest.approx(model.evaluate(X, Y, verbose=0), rel=1e-5)


def test_what_is_counted():
    model = sequential([L.Conv2D(4, 3, strides=2, name="conv"), L.Flatten(), L.Dense(2, name="fc")], (7, 7, 3))
    data = np.random.default_rng(0).standard_normal((8, 7, 7, 3)).astype("float32")
    details = without_training(model, data, rounds=1).history[0].details
    assert details["parameters"] == model.count_params()
    assert details["flops"] == 2 * (9 * 27 * 4 + 36 * 2)
    assert details["units"] == {"conv": 4, "fc": 2}


def test_the_optimizer_and_its_learning_rate_begin_anew():
    seen = []

    class Watch(keras.callbacks.Callback):
        def on_train_begin(self, logs=None):
            seen.append((float(self.model.optimizer.learning_rate), int(self.model.optimizer.iterations)))

        def on_train_end(self, logs=None):
            self.model.optimizer.learning_rate = 1e-5

    model = make(keras.optimizers.Adam(0.02))
    relieve(model, rounds=3, fit=dict(FIT, callbacks=[Watch()]))
    assert seen == [(pytest.approx(0.02), 0)] * 3


def test_rewinds_to_early_weights():
    early = sequential([L.Dense(16, "relu", name="a"), L.Dense(12, "relu", name="b"), L.Dense(1, name="c")])
    model = keras.models.clone_model(early)
    model.set_weights(early.get_weights())
    model.compile(keras.optimizers.Adam(0.02), "mse")
    model.fit(**FIT, verbose=0)
    found = without_training(model, X, rounds=2, rewind=early)
    for name in "abc":
        mask = kept(found.model, name)
        assert not mask.all()
        np.testing.assert_array_equal(
            ops.convert_to_numpy(found.model.get_layer(name).kernel)[mask],
            ops.convert_to_numpy(early.get_layer(name).kernel)[mask],
        )


def test_a_floor_takes_a_round_back_and_removes_less():
    model, data = sequential([L.Dense(50)], (200,)), np.random.default_rng(0).standard_normal((64, 200))
    found = without_training(model, data, answers=[1.0, 0.2, 0.3, 1.0], rounds=4, floor=0.5)
    assert [row.held for row in found.history] == [True, True, False, False, True]
    assert [row.step for row in found.history] == [0, 1, 1, 0.5, 0.25]
    parameters = [row.details["parameters"] for row in found.history]
    assert parameters[1] > parameters[4] > parameters[3] > parameters[2]


def test_a_tolerance():
    found = without_training(make(), X, answers=[0.95, 0.85], rounds=2, tolerance=0.1)
    assert found.floor == pytest.approx(0.9)
    assert [row.held for row in found.history] == [True, True, False]


def test_ends_when_nothing_is_left_to_remove():
    model = sequential([L.Dense(2, use_bias=False)])
    found = without_training(model, X, alpha_dense=1.0, rounds=5)
    assert len(found.history) == 1


def test_layers_that_samples_do_not_serve_stay():
    model = sequential([L.LSTM(5, name="lstm"), L.Dense(6, "relu", name="a"), L.Dense(1, name="b")], (4, 3))
    data = np.random.default_rng(0).standard_normal((16, 4, 3)).astype("float32")
    found = without_training(model, data, rounds=2, alpha_dense=0.7)
    rows = {row.kernel: row for row in kr.summary(found.model).rows if row.layer == "lstm"}
    assert all(row.sparsity == 0 for row in rows.values())
    assert not kept(found.model, "a").all()


def test_data_of_every_kind(tf):
    model = make()
    expected = without_training(model, X).model.get_weights()
    for data in (tf.data.Dataset.from_tensor_slices((X, Y)).batch(100), (X[i : i + 64] for i in range(0, 256, 64))):
        weights = without_training(model, data).model.get_weights()
        assert all(np.array_equal(one, other) for one, other in zip(weights, expected))


def test_resumes_and_goes_on_for_more_rounds(tmp_path):
    model = make()
    whole = relieve(model, rounds=4)

    class Interrupt(keras.callbacks.Callback):
        epochs = 0

        def on_epoch_end(self, epoch, logs=None):
            self.epochs += 1
            if self.epochs == 5:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        relieve(model, rounds=4, fit=dict(FIT, callbacks=[Interrupt()]), directory=tmp_path)
    relieve(model, rounds=3, directory=tmp_path)
    again = relieve(model, rounds=4, directory=tmp_path)
    assert all(np.array_equal(one, other) for one, other in zip(whole.model.get_weights(), again.model.get_weights()))
    assert [row.details for row in again.history] == [row.details for row in whole.history]
    with pytest.raises(ValueError, match="`directory` holds the state of another run"):
        relieve(model, rounds=4, alpha_dense=0.8, directory=tmp_path)


def test_table_and_plot():
    matplotlib = pytest.importorskip("matplotlib")
    matplotlib.use("Agg")
    found = without_training(make(), X, answers=[0.9, 0.8], rounds=2, floor=0.5)
    assert "compression" in str(found)
    assert str(found).endswith("floor of quality: 0.5")
    assert len(str(found).splitlines()) == 2 + 3 + 1
    ax = found.plot()
    np.testing.assert_allclose(ax.lines[0].get_ydata(), [1.0, 0.9, 0.8])
    np.testing.assert_allclose(ax.lines[1].get_ydata(), [1.0, 1.0, 1.0])
    assert found.plot(ax=ax) is ax


# Wrong use.


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(alpha_conv=0), "`alpha_conv` must be a number in.*alpha_conv=0"),
        (dict(alpha_dense=1.5), "`alpha_dense` must be a number in.*alpha_dense=1.5"),
        (dict(rounds=0), "`rounds`.*rounds=0"),
        (dict(floor=0.5, tolerance=0.1), "`floor` or `tolerance`, not both"),
        (dict(fit=None), "`fit` must be a dict"),
        (dict(fit=lambda model: {"loss": 0.1}), "`evaluate` is needed.*'loss'"),
        (dict(metric="val_loss"), "`evaluate` is needed.*'val_loss'"),
        (dict(metric="accuracy"), "not measured by the model.*'accuracy'.*loss"),
        (dict(floor=1e-9), "does not reach the floor: loss is .*floor=1e-09"),
        (dict(data=np.zeros((4, 3))), "wrong shape"),
        (dict(data=np.full((4, 8), np.nan)), "NaN"),
        (dict(rewind=sequential([L.Dense(2)])), "`rewind` must be a model of the same architecture"),
        (dict(verbose=7), "`verbose`"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        relieve(**arguments)
