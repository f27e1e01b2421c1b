"""The training of a round."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import keras
import numpy as np

from keras_renorm.src.methods.outcome import Goal
from keras_renorm.src.methods.run_state import optimizer_chain
from keras_renorm.src.training.optimizers.irrelevance_decay import IrrelevanceDecay


def train(
    model: keras.Model, fit: Any, metric: str, callbacks: Sequence[keras.callbacks.Callback] = ()
) -> tuple[float, int, str]:
    """Train for a round, and return the last value of the metric, the number of epochs, and what went wrong."""
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
    for one in optimizer_chain(optimizer):
        if isinstance(one, IrrelevanceDecay):
            one.restart()


def check_fit(fit: Any, model: keras.Model) -> Any:
    """Return `fit` if the model can be trained with it."""
    if not callable(fit) and not isinstance(fit, Mapping):
        raise ValueError(
            f"Argument `fit` must be a dict of arguments of `model.fit`, or a function `model -> logs`. Received: fit={fit!r}."
        )
    if not model.compiled and not callable(fit):
        raise ValueError(f"Argument `model` must be compiled to be trained. Received: model={model.name}, not compiled.")
    return fit


class SeedAgain(keras.callbacks.Callback):
    """On JAX and PyTorch the first `fit` of a model draws one batch more than later ones: a resumed run would differ."""

    def __init__(self, seed: int):
        super().__init__()
        self.seed = seed

    def on_train_begin(self, logs=None):
        if keras.backend.backend() != "tensorflow":
            keras.utils.set_random_seed(self.seed)


class StopWhenHeld(keras.callbacks.Callback):
    def __init__(self, goal: Goal, floor: float | None):
        super().__init__()
        self.goal, self.floor = goal, floor

    def on_epoch_end(self, epoch, logs=None):
        if self.goal.metric in (logs or {}) and self.goal.holds(logs[self.goal.metric], self.floor):
            self.model.stop_training = True
