"""Dissipating gradients: the weights that hardly move in the first epochs are removed."""

from __future__ import annotations

import numbers
from typing import Any

import numpy as np

from keras_renorm.src.core import validation
from keras_renorm.src.methods.at_initialization.search import Search

MOVEMENT = ("absolute", "relative")


class DissipatingGradients(Search):
    """Removes the weights that hardly move in the first epochs of training, whatever their magnitude.

    At the end of each search epoch the weights that have moved least since training began are removed, an equal share each
    time. Then training continues with the sparse model. The callback works with every prunable layer, and uses the pattern,
    group and renormalizer of the layer.

    Source: M. Haroon, arXiv 2209.02201. The rule of the paper is `movement="relative"` with a `fraction`: remove `w` if
    `|w - w0| <= fraction * |w0|`. Deviation: by default the absolute movement counts, which keeps more accuracy.

    Args:
        sparsity: fraction of the weights of the prunable layers to remove in the end, in [0, 1). Defaults to `None`.
        fraction: how far a weight must move to be kept, as a fraction of its first value (`movement="relative"`) or of the mean
            magnitude of the first values of its kernel (`"absolute"`). The data then decide the sparsity. Pass either
            `sparsity` or `fraction`. Defaults to `None`.
        search_epochs: number of epochs after each of which weights are removed. Defaults to 2.
        movement: `"absolute"` for `|w - w0|`, or `"relative"` for `|w - w0| / |w0|`. Defaults to `"absolute"`.
        allocation: how `sparsity` is divided among the kernels, as in `keras_renorm.prune`. Defaults to `"balanced"`.

    Raises:
        ValueError: if an argument is not possible; when training begins, if the model has no prunable layers, their patterns do
            not allow the sparsity, the training is shorter than the search, or the optimizer cannot be recorded.

    Example:

    >>> import keras, numpy as np, keras_renorm as kr
    >>> model = keras.Sequential([keras.Input((8,)), kr.layers.PrunableDense(4), keras.layers.Dense(1)])
    >>> model.compile("adam", "mse")
    >>> x, y = np.ones((16, 8)), np.ones((16, 1))
    >>> pruning = kr.methods.DissipatingGradients(0.75, search_epochs=2)
    >>> history = model.fit(x, y, epochs=4, verbose=0, callbacks=[pruning])
    >>> history.history["sparsity"]
    [0.375, 0.75, 0.75, 0.75]
    """

    needs_start = True

    def __init__(
        self,
        sparsity: float | None = None,
        fraction: float | None = None,
        search_epochs: int = 2,
        movement: str = "absolute",
        allocation: Any = "balanced",
    ):
        if (sparsity is None) == (fraction is None):
            raise ValueError(
                "Pass either `sparsity` (how much to remove) or `fraction` (how far a weight must have moved to be kept). "
                f"Received: sparsity={sparsity}, fraction={fraction}."
            )
        super().__init__(sparsity, search_epochs, allocation)
        if fraction is not None and (not isinstance(fraction, numbers.Real) or not fraction > 0):
            raise ValueError(
                "Argument `fraction` must be a positive number: how far a weight must have moved to be kept, such as 0.1. "
                f"Received: fraction={fraction!r}."
            )
        self.fraction = fraction
        self.movement = validation.check_choice(movement, MOVEMENT, "movement")

    def select(self, place, sparsity, epoch):
        movement = self._movement(place)
        if self.fraction is None:
            return place.best(movement, sparsity * (epoch + 1) / self.search_epochs)
        return place.best(movement, self._dissipated(place, movement))

    def _movement(self, place):
        moved, unit = np.abs(place.kernel - place.start), np.abs(place.start)
        if self.movement == "absolute":
            return moved / max(unit.mean(dtype=np.float64), np.finfo(np.float32).tiny)
        # A weight that started at zero has moved infinitely far if it moved at all.
        return np.divide(moved, unit, out=np.where(moved > 0, np.inf, 0).astype(moved.dtype), where=unit > 0)

    def _dissipated(self, place, movement):
        gone = np.count_nonzero(~place.mask | (movement <= self.fraction))
        if gone == movement.size:
            raise ValueError(
                f"Argument `fraction` is too large: no weight of {place.name} moved farther. Received: fraction="
                f"{self.fraction}; the largest movement is {movement.max():.2g}."
            )
        return min(gone / movement.size, place.layer.pattern.most)
