import functools
import os
import pathlib
import signal
import subprocess
import sys
import time

import keras
import numpy as np
import pytest

import keras_renorm as kr
from keras_renorm.src.core import run_folder
from keras_renorm.src.layers.prunable import prunable_layers
from keras_renorm.src.methods import outcome, run_state

X = np.random.default_rng(0).standard_normal((256, 8)).astype("float32")
Y = (X[:, :1] - 0.5 * X[:, 1:2]).astype("float32")
FIT = dict(x=X, y=Y, epochs=4, batch_size=64)


def make(optimizer=None, layers=None):
    keras.utils.set_random_seed(3)
    layers = layers or [keras.layers.Dense(16, "relu"), keras.layers.Dropout(0.1), keras.layers.Dense(1)]
    model = keras.Sequential([keras.Input((8,)), *layers])
    model.compile(optimizer or keras.optimizers.Adam(0.02), "mse")
    return model


def prune(model=None, fit=FIT, **arguments):
    arguments = {"metric": "loss", "floor": 0.5, "step": 0.4, "smallest_step": 0.15, "verbose": 0, **arguments}
    return kr.methods.prune_iteratively(model or make(), fit, **arguments)


def zeros(model):
    return kr.summary(model).sparsity


class Scripted:
    """A training that changes the weights and answers what it is told, without learning."""

    def __init__(self, answers, metric="quality"):
        self.answers, self.metric, self.seen = iter(answers), metric, []

    def __call__(self, model):
        self.seen.append(kr.summary(model).sparsity)
        for variable in model.trainable_variables:
            variable.assign(variable * 0.5)
        return {self.metric: next(self.answers)}


def scripted(answers, **arguments):
    fit = Scripted(answers)
    arguments = {"metric": "quality", "mode": "max", "floor": 1.0, **arguments}
    return fit, prune(make(layers=[keras.layers.Dense(100)]), fit, **arguments)


# The loop.


def test_goes_back_and_halves_the_step():
    """800 weights; steps of 40% hold twice, fail, then 20% fails and holds no more."""
    fit, found = scripted([2.0, 1.0, 1.5, 0.9, 0.99])
    np.testing.assert_allclose(fit.seen, [0, 0.4, 0.64, 1 - 0.36 * 0.6, 1 - 0.36 * 0.8], atol=2e-3)
    assert [row.held for row in found.history] == [True, True, True, False, False]
    assert [row.step for row in found.history] == [0, 0.4, 0.4, 0.4, 0.2]
    assert [row.metric for row in found.history] == [2.0, 1.0, 1.5, 0.9, 0.99]
    assert found.sparsity == pytest.approx(0.64)
    assert zeros(found.model) == pytest.approx(0.64)


def test_the_weights_are_those_of_the_round_that_held():
    """Every training halves the weights: after the two that count, a quarter is left of each."""
    model = make(layers=[keras.layers.Dense(100, name="fc")])
    dense = keras.ops.convert_to_numpy(model.get_layer("fc").kernel)
    found = prune(model, Scripted([2.0, 1.0, 0.5, 0.5]), metric="quality", mode="max", floor=1.0, renormalize=None)
    kernel = keras.ops.convert_to_numpy(found.model.get_layer("fc").kernel)
    np.testing.assert_allclose(kernel[kernel != 0], (dense / 4)[kernel != 0], rtol=1e-6)
    assert type(found.model.get_layer("fc")) is keras.layers.Dense


def test_the_model_passed_in_stays_as_it_is():
    model = make()
    before, optimizer = model.get_weights(), model.optimizer
    prune(model)
    assert all(np.array_equal(one, other) for one, other in zip(before, model.get_weights()))
    assert model.optimizer is optimizer


def test_on_real_training_the_floor_is_held():
    found = prune(floor=0.3)
    assert found.sparsity > 0.6
    assert zeros(found.model) == pytest.approx(found.sparsity)
    held = [row for row in found.history if row.held]
    assert all(row.metric <= 0.3 for row in held)
    assert not found.history[-1].held
    assert found.history[-1].step / 2 < 0.15


def test_the_optimizer_goes_back_too():
    class Watch(Scripted):
        def __call__(self, model):
            self.iterations.append(int(model.optimizer.iterations))
            model.fit(X, np.zeros((256, 100)), batch_size=64, verbose=0)
            return super().__call__(model)

    fit = Watch([2.0, 1.0, 0.5, 1.0, 0.5])
    fit.iterations = []
    prune(make(layers=[keras.layers.Dense(100)]), fit, metric="quality", mode="max", floor=1.0)
    assert fit.iterations == [0, 4, 8, 8, 12]


def test_ends_a_round_as_soon_as_the_metric_holds():
    found = prune(fit={**FIT, "epochs": 50}, floor=0.5)
    assert found.history[0].epochs == 50
    assert all(row.epochs < 50 for row in found.history[1:] if row.held)
    whole = prune(fit={**FIT, "epochs": 5}, floor=0.5, stop_early=False, max_rounds=2)
    assert [row.epochs for row in whole.history] == [5, 5, 5]


@pytest.mark.parametrize(
    ("mode", "answers", "floor"),
    [("max", [0.9, 0.86, 0.85, 0.84, 0.84], 0.85), ("min", [0.9, 0.94, 0.95, 0.96, 0.96], 0.95)],
)
def test_tolerance(mode, answers, floor):
    _, found = scripted(answers, floor=None, tolerance=0.05, mode=mode)
    assert found.floor == pytest.approx(floor)
    assert sum(row.held for row in found.history) == 3


@pytest.mark.parametrize(
    ("metric", "better"),
    [("val_accuracy", "max"), ("val_loss", "min"), ("auc", "max"), ("val_perplexity", "min"), ("my_mae", "min")],
)
def test_the_direction_of_a_metric(metric, better):
    assert outcome.direction(metric, "auto") == better


def test_ends_when_nothing_is_left_to_remove():
    fit, found = scripted([2.0] * 50, step=0.9)
    assert found.sparsity == pytest.approx(1 - 1 / 800)
    assert len(fit.seen) <= 5


def test_max_rounds():
    _, found = scripted([2.0] * 5, max_rounds=3)
    assert len(found.history) == 4


@pytest.mark.parametrize("allocation", ["global", "uniform", "erk", "balanced", "lamp"])
@pytest.mark.parametrize("pattern", ["unstructured", kr.patterns.Block((4, 1)), "unit"])
def test_allocations_and_patterns(allocation, pattern):
    layers = [keras.layers.Dense(32, "relu"), keras.layers.Dense(32, "relu"), keras.layers.Dense(4)]
    found = prune(
        make(layers=layers),
        Scripted([2.0] * 4),
        metric="quality",
        mode="max",
        floor=1.0,
        max_rounds=3,
        allocation=allocation,
        pattern=pattern,
    )
    assert found.sparsity == pytest.approx(1 - 0.6**3, abs=0.05)
    assert all(one.sparsity < other.sparsity for one, other in zip(found.history, found.history[1:]))


def test_the_limit_of_a_pattern_belongs_to_its_kernel():
    model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(100, name="first"), keras.layers.Dense(1, name="last")])
    model.compile("sgd", "mse")
    found = prune(
        model,
        lambda model: {"loss": 0.0},
        metric="loss",
        floor=1.0,
        tolerance=None,
        step=0.5,
        max_rounds=2,
        pattern={"last": kr.patterns.NOfM(2, 4)},
    )
    assert found.sparsity == 0.75
    assert np.count_nonzero(found.model.get_layer("last").kernel) >= 50


def test_a_global_threshold():
    model = make(layers=[keras.layers.Dense(100, use_bias=False, name="a"), keras.layers.Dense(50, use_bias=False, name="b")])
    kernels = [keras.ops.convert_to_numpy(model.get_layer(name).kernel) for name in "ab"]
    found = prune(model, Scripted([2.0, 2.0]), metric="quality", mode="max", floor=1.0, max_rounds=1, renormalize=None)
    threshold = np.quantile(np.abs(np.concatenate([kernel.ravel() for kernel in kernels])), 0.4)
    for name, kernel in zip("ab", kernels):
        kept = keras.ops.convert_to_numpy(found.model.get_layer(name).kernel) != 0
        assert (kept == (np.abs(kernel) > threshold)).mean() > 0.999


def test_own_criterion():
    def keep_the_last(kernel):
        return np.arange(kernel.size, dtype="float32").reshape(kernel.shape)

    model = make(layers=[keras.layers.Dense(100, name="fc")])
    found = prune(model, Scripted([2.0, 2.0]), metric="quality", mode="max", floor=1.0, max_rounds=1, criterion=keep_the_last)
    kept = keras.ops.convert_to_numpy(found.model.get_layer("fc").kernel) != 0
    assert kept.sum(axis=1).tolist() == [0, 0, 0, 80, 100, 100, 100, 100]


@pytest.mark.parametrize("criterion", ["activity", "activation", "obs"])
def test_criteria_that_need_samples(criterion):
    """Of inputs that are all alike but for their size, the largest stay."""
    samples = X * np.array([1, 1, 1, 1, 5, 5, 5, 5], "float32")
    model = make(layers=[keras.layers.Dense(100, kernel_initializer="ones", name="fc")])
    arguments = dict(criterion=criterion, calibration=samples, renormalize=None, step=0.5, max_rounds=1)
    found = prune(model, Scripted([2.0, 2.0]), metric="quality", mode="max", floor=1.0, **arguments)
    kept = keras.ops.convert_to_numpy(found.model.get_layer("fc").kernel) != 0
    assert kept.sum(axis=1).tolist() == [0, 0, 0, 0, 100, 100, 100, 100]


def test_a_criterion_that_needs_labels():
    """Weights of inputs that are zero have no gradient, so they go first."""
    samples = X * np.array([1, 1, 1, 1, 0, 0, 0, 0], "float32")
    model = make(layers=[keras.layers.Dense(100, name="fc")])
    arguments = dict(criterion="taylor", renormalize=None, step=0.5, max_rounds=2)
    quality = dict(metric="quality", mode="max", floor=1.0)
    with pytest.raises(ValueError, match="must have labels"):
        prune(model, Scripted([2.0] * 3), calibration=samples, **arguments, **quality)
    labels = np.ones((len(X), 100), "float32")
    found = prune(model, Scripted([2.0] * 3), calibration=(samples, labels), **arguments, **quality)
    kept = keras.ops.convert_to_numpy(found.model.get_layer("fc").kernel) != 0
    assert kept[:4].sum() == kept.sum() == 200


def test_goes_on_from_a_model_with_prunable_layers():
    model = make(layers=[kr.layers.PrunableDense(100, pattern=kr.patterns.Block((4, 1)))])
    model.layers[0].update_masks(0.5)
    fit = Scripted([2.0] * 2)
    found = prune(model, fit, metric="quality", mode="max", floor=1.0, max_rounds=1)
    np.testing.assert_allclose(fit.seen, [0.5, 0.7], atol=0.01)
    assert type(found.model.layers[0]) is keras.layers.Dense


def test_irrelevance_decay_restarts_with_every_pruning():
    optimizer = kr.optimizers.IrrelevanceDecay(keras.optimizers.Adam(0.02), gamma=1e-3, decay_steps=100)
    steps = []

    class Watch(keras.callbacks.Callback):
        def on_train_begin(self, logs=None):
            steps.append(int(self.model.optimizer.steps))

    fit = dict(FIT, callbacks=[Watch()])
    found = prune(make(optimizer), fit, floor=10.0, max_rounds=2)
    assert steps == [0, 0, 0]
    assert isinstance(found.model.optimizer, kr.optimizers.IrrelevanceDecay)


def test_a_round_with_nan_is_rolled_back_and_reported():
    answers = [2.0, 2.0, float("nan"), 0.0]
    _, found = scripted(answers)
    assert [row.held for row in found.history] == [True, True, False, False]
    assert found.history[2].note == "quality is nan"
    assert all(np.isfinite(weight).all() for weight in found.model.get_weights())


def test_training_that_diverges():
    class Diverge(keras.callbacks.Callback):
        def on_train_begin(self, logs=None):
            if kr.summary(self.model).sparsity > 0.3:
                self.model.optimizer.learning_rate = 1e20

    found = prune(fit=dict(FIT, callbacks=[Diverge()]), step=0.5, smallest_step=0.2)
    assert [row.held for row in found.history] == [True, False, True, False]
    assert "loss is" in found.history[1].note
    assert all(np.isfinite(weight).all() for weight in found.model.get_weights())


# What is shown.


def test_table_and_plot():
    matplotlib = pytest.importorskip("matplotlib")
    matplotlib.use("Agg")
    _, found = scripted([2.0, 1.0, 0.9, 0.99])
    assert "quality" in str(found)
    assert str(found).endswith("floor of quality: 1")
    assert len(str(found).splitlines()) == 2 + 4 + 1
    ax = found.plot()
    assert ax.get_xlabel() == "weights left"
    np.testing.assert_allclose(ax.lines[0].get_ydata(), [2.0, 1.0])
    np.testing.assert_allclose(ax.lines[1].get_ydata(), [0.9, 0.99])
    assert found.plot(ax=ax) is ax


def test_progress(capsys):
    scripted([2.0, 1.0, 0.9, 0.99], verbose=1)
    shown = capsys.readouterr().out
    assert "sparsity: 0.4" in shown
    assert "quality: 1.0" in shown


# The state on disk.


def same(one, other):
    return all(np.array_equal(a, b) for a, b in zip(one.model.get_weights(), other.model.get_weights())) and [
        (row.sparsity, row.metric, row.held) for row in one.history
    ] == [(row.sparsity, row.metric, row.held) for row in other.history]


def test_the_same_result_with_and_without_a_directory(tmp_path):
    one, other = prune(max_rounds=4), prune(max_rounds=4, directory=tmp_path / "run")
    assert same(one, other)
    files = sorted(path.name for path in (tmp_path / "run").iterdir())
    last = max(row.round for row in other.history if row.held)
    assert files == [f"round-{last:04d}.npz", "run.json"]
    assert same(prune(max_rounds=4, directory=tmp_path / "run"), other)


def test_half_precision_comes_back_from_disk(tmp_path):
    model = make(layers=[keras.layers.Dense(16, dtype="bfloat16"), keras.layers.Dense(1, dtype="bfloat16")])
    arguments = dict(metric="quality", mode="max", floor=1.0)
    whole = prune(model, Scripted([2.0] * 3), max_rounds=2, **arguments)
    prune(model, Scripted([2.0] * 2), max_rounds=1, directory=tmp_path, **arguments)
    again = prune(model, Scripted([2.0]), max_rounds=2, directory=tmp_path, **arguments)
    for one, other in zip(whole.model.variables, again.model.variables):
        assert keras.backend.standardize_dtype(other.dtype) == "bfloat16"
        np.testing.assert_array_equal(*(keras.ops.convert_to_numpy(keras.ops.cast(v, "float32")) for v in (one, other)))


in_one_go = functools.cache(prune)


@pytest.mark.parametrize("moment", [1, 2, 5])
def test_resumes_after_an_interruption(tmp_path, moment):
    class Interrupt(keras.callbacks.Callback):
        def __init__(self):
            super().__init__()
            self.epochs = 0

        def on_epoch_end(self, epoch, logs=None):
            self.epochs += 1
            if self.epochs == 2 * moment:
                raise KeyboardInterrupt

    arguments = dict(floor=0.3, stop_early=False, step=0.5, max_rounds=4)
    whole = in_one_go(**arguments)
    with pytest.raises(KeyboardInterrupt):
        prune(fit=dict(FIT, callbacks=[Interrupt()]), directory=tmp_path, **arguments)
    assert same(prune(directory=tmp_path, **arguments), whole)


PROGRAM = """
import os, sys
os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"
sys.path.insert(0, {root!r})
from tests.methods import test_iterative as t
import numpy as np
found = t.prune(directory={directory!r}, floor=0.3, step=0.3, smallest_step=0.1)
np.savez({out!r}, *found.model.get_weights())
"""


@pytest.mark.slow
def test_killed_at_ten_random_moments(tmp_path):
    """SIGKILL, again and again: it ends with the weights of a run that was left alone."""

    def program(name):
        root = str(pathlib.Path(__file__).parents[2])
        content = PROGRAM.format(root=root, directory=str(tmp_path / name), out=str(tmp_path / f"{name}.npz"))
        return subprocess.Popen([sys.executable, "-c", content], stderr=subprocess.DEVNULL)

    started = time.monotonic()
    assert program("whole").wait(timeout=600) == 0
    duration = time.monotonic() - started
    generator, kills = np.random.default_rng(0), 0
    while kills < 10:
        process = program("killed")
        time.sleep(generator.uniform(0.4, 0.8) * duration)
        # One that had ended before begins from its finished state, and is killed all the same.
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        kills += 1
    assert kills == 10
    assert program("killed").wait(timeout=600) == 0
    with np.load(tmp_path / "whole.npz") as one, np.load(tmp_path / "killed.npz") as other:
        for name in one.files:
            np.testing.assert_array_equal(one[name], other[name])


def test_a_directory_of_another_run(tmp_path):
    prune(directory=tmp_path, max_rounds=1)
    before = (tmp_path / "run.json").read_text()
    for other in (
        dict(floor=0.4),
        dict(seed=1),
        dict(allocation="uniform"),
        dict(renormalize=None),
        dict(pattern=kr.patterns.Block((2, 1))),
        dict(model=make("sgd")),
        dict(model=make(layers=[keras.layers.Dense(1)])),
        dict(model=make(layers=[keras.layers.Dense(16, "relu", dtype="bfloat16"), keras.layers.Dense(1)])),
    ):
        with pytest.raises(ValueError, match="`directory` holds the state of another run"):
            prune(directory=tmp_path, max_rounds=1, **other)
    assert (tmp_path / "run.json").read_text() == before


def test_a_full_disk_leaves_the_former_state(tmp_path, monkeypatch):
    whole = prune(max_rounds=3, floor=0.3)
    prune(directory=tmp_path, max_rounds=1, floor=0.3)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def full(*arguments, **more):
        arguments[0].write(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(run_folder.np, "savez", full)
    with pytest.raises(OSError, match="No space left"):
        prune(directory=tmp_path, max_rounds=3, floor=0.3)
    monkeypatch.undo()
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    assert same(prune(directory=tmp_path, max_rounds=3, floor=0.3), whole)


def test_what_another_run_left_behind_is_not_used(tmp_path, monkeypatch):
    """Run A is killed between its weights and its record; B begins there, is killed in its first round, and goes on."""
    write = run_folder.RunFolder._write

    def killed(self, path, content):
        if path.name == "run.json":
            raise KeyboardInterrupt
        write(self, path, content)

    class Interrupt(keras.callbacks.Callback):
        def on_train_begin(self, logs=None):
            if kr.summary(self.model).sparsity > 0:
                raise KeyboardInterrupt

    monkeypatch.setattr(run_folder.RunFolder, "_write", killed)
    with pytest.raises(KeyboardInterrupt):
        prune(directory=tmp_path, max_rounds=1, seed=0)
    monkeypatch.undo()
    assert os.listdir(tmp_path) == ["round-0000.npz"]
    with pytest.raises(KeyboardInterrupt):
        prune(fit=dict(FIT, callbacks=[Interrupt()]), directory=tmp_path, max_rounds=1, seed=1)
    assert same(prune(directory=tmp_path, max_rounds=1, seed=1), prune(max_rounds=1, seed=1))


def test_two_runs_at_once(tmp_path):
    class Second(keras.callbacks.Callback):
        def on_train_begin(self, logs=None):
            with pytest.raises(ValueError, match="`directory` is in use by another run"):
                prune(directory=tmp_path, max_rounds=1, seed=1)

    prune(fit=dict(FIT, epochs=1, callbacks=[Second()]), floor=10.0, directory=tmp_path, max_rounds=1)


def test_a_damaged_state(tmp_path):
    prune(directory=tmp_path, max_rounds=1)
    (tmp_path / "run.json").write_text("")
    with pytest.raises(ValueError, match="damaged state: '.*run.json' .*delete it .* to start again"):
        prune(directory=tmp_path, max_rounds=1)


def test_other_weights_than_those_of_the_run(tmp_path):
    """The run goes on from its own, and says so."""
    first = prune(directory=tmp_path, max_rounds=1)
    other = make()
    other.layers[0].bias.assign_add(np.ones(16))
    with pytest.warns(UserWarning, match="began with other weights than those of the model passed in"):
        assert same(prune(other, directory=tmp_path, max_rounds=1), first)


def test_own_rules_have_the_same_name_in_every_process():
    class Own:
        pass

    def rule(kernel):
        return kernel

    assert run_state.name_of(rule).endswith("rule")
    assert run_state.name_of(Own()).endswith("Own")
    assert run_state.name_of(kr.patterns.Block((2, 1))) == "Block(size=(2, 1))"
    assert run_state.name_of(None) == "None"


# Wrong use.


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(floor=None), "either `floor`.*or `tolerance`"),
        (dict(tolerance=0.1), "either `floor`.*or `tolerance`"),
        (dict(step=0.0), "`step`.*step=0.0"),
        (dict(step=1.0), "`step`.*step=1.0"),
        (dict(smallest_step=2), "`smallest_step`.*smallest_step=2"),
        (dict(mode="best"), "`mode`.*'best'"),
        (dict(metric="quality"), "`metric` does not tell.*'quality'"),
        (dict(fit=3), "`fit` must be a dict"),
        (dict(max_rounds=0), "`max_rounds`.*max_rounds=0"),
        (dict(allocation="even"), "`allocation`.*'even'"),
        (dict(criterion="best"), "`criterion`.*'best'"),
        (dict(criterion="activity"), "'activity'|Activity.*needs calibration samples"),
        (dict(criterion="admm", calibration=X), "`criterion` must return scores.*ADMM"),
        (dict(criterion=kr.criteria.Activity(0.9), calibration=X), "`criterion` must return scores.*share=0.9"),
        (dict(verbose=7), "`verbose`"),
        (dict(metric="val_loss"), "not in the logs.*'val_loss'.*have: \\['loss'\\]"),
        (dict(fit=lambda model: None), "not in the logs.*none, but None"),
        (dict(floor=1e-9), "does not reach the floor: after training, loss is .*floor=1e-09"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        prune(**arguments)


def test_a_model_that_is_not_compiled():
    model = keras.Sequential([keras.Input((8,)), keras.layers.Dense(1)])
    with pytest.raises(ValueError, match="must be compiled"):
        prune(model)


def test_layers_that_samples_cannot_score():
    model = keras.Sequential([keras.Input((4,)), keras.layers.Embedding(9, 5, name="words"), keras.layers.LSTM(3)])
    model.compile("adam", "mse")
    samples = np.zeros((16, 4), "int32")
    fit = dict(x=samples, y=np.zeros((16, 3), "float32"))
    with pytest.raises(ValueError, match=r"cannot score the kernels of layers \['words', 'lstm.*`layers=`"):
        prune(model, fit, criterion="activity", calibration=samples, floor=10.0)


def test_nothing_to_prune():
    model = make(layers=[keras.layers.LayerNormalization()])
    with pytest.raises(ValueError, match="nothing"):
        prune(model)


def test_masks_are_never_lost_between_rounds():
    """What a round that held removed is gone in every later one."""
    removed = []

    def fit(model):
        masks = [keras.ops.convert_to_numpy(k.mask) for layer in prunable_layers(model) for k in layer.masked_kernels]
        removed.append(~np.concatenate([mask.ravel() for mask in masks]))
        return {"quality": 1.0 if len(removed) != 3 else 0.0}

    prune(make(), fit, metric="quality", mode="max", floor=1.0, max_rounds=4)
    assert (removed[1] <= removed[3]).all()
    assert (removed[3] <= removed[4]).all()
