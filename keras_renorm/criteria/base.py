from __future__ import annotations

from typing import Any

import numpy as np

from keras_renorm import serialization


class Criterion(serialization.Configurable):
    """Base class: scores the weights of a kernel."""

    def __call__(self, kernel: np.ndarray) -> np.ndarray:
        """Scores shaped like `kernel`; larger = keep."""
        raise NotImplementedError


def score(criterion: Any, kernel: np.ndarray) -> np.ndarray:
    """Call a criterion, which may be a user's own callable, and check what it answers."""
    scores = np.asarray(criterion(kernel))
    if scores.shape != kernel.shape:
        raise ValueError(
            f"The criterion must give one score a weight. Received: criterion={criterion!r}, which gave scores of shape "
            f"{scores.shape} for a kernel of shape {kernel.shape}."
        )
    return scores
