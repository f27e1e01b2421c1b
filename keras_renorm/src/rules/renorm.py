"""What is done to the surviving weights so that each unit computes what it computed before.

A renormalizer is called as `renormalizer(before, after, input_axes)` with two kernels, the one that the layer computed with
until now and what is left of it, and returns one scale a unit. One that needs samples is called as
`renormalizer(matrix, mask, moments)` and returns new weights. A new one is one class in this module and one
row of `core/names.py`.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from keras_renorm.src.core import least_squares, names, registry, validation
from keras_renorm.src.core.arrays import masked, row_blocks
from keras_renorm.src.core.moments import Moments

GRANULARITIES = ("unit", "layer")


class Renormalizer(registry.Configurable):
    """Base class of what turns a pruned kernel into scales."""

    def __call__(self, before: np.ndarray, after: np.ndarray, input_axes: tuple[int, ...]) -> np.ndarray:
        """One scale a unit.

        Args:
            before: the kernel that the layer computed with until now.
            after: the kernel with the removed weights set to zero, not yet scaled.
            input_axes: axes that run over the inputs of one unit.

        Returns:
            Array that broadcasts against the kernel, of its shape with `input_axes` of length one.
        """
        raise NotImplementedError


def _check_max_scale(value: float | None) -> float | None:
    if value is not None and not (np.isreal(value) and 1 <= value < np.inf):
        raise ValueError(f"Argument `max_scale` must be `None` or a number of at least 1. Received: max_scale={value!r}.")
    return value


class _KeepNorm(Renormalizer):
    """Scale that gives each unit back the norm that its weights had.

    Args:
        granularity: `"unit"` for one scale a unit, `"layer"` for the same scale for all units of a layer.
        max_scale: upper bound of a scale, or `None`. It must be at least 1.
    """

    def __init__(self, granularity: str = "unit", max_scale: float | None = None):
        self.granularity = validation.check_choice(granularity, GRANULARITIES, "granularity")
        self.max_scale = _check_max_scale(max_scale)

    power: int

    def __call__(self, before, after, input_axes):
        (wanted,), (left,) = self._norms(before, [None], input_axes), self._norms(after, [None], input_axes)
        return self._ratio(wanted, left, before.shape, input_axes)

    def of_masks(
        self, kernel: np.ndarray, mask: np.ndarray | None, new_mask: np.ndarray, scale: Any, input_axes: tuple[int, ...]
    ) -> np.ndarray:
        """What a call with `kernel * mask * scale` and `kernel * new_mask` gives, without these arrays; `None` is no mask."""
        wanted, left = self._norms(kernel, [mask, new_mask], input_axes, scale)
        return self._ratio(wanted, left, kernel.shape, input_axes)

    def _norms(self, kernel, masks, input_axes, first_scale=1.0):
        """The norm of each unit under each mask, the first times a scale: one pass over the kernel."""
        with np.errstate(over="ignore"):
            sums = self._sums(kernel, masks, tuple(input_axes), kernel.dtype)
        if not all(np.all((part > 1e-30) & (part < np.inf)) for part in sums):
            # A unit is empty, or its squares leave the range of float32.
            sums = self._sums(kernel, masks, tuple(input_axes), np.float64)
        sums = [part.astype(np.float64) for part in sums]
        sums[0] = sums[0] * np.abs(np.asarray(first_scale, np.float64)) ** self.power
        if self.granularity == "layer":
            sums = [np.full_like(part, part.sum()) for part in sums]
        return [part ** (1 / self.power) for part in sums]

    def _sums(self, kernel, masks, axes, dtype):
        """The sum of powers of each unit under each mask, added up in a precision."""
        sums = [[] for _ in masks]
        for rows in row_blocks(len(kernel), kernel.size // max(1, len(kernel))):
            block = kernel[rows].astype(dtype, copy=False)
            powers = np.square(block) if self.power == 2 else np.abs(block)
            for mask, parts in zip(masks, sums):
                parts.append((powers if mask is None else masked(powers, mask[rows])).sum(axis=axes, keepdims=True))
        return [sum(parts) if 0 in axes else np.concatenate(parts) for parts in sums]

    def _ratio(self, wanted, left, shape, input_axes):
        scale = np.ones_like(wanted)
        # A unit without survivors (or one that was dead before) has nothing to keep.
        np.divide(wanted, left, out=scale, where=(wanted > 0) & (left > 0))
        if self.max_scale is not None:
            scale = np.minimum(scale, self.max_scale)
        shape = [1 if axis in input_axes else size for axis, size in enumerate(shape)]
        return np.broadcast_to(scale, shape).astype(np.float32)


@registry.register
class L1(_KeepNorm):
    """Keep the sum of the absolute weights: `s_j = ||W_j||_1 / ||W_j M_j||_1`.

    Source: M. Rawson, Renormalized sparse neural network pruning, arXiv 2206.10088. The formula is the natural reading of
    its abstract; the paper's own text was not at hand.

    Args:
        granularity: `"unit"` (as the paper) or `"layer"`.
        max_scale: upper bound of a scale, or `None`.

    Example:

    >>> import numpy as np
    >>> from keras_renorm.renorm import L1
    >>> before, after = np.array([[3.0], [1.0]]), np.array([[3.0], [0.0]])
    >>> float(L1()(before, after, input_axes=(0,))[0, 0])  # (3 + 1) / 3
    1.3333333730697632
    """

    power = 1


@registry.register
class L2(_KeepNorm):
    """Keep the Euclidean norm: `s_j = ||W_j||_2 / ||W_j M_j||_2`. Arguments and source as for `L1`."""

    power = 2


# Which `of_masks` speaks for; a subclass may compute something else.
KEEP_NORM = (L1, L2)


class CalibratedRenormalizer(Renormalizer):
    """Base class of what looks at the data that goes through a layer (`keras_renorm.prune` with `calibration`).

    `compensates` says whether it can also make up for what is lost elsewhere: where the output meets others in an `Add`,
    its targets then include what the others lack.
    """

    compensates = False

    def __call__(self, matrix: np.ndarray, mask: np.ndarray, moments: Moments) -> np.ndarray:
        """The new weights; the bias that goes with them is `moments.intercept(weights)`.

        Args:
            matrix: the dense kernel, shape `(groups, inputs, units)`.
            mask: bool of that shape; `True` = kept.
            moments: of the layer's inputs, as they come from the pruned layers before it, and of the dense layer's outputs.

        Returns:
            Array of that shape, zero where the mask is `False`.
        """
        raise NotImplementedError


@registry.register
class MatchMoments(CalibratedRenormalizer):
    """Give each unit's pre-activation the mean and the standard deviation that it had: one scale a unit, and a new bias.

    Source: this library's own; beyond M. Rawson's paper, whose scales see no data.

    Args:
        max_scale: upper bound of a scale, or `None`. It must be at least 1.

    Raises:
        ValueError: if `max_scale` is below 1.
    """

    def __init__(self, max_scale: float | None = None):
        self.max_scale = _check_max_scale(max_scale)

    def __call__(self, matrix, mask, moments):
        kept = np.where(mask, matrix, 0)
        left = moments.output_power(kept)
        scale = np.ones_like(left)
        # A unit whose survivors carry nothing has nothing to scale: its bias alone meets the mean.
        np.divide(moments.power, left, out=scale, where=left > 1e-9 * moments.power)
        return kept * np.minimum(np.sqrt(scale), self.max_scale or np.inf)[:, None, :]


@registry.register
class LeastSquares(CalibratedRenormalizer):
    """Refit the survivors: least squares of the dense unit's pre-activation on the kept inputs, with intercept.

    Source: least squares on second moments as in SparseGPT (arXiv 2301.00774) and ALPS (arXiv 2406.07831); that the inputs come
    from the pruned layers before and the targets from the dense model is this library's own.

    Args:
        ridge: strength of the pull toward the old weights, as a share of the inputs' mean second moment. It keeps the fit
            finite where there are fewer samples than inputs.

    Raises:
        ValueError: if `ridge` is not positive.
    """

    compensates = True

    def __init__(self, ridge: float = 0.01):
        if not (np.isreal(ridge) and 0 < ridge < np.inf):
            raise ValueError(f"Argument `ridge` must be a positive number, such as 0.01. Received: ridge={ridge!r}.")
        self.ridge = ridge

    def __call__(self, matrix, mask, moments):
        left, right = least_squares.regularized(moments, matrix, self.ridge)
        return least_squares.solve_masked(left, right, mask, start=matrix)


KNOWN = names.resolve(names.RENORMALIZERS | names.CALIBRATED_RENORMALIZERS)


def get(identifier: Any, group: str = "layer", calibrated: bool = False) -> Any:
    """The renormalizer that a name, an instance or a config stands for.

    Args:
        identifier: `None` for plain pruning, `"auto"`, a name, an instance, a config, or a callable.
        group: which weights compete; `"auto"` depends on it.
        calibrated: whether there are calibration samples; `"auto"` depends on that too.

    Returns:
        A callable `(before, after, input_axes) -> scales` or, if it needs samples, a `CalibratedRenormalizer`; or `None`.

    Raises:
        ValueError: if it is not known, or needs samples that are not there.
    """
    if identifier is None:
        return None
    if isinstance(identifier, str) and identifier == "auto":
        # Measured on held-out training data: see `docs/defaults.md`.
        if calibrated:
            return LeastSquares()
        return L2() if group == "unit" else L2(max_scale=2.0)
    renormalizer = registry.get(identifier, KNOWN | {"auto": None}, Renormalizer, "renormalize")
    if isinstance(renormalizer, CalibratedRenormalizer) and not calibrated:
        raise ValueError(
            f"Renormalizer {renormalizer!r} needs samples to see what each unit computes. Call "
            "`keras_renorm.prune(model, sparsity, renormalize=..., calibration=samples)`, or take `renormalize='l2'`."
        )
    return renormalizer
