"""Prune a little, train a little, as long as a metric holds."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import numbers
import os
import pathlib
import time
from collections.abc import Callable, Mapping
from typing import Any, BinaryIO

import keras
import numpy as np
from keras import ops

from keras_renorm import allocation as allocations
from keras_renorm import validation
from keras_renorm.conversion import rebuild, strip, to_prunable
from keras_renorm.criteria.base import score
from keras_renorm.layers.masked import masked_layers, sparsity_of
from keras_renorm.masking import update_masks
from keras_renorm.optimizers import IrrelevanceDecay
from keras_renorm.tables import format_table

LARGER_IS_BETTER = ("acc", "accuracy", "auc", "precision", "recall", "f1_score", "iou", "r2_score")
SMALLER_IS_BETTER = ("loss", "error", "perplexity", "mae", "mse", "crossentropy")


@dataclasses.dataclass(frozen=True)
class Round:
    """One round: the model was pruned to `sparsity` (by `step`, a share of what was left) and trained for `epochs`.

    `held` says whether `metric` held the floor; if not, the model went back to the last round that had. `note` says what else
    went wrong. Round 0 is the dense model.
    """

    round: int
    sparsity: float
    step: float
    metric: float
    held: bool
    epochs: int
    seconds: float
    note: str = ""


@dataclasses.dataclass(frozen=True)
class IterativePruning:
    """What `prune_iteratively` found. Printing it shows the rounds as a table.

    Attributes:
        model: the sparsest model that held the floor, of plain Keras layers.
        history: tuple of `Round`.
        metric: name of the metric.
        floor: the value that it had to hold.
    """

    model: keras.Model
    history: tuple[Round, ...]
    metric: str
    floor: float

    @property
    def sparsity(self) -> float:
        """Fraction of zeros over the prunable weights of `model`."""
        return max(row.sparsity for row in self.history if row.held)

    def __str__(self) -> str:
        header = ("round", "sparsity", "step", self.metric, "held", "epochs", "seconds", "note")
        cells = [
            (
                str(row.round),
                f"{row.sparsity:.4f}",
                f"{row.step:.3g}",
                f"{row.metric:.4g}",
                "yes" if row.held else "no",
                str(row.epochs),
                f"{row.seconds:.1f}",
                row.note,
            )
            for row in self.history
        ]
        return f"{format_table(header, cells, right=(0, 1, 2, 3, 5, 6))}\nfloor of {self.metric}: {self.floor:.4g}"

    __repr__ = __str__

    def plot(self, ax: Any = None) -> Any:
        """Draw the metric of every round over the share of weights left, and the floor.

        Args:
            ax: matplotlib axes; new ones if `None`.

        Returns:
            The axes.
        """
        if ax is None:
            import matplotlib.pyplot as plt

            ax = plt.figure(layout="constrained").add_subplot()
        held, failed = ([row for row in self.history if row.held is held] for held in (True, False))
        ax.plot([1 - row.sparsity for row in held], [row.metric for row in held], "ko-", label="held")
        ax.plot([1 - row.sparsity for row in failed], [row.metric for row in failed], "kx", label="rolled back")
        ax.axhline(self.floor, color="0.5", linestyle="--", label="floor")
        ax.set(xscale="log", xlabel="weights left", ylabel=self.metric)
        ax.invert_xaxis()
        ax.legend()
        return ax


def prune_iteratively(
    model: keras.Model,
    fit: Mapping[str, Any] | Callable[[keras.Model], Any],
    metric: str = "val_accuracy",
    floor: float | None = None,
    tolerance: float | None = None,
    mode: str = "auto",
    step: float = 0.2,
    smallest_step: float = 0.02,
    stop_early: bool = True,
    layers: Any = None,
    criterion: Any = "magnitude",
    pattern: Any = "unstructured",
    group: str = "layer",
    allocation: Any = "global",
    renormalize: Any = "auto",
    max_rounds: int | None = None,
    directory: str | os.PathLike | None = None,
    seed: int = 0,
    verbose: int | str = "auto",
) -> IterativePruning:
    """The sparsest model that still holds a given quality: prune, train, check; go on, or go back and try a smaller step.

    Round 0 trains the model as it is. Each further round removes `step` of the weights that are left and trains. If `metric`
    holds the floor, the next round goes on from there. If not, the model goes back to the last round that held, and the step
    is halved. It ends when the step would be smaller than `smallest_step`.

    The model passed in stays as it is. A model that was compiled with a `keras_renorm.optimizers.IrrelevanceDecay` is trained
    with it; its `restart()` is called with every pruning.

    Source: the loop around the regularizer of G. Bonetta, M. Ribero and R. Cancelliere, arXiv 2204.04977, which removes a fixed
    share of the weights, by magnitude over the whole model, whenever the metric is above the floor, and ends when it no longer
    is. Going back and halving the step are added here.

    Args:
        model: a compiled Sequential or Functional model, plain or with prunable layers, trained or not.
        fit: the training of a round: a dict of arguments of `model.fit`, such as
            `dict(x=x, y=y, epochs=3, validation_split=0.1)`; or a function `model -> logs` (or `History`), which trains the
            model in place.
        metric: name of the metric in the logs of `fit`; its value in the last epoch counts.
        floor: the value that the metric has to hold; or
        tolerance: how far it may be from the dense model's, in its own units. Pass one of the two.
        mode: `"max"` if larger values are better, `"min"` if smaller ones are, `"auto"` to tell by the metric's name.
        step: fraction of the weights left that a round removes, in (0, 1).
        smallest_step: the step below which there is no further try.
        stop_early: whether a round ends as soon as the metric holds, before `fit`'s epochs are over (with a dict as `fit`).
        layers: which layers of a plain model, as in `keras_renorm.to_prunable`.
        criterion: what scores the weights.
        pattern: which weights live and die together.
        group: `"layer"` or `"unit"`.
        allocation: how the sparsity is divided among kernels; `"global"`, one threshold on the scores over all of them.
        renormalize: what is done to the survivors at each pruning. (For layers that are prunable already, these five stay.)
        max_rounds: number of rounds after which to end in any case.
        directory: folder for the state, written after every round. If it holds the state of the same run, the run goes on
            where it was.
        seed: integer. Round `r` begins with `keras.utils.set_random_seed(seed + r)`, so that a run that was stopped ends
            as one that was not.
        verbose: `"auto"`, 0, 1, or 2: the progress bar.

    Returns:
        An `IterativePruning`: `model`, `history`, `sparsity`, and `plot()`.

    Raises:
        ValueError: if an argument is not possible, the metric is not in the logs, the dense model does not hold the floor, or
            the directory holds the state of another run.

    Example:

    >>> import keras, numpy as np, keras_renorm as kr
    >>> keras.utils.set_random_seed(0)
    >>> x = np.random.default_rng(0).standard_normal((256, 8)).astype("float32")
    >>> model = keras.Sequential([keras.Input((8,)), keras.layers.Dense(16, "relu"), keras.layers.Dense(1)])
    >>> model.compile(keras.optimizers.Adam(0.01), "mse")
    >>> fit = dict(x=x, y=x[:, :1], epochs=20)
    >>> found = kr.methods.prune_iteratively(model, fit, metric="loss", floor=0.1, step=0.5, max_rounds=3, verbose=0)
    >>> [row.held for row in found.history], round(found.sparsity, 3)
    ([True, True, True, True], 0.875)
    """
    validation.check_model(model)
    _check_steps(step, smallest_step)
    better = _direction(metric, mode)
    if (floor is None) == (tolerance is None):
        raise ValueError(
            "Pass either `floor` (the value that the metric has to hold) or `tolerance` (how far it may be from the dense "
            f"model's). Received: floor={floor}, tolerance={tolerance}."
        )
    if not callable(fit) and not isinstance(fit, Mapping):
        raise ValueError(
            f"Argument `fit` must be a dict of arguments of `model.fit`, or a function `model -> logs`. Received: fit={fit!r}."
        )
    if not model.compiled and not callable(fit):
        raise ValueError(f"Argument `model` must be compiled to be trained. Received: model={model.name}, not compiled.")
    if max_rounds is not None:
        validation.check_count(max_rounds, "max_rounds")
    allocation = allocations.get(allocation)
    verbose = validation.check_verbose(verbose)
    if masked_layers(model):
        pruned, _ = rebuild(model, lambda layer: None)
    else:
        pruned = to_prunable(model, layers, None, criterion, pattern, group, renormalize)
    if pruned.compiled:
        pruned.optimizer.build(pruned.trainable_variables)
    settings = dict(metric=metric, floor=floor, tolerance=tolerance, mode=better, step=step, stop_early=stop_early, seed=seed)
    folder = Folder(directory, pruned, settings) if directory else None

    def train(number, sparsity, floor):
        """Prune and train for a round: its row of the history."""
        keras.utils.set_random_seed(seed + number)
        started = time.monotonic()
        if number:
            _prune(pruned, sparsity, allocation)
        reached = sparsity_of(pruned)
        stop = _StopWhenHeld(metric, lambda value: _holds(value, floor, better)) if stop_early and number else None
        value, epochs, note = _train(pruned, fit, metric, stop)
        held = floor is None or (not note and _holds(value, floor, better))
        return Round(number, reached, state.step if number else 0.0, value, held, epochs, time.monotonic() - started, note)

    state = folder.read() if folder else None
    if state is None:
        state = State(floor, step, [], [])
        first = train(0, 0.0, None)
        if floor is None:
            state.floor = first.metric - tolerance if better == "max" else first.metric + tolerance
        if first.note or not _holds(first.metric, state.floor, better):
            raise ValueError(
                f"The dense model does not hold the floor: after training, {metric} is {first.metric:.6g}, and floor="
                f"{state.floor:.6g}{f' ({first.note})' if first.note else ''}. Train it longer, or lower the floor."
            )
        state.accept(first, pruned)
        if folder:
            folder.write(state)
    progress = keras.utils.Progbar(None, verbose=verbose, unit_name="round", stateful_metrics=["sparsity", metric, "step"])
    while state.step >= smallest_step and (max_rounds is None or state.rounds < max_rounds):
        present = sparsity_of(pruned)
        row = train(state.rounds + 1, 1 - (1 - present) * (1 - state.step), state.floor)
        if row.sparsity <= present:
            # Every kernel is down to its last weight.
            state.restore(pruned)
            break
        if row.held:
            state.accept(row, pruned)
        else:
            state.reject(row, pruned)
        if folder:
            folder.write(state)
        progress.update(state.rounds, [("sparsity", row.sparsity), (metric, row.metric), ("step", state.step)])
    return IterativePruning(strip(pruned), tuple(state.history), metric, state.floor)


class State:
    """Where a run is: the last model that held, and what comes next."""

    def __init__(self, floor: float | None, step: float, history: list[Round], values: list[np.ndarray]):
        self.floor, self.step, self.history, self.values = floor, step, history, values

    @property
    def rounds(self) -> int:
        return len(self.history) - 1

    def accept(self, row: Round, model: keras.Model) -> None:
        """Go on from the model as it is now."""
        self.history.append(row)
        # Half-precision values as float32, which holds them all and which every file format knows.
        values = [ops.convert_to_numpy(variable) for variable in _variables(model)]
        self.values = [value.astype("float32" if value.dtype.kind == "V" else value.dtype) for value in values]

    def reject(self, row: Round, model: keras.Model) -> None:
        """Go back to the last model that held, and halve the step."""
        self.history.append(row)
        self.step /= 2
        self.restore(model)

    def restore(self, model: keras.Model) -> None:
        for variable, value in zip(_variables(model), self.values):
            variable.assign(value)


class Folder:
    """The state of a run on disk. Every file is written to another name first: a kill at any moment leaves a whole state."""

    def __init__(self, path: str | os.PathLike, model: keras.Model, settings: dict):
        self.path = pathlib.Path(path)
        # Not by their paths, which count how many models were made before.
        shapes = [(variable.name, list(variable.shape)) for variable in model.variables]
        pruning = [(repr(layer.criterion), repr(layer.pattern), layer.group) for layer in masked_layers(model)]
        self.fingerprint = hashlib.sha256(json.dumps([settings, shapes, pruning]).encode()).hexdigest()
        self.model = model

    def read(self) -> State | None:
        """The state that is there, its model's values assigned; `None` if there is none."""
        self.path.mkdir(parents=True, exist_ok=True)
        record = self.path / "run.json"
        if not record.exists():
            return None
        content = json.loads(record.read_text())
        if content["fingerprint"] != self.fingerprint:
            raise ValueError(
                f"Argument `directory` holds the state of another run: of another model, or with other arguments. Received: "
                f"directory={str(self.path)!r}. Pass an empty directory, or delete that one if its run is no longer needed."
            )
        with np.load(self.path / content["values"]) as arrays:
            values = [arrays[str(index)] for index in range(len(arrays.files))]
        state = State(content["floor"], content["step"], [Round(**row) for row in content["history"]], values)
        state.restore(self.model)
        return state

    def write(self, state: State) -> None:
        name = f"round-{max(row.round for row in state.history if row.held):04d}.npz"
        if not (self.path / name).exists():
            # Not `model.save_weights`, which leaves the states of random number generators out.
            self._write(name, lambda file: np.savez(file, **{str(i): value for i, value in enumerate(state.values)}))
        content = dict(
            fingerprint=self.fingerprint,
            floor=state.floor,
            step=state.step,
            values=name,
            history=[dataclasses.asdict(row) for row in state.history],
        )
        self._write("run.json", lambda file: file.write(json.dumps(content, indent=1).encode()))
        for other in self.path.glob("*.npz"):
            if other.name != name:
                other.unlink()

    def _write(self, name: str, write: Callable[[BinaryIO], Any]) -> None:
        partial = self.path / f"partial-{name}"
        try:
            with open(partial, "wb") as file:
                write(file)
            os.replace(partial, self.path / name)
        except BaseException:
            partial.unlink(missing_ok=True)
            raise


class _StopWhenHeld(keras.callbacks.Callback):
    def __init__(self, metric, holds):
        super().__init__()
        self.metric, self.holds = metric, holds

    def on_epoch_end(self, epoch, logs=None):
        if self.metric in (logs or {}) and self.holds(logs[self.metric]):
            self.model.stop_training = True


def _train(model, fit, metric, stop) -> tuple[float, int, str]:
    """Train for a round: the metric at its end, the number of epochs, and what went wrong."""
    _restart(model.optimizer)
    if callable(fit):
        result = fit(model)
    else:
        arguments = {"verbose": 0, **fit}
        result = model.fit(**{**arguments, "callbacks": [*(arguments.get("callbacks") or ()), *([stop] if stop else [])]})
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
    while optimizer is not None:
        if isinstance(optimizer, IrrelevanceDecay):
            optimizer.restart()
        optimizer = getattr(optimizer, "inner_optimizer", None)


def _prune(model: keras.Model, sparsity: float, allocation: Callable) -> None:
    """Remove the weights with the lowest scores, until the model has the sparsity."""
    kernels = [(layer, masked) for layer in masked_layers(model) for masked in layer.masked_kernels]
    scores = [score(layer.criterion, ops.convert_to_numpy(masked.effective())) for layer, masked in kernels]
    most = min(layer.pattern.most for layer, _ in kernels)
    one_weight_each = 1 - len(kernels) / sum(masked.size for _, masked in kernels)
    sparsity = min(sparsity, one_weight_each)
    sparsities: dict[int, list[float]] = {}
    for (layer, _), one in zip(kernels, allocations.allocate(scores, sparsity, allocation, most=most)):
        sparsities.setdefault(id(layer), []).append(one)
    update_masks(model, sparsities)


def _variables(model: keras.Model) -> list[keras.Variable]:
    """All that a training changes."""
    return [*model.variables, *(model.optimizer.variables if model.compiled and model.optimizer else [])]


def _holds(value: float, floor: float, better: str) -> bool:
    return value >= floor if better == "max" else value <= floor


def _direction(metric: str, mode: str) -> str:
    if validation.check_choice(mode, ("auto", "max", "min"), "mode") != "auto":
        return mode
    for endings, direction in ((LARGER_IS_BETTER, "max"), (SMALLER_IS_BETTER, "min")):
        if metric.endswith(endings):
            return direction
    raise ValueError(
        f"Argument `metric` does not tell whether larger or smaller values are better. Received: metric={metric!r}. Pass "
        "`mode='max'` or `mode='min'`."
    )


def _check_steps(step: Any, smallest_step: Any) -> None:
    for argument, value in (("step", step), ("smallest_step", smallest_step)):
        if isinstance(value, bool) or not isinstance(value, numbers.Real) or not 0 < value < 1:
            raise ValueError(
                f"Argument `{argument}` must be a number in (0, 1): the fraction of the weights left that a round removes. "
                f"Received: {argument}={value!r}."
            )
