"""The base classes of criteria."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from keras_renorm.src.core import registry
from keras_renorm.src.core.moments import Moments
from keras_renorm.src.core.statistics import Statistics


class Criterion(registry.Configurable):
    """Base class of criteria, which score the weights of a kernel.

    Attributes:
        elementwise: whether the score of a weight depends on its value alone, and is NaN only if the value is. Such a criterion
            may be called with a part of the kernel, in arrays of any shape. Defaults to `False`.
    """

    elementwise = False

    def __call__(self, kernel: np.ndarray) -> np.ndarray:
        """Score the weights: an array of the shape of `kernel`. The highest scores are kept."""
        raise NotImplementedError


class CalibratedCriterion(Criterion):
    """Base class of criteria that need calibration samples (`keras_renorm.prune` with `calibration`).

    Attributes:
        statistics: the statistics that the criterion needs: `Moments` or `InputSizes` of the inputs, or `Gradients` of the
            loss, for which samples need labels. Defaults to `Moments`.
        chooses_count: whether the criterion itself decides how many weights are kept, so that no sparsity is given. Defaults to
            `False`.
    """

    statistics: type[Statistics] = Moments
    chooses_count = False

    @property
    def needs_labels(self) -> bool:
        """Whether samples must have labels."""
        return self.statistics.of == "gradients"

    def __call__(self, matrix: np.ndarray, statistics: Any) -> np.ndarray:
        """Score the weights: an array of the shape of `matrix`. The highest scores are kept.

        Args:
            matrix: the kernel of the layer, of shape `(groups, inputs, units)`.
            statistics: an instance of `self.statistics`.
        """
        raise NotImplementedError

    def select(self, matrix: np.ndarray, statistics: Any, mask_of: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
        """Select the weights to keep: a bool array of the shape of `matrix`.

        Args:
            matrix: as in `__call__`.
            statistics: as in `__call__`.
            mask_of: returns for an array of scores the mask that keeps the highest.
        """
        return mask_of(self(matrix, statistics))


def score(criterion: Any, kernel: np.ndarray) -> np.ndarray:
    """Call a criterion, which may be any callable, and check the scores that it returns."""
    scores = np.asarray(criterion(kernel))
    if scores.shape != kernel.shape:
        raise ValueError(
            f"The criterion must return one score for each weight. Received: criterion={criterion!r}, which gave scores of "
            f"shape {scores.shape} for a kernel of shape {kernel.shape}."
        )
    return scores
