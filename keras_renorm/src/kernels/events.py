"""One pruning event for one kernel: score, mask and renormalize it."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numpy as np

from keras_renorm.src.core import validation
from keras_renorm.src.core.arrays import masked
from keras_renorm.src.kernels import masks
from keras_renorm.src.kernels.streaming import StreamedScores
from keras_renorm.src.rules import patterns, renorm
from keras_renorm.src.rules.criteria.base import Criterion, score


def prune_kernel(
    kernel: np.ndarray,
    sparsity: float,
    criterion: Callable,
    pattern: patterns.Pattern,
    group: str,
    renormalize: Callable | None,
    input_axes: tuple[int, ...],
    mask: np.ndarray | None = None,
    scale: Any = 1.0,
    regrow: bool = False,
    read: np.ndarray | None = None,
    description: str = "The kernel",
) -> tuple[np.ndarray, np.ndarray]:
    """Compute the new mask and the new scales of a kernel.

    Args:
        kernel: array, with the values of removed weights.
        sparsity: fraction of the weights to remove, in [0, 1).
        criterion: callable `kernel -> scores`.
        pattern: which weights are removed together.
        group: which weights compete with each other: `"layer"` or `"unit"`.
        renormalize: callable `(before, after, input_axes) -> scales`, or `None`.
        input_axes: axes that run over the inputs of one unit.
        mask: the mask until now. Defaults to `None`: no weight is removed.
        scale: the scales until now, which broadcast against the kernel. Defaults to 1.
        regrow: whether a weight that `mask` removes may come back. Defaults to `False`.
        read: bool for each unit, along the last axis: the weights of units that no layer reads are removed first. Defaults to
            `None`: all units are read.
        description: name of the kernel in error messages.

    Returns:
        The new mask (bool, of the shape of `kernel`) and the new scales (which broadcast against it).

    Raises:
        ValueError: if a kept weight is NaN or infinite.
    """
    pruned_before = mask is not None and not mask.all()
    if pruned_before and not regrow and masks.removes_enough(mask, sparsity, pattern, group, input_axes):
        return mask, scale
    kernel, mask = in_float(kernel), mask if pruned_before else None
    units_last = input_axes == tuple(range(kernel.ndim - 1))
    if not regrow and _is_elementwise(criterion) and type(pattern) is patterns.Unstructured and group == "layer" and units_last:
        scores = StreamedScores(kernel, mask, scale, functools.partial(score, criterion), description)
        left = None if mask is None else mask.reshape(scores.shape)
        new_mask = masks.best_cells(scores, validation.check_sparsity(sparsity), left, read).reshape(kernel.shape)
        if new_mask.all():
            # No score was asked for.
            validation.check_finite(kernel, description)
    else:
        current = effective(kernel, mask, scale, description)
        scores = score(criterion, kernel * scale if regrow else current)
        new_mask = masks.compute_mask(scores, sparsity, pattern, group, input_axes, None if regrow else mask, read)
    return new_mask, new_scale(kernel, mask, new_mask, scale, renormalize, input_axes)


def in_float(kernel: np.ndarray) -> np.ndarray:
    """The kernel in single precision or more: norms of half-precision kernels overflow, underflow and stagnate."""
    return kernel if kernel.dtype in (np.float32, np.float64) else kernel.astype(np.float32)


def effective(kernel: np.ndarray, mask: np.ndarray | None, scale: Any, description: str = "The kernel") -> np.ndarray:
    """The effective kernel, with which the layer computes: masked and scaled.

    Raises:
        ValueError: if a kept weight is NaN or infinite.
    """
    current = kernel if mask is None or mask.all() else masked(kernel, mask)
    validation.check_finite(current, description)
    if not np.all(np.equal(scale, 1)):
        # New arrays cost more than the arithmetic.
        current = np.multiply(current, scale, out=None if current is kernel else current)
    return current


def new_scale(
    kernel: np.ndarray,
    mask: np.ndarray | None,
    new_mask: np.ndarray,
    scale: Any,
    renormalize: Callable | None,
    input_axes: tuple[int, ...],
) -> Any:
    """Compute the scales that belong to a new mask.

    Args:
        kernel: array that `in_float` returned, finite where one of the masks is set.
        mask: the mask until now; `None` if no weight is removed.
        new_mask: the new mask.
        scale: the scales until now, which broadcast against the kernel.
        renormalize: callable `(before, after, input_axes) -> scales`, or `None`.
        input_axes: axes that run over the inputs of one unit.
    """
    if renormalize is None:
        return scale
    if type(renormalize) in renorm.KEEP_NORM:
        return renormalize.of_masks(kernel, mask, new_mask, scale, input_axes)
    before, after = effective(kernel, mask, scale), masked(kernel, new_mask)
    return _check_scale(renormalize(before, after, input_axes), renormalize, kernel, input_axes)


def _is_elementwise(criterion: Callable) -> bool:
    return isinstance(criterion, Criterion) and criterion.elementwise


def _check_scale(scale: Any, renormalize: Callable, kernel: np.ndarray, input_axes: tuple[int, ...]) -> np.ndarray:
    wanted = tuple(1 if axis in input_axes else side for axis, side in enumerate(kernel.shape))
    scale = np.asarray(scale)
    if scale.shape != wanted or not np.isfinite(scale).all():
        raise ValueError(
            f"Argument `renormalize` must return one finite scale for each unit, as an array of shape {wanted} for a kernel of "
            f"shape {kernel.shape}. Received: renormalize={renormalize!r}, which gave "
            + (f"shape {scale.shape}." if scale.shape != wanted else "NaN or infinity.")
        )
    return scale
