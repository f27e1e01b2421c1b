"""Pruning schedules: when to prune, and how much, as `schedule(step) -> (should_prune, sparsity)`.

Names, arguments and numbers are those of tfmot (`tensorflow_model_optimization.sparsity.keras`). The schedules of tfmot
themselves are accepted wherever a schedule is. The step is the number of batches that have been trained.
"""

from __future__ import annotations

import dataclasses
import importlib
import os
from collections.abc import Callable
from typing import Any

import keras

from keras_renorm.src.core import registry, validation

_TFMOT = "tensorflow_model_optimization"


class PruningSchedule(registry.Configurable):
    """Base class of schedules. A subclass implements `sparsity_at`.

    Args:
        begin_step: the first step at which to prune.
        end_step: the last step at which to prune; -1 to prune until training ends.
        frequency: number of steps from one pruning event to the next.
    """

    def __init__(self, begin_step: int, end_step: int, frequency: int):
        if begin_step < 0:
            raise ValueError(f"Argument `begin_step` must be at least 0. Received: begin_step={begin_step}.")
        if end_step != -1 and end_step < begin_step:
            raise ValueError(
                "Argument `end_step` must be -1 (never ends) or at least `begin_step`. Received: "
                f"begin_step={begin_step}, end_step={end_step}."
            )
        if frequency <= 0:
            raise ValueError(f"Argument `frequency` must be at least 1. Received: frequency={frequency}.")
        self.begin_step, self.end_step, self.frequency = int(begin_step), int(end_step), int(frequency)

    def __call__(self, step: int) -> tuple[bool, float]:
        """Whether to prune at this step, and the sparsity to prune to, as `(should_prune, sparsity)`."""
        step = int(step)
        in_range = self.begin_step <= step and (self.end_step < 0 or step <= self.end_step)
        return in_range and (step - self.begin_step) % self.frequency == 0, self.sparsity_at(step)

    def sparsity_at(self, step: int) -> float:
        """The sparsity at a step, in [0, 1)."""
        raise NotImplementedError


@registry.register
class ConstantSparsity(PruningSchedule):
    """The same sparsity at every pruning event.

    Args:
        target_sparsity: fraction of the weights to remove, in [0, 1).
        begin_step: the first step at which to prune.
        end_step: the last step at which to prune; -1 to prune until training ends. Defaults to -1.
        frequency: number of steps from one pruning event to the next. Defaults to 100.

    Raises:
        ValueError: if an argument is out of its range.

    Example:

    >>> import keras_renorm as kr
    >>> kr.schedules.ConstantSparsity(0.5, begin_step=100)(200)
    (True, 0.5)
    """

    def __init__(self, target_sparsity: float, begin_step: int, end_step: int = -1, frequency: int = 100):
        super().__init__(begin_step, end_step, frequency)
        self.target_sparsity = validation.check_sparsity(target_sparsity, "target_sparsity")

    @property
    def max_sparsity(self) -> float:
        return self.target_sparsity

    def sparsity_at(self, step):
        return self.target_sparsity


@registry.register
class PolynomialDecay(PruningSchedule):
    """A sparsity that rises fast at first and slowly at the end.

    The sparsity is `final + (initial - final) * (1 - (step - begin) / (end - begin)) ** power`.

    Source: M. Zhu and S. Gupta, To prune, or not to prune, arXiv 1710.01878, section 3.

    Args:
        initial_sparsity: sparsity at `begin_step`, in [0, 1).
        final_sparsity: sparsity at `end_step`, in [0, 1).
        begin_step: the first step at which to prune.
        end_step: the last step at which to prune.
        power: exponent of the polynomial. Defaults to 3.
        frequency: number of steps from one pruning event to the next. As in tfmot, there is an event at `end_step` only if
            `end_step - begin_step` is a multiple of `frequency`: choose a multiple to reach `final_sparsity` exactly. Defaults
            to 100.

    Raises:
        ValueError: if an argument is out of its range.

    Example:

    >>> import keras_renorm as kr
    >>> schedule = kr.schedules.PolynomialDecay(0.0, 0.9, begin_step=0, end_step=1000)
    >>> schedule(1000)
    (True, 0.9)
    """

    def __init__(
        self,
        initial_sparsity: float,
        final_sparsity: float,
        begin_step: int,
        end_step: int,
        power: float = 3,
        frequency: int = 100,
    ):
        if end_step == -1:
            raise ValueError("Argument `end_step` must be at least `begin_step`. Received: end_step=-1.")
        super().__init__(begin_step, end_step, frequency)
        self.initial_sparsity = validation.check_sparsity(initial_sparsity, "initial_sparsity")
        self.final_sparsity = validation.check_sparsity(final_sparsity, "final_sparsity")
        self.power = power

    @property
    def max_sparsity(self) -> float:
        return max(self.initial_sparsity, self.final_sparsity)

    def sparsity_at(self, step):
        length = self.end_step - self.begin_step
        share = min(1.0, max(0.0, (step - self.begin_step) / length)) if length else float(step >= self.begin_step)
        return self.final_sparsity + (self.initial_sparsity - self.final_sparsity) * (1 - share) ** self.power


@dataclasses.dataclass(frozen=True)
class Goal:
    """The final sparsity of a schedule, and when it is reached.

    Args:
        sparsity: the sparsity at `end_step`.
        last_event: the step of the last pruning event that raises the sparsity.
        sparsity_at_last_event: the sparsity that this event prunes to. It is less than `sparsity` if there is no event at
            `end_step`.
        end_step: the step at which the schedule reaches `sparsity`.
        began: the step at which the training that follows the schedule began; -1 before the first training.
    """

    sparsity: float
    last_event: int
    sparsity_at_last_event: float
    end_step: int
    began: int = -1


def goal_of(schedule: Any, began: int = -1) -> Goal | None:
    """The goal of a schedule; `None` for a schedule that does not say where it ends."""
    constant = isinstance(schedule, ConstantSparsity)
    if not isinstance(schedule, PruningSchedule) or (schedule.end_step < 0 and not constant):
        return None
    begin, end, every = schedule.begin_step, schedule.end_step, schedule.frequency
    if constant:
        # Every event prunes to the same sparsity, so the first event of this training is enough.
        first = begin + max(0, (began - begin) // every + 1) * every
        end = last = first if end < 0 or first <= end else end - (end - begin) % every
    else:
        last = end - (end - begin) % every
    return Goal(evaluate(schedule, end)[1], last, evaluate(schedule, last)[1], end, began)


_OWN = {cls.__name__: cls for cls in (ConstantSparsity, PolynomialDecay)}


def get(identifier: Any) -> Callable[[int], tuple[bool, float]] | None:
    """Get a schedule from an instance, a config or a callable.

    The `ConstantSparsity` and `PolynomialDecay` of tfmot become the classes of the same names here, with equal arguments and
    numbers, so that a saved model does not need tfmot. Other schedules of tfmot are kept as they are.

    Args:
        identifier: a schedule of this library or of tfmot, a config, a callable `step -> (should_prune, sparsity)`, or `None`.

    Returns:
        A callable `step -> (should_prune, sparsity)`, or `None`.

    Raises:
        ValueError: if `identifier` is none of these, or does not return `(should_prune, sparsity)`.

    Example:

    >>> import keras_renorm as kr
    >>> kr.schedules.get(lambda step: (step == 100, 0.5))(100)
    (True, 0.5)
    """
    if identifier is None or isinstance(identifier, PruningSchedule):
        return identifier
    validation.refuse_legacy_keras(identifier, "pruning_schedule")
    if isinstance(identifier, dict):
        return get(_deserialize(identifier))
    if type(identifier).__module__.startswith(_TFMOT) and type(identifier).__name__ in _OWN:
        return _OWN[type(identifier).__name__](**identifier.get_config()["config"])
    if not isinstance(identifier, type) and callable(identifier):
        evaluate(identifier, 0)
        return identifier
    raise ValueError(
        "Argument `pruning_schedule` must be a schedule: `keras_renorm.schedules.PolynomialDecay`, "
        "`keras_renorm.schedules.ConstantSparsity`, one of tfmot's, or a callable `step -> (should_prune, sparsity)`. "
        f"Received: pruning_schedule={identifier!r}."
    )


def evaluate(schedule: Callable, step: int) -> tuple[bool, float]:
    """The answer of a schedule at a step, as Python values: schedules of tfmot return tensors."""
    try:
        should_prune, sparsity = schedule(step)
        return bool(should_prune), validation.check_sparsity(float(sparsity))
    except (TypeError, ValueError) as error:
        raise ValueError(
            "Argument `pruning_schedule` must answer `schedule(step)` with `(should_prune, sparsity)`, a bool and a "
            f"number in [0, 1). Received: pruning_schedule={schedule!r}, which at step {step} fails with: {error}"
        ) from error


def serialize(schedule: Any) -> dict | None:
    """The config of a schedule. The nested `{"class_name", "config"}` of tfmot is wrapped, as Keras cannot read it."""
    if schedule is None:
        return None
    config = schedule.get_config() if hasattr(schedule, "get_config") else None
    if isinstance(config, dict) and set(config) == {"class_name", "config"}:
        cls = type(schedule)
        return {
            "tfmot_schedule": {
                "module": cls.__module__,
                "registered_name": keras.saving.get_registered_name(cls),
                **config,
            }
        }
    return registry.serialize(schedule)


def _deserialize(config: dict) -> Any:
    nested = config.get("tfmot_schedule", config)
    if set(nested) == {"class_name", "config"} and nested["class_name"] in _OWN:
        return _OWN[nested["class_name"]](**nested["config"])
    if "tfmot_schedule" not in config:
        return keras.saving.deserialize_keras_object(config)
    cls = keras.saving.get_registered_object(nested["registered_name"])
    if cls is None and nested["module"].startswith(_TFMOT):
        cls = getattr(_import_quietly(nested["module"]), nested["class_name"], None)
    if cls is None:
        raise ValueError(
            f"The model was saved with a pruning schedule of class '{nested['class_name']}', which is not known here. "
            "Decorate the class with `@keras.saving.register_keras_serializable()`, or pass "
            f"`custom_objects={{{nested['registered_name']!r}: {nested['class_name']}}}` when loading."
        )
    return cls.from_config(nested["config"])


def _import_quietly(module: str) -> Any:
    """Import a module of tfmot without its side effect: tfmot sets TF_USE_LEGACY_KERAS, which turns `tf.keras` into Keras 2."""
    before = os.environ.get("TF_USE_LEGACY_KERAS")
    _keep_tf_keras()
    try:
        return importlib.import_module(module)
    finally:
        if before is None:
            os.environ.pop("TF_USE_LEGACY_KERAS", None)
        else:
            os.environ["TF_USE_LEGACY_KERAS"] = before


def _keep_tf_keras() -> None:
    """Make TensorFlow load `tf.keras` as Keras 3 before tfmot is imported."""
    if keras.backend.backend() == "tensorflow" and "TF_USE_LEGACY_KERAS" not in os.environ:
        import tensorflow as tf

        tf.keras.layers  # noqa: B018 (the access decides)
