from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from keras_renorm.src.core import registry
from keras_renorm.src.core.moments import Moments
from keras_renorm.src.core.statistics import Statistics


class Criterion(registry.Configurable):
    """Base class: scores the weights of a kernel.

    `elementwise` says that a weight's score depends on its value alone, and is NaN only where that is: the criterion may then
    be asked for a part of the kernel at a time, in arrays of any shape.
    """

    elementwise = False

    def __call__(self, kernel: np.ndarray) -> np.ndarray:
        """Scores shaped like `kernel`; larger = keep."""
        raise NotImplementedError


class CalibratedCriterion(Criterion):
    """Base class: scores the weights of a layer by the data that goes through it (`keras_renorm.prune` with `calibration`).

    `statistics` names what it needs to know of the data: `Moments` or `InputSizes` of the inputs, or `Gradients` of the loss,
    for which samples need labels. `chooses_count` says that it decides itself how many weights stay, so that no sparsity is
    asked for.
    """

    statistics: type[Statistics] = Moments
    chooses_count = False

    def __call__(self, matrix: np.ndarray, statistics: Any) -> np.ndarray:
        """Scores shaped like `matrix`; larger = keep.

        Args:
            matrix: the layer's kernel, shape `(groups, inputs, units)`.
            statistics: of its inputs (and targets), an instance of `self.statistics`.
        """
        raise NotImplementedError

    def select(self, matrix: np.ndarray, statistics: Any, mask_of: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
        """The weights to keep, bool of the shape of `matrix`.

        Args:
            matrix: as in `__call__`.
            statistics: likewise.
            mask_of: scores of that shape -> the mask that keeps the best of them.
        """
        return mask_of(self(matrix, statistics))


def score(criterion: Any, kernel: np.ndarray) -> np.ndarray:
    """Call a criterion, which may be a user's own callable, and check what it answers."""
    scores = np.asarray(criterion(kernel))
    if scores.shape != kernel.shape:
        raise ValueError(
            f"The criterion must give one score a weight. Received: criterion={criterion!r}, which gave scores of shape "
            f"{scores.shape} for a kernel of shape {kernel.shape}."
        )
    return scores
