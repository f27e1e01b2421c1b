import os
import subprocess
import sys
import types

import keras
import numpy as np
import pytest

from keras_renorm.src.rules import schedules


@pytest.fixture(scope="module")
def tfmot():
    return pytest.importorskip("tensorflow_model_optimization").sparsity.keras


SETTINGS = [
    ("ConstantSparsity", dict(target_sparsity=0.5, begin_step=0)),
    ("ConstantSparsity", dict(target_sparsity=0.9, begin_step=7, end_step=40, frequency=3)),
    ("PolynomialDecay", dict(initial_sparsity=0.0, final_sparsity=0.9, begin_step=0, end_step=50, frequency=1)),
    ("PolynomialDecay", dict(initial_sparsity=0.5, final_sparsity=0.8, begin_step=5, end_step=45, power=1, frequency=10)),
    ("PolynomialDecay", dict(initial_sparsity=0.2, final_sparsity=0.99, begin_step=10, end_step=33, power=2.5, frequency=4)),
]


@pytest.mark.parametrize(("name", "arguments"), SETTINGS)
def test_the_same_numbers_as_tfmot(name, arguments, tfmot):
    ours, theirs = getattr(schedules, name)(**arguments), getattr(tfmot, name)(**arguments)
    for step in range(60):
        should_prune, sparsity = theirs(step)
        assert ours(step)[0] == bool(should_prune), step
        assert ours(step)[1] == pytest.approx(float(sparsity), abs=1e-6), step


@pytest.mark.parametrize("name", ["ConstantSparsity", "PolynomialDecay"])
def test_the_same_signature_as_tfmot(name, tfmot):
    import inspect

    ours, theirs = (inspect.signature(getattr(module, name).__init__) for module in (schedules, tfmot))
    assert [(p.name, p.default) for p in ours.parameters.values()] == [(p.name, p.default) for p in theirs.parameters.values()]


@pytest.mark.parametrize(("name", "arguments"), SETTINGS)
def test_config_round_trip(name, arguments, tfmot):
    ours = getattr(schedules, name)(**arguments)
    assert schedules.get(schedules.serialize(ours)) == ours
    assert schedules.get(getattr(tfmot, name)(**arguments)) == ours
    assert schedules.get(getattr(tfmot, name)(**arguments).get_config()) == ours


def test_a_schedule_of_tfmots_kind_is_kept(tfmot):
    import tensorflow as tf

    @keras.saving.register_keras_serializable(package="tests")
    class Half(tfmot.PruningSchedule):
        def __init__(self, share=0.5):
            self.share = share

        def __call__(self, step):
            return tf.equal(step % 2, 0), tf.constant(self.share)

        def get_config(self):
            return {"class_name": "Half", "config": {"share": self.share}}

    schedule = schedules.get(Half(0.25))
    assert isinstance(schedule, Half)
    assert schedules.evaluate(schedule, 4) == (True, 0.25)
    again = schedules.get(schedules.serialize(schedule))
    assert isinstance(again, Half)
    assert again.share == 0.25


def test_a_callable_is_a_schedule():
    def schedule(step):
        return step == 3, 0.5

    assert schedules.get(schedule) is schedule


def test_the_end_is_exact():
    assert schedules.PolynomialDecay(0, 0.9, 0, 1000)(1000) == (True, 0.9)
    assert schedules.PolynomialDecay(0, 0.9, 5, 5)(5) == (True, 0.9)


@pytest.mark.parametrize("value", [0.5, "polynomial", schedules.PolynomialDecay, lambda step: 0.5, lambda step: (True, 1.5)])
def test_not_a_schedule(value):
    with pytest.raises(ValueError, match="`pruning_schedule` must"):
        schedules.get(value)


@pytest.mark.parametrize("sparsity", [-0.1, 1.0, float("nan")])
def test_sparsity_out_of_range(sparsity):
    with pytest.raises(ValueError, match=r"`target_sparsity` must be a number in \[0, 1\)"):
        schedules.ConstantSparsity(sparsity, 0)
    with pytest.raises(ValueError, match="`final_sparsity`"):
        schedules.PolynomialDecay(0, sparsity, 0, 10)


@pytest.mark.parametrize(
    ("steps", "argument"),
    [((-1, 10, 1), "begin_step"), ((5, 3, 1), "end_step"), ((0, 10, 0), "frequency"), ((0, -1, 1), "end_step")],
)
def test_steps_out_of_range(steps, argument):
    begin, end, frequency = steps
    with pytest.raises(ValueError, match=f"`{argument}` must"):
        schedules.PolynomialDecay(0, 0.5, begin, end, frequency=frequency)


def test_before_the_beginning_and_after_the_end_by_hand():
    constant = schedules.ConstantSparsity(0.5, 10, 30, 10)
    assert [constant(step) for step in (0, 9, 10, 11, 20, 30, 31, 40)] == [
        (event, 0.5) for event in (False, False, True, False, True, True, False, False)
    ]
    decay = schedules.PolynomialDecay(0.2, 0.6, 10, 30, power=1, frequency=5)
    assert decay(0) == (False, pytest.approx(0.2))
    assert decay(5) == (False, pytest.approx(0.2))
    assert decay(10) == (True, pytest.approx(0.2))
    assert decay(15) == (True, pytest.approx(0.3))
    assert decay(16) == (False, pytest.approx(0.32))
    assert decay(30) == (True, pytest.approx(0.6))
    assert decay(35) == (False, pytest.approx(0.6))
    assert decay(1000) == (False, pytest.approx(0.6))


def test_a_beginning_that_is_the_end():
    decay = schedules.PolynomialDecay(0.2, 0.6, 5, 5)
    assert [decay(step) for step in (4, 5, 6, 105)] == [(False, 0.2), (True, 0.6), (False, 0.6), (False, 0.6)]


def test_initial_above_final_by_hand():
    decay = schedules.PolynomialDecay(0.8, 0.4, 0, 20, power=2, frequency=5)
    assert [decay(step)[1] for step in (0, 5, 10, 20)] == pytest.approx([0.8, 0.4 + 0.4 * 0.75**2, 0.5, 0.4])
    assert decay.max_sparsity == 0.8
    assert schedules.PolynomialDecay(0.4, 0.8, 0, 20).max_sparsity == 0.8
    assert schedules.ConstantSparsity(0.3, 0).max_sparsity == 0.3


def test_defaults_by_hand():
    constant = schedules.ConstantSparsity(0.5, 3)
    assert (constant.begin_step, constant.end_step, constant.frequency) == (3, -1, 100)
    assert constant(3 + 10**6)[0]
    assert not constant(3 + 10**6 + 1)[0]
    decay = schedules.PolynomialDecay(0.0, 0.8, 0, 200)
    assert (decay.power, decay.frequency) == (3, 100)
    assert decay(100) == (True, pytest.approx(0.8 * (1 - 0.5**3)))


def test_the_smallest_arguments_and_arguments_of_numpy():
    schedule = schedules.ConstantSparsity(0, np.int64(0), np.int64(0), np.int64(1))
    assert [schedule(step) for step in (0, 1)] == [(True, 0), (False, 0)]
    assert {type(value) for value in (schedule.begin_step, schedule.end_step, schedule.frequency)} == {int}
    assert schedule(np.int64(0)) == (True, 0)
    with pytest.raises(ValueError, match="`end_step` must be -1"):
        schedules.ConstantSparsity(0.5, 5, -2)
    with pytest.raises(ValueError, match="`initial_sparsity`"):
        schedules.PolynomialDecay(1.0, 0.5, 0, 10)
    with pytest.raises(NotImplementedError):
        schedules.PruningSchedule(0, 10, 1)(0)


def test_nothing_is_a_schedule_of_nothing():
    assert schedules.get(None) is None
    assert schedules.serialize(None) is None


def test_a_schedule_that_fails_names_step_and_reason():
    def schedule(step):
        return step == 0, step

    with pytest.raises(ValueError, match=r"which at step 3 fails with: .*\[0, 1\).*3"):
        schedules.evaluate(schedule, 3)


NESTED = {"class_name": "Gone", "config": {}}


def test_a_class_that_is_not_known_here_says_what_to_do():
    config = {"tfmot_schedule": {"module": "mine", "registered_name": "tests>Gone", **NESTED}}
    with pytest.raises(ValueError, match=r"of class 'Gone', which is not known here.*custom_objects=\{'tests>Gone': Gone\}"):
        schedules.get(config)
    config["tfmot_schedule"]["module"] = "tensorflow_model_optimization"
    with pytest.raises(ValueError, match="of class 'Gone', which is not known here"):
        schedules.get(config)


@pytest.mark.parametrize("before", [None, "0", "1"])
def test_an_import_leaves_the_choice_of_keras_as_it_was(before, monkeypatch):
    monkeypatch.delenv("TF_USE_LEGACY_KERAS", raising=False)
    if before is not None:
        monkeypatch.setenv("TF_USE_LEGACY_KERAS", before)

    def import_module(module):
        os.environ["TF_USE_LEGACY_KERAS"] = "1"
        return module

    monkeypatch.setattr(schedules.importlib, "import_module", import_module)
    assert schedules._import_quietly("tensorflow_model_optimization") == "tensorflow_model_optimization"
    assert os.environ.get("TF_USE_LEGACY_KERAS") == before


def test_a_class_of_tfmots_that_is_not_registered_is_found_in_its_module(tfmot, monkeypatch):
    """As for a model that was saved with a schedule of a newer tfmot."""

    class Quarter(tfmot.PruningSchedule):
        def __call__(self, step):
            return step > 0, 0.25

        def get_config(self):
            return {"class_name": "Quarter", "config": {}}

    Quarter.__module__ = "tensorflow_model_optimization.somewhere"
    config = schedules.serialize(Quarter())
    assert config["tfmot_schedule"]["module"] == Quarter.__module__
    monkeypatch.setattr(schedules, "_import_quietly", lambda module: types.SimpleNamespace(Quarter=Quarter))
    assert isinstance(schedules.get(config), Quarter)


TFMOT = """
import keras_renorm as kr, sys
assert "tf_keras" not in sys.modules and "tensorflow_model_optimization" not in sys.modules, "imported"
import tensorflow_model_optimization as tfmot
import keras, numpy as np
schedule = tfmot.sparsity.keras.ConstantSparsity(0.5, 0, frequency=1)
model = kr.to_prunable(keras.Sequential([keras.Input((4,)), keras.layers.Dense(2)]), pruning_schedule=schedule)
model.compile("sgd", "mse")
model.fit(np.ones((4, 4)), np.ones((4, 2)), verbose=0, callbacks=[kr.callbacks.UpdatePruning()])
assert kr.summary(model).sparsity == 0.5
kr.export_tflite(model, sys.argv[1])
"""


def test_tfmot_beside_keras_3(tmp_path):
    """What tfmot does to `tf.keras` disturbs nothing here."""
    # tfmot may have set it for this process already.
    environment = {name: value for name, value in os.environ.items() if name != "TF_USE_LEGACY_KERAS"}
    command = [sys.executable, "-W", "ignore", "-c", TFMOT, str(tmp_path / "model.tflite")]
    subprocess.run(command, check=True, env=environment)


def test_evaluate_gives_python_values(tfmot):
    should_prune, sparsity = schedules.evaluate(tfmot.ConstantSparsity(0.5, 0), 100)
    assert should_prune is True
    assert type(sparsity) is float
    assert np.isclose(sparsity, 0.5)


def test_goals():
    constant, decay = schedules.ConstantSparsity, schedules.PolynomialDecay
    goal_of = schedules.goal_of
    assert goal_of(constant(0.5, 7)) == schedules.Goal(0.5, 7, 0.5, 7, -1)
    # Events at 7, 17 and so on, of which one is to come.
    assert goal_of(constant(0.5, 7, frequency=10), began=17).last_event == 27
    assert goal_of(constant(0.5, 7, frequency=10), began=16).last_event == 17
    assert goal_of(constant(0.5, 7, end_step=20, frequency=10), began=17).last_event == 17
    assert goal_of(decay(0.0, 0.8, 0, 8, power=1, frequency=4), 3) == schedules.Goal(0.8, 8, 0.8, 8, 3)
    assert goal_of(decay(0.0, 0.8, 0, 10, power=1, frequency=4)) == schedules.Goal(0.8, 8, pytest.approx(0.64), 10, -1)
    assert goal_of(lambda step: (True, 0.5)) is None
    assert goal_of(None) is None
