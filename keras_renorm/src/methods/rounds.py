"""Rounds of pruning and training that iterative methods share.

A method defines how a round prunes. This module trains, checks the metric against the floor, restores models, and keeps the
history and the state on disk.
"""

from __future__ import annotations

import dataclasses
import os
import time
from collections.abc import Callable, Mapping
from typing import Any

import keras

from keras_renorm.src.core.arrays import copied
from keras_renorm.src.core.run_folder import RunFolder
from keras_renorm.src.layers.prunable import sparsity_of
from keras_renorm.src.methods import run_state
from keras_renorm.src.methods.outcome import Goal, Round
from keras_renorm.src.methods.round_training import SeedAgain, StopWhenHeld, train
from keras_renorm.src.methods.run_state import State, optimizer_variables


@dataclasses.dataclass(frozen=True)
class RunPlan:
    """The checked arguments of a run of rounds.

    Args:
        fit: the training of a round: a dict of arguments of `model.fit`, or a function `model -> logs`.
        goal: what the metric must reach.
        step: how much a round prunes, in the units of the method.
        smallest_step: the smallest step to try. The step is halved after each round that fails.
        max_rounds: the largest number of rounds; `None` for no limit.
        stop_early: whether a round ends as soon as the goal is reached.
        seed: round `r` begins with `keras.utils.set_random_seed(seed + r)`.
        verbose: whether to show a progress bar.
    """

    fit: Mapping[str, Any] | Callable[[keras.Model], Any]
    goal: Goal
    step: float
    smallest_step: float
    max_rounds: int | None
    stop_early: bool
    seed: int
    verbose: int


def run_rounds(
    model: keras.Model,
    prune: Callable[[float], dict[str, Any]],
    plan: RunPlan,
    directory: str | os.PathLike | None = None,
    settings: Mapping[str, Any] | None = None,
    first: Callable[[], tuple[float, dict]] | None = None,
    reset_optimizer: bool = False,
) -> State:
    """Prune, train and check in rounds, until the step is too small or nothing is left to prune.

    If a round misses the goal, the model is restored and the step is halved.

    Args:
        model: a model with prunable layers, compiled unless `plan.fit` is a function. It ends as the last round that held.
        prune: prunes `model` by a step before the training of a round, and returns `Round.details`.
        plan: the arguments of the run.
        directory: folder for the state. If it holds the state of the same run, that run is resumed.
        settings: whatever makes it another run if it changes.
        first: returns the metric and the details of the model as it is. Defaults to `None`: round 0 trains the model.
        reset_optimizer: whether every round begins with the first state of the optimizer. Defaults to `False`.

    Returns:
        The final `State`.

    Raises:
        ValueError: if the metric is not in the logs, the dense model does not reach the floor, or the directory holds the state
            of another run, is in use by another run, or holds a damaged state.
    """
    if model.compiled and model.optimizer:
        model.optimizer.build(model.trainable_variables)
    if directory is None:
        return _run(model, prune, plan, None, first, reset_optimizer)
    with RunFolder(directory, run_state.fingerprint(model, settings or {})) as folder:
        return _run(model, prune, plan, folder, first, reset_optimizer)


def _run(
    model: keras.Model,
    prune: Callable[[float], dict[str, Any]],
    plan: RunPlan,
    folder: RunFolder | None,
    first: Callable[[], tuple[float, dict]] | None,
    reset_optimizer: bool,
) -> State:
    fresh = [copied(variable) for variable in optimizer_variables(model)]
    began = run_state.weights_digest(model) if folder else ""
    state = run_state.read(folder, model, began) if folder else None
    if state is None:
        state = _begin(model, plan, first, began)
        if folder:
            run_state.write(folder, state)
    progress = keras.utils.Progbar(
        plan.max_rounds, verbose=plan.verbose, unit_name="round", stateful_metrics=["sparsity", plan.goal.metric, "step"]
    )
    while state.step >= plan.smallest_step and (plan.max_rounds is None or state.rounds < plan.max_rounds):
        row = _play(model, prune, plan, state, fresh if reset_optimizer else [])
        if row is None:
            state.restore(model)
            break
        if row.held:
            state.accept(row, model)
        else:
            state.reject(row, model)
        if folder:
            run_state.write(folder, state)
        progress.update(row.round, [("sparsity", row.sparsity), (plan.goal.metric, row.metric), ("step", state.step)])
    return state


def _begin(model: keras.Model, plan: RunPlan, first: Callable[[], tuple[float, dict]] | None, began: str) -> State:
    """Round 0: the dense model, which is trained unless `first` returns its metric."""
    goal = plan.goal
    keras.utils.set_random_seed(plan.seed)
    started = time.monotonic()
    if first is None:
        (value, epochs, note), details = train(model, plan.fit, goal.metric, [SeedAgain(plan.seed)]), {}
    else:
        (value, details), epochs, note = first(), 0, ""
    floor, trained = goal.floor_after(value), "" if first else "after training, "
    if note or not goal.holds(value, floor):
        raise ValueError(
            f"The dense model does not reach the floor: {trained}{goal.metric} is {value:.6g}"
            + ("" if floor is None else f", and floor={floor:.6g}")
            + f"{f' ({note})' if note else ''}. Train it longer, or lower the floor."
        )
    state = State(floor, plan.step, [], [], began)
    row = Round(0, sparsity_of(model), 0.0, value, True, epochs, time.monotonic() - started, details=details)
    state.accept(row, model)
    return state


def _play(model: keras.Model, prune: Callable[[float], dict], plan: RunPlan, state: State, fresh: list) -> Round | None:
    """Prune and train once.

    Args:
        fresh: values to which the optimizer is reset; empty to keep its state.

    Returns:
        The `Round`; `None` if there was nothing left to prune.
    """
    number, present, started = state.rounds + 1, sparsity_of(model), time.monotonic()
    keras.utils.set_random_seed(plan.seed + number)
    details = prune(state.step)
    sparsity = sparsity_of(model)
    if sparsity <= present:
        return None
    for variable, value in zip(optimizer_variables(model), fresh):
        variable.assign(value)
    callbacks = [SeedAgain(plan.seed + number), *([StopWhenHeld(plan.goal, state.floor)] if plan.stop_early else [])]
    value, epochs, note = train(model, plan.fit, plan.goal.metric, callbacks)
    held = not note and plan.goal.holds(value, state.floor)
    return Round(number, sparsity, state.step, value, held, epochs, time.monotonic() - started, note, details)
