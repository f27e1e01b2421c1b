"""Rounds of pruning and training, with a way back: what the iterative methods share.

A method says how a round prunes; here are the training, the check against a floor, the state on disk and the history.
"""

from __future__ import annotations

import dataclasses
import math
import os
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import keras
import numpy as np
from keras import ops

from keras_renorm.src.core import validation
from keras_renorm.src.core.registry import Configurable
from keras_renorm.src.layers.prunable import prunable_layers, sparsity_of
from keras_renorm.src.methods.run_folder import RunFolder, digest
from keras_renorm.src.reports import plots
from keras_renorm.src.training.optimizers.irrelevance_decay import IrrelevanceDecay

LARGER_IS_BETTER = ("acc", "accuracy", "auc", "precision", "recall", "f1_score", "iou", "r2_score")
SMALLER_IS_BETTER = ("loss", "error", "perplexity", "mae", "mse", "crossentropy")


@dataclasses.dataclass(frozen=True)
class Round:
    """One round: the model was pruned to `sparsity` (by `step`) and trained for `epochs`.

    `held` says whether `metric` held the floor; if not, the model went back to the last round that had. `note` says what else
    went wrong, `details` what the method has to say of the pruning. Round 0 is the dense model.
    """

    round: int
    sparsity: float
    step: float
    metric: float
    held: bool
    epochs: int
    seconds: float
    note: str = ""
    details: dict[str, Any] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Outcome:
    """Where rounds of pruning ended.

    Attributes:
        model: the sparsest model that held the floor, of plain Keras layers.
        history: tuple of `Round`.
        metric: name of the metric.
        floor: the value that it had to hold, or `None`.
    """

    model: keras.Model
    history: tuple[Round, ...]
    metric: str
    floor: float | None

    @property
    def sparsity(self) -> float:
        """Fraction of zeros over the prunable weights of `model`."""
        return max(row.sparsity for row in self.history if row.held)

    def plot(self, ax: Any = None) -> Any:
        """Draw the rounds: `keras_renorm.plots.history`.

        Args:
            ax: matplotlib axes; new ones if `None`.

        Returns:
            The axes.
        """
        return plots.history(self, ax)


@dataclasses.dataclass(frozen=True)
class Goal:
    """What has to be held: `metric` at `floor`, or within `tolerance` of the dense model's; with neither, all is held."""

    metric: str
    better: str
    floor: float | None = None
    tolerance: float | None = None

    def floor_after(self, dense: float) -> float | None:
        """The floor, when the metric of the dense model is known."""
        if self.tolerance is None:
            return self.floor
        return dense - self.tolerance if self.better == "max" else dense + self.tolerance

    def holds(self, value: float, floor: float | None) -> bool:
        return floor is None or (value >= floor if self.better == "max" else value <= floor)


@dataclasses.dataclass(frozen=True)
class Plan:
    """How the rounds go: the arguments of a method, checked.

    Args:
        fit: the training of a round: a dict of arguments of `model.fit`, or a function `model -> logs`.
        goal: what has to be held.
        step: how much a round prunes, whatever the method means by it.
        smallest_step: the step, halved after each round that failed, below which there is no further try.
        max_rounds: number of rounds after which to end in any case; `None` for no limit.
        stop_early: whether a round ends as soon as the goal is held.
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
    plan: Plan,
    directory: str | os.PathLike | None = None,
    settings: Mapping[str, Any] | None = None,
    first: Callable[[], tuple[float, dict]] | None = None,
    reset_optimizer: bool = False,
) -> State:
    """Prune, train, check; go on, or go back and halve the step, until the step is too small or nothing is left to prune.

    Args:
        model: a model with prunable layers, compiled unless `plan.fit` is a function; it ends as the last round that held.
        prune: what a round does before it trains: prunes `model` by a step and says what there is to say (`Round.details`).
        plan: how the rounds go.
        directory: folder for the state; if it holds the state of the same run, the run goes on where it was.
        settings: what makes the run another one if it changes.
        first: gives metric and details of the model as it is; `None` to train it in round 0.
        reset_optimizer: whether every round begins with the optimizer (and its learning rate) as it was at first.

    Returns:
        Where the run ended.

    Raises:
        ValueError: if the metric is not in the logs, the dense model does not hold the floor, or the directory holds the state
            of another run, is used by another run now, or holds a damaged state.
    """
    if model.compiled and model.optimizer:
        model.optimizer.build(model.trainable_variables)
    if directory is None:
        return _run(model, prune, plan, None, first, reset_optimizer)
    with RunFolder(directory, _what_it_is(model, settings or {})) as folder:
        return _run(model, prune, plan, folder, first, reset_optimizer)


def _run(
    model: keras.Model,
    prune: Callable[[float], dict[str, Any]],
    plan: Plan,
    folder: RunFolder | None,
    first: Callable[[], tuple[float, dict]] | None,
    reset_optimizer: bool,
) -> State:
    goal = plan.goal
    fresh = [_copy(variable) for variable in _optimizer_variables(model)]
    began = _weights_digest(model) if folder else ""
    state = _read(folder, model, began) if folder else None
    if state is None:
        keras.utils.set_random_seed(plan.seed)
        started = time.monotonic()
        if first is None:
            (value, epochs, note), details = train(model, plan.fit, goal.metric, [_SeedAgain(plan.seed)]), {}
        else:
            (value, details), epochs, note = first(), 0, ""
        floor, trained = goal.floor_after(value), "" if first else "after training, "
        if note or not goal.holds(value, floor):
            raise ValueError(
                f"The dense model does not hold the floor: {trained}{goal.metric} is {value:.6g}"
                + ("" if floor is None else f", and floor={floor:.6g}")
                + f"{f' ({note})' if note else ''}. Train it longer, or lower the floor."
            )
        state = State(floor, plan.step, [], [], began)
        row = Round(0, sparsity_of(model), 0.0, value, True, epochs, time.monotonic() - started, details=details)
        state.accept(row, model)
        if folder:
            _write(folder, state)
    progress = keras.utils.Progbar(
        plan.max_rounds, verbose=plan.verbose, unit_name="round", stateful_metrics=["sparsity", goal.metric, "step"]
    )
    while state.step >= plan.smallest_step and (plan.max_rounds is None or state.rounds < plan.max_rounds):
        number, present, started = state.rounds + 1, sparsity_of(model), time.monotonic()
        keras.utils.set_random_seed(plan.seed + number)
        details = prune(state.step)
        sparsity = sparsity_of(model)
        if sparsity <= present:
            state.restore(model)
            break
        if reset_optimizer:
            for variable, value in zip(_optimizer_variables(model), fresh):
                variable.assign(value)
        callbacks = [_SeedAgain(plan.seed + number), *([_StopWhenHeld(goal, state.floor)] if plan.stop_early else [])]
        value, epochs, note = train(model, plan.fit, goal.metric, callbacks)
        held = not note and goal.holds(value, state.floor)
        row = Round(number, sparsity, state.step, value, held, epochs, time.monotonic() - started, note, details)
        if held:
            state.accept(row, model)
        else:
            state.reject(row, model)
        if folder:
            _write(folder, state)
        progress.update(number, [("sparsity", sparsity), (goal.metric, value), ("step", state.step)])
    return state


class State:
    """Where a run is: the last model that held, what comes next, and a digest of the weights that it began with."""

    def __init__(self, floor: float | None, step: float, history: list[Round], values: list[np.ndarray], began: str):
        self.floor, self.step, self.history, self.values, self.began = floor, step, history, values, began

    @property
    def rounds(self) -> int:
        return len(self.history) - 1

    def accept(self, row: Round, model: keras.Model) -> None:
        """Go on from the model as it is now."""
        self.history.append(row)
        self.values = [_copy(variable) for variable in _variables(model)]

    def reject(self, row: Round, model: keras.Model) -> None:
        """Go back to the last model that held, and halve the step."""
        self.history.append(row)
        self.step /= 2
        self.restore(model)

    def restore(self, model: keras.Model) -> None:
        for variable, value in zip(_variables(model), self.values):
            variable.assign(value)


def _read(folder: RunFolder, model: keras.Model, began: str) -> State | None:
    """The state that is on disk, its model's values assigned; `None` if there is none."""
    found = folder.read()
    if found is None:
        return None
    record, values = found
    state = State(record["floor"], record["step"], [Round(**row) for row in record["history"]], values, record["began"])
    if state.began != began:
        warnings.warn(
            f"The run in directory={str(folder.path)!r} began with other weights than those of the model passed in. It goes on "
            "from its own; to prune the model passed in, pass an empty directory.",
            stacklevel=5,
        )
    state.restore(model)
    return state


def _write(folder: RunFolder, state: State) -> None:
    # Not `model.save_weights`, which leaves the states of random number generators out.
    number = max(row.round for row in state.history if row.held)
    history = [dataclasses.asdict(row) for row in state.history]
    folder.write(dict(floor=state.floor, step=state.step, began=state.began, history=history), number, state.values)


def _what_it_is(model: keras.Model, settings: Mapping[str, Any]) -> list:
    """What makes a run another one if it changes."""
    # Variables not by their paths, which count how many models were made before.
    variables = [(variable.name, list(variable.shape), variable.dtype) for variable in model.variables]
    pruning = [
        [layer.group, *map(name_of, (layer.criterion, layer.pattern, layer.renormalize))] for layer in prunable_layers(model)
    ]
    optimizer = [type(one).__name__ for one in _chain(getattr(model, "optimizer", None))]
    return [dict(settings), variables, pruning, optimizer, [list(v.shape) for v in _optimizer_variables(model)]]


def name_of(rule: Any) -> str:
    """What a criterion, a pattern or a function is called in every process; the `repr` of a function is not."""
    if isinstance(rule, Configurable) or rule is None:
        return repr(rule)
    return rule.__qualname__ if hasattr(rule, "__qualname__") else type(rule).__qualname__


def _weights_digest(model: keras.Model) -> str:
    """What tells models of the same architecture apart; without random states, which no two models share."""
    return digest(_copy(variable).tobytes() for variable in model.weights)


class _SeedAgain(keras.callbacks.Callback):
    """On JAX and PyTorch the first `fit` of a model draws a batch more than later ones: a run that is resumed would differ."""

    def __init__(self, seed: int):
        super().__init__()
        self.seed = seed

    def on_train_begin(self, logs=None):
        if keras.backend.backend() != "tensorflow":
            keras.utils.set_random_seed(self.seed)


class _StopWhenHeld(keras.callbacks.Callback):
    def __init__(self, goal: Goal, floor: float | None):
        super().__init__()
        self.goal, self.floor = goal, floor

    def on_epoch_end(self, epoch, logs=None):
        if self.goal.metric in (logs or {}) and self.goal.holds(logs[self.goal.metric], self.floor):
            self.model.stop_training = True


def train(
    model: keras.Model, fit: Any, metric: str, callbacks: Sequence[keras.callbacks.Callback] = ()
) -> tuple[float, int, str]:
    """Train for a round: the metric at its end, the number of epochs, and what went wrong."""
    _restart(model.optimizer)
    if callable(fit):
        result = fit(model)
    else:
        arguments = {"verbose": 0, **fit}
        result = model.fit(**{**arguments, "callbacks": [*(arguments.get("callbacks") or ()), *callbacks]})
    epochs = len(result.epoch) if isinstance(result, keras.callbacks.History) else 1
    logs = result.history if isinstance(result, keras.callbacks.History) else result
    if not isinstance(logs, Mapping) or metric not in logs:
        there = sorted(logs) if isinstance(logs, Mapping) else f"none, but {logs!r}"
        raise ValueError(
            f"Argument `metric` is not in the logs of the training. Received: metric={metric!r}. The logs have: {there}. "
            "Metrics are named in `model.compile(metrics=[...])`; those that begin with 'val_' need `validation_data` or "
            "`validation_split` in `fit`."
        )
    last = {name: float(np.ravel(value)[-1]) for name, value in logs.items() if np.size(value)}
    wrong = [name for name in dict.fromkeys(("loss", metric)) if name in last and not math.isfinite(last[name])]
    return last[metric], epochs, f"{wrong[0]} is {last[wrong[0]]}" if wrong else ""


def _restart(optimizer: Any) -> None:
    for one in _chain(optimizer):
        if isinstance(one, IrrelevanceDecay):
            one.restart()


def _chain(optimizer: Any) -> Iterator[Any]:
    """An optimizer and those that it wraps."""
    while optimizer is not None:
        yield optimizer
        optimizer = getattr(optimizer, "inner_optimizer", None)


def _copy(variable: keras.Variable) -> np.ndarray:
    """Its value, in memory of its own: on PyTorch an array may share the variable's.

    Half-precision values come as float32, which holds them all and which every file format knows.
    """
    value = ops.convert_to_numpy(variable)
    return np.array(value, "float32" if value.dtype.kind == "V" else value.dtype)


def _variables(model: keras.Model) -> list[keras.Variable]:
    """All that a training changes."""
    return [*model.variables, *_optimizer_variables(model)]


def _optimizer_variables(model: keras.Model) -> list[keras.Variable]:
    return model.optimizer.variables if model.compiled and model.optimizer else []


def direction(metric: str, mode: str) -> str:
    """`"max"` or `"min"`: whether larger or smaller values of a metric are better."""
    if validation.check_choice(mode, ("auto", "max", "min"), "mode") != "auto":
        return mode
    for endings, direction in ((LARGER_IS_BETTER, "max"), (SMALLER_IS_BETTER, "min")):
        if metric.endswith(endings):
            return direction
    raise ValueError(
        f"Argument `metric` does not tell whether larger or smaller values are better. Received: metric={metric!r}. Pass "
        "`mode='max'` or `mode='min'`."
    )


def check_fit(fit: Any, model: keras.Model) -> Any:
    """`fit` itself, if the model can be trained with it."""
    if not callable(fit) and not isinstance(fit, Mapping):
        raise ValueError(
            f"Argument `fit` must be a dict of arguments of `model.fit`, or a function `model -> logs`. Received: fit={fit!r}."
        )
    if not model.compiled and not callable(fit):
        raise ValueError(f"Argument `model` must be compiled to be trained. Received: model={model.name}, not compiled.")
    return fit
