"""Scores of single weights, computed on demand without an array of the size of the kernel."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from keras_renorm.src.core import validation
from keras_renorm.src.core.arrays import is_finite, masked


class StreamedScores:
    """The scores of the weights of a kernel, as a matrix with units last, by an elementwise criterion.

    Like an array it has a `shape` and a `size`, is sliced by rows, and returns single scores with `take`.

    Args:
        kernel: float array with units last.
        mask: bool array of the weights that are kept; `None` for all. The scores of the other weights have no meaning.
        scale: the scales, which broadcast against the kernel and are the same for all weights of a unit.
        criterion: callable `kernel -> scores`.
        description: name of the kernel in error messages.
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
        """The scores of weights by their numbers, row by row."""
        kernel = self._kernel.take(places)
        return self._criterion(kernel if self._scale is None else kernel * self._scale.take(places % self.shape[1]))
