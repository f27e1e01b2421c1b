"""Renormalizers: they change the weights that are kept, so that each unit computes nearly what it computed before.

A renormalizer is called as `renormalizer(before, after, input_axes)`, with the kernel before and after pruning, and returns one
scale for each unit. A renormalizer that needs calibration samples is called as `renormalizer(matrix, mask, moments)` and
returns new weights. A new one is one class in this module and one
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
    """Base class of renormalizers: the scale of each unit, from the kernel before and after pruning."""

    def __call__(self, before: np.ndarray, after: np.ndarray, input_axes: tuple[int, ...]) -> np.ndarray:
        """Compute the scale of each unit.

        Args:
            before: the kernel before this pruning event.
            after: the kernel with the removed weights set to zero, not yet scaled.
            input_axes: the axes that run over the inputs of one unit.

        Returns:
            Array of the shape of the kernel, but with `input_axes` of length one.
        """
        raise NotImplementedError


def _check_max_scale(value: float | None) -> float | None:
    if value is not None and not (np.isreal(value) and 1 <= value < np.inf):
        raise ValueError(f"Argument `max_scale` must be `None` or a number of at least 1. Received: max_scale={value!r}.")
    return value


class _KeepNorm(Renormalizer):
    """The scale that gives each unit the norm of its weights back.

    Args:
        granularity: `"unit"` for one scale for each unit, `"layer"` for the same scale for all units of a layer. Defaults to
            `"unit"`.
        max_scale: upper bound of a scale, at least 1, or `None`. Defaults to `None`.
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
        """The result of a call with `kernel * mask * scale` and `kernel * new_mask`, without making these arrays.

        A mask of `None` keeps every weight.
        """
        wanted, left = self._norms(kernel, [mask, new_mask], input_axes, scale)
        return self._ratio(wanted, left, kernel.shape, input_axes)

    def _norms(self, kernel, masks, input_axes, first_scale=1.0):
        """The norm of each unit under each mask, in one pass over the kernel. The norm under the first mask is scaled."""
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
        """The sum of powers of each unit under each mask, accumulated in `dtype`."""
        sums = [[] for _ in masks]
        for rows in row_blocks(len(kernel), kernel.size // max(1, len(kernel))):
            block = kernel[rows].astype(dtype, copy=False)
            powers = np.square(block) if self.power == 2 else np.abs(block)
            for mask, parts in zip(masks, sums):
                parts.append((powers if mask is None else masked(powers, mask[rows])).sum(axis=axes, keepdims=True))
        return [sum(parts) if 0 in axes else np.concatenate(parts) for parts in sums]

    def _ratio(self, wanted, left, shape, input_axes):
        scale = np.ones_like(wanted)
        # A unit without kept weights, or one that was zero before, keeps its scale of 1.
        np.divide(wanted, left, out=scale, where=(wanted > 0) & (left > 0))
        if self.max_scale is not None:
            scale = np.minimum(scale, self.max_scale)
        shape = [1 if axis in input_axes else size for axis, size in enumerate(shape)]
        return np.broadcast_to(scale, shape).astype(np.float32)


@registry.register
class L1(_KeepNorm):
    """Keep the sum of the absolute weights of each unit: `s_j = ||W_j||_1 / ||W_j M_j||_1`.

    Source: M. Rawson, Renormalized sparse neural network pruning, arXiv 2206.10088. The formula is the natural reading of
    its abstract; the full text of the paper was not available.

    Args:
        granularity: `"unit"` (as in the paper) for one scale for each unit, `"layer"` for the same scale for all units of a
            layer. Defaults to `"unit"`.
        max_scale: upper bound of a scale, at least 1, or `None`. Defaults to `None`.

    Raises:
        ValueError: if `granularity` is not known, or `max_scale` is below 1.

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
    """Keep the Euclidean norm of the weights of each unit: `s_j = ||W_j||_2 / ||W_j M_j||_2`.

    Source: as for `L1`; the Euclidean norm in place of the sum of absolute weights is the choice of this library.

    Args:
        granularity: `"unit"` for one scale for each unit, `"layer"` for the same scale for all units of a layer. Defaults to
            `"unit"`.
        max_scale: upper bound of a scale, at least 1, or `None`. Defaults to `None`.

    Raises:
        ValueError: if `granularity` is not known, or `max_scale` is below 1.

    Example:

    >>> import numpy as np
    >>> from keras_renorm.renorm import L2
    >>> before, after = np.array([[4.0], [3.0]]), np.array([[4.0], [0.0]])
    >>> float(L2()(before, after, input_axes=(0,))[0, 0])  # 5 / 4
    1.25
    """

    power = 2


# The classes whose `of_masks` equals a call; a subclass may compute something else.
KEEP_NORM = (L1, L2)


class CalibratedRenormalizer(Renormalizer):
    """Base class of renormalizers that need calibration samples (`keras_renorm.prune` with `calibration`).

    Attributes:
        compensates: whether the renormalizer can also reduce the errors of other layers. If the output of the layer is added
            to other outputs, its targets then include the errors of those outputs. Defaults to `False`.
    """

    compensates = False

    def __call__(self, matrix: np.ndarray, mask: np.ndarray, moments: Moments) -> np.ndarray:
        """Compute new weights. The bias that belongs to them is `moments.intercept(weights)`.

        Args:
            matrix: the dense kernel, of shape `(groups, inputs, units)`.
            mask: bool array of that shape; `True` for weights that are kept.
            moments: second moments of the inputs of the layer in the pruned model, and of its outputs in the dense model.

        Returns:
            Array of that shape, zero where the mask is `False`.
        """
        raise NotImplementedError


@registry.register
class MatchMoments(CalibratedRenormalizer):
    """Give the pre-activation of each unit its mean and standard deviation back, by one scale for each unit and a new bias.

    Source: this library. The scales of M. Rawson (arXiv 2206.10088) do not depend on data.

    Args:
        max_scale: upper bound of a scale, at least 1, or `None`. Defaults to `None`.

    Raises:
        ValueError: if `max_scale` is below 1.
    """

    def __init__(self, max_scale: float | None = None):
        self.max_scale = _check_max_scale(max_scale)

    def __call__(self, matrix, mask, moments):
        kept = np.where(mask, matrix, 0)
        left = moments.output_power(kept)
        scale = np.ones_like(left)
        # If the inputs of the kept weights are constant, the bias alone gives the mean.
        np.divide(moments.power, left, out=scale, where=left > 1e-9 * moments.power)
        return kept * np.minimum(np.sqrt(scale), self.max_scale or np.inf)[:, None, :]


@registry.register
class LeastSquares(CalibratedRenormalizer):
    """Fit the kept weights by least squares: the pre-activation of the dense unit from the kept inputs, with intercept.

    Source: least squares on second moments as in SparseGPT (arXiv 2301.00774) and ALPS (arXiv 2406.07831). Deviation: the
    inputs are those of the pruned model, the targets those of the dense model.

    Args:
        ridge: strength of the ridge penalty on the change of the weights, as a share of the mean second moment of the inputs.
            It keeps the fit finite if there are fewer samples than inputs. Defaults to 0.01.

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
    """Get a renormalizer by its name, from an instance, or from a config.

    Args:
        identifier: `None` for plain pruning, `"auto"`, `"l1"`, `"l2"`, `"moments"`, `"lstsq"`, a `Renormalizer`, its config, or
            a callable. `"auto"` is `LeastSquares` with calibration samples, else `L2`.
        group: which weights compete: `"layer"` or `"unit"`. `"auto"` depends on it. Defaults to `"layer"`.
        calibrated: whether there are calibration samples. Defaults to `False`.

    Returns:
        A callable `(before, after, input_axes) -> scales`, a `CalibratedRenormalizer`, or `None`.

    Raises:
        ValueError: if `identifier` is not known, or needs calibration samples and there are none.

    Example:

    >>> import keras_renorm as kr
    >>> kr.renorm.get("l2")
    L2(granularity='unit', max_scale=None)
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
            f"Renormalizer {renormalizer!r} needs calibration samples. Call "
            "`keras_renorm.prune(model, sparsity, renormalize=..., calibration=samples)`, or take `renormalize='l2'`."
        )
    return renormalizer
