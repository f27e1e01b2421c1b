"""Checks of arguments. Each error names the argument, what was received and what to do."""

from __future__ import annotations

import math
import numbers
from typing import Any

import keras
import numpy as np

from keras_renorm.src.core.arrays import is_finite


def refuse_legacy_keras(value: Any, argument: str) -> None:
    """Raise `TypeError` if `value` comes from `tf_keras` (Keras 2)."""
    if any(cls.__module__.split(".")[0] == "tf_keras" for cls in type(value).__mro__):
        raise TypeError(
            f"Argument `{argument}` is an object of `tf_keras` (Keras 2), which keras_renorm cannot use. Received: "
            f"{argument}={value} (of type {type(value).__module__}.{type(value).__name__}). This happens after "
            "`import tensorflow_model_optimization` or with TF_USE_LEGACY_KERAS=1, which turn `tf.keras` into "
            "`tf_keras`. Build it with `import keras` (Keras 3) instead of `tf.keras`; a model saved by "
            "Keras 2 as `.h5` can be read with `keras.models.load_model`."
        )


def check_model(model: Any, argument: str = "model") -> None:
    """Raise unless `model` is a built Keras 3 model."""
    refuse_legacy_keras(model, argument)
    if not isinstance(model, keras.Model):
        raise TypeError(f"Argument `{argument}` must be a `keras.Model`. Received: {argument}={model} (of type {type(model)}).")
    if not model.built or (isinstance(model, keras.Sequential) and not hasattr(model, "inputs")):
        raise ValueError(
            f"Argument `{argument}` has no weights yet: model '{model.name}' was never built. Call it on a batch of "
            "data, call `model.build(input_shape)`, or start it with `keras.Input(shape)`."
        )


def check_sparsity(value: Any, argument: str = "sparsity") -> float:
    """Return `value` as a float in [0, 1)."""
    if isinstance(value, bool) or not isinstance(value, (numbers.Real, np.floating)) or math.isnan(value) or not 0 <= value < 1:
        raise ValueError(
            f"Argument `{argument}` must be a number in [0, 1): the fraction of the weights to remove, such as 0.9 for "
            f"90%. Received: {argument}={value!r}."
        )
    return float(value)


def check_share(value: Any, argument: str) -> float:
    """Return `value` as a float in (0, 1]."""
    if isinstance(value, bool) or not isinstance(value, (numbers.Real, np.floating)) or not 0 < value <= 1:
        raise ValueError(f"Argument `{argument}` must be a number in (0, 1]. Received: {argument}={value!r}.")
    return float(value)


def check_count(value: Any, argument: str) -> int:
    """Return `value` if it is an integer of at least 1."""
    if isinstance(value, bool) or not isinstance(value, numbers.Integral) or value < 1:
        raise ValueError(f"Argument `{argument}` must be an integer of at least 1. Received: {argument}={value!r}.")
    return int(value)


def check_positive(value: Any, argument: str) -> float:
    """Return `value` as a float if it is a finite number above 0."""
    if isinstance(value, bool) or not isinstance(value, (numbers.Real, np.floating)) or not 0 < value < np.inf:
        raise ValueError(f"Argument `{argument}` must be a positive number. Received: {argument}={value!r}.")
    return float(value)


def check_choice(value: Any, choices: tuple[str, ...], argument: str) -> str:
    """Return `value` if it is one of `choices`."""
    if value not in choices:
        raise ValueError(f"Argument `{argument}` must be one of {list(choices)}. Received: {argument}={value!r}.")
    return value


def check_verbose(value: Any) -> int:
    """Return 0, 1 or 2. `"auto"` is 1 if Keras logs interactively."""
    if value == "auto":
        return int(keras.config.is_interactive_logging_enabled())
    return check_choice(value, (0, 1, 2), "verbose")


def check_scores(scores: np.ndarray, mask: np.ndarray | None = None) -> None:
    """Raise `ValueError` if a score is NaN where `mask` is `True` (`None`: anywhere)."""
    # One fast pass while all is well: the highest of numbers that are not all numbers is NaN.
    if np.isnan(scores.max(initial=0)) and (mask is None or np.isnan(scores[mask]).any()):
        raise ValueError("The criterion returned scores that are NaN. Check what it computes, and the kernel that it received.")


def check_finite(values: np.ndarray, description: str) -> None:
    """Raise `ValueError` if `values` hold NaN or infinity."""
    if not is_finite(values):
        count = int(np.sum(~np.isfinite(values)))
        raise ValueError(
            f"{description} holds {count} values that are NaN or infinite, so its weights cannot be compared. Nothing "
            "was changed. Go back to a checkpoint from before training diverged, or lower the learning rate."
        )
