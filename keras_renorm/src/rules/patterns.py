"""Which weights live and die together.

A pattern groups the weights of a kernel into cells, each with one score; a mask keeps or removes whole cells. Scores come
with the inputs first and the units last: shape `(..., inputs, units)`, where the axis before the last is the one that
TFLite stores innermost (the input channels of a convolution).

A new pattern is one class in this module and one row of `core/names.py`.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from keras_renorm.src.core import arrays, names, registry
from keras_renorm.src.core.arrays import row_blocks


class Pattern(registry.Configurable):
    """Base class: cells are single weights and every one of them may be removed.

    `most` is the highest sparsity that the pattern can give, `units_per_cell` how many units a cell spans (`None`: its
    cells are the units themselves).
    """

    most = 1.0
    units_per_cell = 1

    @property
    def by_units(self) -> bool:
        """Whether whole units go, all weights of each: there is one cell for all inputs, as it says itself."""
        return self.units_per_cell is None and len(self.cells(np.ones((6, 8), np.float32))) == 1

    def cells(self, scores: np.ndarray) -> np.ndarray:
        """One score a cell, as a matrix with units last; `inf` marks a cell that always stays.

        Args:
            scores: array of shape `(..., inputs, units)`, larger = keep.

        Returns:
            Array of shape `(cells, unit cells)`.
        """
        return scores.reshape(-1, scores.shape[-1])

    def any(self, flags: np.ndarray) -> np.ndarray:
        """Whether any weight of each cell is flagged.

        Args:
            flags: bool of shape `(..., inputs, units)`; or of shape `(..., 1, units)`, where all weights of a unit are alike.

        Returns:
            Bool of the shape of `cells`.
        """
        return flags.reshape(-1, flags.shape[-1])

    def expand(self, kept: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
        """Spread kept cells over their weights: bool of the shape of `cells` -> bool of shape `shape`."""
        return kept.reshape(shape)

    def check(self, sparsity: float, group: str) -> None:
        """Raise `ValueError` for a sparsity or a group that the pattern cannot give."""


@registry.register
class Unstructured(Pattern):
    """Single weights (default).

    Example:

    >>> import keras_renorm as kr
    >>> kr.patterns.get("unstructured")
    Unstructured()
    """


@registry.register
class Block(Pattern):
    """Rectangular blocks of the kernel seen as a matrix `(inputs, units)`.

    A convolution's kernel `(height, width, channels, filters)` is seen as `(height * width * channels, filters)`. Blocks at
    the edge are smaller where the size does not divide. A block's score is the sum of its weights' scores.

    Args:
        size: pair of integers `(inputs, units)`. `(4, 1)` is the 1x4 block of TFLite, whose kernels are
            `(units, inputs)`: four consecutive inputs of one unit.

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
            # Faster than `reduceat`, and blocks at the edge need nothing of their own.
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
    """At most `n` weights of every `m` consecutive inputs of a unit, counted along the axis that TFLite stores innermost.

    Its full sparsity is `1 - n / m`. At a lower one (a schedule on its way) the weights with the lowest scores among those
    that would go are removed. A run at the end that is shorter than `m` keeps up to `n` weights.

    Args:
        n: how many weights of a run stay.
        m: length of a run.

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
        """Which scores are not among the `n` highest of their run, of equal ones the last; of shape `(any, inputs, units)`."""
        outer, inputs, units = scores.shape
        if inputs % self.m:
            # What pads a short run counts as its first weights to go.
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
    """Whole units: columns of a Dense kernel, filters of a convolution. A unit's score is the sum of its weights' scores."""

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
    """The pattern that a name, an instance or a config stands for."""
    pattern = registry.get(identifier, KNOWN, Pattern, "pattern")
    if not isinstance(pattern, Pattern):
        raise ValueError(
            f"Argument `pattern` must be one of {sorted(KNOWN)} or an instance of `keras_renorm.patterns.Pattern`. "
            f"Received: pattern={identifier!r}."
        )
    return pattern
