import keras
import numpy as np
import pytest
from keras import ops

import keras_renorm as kr
from keras_renorm.src.pruning import one_shot
from keras_renorm.src.pruning.recovery import augmentation, course
from keras_renorm.src.pruning.recovery import recover as module
from keras_renorm.src.pruning.recovery.lesson import Lesson, batch_statistics, divergence, relative_error, with_places
from tests.layers.cases import CASES, model_around, model_inputs
from tests.outputs import outputs

L = keras.layers
X = np.random.default_rng(0).standard_normal((160, 12)).astype("float32")


def dense(*last, inputs=12):
    layers = [L.Dense(24, "relu", name="a"), L.Dense(16, "relu", name="b"), *(last or [L.Dense(3, name="c")])]
    model = keras.Sequential([keras.Input((inputs,)), *layers])
    model.compile("adam", "mse")
    return model


def residual():
    inputs = keras.Input((8, 8, 3))
    x = L.Conv2D(8, 3, padding="same", activation="relu", name="first")(inputs)
    y = L.BatchNormalization(name="norm")(L.Conv2D(8, 3, padding="same", name="inside")(x))
    x = L.ReLU()(L.Add(name="sum")([x, y]))
    x = L.ReLU()(x + L.Conv2D(8, 1, name="second")(x))
    return keras.Model(inputs, L.Dense(4, "softmax", name="classes")(L.GlobalAveragePooling2D()(x)))


IMAGES = np.random.default_rng(1).standard_normal((96, 8, 8, 3)).astype("float32")


def recover(pruned, model, x=X, **arguments):
    return kr.recover(pruned, model, x, **{"epochs": 4, "batch_size": 16, "verbose": 0, **arguments})


def values(model):
    return [ops.convert_to_numpy(variable).copy() for variable in model.weights]


def assert_same(one, other):
    for first, second in zip(one, other, strict=True):
        np.testing.assert_array_equal(first, second)


def distance(model, other, x):
    return np.mean((outputs(model, x) - outputs(other, x)) ** 2)


def test_it_comes_nearer_on_samples_that_it_did_not_see():
    generator = np.random.default_rng(0)
    mixed = generator.standard_normal((12, 12))
    x = (generator.standard_normal((600, 12)) @ mixed).astype("float32")
    model = dense()
    pruned = kr.prune(model, 0.8, calibration=x[:200], verbose=0)
    before = values(model), values(pruned)
    better = recover(pruned, model, x[:400], epochs=12)
    assert distance(model, better, x[400:]) < 0.9 * distance(model, pruned, x[400:])
    report = better.recovery_report
    assert report.after < 0.9 * report.before
    assert (report.samples, report.held_out, report.steps) == (360, 40, 12 * 360 // 16)
    assert 0 < report.best_step <= report.steps
    assert len(report.places) == 1
    assert_same([*before[0], *before[1]], [*values(model), *values(pruned)])
    assert better.compiled
    assert better.optimizer is not pruned.optimizer
    assert [layer.name for layer in better.layers] == [layer.name for layer in pruned.layers]
    assert "were held out" in str(report)


PATTERNS = ["unstructured", kr.patterns.Block((4, 1)), kr.patterns.NOfM(2, 4), "unit"]


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_zeros_remain(pattern):
    model = residual()
    pruned = kr.prune(model, 0.5, pattern=pattern, calibration=IMAGES, verbose=0)
    better = recover(pruned, model, IMAGES, learning_rate=0.01, epochs=2)
    names = ("kernel", "gamma", "beta", "bias")
    moved = 0
    for one, other in zip(pruned.weights, better.weights):
        one_value, other_value = map(ops.convert_to_numpy, (one, other))
        if one.name == "kernel":
            np.testing.assert_array_equal(one_value == 0, other_value == 0)
        moved += int(one.name in names and not np.array_equal(one_value, other_value))
        assert other.constraint is None
    if better.recovery_report.best_step:
        assert moved > 3
    assert kr.compact(better).count_params() == kr.compact(pruned).count_params()


@pytest.mark.usefixtures("eager")
def test_units_that_are_dead_remain_dead():
    model = residual()
    pruned = kr.prune(model, 0.5, pattern="unit", verbose=0)
    better = recover(pruned, model, IMAGES, learning_rate=0.05, epochs=3)
    features = [keras.Model(one.input, one.get_layer("sum").input[1]) for one in (pruned, better)]
    dead, still = (np.abs(outputs(one, IMAGES)).max(axis=(0, 1, 2)) == 0 for one in features)
    assert dead.sum() == 4
    np.testing.assert_array_equal(dead, still)


def normalized(x, frozen=False):
    """A model with the statistics of these images."""
    inputs = keras.Input((8, 8, 3))
    norm = L.BatchNormalization(name="norm", momentum=0.5)
    y = L.Dropout(0.9)(norm(L.Conv2D(8, 3, padding="same", name="inside")(inputs)))
    model = keras.Model(inputs, L.Dense(4, name="last")(L.GlobalAveragePooling2D()(L.ReLU()(y))))
    before = ops.convert_to_numpy(model.get_layer("inside")(x))
    norm.moving_mean.assign(before.mean(axis=(0, 1, 2)))
    norm.moving_variance.assign(before.var(axis=(0, 1, 2)))
    norm.trainable = not frozen
    return model


def of_norm(model):
    return [ops.convert_to_numpy(value).copy() for value in model.get_layer("norm").non_trainable_weights[-2:]]


@pytest.mark.usefixtures("eager")
def test_batch_normalization_follows_the_batches():
    model = normalized(IMAGES)
    pruned = kr.prune(model, 0.8)
    before = of_norm(model), of_norm(pruned)
    better = recover(pruned, model, IMAGES, learning_rate=0.01, epochs=10, batch_size=32)
    report = better.recovery_report
    assert report.after < 0.5 * report.before
    inside = keras.Model(better.input, better.get_layer("inside").output)
    features = outputs(inside, IMAGES)
    for one, other in zip(of_norm(better), (features.mean(axis=(0, 1, 2)), features.var(axis=(0, 1, 2)))):
        np.testing.assert_allclose(one, other, rtol=0.2, atol=0.05)
    for one, other in zip(before, (of_norm(model), of_norm(pruned))):
        assert_same(one, other)


@pytest.mark.usefixtures("eager")
@pytest.mark.parametrize("why", ["frozen", "other samples", "nothing pruned"])
def test_batch_normalization_stays_where_following_does_harm(why):
    model = normalized(IMAGES, frozen=why == "frozen")
    pruned = kr.prune(model, 0.01 if why == "nothing pruned" else 0.5)
    x = 3 * IMAGES + 2 if why == "other samples" else IMAGES
    better = recover(pruned, model, x, learning_rate=0.003, epochs=6, batch_size=32)
    assert better.recovery_report.best_step or why == "nothing pruned"
    assert_same(of_norm(better), of_norm(pruned))


def test_statistics_of_the_batch_by_hand():
    inputs = keras.Input((2,))
    norm = L.BatchNormalization(momentum=0.75, epsilon=0.0)
    model = keras.Model(inputs, L.Dropout(0.9)(norm(inputs)))
    x = np.array([[1.0, -3.0], [3.0, 1.0]], "float32")
    norm.trainable = False
    with batch_statistics([norm]):
        given = ops.convert_to_numpy(model(x, training=False))
    np.testing.assert_allclose(given, [[-1.0, -1.0], [1.0, 1.0]], rtol=1e-6)
    np.testing.assert_allclose(ops.convert_to_numpy(norm.moving_mean), [0.5, -0.25], rtol=1e-6)
    np.testing.assert_allclose(ops.convert_to_numpy(norm.moving_variance), [1.0, 1.75], rtol=1e-6)
    np.testing.assert_allclose(ops.convert_to_numpy(model(x)[:, 0]), (x[:, 0] - 0.5), rtol=1e-6)
    assert not norm.trainable


@pytest.mark.usefixtures("eager")
@pytest.mark.parametrize("name", list(CASES))
def test_every_layer(name):
    create, inputs, _, _ = CASES[name]
    model = model_around(create(), inputs)
    x = model_inputs(inputs)
    x = keras.tree.map_structure(lambda leaf: np.concatenate([np.asarray(leaf)] * (1 + 40 // len(leaf))), x)
    pruned = kr.prune(model, 0.5)
    better = recover(pruned, model, x, epochs=1)
    assert better.recovery_report.after <= better.recovery_report.before
    assert kr.summary(better).sparsity == pytest.approx(kr.summary(pruned).sparsity)


@pytest.mark.usefixtures("eager")
def test_places_are_sums_and_outputs():
    model = residual()
    pruned = kr.prune(model, 0.5, calibration=IMAGES, verbose=0)
    places = recover(pruned, model, IMAGES, epochs=1).recovery_report.places
    assert len(places) == 3
    assert (places[0].name, places[2].name) == ("sum", "classes")
    small = kr.compact(kr.prune(model, 0.5, pattern="unit"))
    # Where units are gone, sums have other shapes.
    assert [place.name for place in recover(small, model, IMAGES, epochs=1).recovery_report.places] == ["classes"]


def test_several_inputs_and_outputs():
    inputs = {"u": keras.Input((6,), name="u"), "v": keras.Input((4,), dtype="int32", name="v")}
    x = L.Concatenate()([L.Dense(8, "relu")(inputs["u"]), L.Flatten()(L.Embedding(9, 4)(inputs["v"]))])
    model = keras.Model(inputs, {"class": L.Dense(3, "softmax")(x), "value": L.Dense(1)(x), "index": ops.argmax(x, axis=-1)})
    generator = np.random.default_rng(0)
    samples = {"u": generator.standard_normal((64, 6)).astype("float32"), "v": generator.integers(0, 9, (64, 4))}
    pruned = kr.prune(model, 0.5)
    report = recover(pruned, model, samples, epochs=20).recovery_report
    assert len(report.places) == 2
    assert report.after < report.before
    assert report.agreement_before is not None


def test_a_subclassed_model():
    class Net(keras.Model):
        def __init__(self):
            super().__init__()
            self.first, self.last = L.Dense(16, "relu"), L.Dense(2)

        def call(self, inputs):
            return self.last(self.first(inputs))

    model = Net()
    model(X[:1])
    pruned = kr.prune(model, 0.5)
    better = recover(pruned, model, epochs=10)
    assert isinstance(better, Net)
    assert better.recovery_report.after < better.recovery_report.before
    np.testing.assert_array_equal(
        ops.convert_to_numpy(better.first.kernel) == 0, ops.convert_to_numpy(pruned.first.kernel) == 0
    )


@pytest.mark.usefixtures("eager")
def test_a_prunable_model_is_stripped():
    model = dense()
    prunable = kr.to_prunable(model)
    for layer in prunable.layers:
        layer.update_masks(0.5)
    better = recover(prunable, model)
    assert type(better.layers[0]) is L.Dense
    assert kr.summary(better).sparsity == pytest.approx(0.5, abs=0.01)


@pytest.mark.usefixtures("eager")
def test_other_constraints_hold():
    model = dense(L.Dense(3, kernel_constraint="non_neg", name="c"))
    model.get_layer("c").kernel.assign(np.abs(ops.convert_to_numpy(model.get_layer("c").kernel)))
    pruned = kr.prune(model, 0.5)
    better = recover(pruned, model, learning_rate=0.05)
    kernel = ops.convert_to_numpy(better.get_layer("c").kernel)
    assert (kernel >= 0).all()
    assert isinstance(better.get_layer("c").kernel.constraint, keras.constraints.NonNeg)


@pytest.mark.usefixtures("eager")
def test_samples_come_in_any_way():
    model = dense()
    pruned = kr.prune(model, 0.5)
    whole = values(recover(pruned, model, X, epochs=2))
    batches = [X[:100], X[100:]]
    assert_same(whole, values(recover(pruned, model, (batch for batch in batches), epochs=2)))
    assert_same(whole, values(recover(pruned, model, ((batch, None) for batch in batches), epochs=2)))


@pytest.mark.usefixtures("eager")
def test_seeds():
    model = dense()
    pruned = kr.prune(model, 0.5)
    one, again, other = (values(recover(pruned, model, epochs=2, seed=seed)) for seed in (0, 0, 1))
    assert_same(one, again)
    assert not all(np.array_equal(first, second) for first, second in zip(one, other))


@pytest.mark.usefixtures("eager")
def test_both_models_see_what_is_augmented():
    model = dense()
    pruned = kr.prune(model, 0.5)
    better = recover(pruned, model, augment=L.GaussianNoise(0.1))
    assert better.recovery_report.after < better.recovery_report.before
    # To learn from constants teaches nothing of the samples.
    blind = recover(pruned, model, augment=lambda x: 0 * x)
    assert blind.recovery_report.after > better.recovery_report.after


# What goes wrong.


@pytest.mark.usefixtures("eager")
def test_nothing_worse_than_the_start_is_returned():
    model = dense()
    pruned = kr.prune(model, 0.1, calibration=X, verbose=0)
    better = recover(pruned, model, learning_rate=30.0, epochs=1)
    report = better.recovery_report
    assert (report.best_step, report.after) == (0, report.before)
    assert "nothing was changed" in report.notes[-1]
    assert_same(values(better), values(pruned))


@pytest.mark.usefixtures("eager")
def test_nan_ends_it():
    model = dense()
    pruned = kr.prune(model, 0.5)
    report = recover(pruned, model, learning_rate=1e30, epochs=20).recovery_report
    assert report.steps < 20 * 9
    assert report.notes[0].startswith("NaN or infinity ended recovery at step")
    assert np.isfinite(report.after)


def interrupted_at(monkeypatch, steps):
    """Let training be interrupted in a step, which ends before anything is done with its results."""
    make, taken = Lesson.make_train_function, []

    def make_interrupted(self, force=False):
        before = self.train_function
        make(self, force)
        if before is self.train_function:
            return
        step = self.train_function

        def interrupted(*args):
            results = step(*args)
            taken.append(1)
            if len(taken) >= steps:
                raise KeyboardInterrupt
            return results

        self.train_function = interrupted

    monkeypatch.setattr(Lesson, "make_train_function", make_interrupted)


def test_an_interrupt_returns_the_best_so_far(monkeypatch):
    interrupted_at(monkeypatch, 60)
    model = dense()
    report = recover(kr.prune(model, 0.5), model, epochs=20).recovery_report
    assert report.notes == (f"An interrupt ended recovery after {report.steps} of 180 steps.",)
    assert report.after < report.before


def test_a_time_limit(monkeypatch):
    clock = iter(np.arange(0, 1000.0))
    monkeypatch.setattr(course.time, "monotonic", lambda: next(clock))
    model = dense()
    report = recover(kr.prune(model, 0.5), model, epochs=20, seconds=6).recovery_report
    assert 0 < report.steps < 180
    assert report.notes[0].startswith("The time limit of 6 seconds ended recovery after")


def others():
    model = dense()
    return kr.prune(model, 0.5), model


BAD = {
    "the same model": (lambda p, m: (m, m, X), {}, "must be two models"),
    "other outputs": (lambda p, m: (p, dense(L.Dense(2)), X), {}, "outputs of the same shapes.*3.*2"),
    "few": (lambda p, m: (p, m, X[:20]), {}, "at least 32 samples.*Received: 20"),
    "shape": (lambda p, m: (p, m, X[:, :5]), {}, "`samples` has samples of the wrong shape"),
    "nan": (lambda p, m: (p, m, np.full((40, 12), np.nan)), {}, "`samples` holds NaN"),
    "nothing": (lambda p, m: (p, m, iter([])), {}, "`samples` contains no samples"),
    "no model": (lambda p, m: (p, None, X), {}, "`model` must be a `keras.Model`"),
    "epochs": (lambda p, m: (p, m, X), dict(epochs=0), "`epochs` must be an integer of at least 1"),
    "batch": (lambda p, m: (p, m, X), dict(batch_size=0), "`batch_size` must be an integer of at least 1"),
    "rate": (lambda p, m: (p, m, X), dict(learning_rate=-1.0), "`learning_rate` must be a positive number"),
    "seconds": (lambda p, m: (p, m, X), dict(seconds=0), "`seconds` must be a positive number"),
    "verbose": (lambda p, m: (p, m, X), dict(verbose=7), "`verbose`"),
    "no rate": (lambda p, m: (p, m, X), dict(learning_rate=None), "`learning_rate` must be a positive number"),
    "seed": (lambda p, m: (p, m, X), dict(seed="a"), "`seed` must be an integer of at least 0"),
    "augment": (lambda p, m: (p, m, X), dict(augment="turn"), "`augment` must be one of .'flip', 'shift'."),
    "no images": (lambda p, m: (p, m, X), dict(augment=["flip"]), "one input of images.*'flip'.*12"),
    "no function": (lambda p, m: (p, m, X), dict(augment=3), "`augment` must be a name, a layer, a function"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input(name):
    arguments, more, message = BAD[name]
    with pytest.raises((TypeError, ValueError), match=message):
        recover(*arguments(*others()), **more)


def test_nothing_to_train():
    pruned, model = others()
    pruned.trainable = False
    with pytest.raises(ValueError, match="no trainable weights"):
        recover(pruned, model)


def test_nothing_to_compare():
    inputs = keras.Input((12,))
    model = keras.Model(inputs, ops.argmax(L.Dense(4)(L.Dense(8)(inputs)), axis=-1))
    with pytest.raises(ValueError, match="no outputs of floats"):
        recover(kr.prune(model, 0.5), model)


# By hand.


def test_losses_by_hand():
    def loss(function, *pair):
        return float(function(*(ops.convert_to_tensor(one) for one in pair)))

    wanted, given = np.array([[1.0, 0.0], [3.0, 0.0]], "float32"), np.array([[1.0, 1.0], [3.0, 1.0]], "float32")
    # Squares 0, 1, 0, 1; variances of the columns 1 and 0.
    assert loss(relative_error, wanted, given) == pytest.approx(0.5 / 0.5, rel=1e-5)
    halves, quarters = np.array([[0.5, 0.5]], "float32"), np.array([[0.25, 0.75]], "float32")
    expected = 0.5 * np.log(2) + 0.5 * np.log(2 / 3)
    assert loss(divergence(1.0, from_logits=False), halves, quarters) == pytest.approx(expected, rel=1e-4)
    assert loss(divergence(1.0, from_logits=True), np.log(halves), np.log(quarters)) == pytest.approx(expected, rel=1e-4)
    softened = quarters**0.5 / np.sum(quarters**0.5)
    expected = 4 * np.sum(halves * np.log(halves / softened))
    assert loss(divergence(2.0, from_logits=False), halves, quarters) == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize(
    ("outputs", "from_logits", "expected"),
    [
        ([[0.2, 0.8], [0.6, 0.4]], False, "loss"),
        ([[2.0, -1.0], [0.0, 3.0]], True, "loss"),
        ([[2.0, -1.0], [0.0, 3.0]], False, "relative_error"),
        ([[0.3], [0.7]], True, "relative_error"),
        ([0.3, 0.7], True, "relative_error"),
    ],
)
def test_which_loss(outputs, from_logits, expected):
    assert module._loss_of(np.array(outputs, "float32"), from_logits).__name__ == expected


def test_the_loss_of_the_model_tells_of_logits():
    model = dense()
    assert not module._has_logits(model)
    model.compile("adam", keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    assert module._has_logits(model)
    model.compile("adam", "sparse_categorical_crossentropy")
    assert not module._has_logits(model)


def test_with_places():
    model = residual()
    outputs, names = with_places(model)
    assert names[0] == "sum"
    assert [tuple(one.shape) for one in outputs.outputs] == [(None, 8, 8, 8), (None, 8, 8, 8), (None, 4)]


def run_of(folder, **arguments):
    model = dense()
    keras.utils.set_random_seed(3)
    for variable in model.weights:
        variable.assign(keras.random.normal(variable.shape) * 0.3)
    return model, kr.prune(model, 0.7, calibration=X, verbose=0), dict(epochs=30, directory=folder, **arguments)


def test_a_recovery_that_is_continued_ends_like_one_in_one_go(tmp_path, monkeypatch):
    model, pruned, arguments = run_of(tmp_path / "whole")
    whole = recover(pruned, model, **arguments)
    arguments["directory"] = tmp_path / "parts"
    with monkeypatch.context() as context:
        interrupted_at(context, 100)
        part = recover(pruned, model, **arguments)
    assert 80 < part.recovery_report.steps <= 100
    assert "An interrupt ended recovery after" in part.recovery_report.notes[0]
    keras.utils.set_random_seed(11)
    continued = recover(pruned, model, **arguments)
    assert_same(values(whole), values(continued))
    one, other = (vars(each.recovery_report) for each in (whole, continued))
    assert {**one, "seconds": 0} == {**other, "seconds": 0}
    # All is done, so nothing is done.
    monkeypatch.setattr(course, "take_steps", None)
    assert_same(values(whole), values(recover(pruned, model, **arguments)))


def test_a_recovery_goes_on_with_more_seconds(tmp_path, monkeypatch):
    model, pruned, arguments = run_of(tmp_path)
    with monkeypatch.context() as context:
        clock = iter(np.arange(0, 1000.0))
        context.setattr(course.time, "monotonic", lambda: next(clock))
        few = recover(pruned, model, seconds=20, **arguments).recovery_report
    assert 0 < few.steps < 30 * 144 // 16
    assert "time limit" in few.notes[0]
    take, taken = course.take_steps, []
    monkeypatch.setattr(
        course, "take_steps", lambda lesson, x, order, size: taken.extend(order) or take(lesson, x, order, size)
    )
    more = recover(pruned, model, **arguments).recovery_report
    assert more.steps == 30 * 144 // 16
    assert len(taken) == (more.steps - few.steps) * 16
    assert more.before == few.before
    assert not any("time limit" in note for note in more.notes)


@pytest.mark.parametrize("change", [dict(seed=1), dict(learning_rate=0.1), dict(epochs=3), dict(x=2 * X)], ids=str)
def test_the_state_of_another_recovery_is_refused(tmp_path, change):
    model, pruned, arguments = run_of(tmp_path)
    recover(pruned, model, **{**arguments, "epochs": 2})
    with pytest.raises(ValueError, match="holds the state of another run"):
        recover(pruned, model, **{**arguments, "epochs": 2, **change})


@pytest.mark.usefixtures("eager")
def test_a_layer_that_augments_is_known_by_its_settings(tmp_path):
    class Own(L.Layer):
        def __init__(self, factor):
            super().__init__()
            self.factor = factor

        def call(self, inputs):
            return self.factor * inputs

    model, pruned, arguments = run_of(tmp_path)
    arguments.update(epochs=2)
    recover(pruned, model, augment=[L.GaussianNoise(0.1), Own(2.0)], **arguments)
    again = recover(pruned, model, augment=[L.GaussianNoise(0.1), Own(2.0)], **arguments)
    assert again.recovery_report.steps == 18
    with pytest.raises(ValueError, match="holds the state of another run"):
        recover(pruned, model, augment=[L.GaussianNoise(0.2), Own(2.0)], **arguments)


def test_prune_recovers():
    model = residual()
    pruned = kr.prune(model, 0.8, calibration=IMAGES, verbose=0)
    expected = kr.recover(pruned, model, IMAGES, epochs=3, batch_size=32, augment=["flip", "shift"], seed=2, verbose=0)
    options = dict(epochs=3, batch_size=32, augment=["flip", "shift"], seed=2)
    better = kr.prune(model, 0.8, calibration=(batch for batch in (IMAGES[:50], IMAGES[50:])), recover=options, verbose=0)
    np.testing.assert_allclose(outputs(better, IMAGES), outputs(expected, IMAGES), atol=1e-2)
    assert better.recovery_report.steps == expected.recovery_report.steps
    assert expected.pruning_report is pruned.pruning_report
    one, other = (one.pruning_report.sparsity for one in (better, pruned))
    assert one == pytest.approx(other, abs=1e-3)


def test_prune_recovers_a_model_with_nested_inputs():
    a, b, c = (keras.Input((width,), name=name) for name, width in (("a", 6), ("b", 4), ("c", 3)))
    model = keras.Model([a, {"b": b, "c": c}], L.Dense(3)(L.Dense(16, "relu")(L.Concatenate()([a, b, c]))))
    samples = [X[:, :6], {"b": X[:, 6:10], "c": X[:, :3]}]
    better = kr.prune(model, 0.5, calibration=samples, recover=dict(epochs=2), verbose=0)
    assert better.recovery_report.samples == 144


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (dict(recover=True), ValueError, "`recover` needs samples: pass `calibration`"),
        (dict(recover=5, calibration=X), TypeError, "`recover` must be a bool or a dict"),
        (dict(recover=dict(epoch=3), calibration=X), ValueError, r"`recover` can hold .*'epochs'.*Received: .'epoch'."),
        (dict(recover=dict(epochs=0), calibration=X), ValueError, "`epochs` must be an integer of at least 1"),
        (dict(recover=dict(augment="flip"), calibration=X), ValueError, "only for models with one input of images"),
        (dict(recover=dict(directory=__file__), calibration=X), ValueError, "`directory` must be a folder"),
    ],
    ids=["samples", "type", "name", "value", "augment", "directory"],
)
def test_prune_refuses_what_recovery_would_refuse_before_it_prunes(monkeypatch, arguments, error, message):
    monkeypatch.setattr(one_shot, "copy_model", None)
    with pytest.raises(error, match=message):
        kr.prune(dense(), 0.5, verbose=0, **arguments)


@pytest.mark.parametrize(
    "augment",
    ["flip", "shift", L.RandomFlip("vertical"), lambda x: -x, ["flip", lambda x: 2 * x]],
    ids=["flip", "shift", "layer", "function", "list"],
)
def test_augmentations(augment):
    keras.utils.set_random_seed(0)
    changed = ops.convert_to_numpy(augmentation.get(augment, residual())(ops.convert_to_tensor(IMAGES)))
    assert changed.shape == IMAGES.shape
    if augment == "flip":
        flipped = [np.array_equal(one, other[:, ::-1]) for one, other in zip(changed, IMAGES)]
        kept = [np.array_equal(one, other) for one, other in zip(changed, IMAGES)]
        assert 30 < sum(flipped) < 66
        assert sum(flipped) + sum(kept) == 96
    else:
        assert not np.array_equal(changed, IMAGES)


def test_a_model_with_a_fixed_batch_size():
    inputs = keras.Input(batch_shape=(8, 12))
    x = L.Dense(16, "relu")(inputs)
    model = keras.Model(inputs, L.Dense(3)(ops.reshape(x, (8, 16))))
    report = recover(kr.prune(model, 0.5), model, X, epochs=20, batch_size=64).recovery_report
    assert report.after < report.before
    assert (report.samples, report.held_out) == (144, 16)
    assert report.steps == 20 * 144 // 8


def test_a_fixed_batch_size_may_need_more_samples():
    model = keras.Sequential([keras.Input(batch_shape=(90, 12)), L.Dense(3)])
    with pytest.raises(ValueError, match="at least 180 samples.*Received: 160"):
        recover(kr.prune(model, 0.5), model)


def test_answers_are_computed_once_if_memory_holds_them(monkeypatch):
    mixed = (X @ np.random.default_rng(1).standard_normal((12, 12))).astype("float32")
    model = dense()
    pruned, computed = kr.prune(model, 0.7, calibration=mixed, verbose=0), []
    answers = Lesson.answers
    monkeypatch.setattr(Lesson, "answers", lambda self, x, size: computed.append(len(x)) or answers(self, x, size))
    once = recover(pruned, model, mixed, epochs=20)
    assert computed == [16, 144]
    assert once.recovery_report.best_step
    with monkeypatch.context() as context:
        context.setattr(module, "_MOST_ANSWERS", 0)
        each_time = recover(pruned, model, mixed, epochs=20)
    assert computed == [16, 144]
    for one, other in zip(values(once), values(each_time), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-3, atol=1e-3)
    # Only the samples that are held out remain as they are.
    changed = recover(pruned, model, mixed, epochs=20, augment=lambda x: x + 1)
    assert computed == [16, 144, 16]
    assert changed.recovery_report.after != once.recovery_report.after


def test_the_report_has_the_errors_of_layers():
    model = residual()
    pruned = kr.prune(model, {"first": 0.9, "classes": 0.5}, calibration=IMAGES, verbose=0)
    report = recover(pruned, model, IMAGES, epochs=6).recovery_report
    assert [place.name for place in report.layers] == ["first", "classes"]
    features = [keras.Model(one.input, one.get_layer("first").output) for one in (pruned, model)]
    # 9 of 96 samples are held out.
    held_out = IMAGES[np.random.default_rng(0).permutation(96)[:9]]
    given, wanted = (outputs(one, held_out) for one in features)
    assert report.layers[0].before == pytest.approx(np.sum((given - wanted) ** 2) / np.sum(wanted**2), rel=1e-3)
    assert report.layers[0].after != report.layers[0].before
    assert "error of layer" in str(report)
    small = kr.compact(kr.prune(model, 0.5, pattern="unit", verbose=0))
    assert recover(small, model, IMAGES, epochs=1).recovery_report.layers == ()
