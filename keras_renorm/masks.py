"""Scores, a sparsity and a pattern make a mask: the exact count, ties broken by index."""

from __future__ import annotations

import numpy as np

from keras_renorm import patterns, validation

GROUPS = ("layer", "unit")


def compute_mask(
    scores: np.ndarray,
    sparsity: float,
    pattern: str | patterns.Pattern = "unstructured",
    group: str = "layer",
    input_axes: tuple[int, ...] | None = None,
    mask: np.ndarray | None = None,
    read: np.ndarray | None = None,
) -> np.ndarray:
    """Keep the cells with the highest scores.

    `round(sparsity * cells)` cells are removed, out of the whole kernel or, with `group="unit"`, out of each unit. Of equal
    scores the one with the lower index (inputs first, units last) stays. With `group="layer"` a unit that something reads
    does not lose its last cell while there are enough for all such units: a network whose units are cut off from its inputs
    cannot learn. Costs about 2 ns a weight.

    Args:
        scores: array shaped like the kernel; larger = keep.
        sparsity: fraction of the cells to remove, in [0, 1).
        pattern: name or instance of a pattern; with single weights, a cell is a weight.
        group: `"layer"` or `"unit"`: which cells compete with each other.
        input_axes: axes of the kernel that run over the inputs of one unit; all but the last by default.
        mask: what was left before, bool, shaped like `scores`: what is gone stays gone and counts as removed.
        read: bool for each unit, whether anything reads it: the cells of the others go first.

    Returns:
        Array of bool, shaped like `scores`; `True` = kept.

    Raises:
        ValueError: if the sparsity is outside [0, 1) or not possible with the pattern, or if a score is NaN.

    Example:

    >>> import numpy as np
    >>> from keras_renorm.masks import compute_mask
    >>> compute_mask(np.array([[3.0, 1.0], [2.0, 4.0]]), sparsity=0.5)
    array([[ True, False],
           [False,  True]])
    """
    sparsity = validation.check_sparsity(sparsity)
    validation.check_choice(group, GROUPS, "group")
    pattern = patterns.get(pattern)
    pattern.check(sparsity, group)
    scores = np.asarray(scores)
    if scores.dtype not in (np.float32, np.float64):
        scores = scores.astype(np.float32)
    axes, shape = _inputs_then_units(scores.shape, input_axes)
    moved = tuple(scores.shape[axis] for axis in axes)

    def ordered(array):
        return array.transpose(axes).reshape(shape)

    cells = pattern.cells(ordered(scores))
    if np.isnan(cells.max()):
        raise ValueError("The criterion gave scores that are NaN. Check what it computes, or the kernel it was given.")
    idle = None
    if read is not None and not read.all():
        idle = ~pattern.any(np.broadcast_to(np.reshape(read, -1), shape))
        cells = np.where(idle & (cells < np.inf), np.nextafter(cells.min(), cells.dtype.type(-np.inf)), cells)
    if mask is not None:
        cells = np.where(pattern.any(ordered(mask)), cells, -np.inf)
    if group == "unit":
        lowest = _lowest_of_columns(cells, round(sparsity * len(cells)))
    else:
        count = round(sparsity * cells.size)
        lowest = _lowest(cells, count)
        if (spared := _last_of_units(cells, lowest, idle)) is not None:
            cells = cells.copy()
            cells[spared] = np.inf
            lowest = _lowest(cells, count)
    new_mask = pattern.expand(~lowest, shape)
    new_mask = np.ascontiguousarray(new_mask.reshape(moved).transpose(np.argsort(axes)))
    return new_mask if mask is None else new_mask & mask


def _inputs_then_units(shape, input_axes):
    """How to transpose a kernel to inputs first, and its shape then, with all axes of units made one."""
    rank = len(shape)
    inputs = tuple(range(rank - 1)) if input_axes is None else tuple(axis % rank for axis in input_axes)
    units = tuple(axis for axis in range(rank) if axis not in inputs)
    number_of_units = int(np.prod([shape[axis] for axis in units], dtype=int))
    input_shape = tuple(shape[axis] for axis in inputs) or (1,)
    return inputs + units, (*input_shape, number_of_units)


def _last_of_units(cells: np.ndarray, lowest: np.ndarray, idle: np.ndarray | None) -> tuple | None:
    """Where the best cell of every column is that has one to keep, if a column would lose all and there are enough."""
    lost = lowest.all(axis=0)
    if not lost.any():
        return None
    worth = cells.max(axis=0) > cells.min()
    columns = np.flatnonzero(worth if idle is None else worth & ~idle.all(axis=0))
    if not lost[columns].any() or len(columns) > np.count_nonzero(~lowest):
        return None
    return cells[:, columns].argmax(axis=0), columns


def _lowest(cells: np.ndarray, count: int) -> np.ndarray:
    """Mark the `count` lowest of all cells, of equal ones the last; cells of `inf` are never marked."""
    values = cells.reshape(-1)
    if count == 0:
        return np.zeros(cells.shape, bool)
    threshold = _smallest(values, count - 1)
    lowest = values < threshold
    if threshold < np.inf:
        tied = np.flatnonzero(values == threshold)
        lowest[tied[len(tied) - (count - np.count_nonzero(lowest)) :]] = True
    return lowest.reshape(cells.shape)


def _smallest(values: np.ndarray, rank: int, sample: int = 50_000) -> float:
    """The value that has `rank` values below it in order, found as by Floyd and Rivest (SELECT, 1975).

    A sample brackets it, and only what lies in the bracket is partitioned: 5 passes over memory instead of the tens that
    introselect takes where the processor is slow at it.
    """
    if values.size > 10 * sample:
        drawn = values[:: values.size // sample]
        share = rank / values.size
        margin = 4 * np.sqrt(share * (1 - share) / drawn.size) + 2 / drawn.size
        ends = [int(np.clip((share + side) * drawn.size, 0, drawn.size - 1)) for side in (-margin, margin)]
        low, high = np.partition(drawn, ends)[ends]
        below = np.count_nonzero(values < low)
        bracket = values[(values >= low) & (values <= high)]
        if below <= rank < below + bracket.size:
            values, rank = bracket, rank - below
    return np.partition(values, rank)[rank]


def _lowest_of_columns(cells: np.ndarray, count: int) -> np.ndarray:
    """Mark the `count` lowest cells of each column, of equal ones the last; cells of `inf` are never marked."""
    if count == 0:
        return np.zeros(cells.shape, bool)
    threshold = np.partition(cells, count - 1, axis=0)[count - 1]
    lowest, tied = cells < threshold, cells == threshold
    missing = count - np.count_nonzero(lowest, axis=0)
    if np.array_equal(np.count_nonzero(tied, axis=0), missing):
        lowest |= tied
    else:
        for column in range(cells.shape[1]):
            lowest[np.flatnonzero(tied[:, column])[-missing[column] :], column] = True
    return lowest & (cells < np.inf)
