import os
import subprocess
import sys

import keras
import numpy as np
import pytest

from keras_renorm import schedules


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


TF_KERAS = """
import keras_renorm as kr, sys
assert "tf_keras" not in sys.modules and "tensorflow_model_optimization" not in sys.modules, "imported"
import tensorflow_model_optimization as tfmot
import keras, numpy as np, tensorflow as tf
schedule = tfmot.sparsity.keras.ConstantSparsity(0.5, 0, frequency=1)
model = kr.to_prunable(keras.Sequential([keras.Input((4,)), keras.layers.Dense(2)]), pruning_schedule=schedule)
model.compile("sgd", "mse")
model.fit(np.ones((4, 4)), np.ones((4, 2)), verbose=0, callbacks=[kr.callbacks.UpdatePruning()])
assert kr.summary(model).sparsity == 0.5
assert tf.keras.__version__.startswith("3"), tf.keras
assert tf.keras.layers.Dense is keras.layers.Dense
"""


def test_tf_keras_stays_keras_3():
    # tfmot may have set it for this process already.
    environment = {name: value for name, value in os.environ.items() if name != "TF_USE_LEGACY_KERAS"}
    subprocess.run([sys.executable, "-W", "ignore", "-c", TF_KERAS], check=True, env=environment)


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
