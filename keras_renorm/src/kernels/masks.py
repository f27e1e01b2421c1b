"""Masks from scores, a sparsity and a pattern. Counts are exact, and ties are broken by index."""

from __future__ import annotations

import numpy as np

from keras_renorm.src.core import arrays, names, validation
from keras_renorm.src.core.arrays import row_blocks
from keras_renorm.src.kernels.streaming import StreamedScores
from keras_renorm.src.rules import patterns


def compute_mask(
    scores: np.ndarray,
    sparsity: float,
    pattern: str | patterns.Pattern = "unstructured",
    group: str = "layer",
    input_axes: tuple[int, ...] | None = None,
    mask: np.ndarray | None = None,
    read: np.ndarray | None = None,
) -> np.ndarray:
    """Compute the mask that keeps the cells with the highest scores.

    `round(sparsity * cells)` cells are removed: of the whole kernel or, with `group="unit"`, of each unit. Of equal scores the
    one with the lower index (inputs first, units last) is kept. With `group="layer"` no unit that a later layer reads loses its
    last cell, as long as there are enough cells for all such units: a network whose units have no inputs cannot learn. It takes
    about 2 ns for each weight.

    Args:
        scores: array of the shape of the kernel. The highest scores are kept.
        sparsity: fraction of the cells to remove, in [0, 1).
        pattern: name or instance of a pattern. Defaults to `"unstructured"`, where a cell is one weight.
        group: which cells compete with each other: `"layer"` or `"unit"`. Defaults to `"layer"`.
        input_axes: axes of the kernel that run over the inputs of one unit. Defaults to all axes but the last.
        mask: bool array of the shape of `scores`, the mask until now. Removed weights stay removed, and count. Defaults to
            `None`.
        read: bool for each unit, whether a later layer reads it. The cells of other units are removed first. Defaults to
            `None`: all units are read.

    Returns:
        Bool array of the shape of `scores`; `True` for weights that are kept.

    Raises:
        ValueError: if the sparsity is outside [0, 1) or not possible with the pattern, or if a score is NaN.

    Example:

    >>> import numpy as np
    >>> from keras_renorm.src.kernels.masks import compute_mask
    >>> compute_mask(np.array([[3.0, 1.0], [2.0, 4.0]]), sparsity=0.5)
    array([[ True, False],
           [False,  True]])
    """
    sparsity = validation.check_sparsity(sparsity)
    validation.check_choice(group, names.GROUPS, "group")
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
    # A pattern may hide a score, and a sum of infinities is none.
    for each in (scores, cells):
        validation.check_scores(each)
    left = None if mask is None else pattern.any(ordered(mask))
    if group == "unit":
        kept = _best_of_columns(cells, round(sparsity * len(cells)), left)
    else:
        read = None if read is None else pattern.any(np.reshape(read, (1,) * (len(shape) - 1) + (-1,)))[0]
        kept = best_cells(cells, sparsity, left, read)
    new_mask = pattern.expand(kept, shape)
    new_mask = np.ascontiguousarray(new_mask.reshape(moved).transpose(np.argsort(axes)))
    return new_mask if mask is None else new_mask & mask


def best_cells(
    cells: np.ndarray | StreamedScores, sparsity: float, left: np.ndarray | None = None, read: np.ndarray | None = None
) -> np.ndarray:
    """The cells to keep if all cells compete with each other, as in `compute_mask`.

    Args:
        cells: scores of the cells, a matrix with units last; `inf` for cells that are always kept.
        sparsity: fraction of the cells to remove, in [0, 1).
        left: bool array of the cells that were kept until now. Defaults to `None`: all.
        read: bool for each column, whether a later layer reads it. Defaults to `None`: all are read.

    Returns:
        New bool array of the shape of `cells`.
    """
    count = round(sparsity * cells.size)
    idle = None if read is None or read.all() else ~read
    kept = _without_lowest(cells, count, left, idle)
    if (spared := _last_of_units(cells, kept, left, idle)) is not None:
        others = np.ones(cells.shape, bool) if left is None else left.copy()
        others[spared] = False
        kept = _without_lowest(cells, count + len(spared[0]), others, idle)
        kept[spared] = True
    return kept


def removes_enough(
    mask: np.ndarray,
    sparsity: float,
    pattern: patterns.Pattern,
    group: str = "layer",
    input_axes: tuple[int, ...] | None = None,
) -> bool:
    """Whether a mask removes at least as many cells as `compute_mask` would at this sparsity."""
    axes, shape = _inputs_then_units(mask.shape, input_axes)
    left = pattern.any(mask.transpose(axes).reshape(shape))
    if group == "unit":
        return bool(len(left) - np.count_nonzero(left, axis=0).max() >= round(sparsity * len(left)))
    return left.size - np.count_nonzero(left) >= round(sparsity * left.size)


def _inputs_then_units(shape, input_axes):
    """The transposition that puts the inputs of a kernel first, and its shape then, with all axes of units made one."""
    rank = len(shape)
    inputs = tuple(range(rank - 1)) if input_axes is None else tuple(axis % rank for axis in input_axes)
    units = tuple(axis for axis in range(rank) if axis not in inputs)
    number_of_units = int(np.prod([shape[axis] for axis in units], dtype=int))
    input_shape = tuple(shape[axis] for axis in inputs) or (1,)
    return inputs + units, (*input_shape, number_of_units)


def _last_of_units(
    cells: np.ndarray | StreamedScores, kept: np.ndarray, left: np.ndarray | None, idle: np.ndarray | None
) -> tuple[np.ndarray, np.ndarray] | None:
    """The places of the best cells of columns that lose all cells, or could if these are kept; `None` if there are none."""
    lost = ~kept.any(axis=0)
    candidates = np.ones(len(lost), bool) if left is None else left.any(axis=0)
    if idle is not None:
        candidates &= ~idle
    if not (lost & candidates).any():
        return None
    # As many as are lost have to go from other columns.
    few = np.count_nonzero(kept, axis=0) <= np.count_nonzero(lost & candidates)
    columns = np.flatnonzero(candidates & few)
    scores = _scores_of(cells, columns)
    if left is not None:
        scores[~left[:, columns]] = -np.inf
    worth = scores.max(axis=0) > _worst(cells, left)
    enough = np.count_nonzero(candidates & ~few) + np.count_nonzero(worth) <= np.count_nonzero(kept)
    if not enough or not lost[columns[worth]].any():
        return None
    return scores[:, worth].argmax(axis=0), columns[worth]


def _scores_of(cells: np.ndarray | StreamedScores, columns: np.ndarray) -> np.ndarray:
    """A copy of some columns."""
    return cells.take(np.arange(len(cells))[:, None] * cells.shape[1] + columns)


def _worst(cells: np.ndarray | StreamedScores, left: np.ndarray | None) -> float:
    """The lowest score, where removed cells count as zero."""
    blocks = ((cells[rows], rows) for rows in row_blocks(*cells.shape))
    return min((block if left is None else arrays.masked(block, left[rows])).min() for block, rows in blocks)


def _without_lowest(
    cells: np.ndarray | StreamedScores, count: int, left: np.ndarray | None, idle: np.ndarray | None
) -> np.ndarray:
    """Mark all but `count` cells: cells that were removed before are left out first, then cells of idle columns, then the
    lowest.

    Of equal scores the last is left out. Cells of `inf` are marked, unless they were removed before.
    """
    if left is not None:
        count -= left.size - np.count_nonzero(left)
    if idle is not None and left is not None:
        idle = idle & left.any(axis=0)
    if idle is not None and idle.any() and count > 0:
        columns = np.flatnonzero(idle)
        waiting = np.zeros(cells.shape, bool)
        waiting[:, columns] = _scores_of(cells, columns) < np.inf
        waiting = waiting if left is None else waiting & left
        others = ~waiting if left is None else left & ~waiting
        number = np.count_nonzero(waiting)
        if number > count:
            return others | _without_lowest_of(cells, count, waiting)
        left, count = others, count - number
    return _without_lowest_of(cells, count, left)


def _without_lowest_of(cells: np.ndarray | StreamedScores, count: int, left: np.ndarray | None) -> np.ndarray:
    """Mark the cells in `left` (`None`: all) except the `count` lowest, of equal ones the last. Cells of `inf` are marked."""
    if count <= 0:
        return np.ones(cells.shape, bool) if left is None else left.copy()
    count_left = cells.size if left is None else np.count_nonzero(left)
    low, high = _bracket(cells, count / count_left, left)
    kept, places, scores = _split(cells, left, low, high)
    gone = count_left - np.count_nonzero(kept)
    if count <= gone or (count > gone + len(places) and high < np.inf):
        # The sample misled.
        kept, places, scores = _split(cells, left, -np.inf, np.inf)
        gone = count_left - np.count_nonzero(kept)
    count -= gone
    if count >= len(places):
        kept.reshape(-1)[places] = False
        return kept
    threshold = np.partition(scores, count - 1)[count - 1]
    lower = scores < threshold
    kept.reshape(-1)[places[lower]] = False
    tied = places[scores == threshold]
    kept.reshape(-1)[tied[len(tied) - (count - np.count_nonzero(lower)) :]] = False
    return kept


def _split(
    cells: np.ndarray | StreamedScores, left: np.ndarray | None, low: float, high: float
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Mark the cells in `left` (`None`: all) that score at least `low`, and list those of them that score at most `high`.

    Returns:
        The marks, of the shape of `cells`, and the places (numbered row by row) and scores of the listed cells, without `inf`.
    """
    kept = np.empty(cells.shape, bool)
    places, scores = [], []
    for rows in row_blocks(*cells.shape):
        values, block = cells[rows], kept[rows]
        np.greater_equal(values, low, out=block)
        if left is not None:
            block &= left[rows]
        near = np.flatnonzero((values <= high if high < np.inf else values < high) & block)
        scores.append(values.reshape(-1)[near])
        places.append(near + rows.start * cells.shape[1])
    return kept, np.concatenate(places), np.concatenate(scores)


def _bracket(cells: np.ndarray | StreamedScores, share: float, left: np.ndarray | None) -> tuple[float, float]:
    """Two values that most likely enclose the quantile `share` of the scores of the cells in `left`."""
    places = np.random.default_rng(0).integers(cells.size, size=min(25_000, cells.size // 25))
    return arrays.bracket(cells.take(places if left is None else places[left.take(places)]), share)


def _best_of_columns(cells: np.ndarray, count: int, left: np.ndarray | None) -> np.ndarray:
    """Mark all but `count` cells of each column: cells that were removed before are left out first, then the lowest, of equal
    ones the last.

    Cells of `inf` are marked.
    """
    if count == 0:
        return np.ones(cells.shape, bool)
    units = cells.shape[1]
    threshold, following = np.empty(units, cells.dtype), np.empty(units, cells.dtype)
    for columns in row_blocks(units, len(cells)):
        block = cells.T[columns] if left is None else arrays.masked(cells.T[columns], left.T[columns], -np.inf)
        block = np.array(block, order="C")
        block.partition(count - 1, axis=1)
        threshold[columns] = block[:, count - 1]
        following[columns] = block[:, count:].min(axis=1, initial=np.inf)
    # Cells of `inf` stay wherever the threshold is.
    at_most = np.minimum(threshold, np.finfo(cells.dtype).max)
    kept = np.empty(cells.shape, bool)
    for rows in row_blocks(*cells.shape):
        np.greater(cells[rows], at_most, out=kept[rows])
        if left is not None:
            kept[rows] &= left[rows]
    for column in np.flatnonzero((following == threshold) & np.isfinite(threshold)):
        tied = cells[:, column] == threshold[column]
        if left is not None:
            tied &= left[:, column]
        tied = np.flatnonzero(tied)
        stay = len(cells) - count - np.count_nonzero(kept[:, column])
        kept[tied[:stay], column] = True
    return kept
