import functools
import tracemalloc

import keras
import numpy as np
import pytest

import keras_renorm as kr
from keras_renorm.src.kernels import masks
from keras_renorm.src.layers.prunable import prunable_layers
from keras_renorm.src.methods.at_initialization.dissipating_gradients import MOVEMENT
from keras_renorm.src.methods.at_initialization.k_starts import FITNESS, RECOMBINE
from tests import fresh
from tests.layers.cases import CASES, model_around, model_inputs
from tests.outputs import outputs

KStarts, DissipatingGradients = kr.methods.KStarts, kr.methods.DissipatingGradients
X = np.random.default_rng(0).standard_normal((64, 12)).astype("float32")
Y = (X[:, :1] * X[:, 1:2]).astype("float32")

METHODS = {
    **{
        f"k-starts, {fitness}, {recombine}": lambda sparsity, fitness=fitness, recombine=recombine: KStarts(
            sparsity, k=5, search_epochs=2, fitness=fitness, recombine=recombine
        )
        for fitness in FITNESS
        for recombine in RECOMBINE
    },
    **{
        f"dissipating, {movement}": lambda sparsity, movement=movement: DissipatingGradients(sparsity, movement=movement)
        for movement in MOVEMENT
    },
    "combination": lambda sparsity: KStarts(sparsity, k=5, search_epochs=1, after="dissipating_gradients"),
}
of_two = functools.partial(KStarts, k=5, search_epochs=1, fitness="gradient", recombine="unit", after="dissipating_gradients")


def make(layer=None, **compile_arguments):
    keras.utils.set_random_seed(5)
    layer = layer or kr.layers.PrunableDense(20, "relu")
    model = keras.Sequential([keras.Input((12,)), layer, kr.layers.PrunableDense(10, "relu"), keras.layers.Dense(1)])
    model.compile(**{"optimizer": "adam", "loss": "mse", **compile_arguments})
    return model


def fit(model, *callbacks, **arguments):
    arguments = {"epochs": 4, "batch_size": 16, "verbose": 0, "shuffle": False, **arguments}
    return model.fit(X, Y, callbacks=list(callbacks), **arguments)


def masks_of(model):
    return [keras.ops.convert_to_numpy(kernel.mask) for layer in prunable_layers(model) for kernel in layer.masked_kernels]


def sparsity_of(model):
    return 1 - np.concatenate([mask.ravel() for mask in masks_of(model)]).mean()


class Snapshots(keras.callbacks.Callback):
    """Kernels before training and after every epoch; stands before the method in the list of callbacks."""

    def on_train_begin(self, logs=None):
        self.seen = [self.kernels()]

    def on_epoch_end(self, epoch, logs=None):
        self.seen.append(self.kernels())

    def kernels(self):
        return [
            keras.ops.convert_to_numpy(kernel.variable)
            for layer in prunable_layers(self.model)
            for kernel in layer.masked_kernels
        ]


class SaveAfter(keras.callbacks.Callback):
    def __init__(self, path, epoch):
        super().__init__()
        self.path, self.epoch = path, epoch

    def on_epoch_end(self, epoch, logs=None):
        if epoch == self.epoch:
            self.model.save(self.path)


# Laws of every method.


@pytest.mark.usefixtures("eager")
@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
def test_sparse_after_the_search_and_to_the_end(method):
    model = make()
    optimizer = model.optimizer
    history = fit(model, method(0.75)).history
    assert history["sparsity"][1:] == [0.75] * 3
    assert sparsity_of(model) == 0.75
    assert model.optimizer is optimizer
    assert int(optimizer.iterations) == 16


@pytest.mark.usefixtures("eager")
@pytest.mark.parametrize("method", ["k-starts, combined, weight", "combination"])
def test_the_same_masks_again(method):
    models = make(), make()
    for model in models:
        fit(model, METHODS[method](0.75), epochs=3)
    for one, other in zip(*map(masks_of, models)):
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("method", ["k-starts, magnitude, None", "k-starts, combined, weight", "combination"])
def test_a_search_goes_on_after_save_and_load(method, tmp_path):
    method, whole = METHODS[method], make()
    fit(whole, method(0.75), SaveAfter(tmp_path / "m.keras", 0))
    loaded = keras.models.load_model(tmp_path / "m.keras")
    fit(loaded, method(0.75), initial_epoch=1)
    for one, other in zip(whole.get_weights(), loaded.get_weights()):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-6)


@pytest.mark.usefixtures("eager")
@pytest.mark.parametrize("name", list(CASES))
def test_every_layer(name):
    """Both methods, one after the other."""
    create, inputs, _, _ = CASES[name]
    layer = kr.layers.RenormalizedPruning(create())
    model = model_around(layer, inputs)
    model.compile("adam", "mse")
    targets = np.random.default_rng(0).standard_normal(outputs(model, model_inputs(inputs)).shape)
    model.fit(model_inputs(inputs), targets, epochs=3, verbose=0, callbacks=[of_two(0.5)])
    assert layer.sparsity == pytest.approx(0.5, abs=0.2)
    assert all(np.isfinite(weight).all() for weight in model.get_weights())


PATTERNS = {
    "block": (kr.patterns.Block((4, 1)), 0.75),
    "wide block": (kr.patterns.Block((4, 2)), 0.75),
    "n of m": (kr.patterns.NOfM(2, 4), 0.5),
    "unit": (kr.patterns.Unit(), 0.5),
}


@pytest.mark.usefixtures("eager")
@pytest.mark.parametrize("group", ["layer", "unit"])
@pytest.mark.parametrize("pattern", PATTERNS.values(), ids=PATTERNS)
@pytest.mark.parametrize("method", ["k-starts, combined, unit", "combination"])
def test_every_pattern(method, pattern, group):
    pattern, sparsity = pattern
    method = METHODS[method](sparsity)
    by_unit = getattr(method, "recombine", None) == "unit"
    if isinstance(pattern, kr.patterns.Unit) and (group == "unit" or by_unit):
        pytest.skip("whole units cannot compete within a unit")
    layer = kr.layers.PrunableDense(20, "relu", pattern=pattern, group=group)
    model = make(layer)
    if by_unit and getattr(pattern, "size", (1, 1))[1] > 1:
        with pytest.raises(ValueError, match="recombine='weight'"):
            fit(model, method)
        return
    fit(model, method)
    # Cells are whole: the mask is what the pattern makes of it.
    mask = keras.ops.convert_to_numpy(layer.mask)
    np.testing.assert_array_equal(mask, pattern.expand(pattern.any(mask), mask.shape))
    assert sparsity_of(model) == pytest.approx(sparsity, abs=0.1)


@pytest.mark.fresh_optimizer
@pytest.mark.parametrize(
    "arguments",
    [
        dict(jit_compile=True),
        dict(run_eagerly=True),
        dict(steps_per_execution=3),
        dict(optimizer="sgd"),
    ],
    ids=["xla", "eager", "several steps", "sgd"],
)
@pytest.mark.parametrize("method", ["k-starts, combined, weight", "combination"])
def test_every_way_to_train(method, arguments):
    model = make(**arguments)
    fit(model, METHODS[method](0.75))
    assert sparsity_of(model) == 0.75


@pytest.mark.parametrize("policy", ["mixed_float16", "mixed_bfloat16"])
def test_mixed_precision(policy):
    keras.config.set_dtype_policy(policy)
    try:
        model = make()
        fit(model, METHODS["k-starts, combined, weight"](0.75))
    finally:
        keras.config.set_dtype_policy("float32")
    assert sparsity_of(model) == 0.75
    inner = model.optimizer.inner_optimizer if policy == "mixed_float16" else model.optimizer
    assert isinstance(inner, keras.optimizers.Adam)


# Dissipating gradients.


def moved(start, now, movement):
    """By the formulas: distances from the start, relative to each start or to their mean."""
    return np.abs(now - start) / (np.abs(start) if movement == "relative" else np.abs(start).mean())


@pytest.mark.parametrize("movement", MOVEMENT)
def test_what_moved_least_goes(movement):
    model, snapshots = make(), Snapshots()
    fit(model, snapshots, DissipatingGradients(0.75, search_epochs=1, movement=movement, allocation="uniform"))
    for start, now, mask in zip(snapshots.seen[0], snapshots.seen[1], masks_of(model)):
        np.testing.assert_array_equal(mask, masks.compute_mask(moved(start, now, movement), 0.75))


@pytest.mark.parametrize("movement", MOVEMENT)
def test_a_fraction_removes_what_moved_less(movement):
    model, snapshots = make(), Snapshots()
    history = fit(model, snapshots, DissipatingGradients(fraction=0.01, search_epochs=2, movement=movement)).history
    gone = [moved(start, now, movement) <= 0.01 for start, now in zip(snapshots.seen[0], snapshots.seen[1])]
    assert 0 < history["sparsity"][0] < 1
    assert history["sparsity"][0] == pytest.approx(sum(map(np.sum, gone)) / sum(map(np.size, gone)))
    for first, mask in zip(gone, masks_of(model)):
        assert not mask[first].any()
    assert history["sparsity"] == sorted(history["sparsity"])


def test_removed_in_equal_steps():
    history = fit(make(), DissipatingGradients(0.75, search_epochs=3)).history
    np.testing.assert_allclose(history["sparsity"], [0.25, 0.5, 0.75, 0.75], atol=2e-3)


# K-starts.


def candidates(kernel, sparsity, k, index, group="layer"):
    for candidate in range(k):
        draw = np.random.default_rng([0, index, candidate]).random(kernel.shape, np.float32)
        yield masks.compute_mask(draw, sparsity, group=group)


def test_the_fittest_candidate_is_chosen():
    model, snapshots = make(), Snapshots()
    pruning = KStarts(0.75, k=7, search_epochs=1, recombine=None, allocation="uniform")
    fit(model, snapshots, pruning)
    for index, (kernel, mask) in enumerate(zip(snapshots.seen[1], masks_of(model))):
        drawn = list(candidates(kernel, 0.75, 7, index))
        sums = [np.abs(kernel)[one].sum() for one in drawn]
        np.testing.assert_array_equal(mask, drawn[np.argmax(sums)])
        path = [k.variable.path for layer in prunable_layers(model) for k in layer.masked_kernels][index]
        found = pruning.history[0][path]
        np.testing.assert_allclose(found["candidates"], np.array(sums) / np.abs(kernel).sum(), rtol=1e-5)
        assert found["best"] == pytest.approx(max(sums) / np.abs(kernel).sum(), rel=1e-5)


def test_each_unit_takes_its_fittest_candidate():
    model, snapshots = make(), Snapshots()
    fit(model, snapshots, KStarts(0.75, k=7, search_epochs=1, recombine="unit", allocation="uniform"))
    for index, (kernel, mask) in enumerate(zip(snapshots.seen[1], masks_of(model))):
        drawn = np.array(list(candidates(kernel, 0.75, 7, index, group="unit")))
        sums = (np.abs(kernel) * drawn).sum(axis=1)
        np.testing.assert_array_equal(mask, drawn[sums.argmax(axis=0), :, np.arange(kernel.shape[1])].T)


def test_recombination_takes_the_fittest_weights_of_all_candidates():
    model, snapshots = make(), Snapshots()
    fit(model, snapshots, KStarts(0.75, k=3, search_epochs=1, allocation="uniform"))
    for index, (kernel, mask) in enumerate(zip(snapshots.seen[1], masks_of(model))):
        union = np.any(list(candidates(kernel, 0.75, 3, index)), axis=0)
        assert 0.25 < union.mean() < 1
        assert not mask[~union].any()
        np.testing.assert_array_equal(mask, masks.compute_mask(np.where(union, np.abs(kernel), 0), 0.75))


@pytest.mark.parametrize("fitness", FITNESS)
def test_finer_recombination_is_fitter(fitness):
    def best(recombine):
        pruning = KStarts(0.75, k=5, search_epochs=1, fitness=fitness, recombine=recombine)
        return fit(make(), pruning).history["fitness"][0]

    plain, unit, weight = (best(recombine) for recombine in (None, "unit", "weight"))
    assert plain < unit < weight <= 1


def test_gradient_fitness_is_that_of_the_last_epoch():
    """The same as with a recorder of one's own whose sums begin anew with the second epoch."""
    model = make()
    reference = make(optimizer=kr.optimizers.Recorder("adam"))
    fit(reference, epochs=1)
    reference.optimizer.reset_gradients()
    fit(reference, epochs=2, initial_epoch=1)
    fit(model, KStarts(0.75, k=200, search_epochs=2, fitness="gradient", allocation="uniform"))
    for layer, mask in zip(prunable_layers(reference), masks_of(model)):
        gradient = reference.optimizer.gradient(layer.masked_kernels[0].variable)
        np.testing.assert_array_equal(mask, masks.compute_mask(gradient, 0.75))


def test_the_fitness_stands_in_logs_and_history():
    pruning = KStarts(0.75, k=4, search_epochs=3)
    history = fit(make(), pruning).history
    assert len(history["fitness"]) == len(pruning.history) == 3
    for epoch, value in zip(pruning.history, history["fitness"]):
        assert value == pytest.approx(np.mean([kernel["best"] for kernel in epoch.values()]))
        assert all(kernel["candidates"].shape == (4,) for kernel in epoch.values())


def test_seeds():
    same = [masks_of(make_and_fit(KStarts(0.75, k=2, seed=seed))) for seed in (1, 1, 2)]
    assert all(np.array_equal(one, other) for one, other in zip(same[0], same[1]))
    assert not all(np.array_equal(one, other) for one, other in zip(same[0], same[2]))


def make_and_fit(method):
    model = make()
    fit(model, method)
    return model


def test_candidates_take_no_memory():
    """A kernel of half a million weights: 64 candidates as against one."""
    peaks = []
    for k in (1, 64):
        model = keras.Sequential([keras.Input((1000,)), kr.layers.PrunableDense(500), keras.layers.Dense(1)])
        model.compile("sgd", "mse")
        pruning = KStarts(0.9, k=k, search_epochs=1)
        pruning.set_model(model)
        pruning.set_params(dict(epochs=2))
        pruning.on_train_begin()
        tracemalloc.start()
        pruning.on_epoch_begin(0)
        pruning.on_epoch_end(0)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    weights = 1000 * 500 * 4
    assert peaks[1] - peaks[0] < weights


# Both.


def test_candidates_are_drawn_among_what_is_left():
    model = make()
    first = DissipatingGradients(0.5, search_epochs=1)
    left = []

    class Watch(keras.callbacks.Callback):
        def on_epoch_end(self, epoch, logs=None):
            left.append(masks_of(self.model))

    fit(model, KStarts(0.75, k=2, search_epochs=2, after=first), Watch())
    assert [round(1 - np.mean(np.concatenate([m.ravel() for m in one])), 2) for one in left] == [0.5, 0.5, 0.75, 0.75]
    for before, after in zip(left[0], left[-1]):
        assert not after[~before].any()


def test_what_the_name_of_the_first_method_stands_for():
    """To leave 1% in two equal steps, each leaves 10%."""
    after = KStarts(0.99, after="dissipating_gradients").after
    assert (after.sparsity, after.search_epochs, after.movement) == (pytest.approx(0.9), 1, "absolute")


# Interruption.


def test_backup_and_restore(tmp_path):
    class Break(keras.callbacks.Callback):
        def on_epoch_begin(self, epoch, logs=None):
            if epoch == 1:
                raise KeyboardInterrupt

    def method():
        return METHODS["combination"](0.75)

    whole = make()
    fit(whole, method())
    interrupted, resumed = make(), make()
    with pytest.raises(KeyboardInterrupt):
        fit(interrupted, method(), keras.callbacks.BackupAndRestore(tmp_path), Break())
    fit(resumed, method(), keras.callbacks.BackupAndRestore(tmp_path))
    for one, other in zip(whole.get_weights(), resumed.get_weights()):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-6)


def test_interrupted_and_fitted_again():
    class Break(keras.callbacks.Callback):
        def on_epoch_begin(self, epoch, logs=None):
            if epoch == 1:
                raise KeyboardInterrupt

    model, whole = make(), make()
    with pytest.raises(KeyboardInterrupt):
        fit(model, METHODS["combination"](0.75), Break())
    fit(model, METHODS["combination"](0.75), initial_epoch=1)
    fit(whole, METHODS["combination"](0.75))
    for one, other in zip(whole.get_weights(), model.get_weights()):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-6)


def test_a_finished_search_is_not_begun_again(tmp_path):
    model = make()
    fit(model, METHODS["combination"](0.75), SaveAfter(tmp_path / "m.keras", 2))
    loaded = keras.models.load_model(tmp_path / "m.keras")
    fit(loaded, METHODS["combination"](0.75), initial_epoch=3)
    for one, other in zip(model.get_weights(), loaded.get_weights()):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-6)


def test_saved_in_the_middle_loads_in_a_fresh_process(tmp_path):
    fit(make(), METHODS["combination"](0.75), SaveAfter(tmp_path / "m.keras", 0))
    program = f"""
import keras, keras_renorm as kr
model = keras.models.load_model(r"{tmp_path / "m.keras"}")
assert isinstance(model.optimizer, kr.optimizers.Recorder), model.optimizer
assert int(model.optimizer.epochs) == 1
"""
    fresh.run(program)


def test_a_lost_record_is_an_error(tmp_path):
    model = make()
    with pytest.raises(ValueError, match="is not there.*initial_epoch=0"):
        fit(model, METHODS["combination"](0.75), initial_epoch=1)
    with pytest.warns(UserWarning, match="it stays dense"):
        fit(make(), METHODS["combination"](0.75), initial_epoch=2)


def test_a_search_that_is_cut_short_warns():
    class Stop(keras.callbacks.Callback):
        def on_epoch_end(self, epoch, logs=None):
            self.model.stop_training = True

    with pytest.warns(UserWarning, match="before the 2 search epochs"):
        fit(make(), METHODS["combination"](0.75), Stop())
    with pytest.warns(UserWarning, match="before the 2 search epochs"):
        fit(make(), KStarts(0.75), Stop())


# Wrong use.


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(sparsity=1.0), "`sparsity`.*1.0"),
        (dict(sparsity=0.5, k=0), "`k`.*k=0"),
        (dict(sparsity=0.5, k=2.5), "`k`.*k=2.5"),
        (dict(sparsity=0.5, search_epochs=0), "`search_epochs`.*=0"),
        (dict(sparsity=0.5, fitness="weight"), "`fitness`.*'weight'"),
        (dict(sparsity=0.5, recombine="layer"), "`recombine`.*'layer'"),
        (dict(sparsity=0.5, after="k_starts"), "`after`.*'k_starts'"),
        (dict(sparsity=0.5, allocation="even"), "`allocation`.*'even'"),
    ],
)
def test_bad_arguments_of_k_starts(arguments, message):
    with pytest.raises(ValueError, match=message):
        KStarts(**arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(), "either `sparsity`.*or `fraction`"),
        (dict(sparsity=0.5, fraction=0.1), "either `sparsity`.*or `fraction`"),
        (dict(fraction=0.0), "`fraction`.*fraction=0.0"),
        (dict(fraction=-1), "`fraction`.*fraction=-1"),
        (dict(sparsity=0.5, movement="squared"), "`movement`.*'squared'"),
    ],
)
def test_bad_arguments_of_dissipating_gradients(arguments, message):
    with pytest.raises(ValueError, match=message):
        DissipatingGradients(**arguments)


@pytest.mark.parametrize("epochs", [1, 2])
def test_a_fit_shorter_than_the_search(epochs):
    model = make()
    before = model.get_weights()
    with pytest.raises(ValueError, match=f"`search_epochs` is longer.*3 epochs.*epochs={epochs}"):
        fit(model, KStarts(0.5, search_epochs=3), epochs=epochs)
    assert all(np.array_equal(one, other) for one, other in zip(before, model.get_weights()))


def test_a_model_without_prunable_layers():
    model = keras.Sequential([keras.Input((12,)), keras.layers.Dense(1)])
    model.compile("adam", "mse")
    with pytest.raises(ValueError, match="no prunable layers.*to_prunable"):
        fit(model, KStarts(0.5))


def test_frozen_layers_cannot_be_watched():
    model = make(kr.layers.PrunableDense(20, trainable=False, name="frozen"))
    with pytest.raises(ValueError, match="'frozen'.*frozen"):
        fit(model, DissipatingGradients(0.5))
    fit(model, KStarts(0.5))


def test_a_recorder_that_lacks_something():
    model = make(optimizer=kr.optimizers.Recorder("adam", gradients=False))
    with pytest.raises(ValueError, match="Recorder\\(optimizer, gradients=True, start=True\\)"):
        fit(model, KStarts(0.5, fitness="gradient", after="dissipating_gradients"))


def test_an_optimizer_that_is_not_used():
    class Own(keras.Sequential):
        def train_step(self, *arguments):
            logs = {"loss": keras.ops.zeros(())}
            # On JAX a step takes the state of the training and gives it back.
            return (logs, arguments[0]) if keras.backend.backend() == "jax" else logs

    model = Own([keras.Input((12,)), kr.layers.PrunableDense(20), keras.layers.Dense(1)])
    model.compile("adam", "mse")
    with pytest.raises(ValueError, match="recorded no gradient.*train_step"):
        fit(model, KStarts(0.5, fitness="gradient"))


def test_the_limit_of_a_pattern_belongs_to_its_kernel():
    for method in (KStarts(0.7, k=3, search_epochs=1), DissipatingGradients(0.7), METHODS["combination"](0.7)):
        model = make(kr.layers.PrunableDense(20, "relu", pattern=kr.patterns.NOfM(2, 4)))
        fit(model, method, epochs=2)
        # Of 440 weights 132 stay: of the 240 of the first layer 120 have to.
        assert [layer.sparsity for layer in prunable_layers(model)] == pytest.approx([0.5, 0.94])


def test_more_than_the_patterns_allow():
    model = make(kr.layers.PrunableDense(20, "relu", pattern=kr.patterns.NOfM(2, 4)))
    before = model.get_weights()
    with pytest.raises(ValueError, match=r"remove 0.7273 of all weights at most. Received: sparsity=0.8"):
        fit(model, KStarts(0.8))
    for one, other in zip(before, model.get_weights()):
        np.testing.assert_array_equal(one, other)


def test_a_fraction_removes_no_more_than_the_pattern_can():
    model = make(kr.layers.PrunableDense(20, "relu", pattern=kr.patterns.NOfM(2, 4)))
    fit(model, DissipatingGradients(fraction=0.015, search_epochs=1))
    assert [layer.sparsity > 0.6 for layer in prunable_layers(model)] == [False, True]
    assert prunable_layers(model)[0].sparsity == 0.5


def test_too_large_a_fraction():
    model = make()
    with pytest.raises(ValueError, match="`fraction` is too large.*fraction=1000"):
        fit(model, DissipatingGradients(fraction=1000))
    assert sparsity_of(model) == 0


def test_a_kernel_that_became_nan():
    model = make(optimizer=keras.optimizers.SGD(1e30))
    with pytest.raises(ValueError, match="NaN or infinite"):
        fit(model, DissipatingGradients(0.5))
    assert all(mask.all() for mask in masks_of(model))
