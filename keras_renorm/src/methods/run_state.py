"""The state of a run of rounds: in memory, and on disk."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Iterator, Mapping
from typing import Any

import keras
import numpy as np

from keras_renorm.src.core.arrays import copied
from keras_renorm.src.core.registry import Configurable
from keras_renorm.src.core.run_folder import RunFolder, digest
from keras_renorm.src.layers.prunable import prunable_layers
from keras_renorm.src.methods.outcome import Round


class State:
    """The state of a run: the last model that held, the next step, and a digest of the first weights."""

    def __init__(self, floor: float | None, step: float, history: list[Round], values: list[np.ndarray], began: str):
        self.floor, self.step, self.history, self.values, self.began = floor, step, history, values, began

    @property
    def rounds(self) -> int:
        return len(self.history) - 1

    def accept(self, row: Round, model: keras.Model) -> None:
        """Continue from the present model."""
        self.history.append(row)
        self.values = [copied(variable) for variable in _variables(model)]

    def reject(self, row: Round, model: keras.Model) -> None:
        """Restore the last model that held, and halve the step."""
        self.history.append(row)
        self.step /= 2
        self.restore(model)

    def restore(self, model: keras.Model) -> None:
        for variable, value in zip(_variables(model), self.values):
            variable.assign(value)


def read(folder: RunFolder, model: keras.Model, began: str) -> State | None:
    """Read the state on disk and assign its values to the model; `None` if there is no state."""
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


def write(folder: RunFolder, state: State) -> None:
    # Not `model.save_weights`, which leaves the states of random number generators out.
    number = max(row.round for row in state.history if row.held)
    history = [dataclasses.asdict(row) for row in state.history]
    folder.write(dict(floor=state.floor, step=state.step, began=state.began, history=history), number, state.values)


def fingerprint(model: keras.Model, settings: Mapping[str, Any]) -> list:
    """Everything that makes it another run if it changes."""
    # Variables not by their paths, which count how many models were made before.
    variables = [(variable.name, list(variable.shape), variable.dtype) for variable in model.variables]
    pruning = [
        [layer.group, *map(name_of, (layer.criterion, layer.pattern, layer.renormalize))] for layer in prunable_layers(model)
    ]
    optimizer = [type(one).__name__ for one in optimizer_chain(getattr(model, "optimizer", None))]
    return [dict(settings), variables, pruning, optimizer, [list(v.shape) for v in optimizer_variables(model)]]


def name_of(rule: Any) -> str:
    """A name of a criterion, a pattern or a function that is the same in every process. The `repr` of a function is not."""
    if isinstance(rule, Configurable) or rule is None:
        return repr(rule)
    return rule.__qualname__ if hasattr(rule, "__qualname__") else type(rule).__qualname__


def weights_digest(model: keras.Model) -> str:
    """A digest that tells models of the same architecture apart. Random states are left out, since no two models share them."""
    return digest(copied(variable).tobytes() for variable in model.weights)


def optimizer_chain(optimizer: Any) -> Iterator[Any]:
    """An optimizer and the optimizers that it wraps."""
    while optimizer is not None:
        yield optimizer
        optimizer = getattr(optimizer, "inner_optimizer", None)


def _variables(model: keras.Model) -> list[keras.Variable]:
    """All variables that training changes."""
    return [*model.variables, *optimizer_variables(model)]


def optimizer_variables(model: keras.Model) -> list[keras.Variable]:
    return model.optimizer.variables if model.compiled and model.optimizer else []
