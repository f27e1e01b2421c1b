"""Scores, a sparsity and a pattern make a mask: the exact count, ties broken by index."""

from __future__ import annotations

import numpy as np

from keras_renorm import arrays, patterns, validation

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
    gone = None if mask is None else ~pattern.any(ordered(mask))
    idle = None if read is None or read.all() else ~pattern.any(np.reshape(read, (1,) * (len(shape) - 1) + (-1,)))
    if group == "unit":
        lowest = _lowest_of_columns(cells, round(sparsity * len(cells)), gone)
    else:
        count = round(sparsity * cells.size)
        lowest = _lowest(cells, count, gone, idle)
        if (spared := _last_of_units(cells, lowest, gone, idle)) is not None:
            cells = cells.copy()
            cells[spared] = np.inf
            lowest = _lowest(cells, count, gone, idle)
    new_mask = pattern.expand(~lowest, shape)
    new_mask = np.ascontiguousarray(new_mask.reshape(moved).transpose(np.argsort(axes)))
    return new_mask if mask is None else new_mask & mask


def removes_enough(
    mask: np.ndarray,
    sparsity: float,
    pattern: patterns.Pattern,
    group: str = "layer",
    input_axes: tuple[int, ...] | None = None,
) -> bool:
    """Whether a mask removes all that `compute_mask` would remove at a sparsity."""
    axes, shape = _inputs_then_units(mask.shape, input_axes)
    gone = ~pattern.any(mask.transpose(axes).reshape(shape))
    if group == "unit":
        return bool(np.count_nonzero(gone, axis=0).min() >= round(sparsity * len(gone)))
    return np.count_nonzero(gone) >= round(sparsity * gone.size)


def _inputs_then_units(shape, input_axes):
    """How to transpose a kernel to inputs first, and its shape then, with all axes of units made one."""
    rank = len(shape)
    inputs = tuple(range(rank - 1)) if input_axes is None else tuple(axis % rank for axis in input_axes)
    units = tuple(axis for axis in range(rank) if axis not in inputs)
    number_of_units = int(np.prod([shape[axis] for axis in units], dtype=int))
    input_shape = tuple(shape[axis] for axis in inputs) or (1,)
    return inputs + units, (*input_shape, number_of_units)


def _last_of_units(cells: np.ndarray, lowest: np.ndarray, gone: np.ndarray | None, idle: np.ndarray | None) -> tuple | None:
    """Where the best cell of every column is that has one to keep, if a column would lose all and there are enough."""
    lost = lowest.all(axis=0) if gone is None else lowest.all(axis=0) & ~gone.all(axis=0)
    if not lost.any():
        return None
    left = cells if gone is None else np.where(gone, -np.inf, cells)
    worth = left.max(axis=0) > cells.min()
    columns = np.flatnonzero(worth if idle is None else worth & ~idle[0])
    if not lost[columns].any() or len(columns) > np.count_nonzero(~lowest):
        return None
    return left[:, columns].argmax(axis=0), columns


def _lowest(cells: np.ndarray, count: int, gone: np.ndarray | None, idle: np.ndarray | None) -> np.ndarray:
    """Mark `count` cells: first those that are gone, then those of idle columns, then the lowest, of equal ones the last.

    Cells of `inf` are never marked, unless they are gone.
    """
    removed = np.zeros(cells.shape, bool) if gone is None else gone
    count -= np.count_nonzero(removed)
    if count <= 0:
        return removed
    if idle is not None and (waiting := ~removed & idle).any():
        waiting &= cells < np.inf
        if np.count_nonzero(waiting) > count:
            return removed | _lowest_among(cells, count, waiting)
        removed = removed | waiting
        count -= np.count_nonzero(waiting)
    elif gone is None:
        return _lowest_among(cells, count, None)
    lowest = _lowest_among(cells, count, ~removed)
    lowest |= removed
    return lowest


def _lowest_among(cells: np.ndarray, count: int, among: np.ndarray | None) -> np.ndarray:
    """Mark the `count` lowest cells of those in `among` (`None`: of all), of equal ones the last; cells of `inf` never."""
    if count == 0:
        return np.zeros(cells.shape, bool)
    values, among = cells.reshape(-1), None if among is None else among.reshape(-1)
    low, high = _bracket(values, count, among)
    lowest = values < low
    between = lowest ^ (values <= high)
    if among is not None:
        lowest &= among
        between &= among
    below, near = np.count_nonzero(lowest), np.flatnonzero(between)
    if not below < count <= below + len(near):
        lowest[:], below = False, 0
        near = np.arange(values.size) if among is None else np.flatnonzero(among)
    ends = values[near]
    threshold = np.partition(ends, count - below - 1)[count - below - 1]
    lowest[near[ends < threshold]] = True
    if threshold < np.inf:
        tied = near[ends == threshold]
        lowest[tied[len(tied) - (count - np.count_nonzero(lowest)) :]] = True
    return lowest.reshape(cells.shape)


def _bracket(values: np.ndarray, count: int, among: np.ndarray | None) -> tuple[float, float]:
    """Two values that the `count`-th lowest most likely lies between."""
    if values.size < 500_000:
        return -np.inf, np.inf
    places = np.random.default_rng(0).integers(values.size, size=min(50_000, values.size // 50))
    if among is not None:
        places = places[among[places]]
    return arrays.bracket(values[places], count / (values.size if among is None else np.count_nonzero(among)))


def _lowest_of_columns(cells: np.ndarray, count: int, gone: np.ndarray | None) -> np.ndarray:
    """Mark `count` cells of each column, those that are gone first, else the lowest, of equal ones the last; `inf` never."""
    if count == 0:
        return np.zeros(cells.shape, bool)
    if gone is not None:
        cells = np.where(gone, -np.inf, cells)
    threshold = np.partition(cells, count - 1, axis=0)[count - 1]
    lowest, tied = cells < threshold, cells == threshold
    missing = count - np.count_nonzero(lowest, axis=0)
    if np.array_equal(np.count_nonzero(tied, axis=0), missing):
        lowest |= tied
    else:
        for column in range(cells.shape[1]):
            lowest[np.flatnonzero(tied[:, column])[-missing[column] :], column] = True
    return lowest & (cells < np.inf)
