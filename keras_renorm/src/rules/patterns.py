"""Sparsity patterns: which weights of a kernel are removed together.

A pattern groups the weights of a kernel into cells, each with one score; a mask keeps or removes whole cells. Scores have the
inputs first and the units last: shape `(..., inputs, units)`. The axis before the last is the axis that TFLite stores
innermost (the input channels of a convolution).

A new pattern is one class in this module and one row of `core/names.py`.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from keras_renorm.src.core import arrays, names, registry
from keras_renorm.src.core.arrays import row_blocks


class Pattern(registry.Configurable):
    """Base class of patterns. Its cells are single weights, and every one of them may be removed.

    Attributes:
        most: the highest sparsity that the pattern can give. Defaults to 1.
        units_per_cell: the number of units that a cell spans; `None` if the cells are whole units. Defaults to 1.
    """

    most = 1.0
    units_per_cell = 1

    @property
    def by_units(self) -> bool:
        """Whether the pattern removes whole units: there is one cell for all inputs of a unit."""
        return self.units_per_cell is None and len(self.cells(np.ones((6, 8), np.float32))) == 1

    def cells(self, scores: np.ndarray) -> np.ndarray:
        """The score of each cell, as a matrix with units last; `inf` marks a cell that is always kept.

        Args:
            scores: array of shape `(..., inputs, units)`. The highest scores are kept.

        Returns:
            Array of shape `(cells, unit cells)`.
        """
        return scores.reshape(-1, scores.shape[-1])

    def any(self, flags: np.ndarray) -> np.ndarray:
        """Whether any weight of each cell is flagged.

        Args:
            flags: bool array of shape `(..., inputs, units)`, or `(..., 1, units)` if all weights of a unit have the same flag.

        Returns:
            Bool array of the shape that `cells` returns.
        """
        return flags.reshape(-1, flags.shape[-1])

    def expand(self, kept: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
        """The mask of a kernel of shape `shape`, from a bool array with one entry for each cell."""
        return kept.reshape(shape)

    def check(self, sparsity: float, group: str) -> None:
        """Raise `ValueError` if the pattern cannot give this sparsity, or does not work with this group."""


@registry.register
class Unstructured(Pattern):
    """Single weights, each removed on its own: unstructured sparsity.

    Example:

    >>> import keras_renorm as kr
    >>> kr.patterns.get("unstructured")
    Unstructured()
    """


@registry.register
class Block(Pattern):
    """Rectangular blocks of the kernel, which is viewed as a matrix `(inputs, units)`.

    The kernel of a convolution, `(height, width, channels, filters)`, is viewed as `(height * width * channels, filters)`.
    Blocks at the edge are smaller if the kernel is not a multiple of the block. The score of a block is the sum of the scores
    of its weights.

    Args:
        size: pair of integers `(inputs, units)`. `(4, 1)` is four consecutive inputs of one unit: the 1x4 block of TFLite,
            whose kernels are `(units, inputs)`. Defaults to `(4, 1)`.

    Example:

    >>> import keras_renorm as kr
    >>> kr.patterns.Block((4, 1))
    Block(size=(4, 1))
    """

    def __init__(self, size: tuple[int, int] = (4, 1)):
        if len(tuple(size)) != 2 or any(not isinstance(side, (int, np.integer)) or side < 1 for side in size):
            raise ValueError(
                f"Argument `size` must be two positive integers `(inputs, units)`, such as (4, 1). Received: size={size!r}."
            )
        self.size = tuple(int(side) for side in size)

    @property
    def units_per_cell(self) -> int:
        return self.size[1]

    def cells(self, scores):
        return self._reduce(np.add, super().cells(scores))

    def any(self, flags):
        return self._reduce(np.logical_or, super().any(flags))

    def _reduce(self, operation, matrix):
        for axis, side in enumerate(self.size):
            if side == 1:
                continue
            lines = np.swapaxes(matrix, 0, axis)
            reduced = lines[::side].copy("K")
            # Faster than `reduceat`, and blocks at the edge are no special case.
            for start in range(1, min(side, len(lines))):
                more = lines[start::side]
                operation(reduced[: len(more)], more, out=reduced[: len(more)])
            matrix = np.swapaxes(reduced, 0, axis)
        return matrix

    def expand(self, kept, shape):
        matrix = (int(np.prod(shape[:-1])), shape[-1])
        for axis, (side, length) in enumerate(zip(self.size, matrix)):
            if side > 1:
                kept = np.repeat(kept, side, axis=axis).take(range(length), axis=axis)
        return kept.reshape(shape)


@registry.register
class NOfM(Pattern):
    """N:M sparsity: at most `n` weights of every `m` consecutive inputs of a unit are kept.

    Inputs are counted along the axis that TFLite stores innermost. The highest sparsity is `1 - n / m`. At a lower sparsity,
    such as in the middle of a schedule, the weights with the lowest scores are removed first, among the weights that the
    highest sparsity would remove. A shorter run at the end keeps up to `n` weights.

    Args:
        n: number of weights to keep in each run. Defaults to 2.
        m: length of a run. Defaults to 4.

    Example:

    >>> import keras_renorm as kr
    >>> kr.patterns.NOfM(2, 4).most
    0.5
    """

    def __init__(self, n: int = 2, m: int = 4):
        if not all(isinstance(value, (int, np.integer)) for value in (n, m)) or not 0 < n < m:
            raise ValueError(
                f"Arguments `n` and `m` must be integers with 0 < n < m, such as 2, 4. Received: n={n!r}, m={m!r}."
            )
        self.n, self.m = int(n), int(m)

    @property
    def most(self) -> float:
        return 1 - self.n / self.m

    def check(self, sparsity, group):
        if sparsity > self.most + 1e-9:
            raise ValueError(
                f"Pattern {self!r} removes {self.most:.0%} of the weights at most. Received: sparsity={sparsity}. "
                f"Pass `sparsity={self.most}`, or another pattern."
            )

    def cells(self, scores):
        *_, inputs, units = scores.shape
        matrices = scores.reshape(-1, inputs, units)
        cells = np.empty_like(matrices)
        for runs in row_blocks(-(-inputs // self.m), self.m * len(matrices) * units):
            rows = slice(runs.start * self.m, runs.stop * self.m)
            some = matrices[:, rows]
            cells[:, rows] = arrays.masked(some, self._goes(some), np.inf)
        return cells.reshape(-1, units)

    def _goes(self, scores: np.ndarray) -> np.ndarray:
        """Whether each score is not among the `n` highest of its run; of equal scores the last are not.

        Args:
            scores: array of shape `(any, inputs, units)`.
        """
        outer, inputs, units = scores.shape
        if inputs % self.m:
            # The padding of a short run is removed before its weights.
            scores = np.pad(scores, [(0, 0), (0, -inputs % self.m), (0, 0)], constant_values=-np.inf)
        runs = scores.reshape(outer, -1, self.m, units)
        beaten_by = np.zeros(runs.shape, np.uint8)
        for first in range(self.m):
            for second in range(first + 1, self.m):
                first_wins = runs[:, :, first] >= runs[:, :, second]
                beaten_by[:, :, second] += first_wins
                beaten_by[:, :, first] += ~first_wins
        return (beaten_by >= self.n).reshape(outer, -1, units)[:, :inputs]


@registry.register
class Unit(Pattern):
    """Whole units: columns of a Dense kernel, filters of a convolution. This is structured pruning.

    The score of a unit is the sum of the scores of its weights.

    Example:

    >>> import keras_renorm as kr
    >>> kr.patterns.Unit()
    Unit()
    """

    units_per_cell = None

    def check(self, sparsity, group):
        if group == "unit":
            raise ValueError(
                "Pattern 'unit' removes whole units, which cannot compete within a unit. Received: group='unit'. "
                "Pass `group='layer'`."
            )

    def cells(self, scores):
        return super().cells(scores).sum(axis=0, keepdims=True)

    def any(self, flags):
        return super().any(flags).any(axis=0, keepdims=True)

    def expand(self, kept, shape):
        return np.broadcast_to(kept.reshape(-1), shape).copy()


KNOWN = names.resolve(names.PATTERNS)


def get(identifier: Any) -> Pattern:
    """Get a pattern by its name, from an instance, or from a config.

    Args:
        identifier: `"unstructured"`, `"block"`, `"n_of_m"`, `"unit"`, a `Pattern`, or its config.

    Returns:
        A `Pattern`.

    Raises:
        ValueError: if `identifier` is none of these.

    Example:

    >>> import keras_renorm as kr
    >>> kr.patterns.get("n_of_m")
    NOfM(n=2, m=4)
    """
    pattern = registry.get(identifier, KNOWN, Pattern, "pattern")
    if not isinstance(pattern, Pattern):
        raise ValueError(
            f"Argument `pattern` must be one of {sorted(KNOWN)} or an instance of `keras_renorm.patterns.Pattern`. "
            f"Received: pattern={identifier!r}."
        )
    return pattern
