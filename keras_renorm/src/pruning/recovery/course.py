"""The course of a recovery: training in small parts, the best weights, and a state on disk."""

from __future__ import annotations

import collections
import dataclasses
import math
import time
from collections.abc import Sequence
from typing import Any

import keras
import numpy as np

from keras_renorm.src.calibration.samples import count_samples, take_samples
from keras_renorm.src.core.arrays import copied
from keras_renorm.src.core.run_folder import RunFolder
from keras_renorm.src.pruning.recovery.lesson import Lesson

_MEASUREMENTS = 20
_FEWEST_STEPS = 10


@dataclasses.dataclass(frozen=True)
class Training:
    """How a student is trained. The arguments are those of `keras_renorm.recover`."""

    steps: int
    batch_size: int
    learning_rate: float
    seconds: float | None
    seed: int
    verbose: int


@dataclasses.dataclass
class Course:
    """What training came to: the measurements at its start and at its best step, and how it ended."""

    start: dict[str, float]
    best: dict[str, float]
    best_step: int = 0
    steps: int = 0
    seconds: float = 0.0
    notes: list[str] = dataclasses.field(default_factory=list)


def take_course(lesson: Lesson, x: Any, held_out: Any, training: Training, folder: RunFolder | None) -> Course:
    """Train, and leave the best weights in the student.

    Args:
        lesson: the compiled lesson.
        x: the samples to learn from.
        held_out: the samples by which the best weights are chosen.
        training: how to train.
        folder: where the state is kept after every part. A course that is found there is continued. `None`: nowhere.
    """
    began = time.monotonic()
    lesson.optimizer.build(lesson.trainable_variables)
    # Few steps at a time, so that the learning rate follows a curve, and the best weights are seen.
    at_once = max(_FEWEST_STEPS, training.steps // _MEASUREMENTS)
    order = _order(count_samples(x), training.steps * training.batch_size, training.seed)
    course, best = _first(lesson, held_out, training, folder)
    earlier, taught = course.seconds, _values(lesson.teacher.weights)
    bar = keras.utils.Progbar(
        training.steps, verbose=training.verbose, unit_name="step", stateful_metrics=["distance", "agreement"]
    )
    try:
        while course.steps < training.steps:
            course.seconds = earlier + time.monotonic() - began
            progress = max(course.steps / training.steps, course.seconds / training.seconds if training.seconds else 0)
            if progress >= 1:
                course.notes.append(_ended(f"The time limit of {training.seconds:g} seconds", course, training))
                break
            lesson.optimizer.learning_rate = training.learning_rate * (1 + math.cos(math.pi * progress)) / 2
            keras.utils.set_random_seed(training.seed + course.steps)
            to = min(course.steps + at_once, training.steps)
            take_steps(lesson, x, order[course.steps * training.batch_size : to * training.batch_size], training.batch_size)
            now = _measure(lesson, held_out, training)
            course.steps = to
            if not math.isfinite(now["loss"]):
                course.notes.append(f"NaN or infinity ended recovery at step {course.steps}. A lower `learning_rate` may help.")
                break
            if now["loss"] < course.best["loss"]:
                course.best, course.best_step, best = now, course.steps, _values(lesson.student.weights)
            bar.update(course.steps, [("distance", now["loss"]), ("agreement", now["agreement"])])
            course.seconds = earlier + time.monotonic() - began
            _write(folder, lesson, course, best)
    except KeyboardInterrupt:
        course.notes.append(_ended("An interrupt", course, training))
        # In the middle of a step of JAX, no variable has a value.
        _assign(lesson.teacher.weights, taught)
    _assign(lesson.student.weights, best)
    course.seconds = earlier + time.monotonic() - began
    return course


def take_steps(lesson: Lesson, x: Any, order: np.ndarray, batch_size: int) -> None:
    """Train on the samples in this order, in batches."""
    if keras.backend.backend() == "jax":
        # `train_on_batch` gives all variables their values after each step: 27 ms more per step with 55 convolutions.
        lesson.fit(take_samples(x, order), batch_size=batch_size, shuffle=False, verbose=0)
        return
    # `fit` takes longer to begin than a small model takes for these steps.
    for start in range(0, len(order), batch_size):
        lesson.train_on_batch(take_samples(x, order[start : start + batch_size]))


def _ended(by: str, course: Course, training: Training) -> str:
    return f"{by} ended recovery after {course.steps} of {training.steps} steps."


def _first(lesson: Lesson, held_out: Any, training: Training, folder: RunFolder | None) -> tuple[Course, list[np.ndarray]]:
    """The course on disk, whose state the lesson then has; or a new one. Also its best weights."""
    found = None if folder is None else folder.read()
    if found is None:
        start = _measure(lesson, held_out, training)
        return Course(start, start), _values(lesson.student.weights)
    record, values = found
    variables = _changing(lesson)
    _assign(variables, values[: len(variables)])
    return Course(**record), values[len(variables) :]


def _write(folder: RunFolder | None, lesson: Lesson, course: Course, best: Sequence[np.ndarray]) -> None:
    if folder is not None:
        folder.write(dataclasses.asdict(course), course.steps, [*_values(_changing(lesson)), *best])


def _changing(lesson: Lesson) -> list[keras.Variable]:
    """All variables that training changes."""
    return [*lesson.student.weights, *lesson.optimizer.variables]


def _measure(lesson: Lesson, held_out: Any, training: Training) -> dict[str, float]:
    """The means of the losses and of the agreement over all samples."""
    count, means = count_samples(held_out), collections.Counter()
    for start in range(0, count, training.batch_size):
        batch = take_samples(held_out, slice(start, start + training.batch_size))
        for name, value in lesson.test_on_batch(batch, return_dict=True).items():
            means[name] += float(value) * count_samples(batch) / count
    return dict(means)


def _order(count: int, length: int, seed: int) -> np.ndarray:
    """The samples of all steps, one after the other: in each pass every sample once, in another order."""
    passes = [np.random.default_rng([seed, number]).permutation(count) for number in range(math.ceil(length / count))]
    return np.concatenate(passes)[:length]


def _values(variables: Sequence[keras.Variable]) -> list[np.ndarray]:
    return [copied(variable) for variable in variables]


def _assign(variables: Sequence[keras.Variable], values: Sequence[np.ndarray]) -> None:
    for variable, value in zip(variables, values):
        variable.assign(value)
