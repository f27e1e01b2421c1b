"""Scores of single weights that are computed where they are asked for, without an array of the size of the kernel."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from keras_renorm.src.core import validation
from keras_renorm.src.core.arrays import is_finite, masked


class StreamedScores:
    """The scores of a kernel's weights, as a matrix with units last, by a criterion that looks at each weight alone.

    Like an array it has a `shape` and a `size`, is sliced by rows, and gives single scores with `take`.

    Args:
        kernel: array of floats with units last.
        mask: what is left of it, bool; `None` for all. The others have scores, too, without meaning.
        scale: the scales, broadcasting against the kernel and the same for all weights of a unit.
        criterion: callable `kernel -> scores`.
        description: the kernel's name in error messages.
    """

    def __init__(self, kernel: np.ndarray, mask: np.ndarray | None, scale: Any, criterion: Callable, description: str):
        units = kernel.shape[-1]
        self.shape = kernel.size // units, units
        self.size = kernel.size
        self._kernel = kernel.reshape(self.shape)
        self._mask = None if mask is None else mask.reshape(self.shape)
        scale = np.asarray(scale, kernel.dtype).reshape(-1)
        self._scale = None if np.all(scale == 1) else np.broadcast_to(scale, units)
        self._criterion, self._description = criterion, description

    def __len__(self):
        return len(self._kernel)

    def __getitem__(self, rows: slice) -> np.ndarray:
        kernel = self._kernel[rows]
        if not is_finite(kernel):
            kept = kernel if self._mask is None else masked(kernel, self._mask[rows])
            validation.check_finite(kept, self._description)
        scores = self._criterion(kernel if self._scale is None else kernel * self._scale)
        validation.check_scores(scores, None if self._mask is None else self._mask[rows])
        return scores

    def take(self, places: np.ndarray) -> np.ndarray:
        """The scores of weights that are numbered row by row."""
        kernel = self._kernel.take(places)
        return self._criterion(kernel if self._scale is None else kernel * self._scale.take(places % self.shape[1]))
