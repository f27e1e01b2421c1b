"""Criterion `"activity"`: the activity of connections."""

from __future__ import annotations

import numpy as np

from keras_renorm.src.core import registry, validation
from keras_renorm.src.core.moments import InputSizes
from keras_renorm.src.rules.criteria.base import CalibratedCriterion


@registry.register
class Activity(CalibratedCriterion):
    """The activity of a connection: the mean of `|x_i w_ij|` over the samples.

    In a convolution a connection leads from an input channel to a filter: it is a slice of the kernel, whose weights are kept
    or removed together. Its score is the Frobenius norm, over the output positions, of the mean of `|x|` correlated with `|w|`.

    With a `share` the criterion chooses the sparsity itself. Each unit keeps the smallest set of connections whose scores reach
    that share of the total of the unit, highest scores first. The bias counts as one more connection and is always kept. A
    connection with a score of zero is removed.

    Needs calibration samples. Scores take one pass of the samples through the network, and memory for the inputs of one
    sample.

    Source: A. Dekhovich and others, Neural network relief: a pruning algorithm based on neural activity, arXiv 2109.10795,
    sections 3.1 and 3.2. There a bias outside the smallest set is removed, too.

    Args:
        share: share of the total score of a unit to keep, in (0, 1]; or `None` to keep the highest scores up to the sparsity
            that is asked for, as other criteria do. Defaults to `None`.

    Raises:
        ValueError: if `share` is outside (0, 1].

    Example:

    >>> import keras, numpy as np, keras_renorm as kr
    >>> model = keras.Sequential([keras.Input((8,)), keras.layers.Dense(4)])
    >>> samples = np.random.default_rng(0).standard_normal((64, 8))
    >>> pruned = kr.prune(model, 0.5, criterion="activity", calibration=samples, verbose=0)
    >>> pruned = kr.prune(model, criterion=kr.criteria.Activity(share=0.95), calibration=samples, verbose=0)
    """

    statistics = InputSizes

    def __init__(self, share: float | None = None):
        self.share = None if share is None else validation.check_share(share, "share")

    @property
    def chooses_count(self) -> bool:
        return self.share is not None

    def __call__(self, matrix, statistics):
        return self._spread(_slice_scores(matrix, statistics), matrix.shape)

    def select(self, matrix, statistics, mask_of):
        if self.share is None:
            return super().select(matrix, statistics, mask_of)
        bias = statistics.bias[:, None, :] * np.sqrt(statistics.sizes.shape[1])
        kept = keep_share(np.concatenate([_slice_scores(matrix, statistics), bias], axis=1), self.share)
        return self._spread(kept[:, :-1], matrix.shape)

    def _spread(self, slices, shape):
        """Repeat the number of each slice, of shape `(groups, channels, units)`, for all its weights."""
        taps = shape[1] // slices.shape[1]
        return np.broadcast_to(slices[:, None], (shape[0], taps, *slices.shape[1:])).reshape(shape)


def _slice_scores(matrix: np.ndarray, statistics: InputSizes) -> np.ndarray:
    """The score of each slice, of shape `(groups, channels, units)`."""
    groups, inputs, units = matrix.shape
    taps = statistics.taps
    # The square of the norm over positions is a quadratic form of the slice's weights.
    sizes = statistics.sizes.reshape(groups, -1, taps, inputs // taps).transpose(0, 3, 2, 1)
    slices = np.abs(matrix).reshape(groups, taps, -1, units).swapaxes(1, 2)
    return np.sqrt(np.sum(slices * ((sizes @ sizes.swapaxes(2, 3)) @ slices), axis=2))


def keep_share(scores: np.ndarray, share: float) -> np.ndarray:
    """The smallest sets of scores, largest first, that reach a share of the total along the axis before the last.

    Args:
        scores: array of shape `(..., connections, units)`, not negative.
        share: in (0, 1].

    Returns:
        Bool array of the same shape. Of equal scores the one with the lower index is taken first; zeros are never taken.
    """
    order = np.argsort(-scores, axis=-2, kind="stable")
    ordered = np.take_along_axis(scores, order, axis=-2)
    before = np.cumsum(ordered, axis=-2) - ordered
    total = ordered.sum(axis=-2, keepdims=True)
    kept = np.zeros(scores.shape, bool)
    np.put_along_axis(kept, order, (ordered > 0) & (before < share * total * (1 - 1e-12)), axis=-2)
    return kept
