"""Allocations: how one overall sparsity is divided among the kernels of a model.

An allocation is a function `(kernels, keep) -> counts`. `keep` is the number of weights to keep in all kernels together;
`counts` are the numbers to keep in each, not rounded, with the sum `keep`. A count may exceed the size of its kernel: the
excess is then divided among the other kernels. A new allocation is one function here and one row of `core/names.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from keras_renorm.src.core import arrays, names, validation


def uniform(kernels: Sequence[np.ndarray], keep: float) -> np.ndarray:
    """Keep the same share of every kernel."""
    sizes = np.array([kernel.size for kernel in kernels], float)
    return keep * sizes / sizes.sum()


def erk(kernels: Sequence[np.ndarray], keep: float) -> np.ndarray:
    """Erdős-Rényi kernel: a density proportional to the sum of the sides of a kernel over their product.

    Small kernels keep more.

    Source: U. Evci and others, Rigging the lottery: making all tickets winners, arXiv 1911.11134.
    """
    sides = np.array([sum(kernel.shape) for kernel in kernels], float)
    return keep * sides / sides.sum()


def balanced(kernels: Sequence[np.ndarray], keep: float) -> np.ndarray:
    """The mean of `uniform` and `erk`: small kernels keep more than large ones, but less than with `erk`."""
    return (uniform(kernels, keep) + erk(kernels, keep)) / 2


def global_(kernels: Sequence[np.ndarray], keep: float) -> np.ndarray:
    """One threshold on the magnitude for all kernels."""
    return _above_threshold([np.abs(kernel).reshape(-1) for kernel in kernels], keep)


def lamp(kernels: Sequence[np.ndarray], keep: float) -> np.ndarray:
    """One threshold for all kernels on `w^2` divided by the sum of the squares of the weights that are not smaller.

    Source: J. Lee and others, Layer-adaptive sparsity for the magnitude-based pruning, arXiv 2010.07611.
    """

    def scores(kernel):
        squares = np.sort(np.square(kernel.astype(np.float64)).reshape(-1))
        not_smaller = np.cumsum(squares[::-1])[::-1]
        return squares / np.maximum(not_smaller, np.finfo(np.float64).tiny)

    return _above_threshold([scores(kernel) for kernel in kernels], keep)


def _above_threshold(scores: list[np.ndarray], keep: float) -> np.ndarray:
    size = sum(part.size for part in scores)
    remove = min(size - round(keep), size - 1)
    threshold = _smallest_of_all(scores, remove)
    counts = np.array([np.count_nonzero(part > threshold) for part in scores], float)
    tied = np.array([np.count_nonzero(part == threshold) for part in scores], float)
    return counts + tied * (keep - counts.sum()) / tied.sum()


def _smallest_of_all(parts: list[np.ndarray], rank: int, sample: int = 100_000) -> float:
    """The value of rank `rank` (from 0) among all parts, without concatenating them."""
    size = sum(part.size for part in parts)
    generator = np.random.default_rng(0)
    drawn = [part[generator.integers(part.size, size=-(-part.size * sample // size))] for part in parts]
    low, high = arrays.bracket(np.concatenate(drawn), rank / size)
    below = sum(np.count_nonzero(part < low) for part in parts)
    between = np.concatenate([part[np.flatnonzero((part >= low) & (part <= high))] for part in parts])
    if not below <= rank < below + len(between):
        below, between = 0, np.concatenate(parts)
    return np.partition(between, rank - below)[rank - below]


KNOWN = names.resolve(names.ALLOCATIONS)


def get(identifier: Any) -> Callable:
    """Get an allocation by its name, or return a callable `(kernels, keep) -> counts` as it is."""
    if callable(identifier):
        return identifier
    validation.check_choice(identifier, tuple(KNOWN), "allocation")
    return KNOWN[identifier]


def allocate(
    kernels: Sequence[np.ndarray], sparsity: float, allocation: str | Callable = "balanced", most: float | Sequence[float] = 1.0
) -> list[float]:
    """Divide a sparsity among kernels, so that together they lose exactly `round(sparsity * weights)` weights.

    Args:
        kernels: the arrays to prune.
        sparsity: fraction of the weights of all kernels to remove, in [0, 1).
        allocation: `"uniform"`, `"global"`, `"erk"`, `"balanced"`, `"lamp"`, or a callable `(kernels, keep) -> counts`.
            Defaults to `"balanced"`.
        most: the highest sparsity of a kernel, which its pattern may limit: one number for all kernels, or one for each.
            Every kernel keeps at least one weight. Defaults to 1.

    Returns:
        One sparsity for each kernel.

    Raises:
        ValueError: if the sparsity is outside [0, 1) or more than `most` allows, if the allocation is not known, or if it
            returns anything else than counts.

    Example:

    >>> import numpy as np
    >>> from keras_renorm.allocation import allocate
    >>> allocate([np.ones((40, 40)), np.ones((40, 10))], 0.9, "erk")
    [0.923125, 0.8075]
    """
    sparsity, allocation = validation.check_sparsity(sparsity), get(allocation)
    sizes = np.array([kernel.size for kernel in kernels])
    check_reachable(sizes, sparsity, most)
    keep = int(sizes.sum()) - round(sparsity * int(sizes.sum()))
    least = np.maximum(np.ceil((1 - np.asarray(most)) * sizes - 1e-9), np.minimum(1, keep // len(kernels)))
    counts, free = np.zeros(len(kernels)), np.ones(len(kernels), bool)
    while free.any():
        left = max(keep - counts[~free].sum(), 0)
        asked = np.asarray(allocation([kernel for kernel, is_free in zip(kernels, free) if is_free], left), float)
        if asked.shape != (free.sum(),) or not np.isfinite(asked).all() or (asked < 0).any():
            raise ValueError(
                "Argument `allocation` must return one number of kept weights for each kernel. Received: "
                f"allocation={allocation!r}, which gave {asked!r} for {free.sum()} kernels."
            )
        counts[free] = asked
        over, under = counts > sizes, free & (counts < least)
        # What one side frees or takes changes the other: settle the larger misfit first.
        excess, lack = np.sum((counts - sizes)[over]), np.sum((least - counts)[under])
        settled = free & (over if excess >= lack else under)
        if not settled.any() or max(excess, lack) < 1e-6:
            break
        counts[settled] = np.where(over, sizes, least)[settled]
        free &= ~settled
    counts = _whole(counts, keep, least, sizes)
    # A sparsity is below one, but may round to all weights of a kernel.
    return [min(float(1 - count / size), float(np.nextafter(1, 0))) for count, size in zip(counts, sizes)]


def highest_sparsity(sizes: Sequence[int], most: float | Sequence[float]) -> float:
    """The sparsity of all kernels together when each has lost `most` of its weights."""
    return float(np.sum(np.asarray(most) * sizes) / np.sum(sizes))


def check_reachable(sizes: Sequence[int], sparsity: float, most: float | Sequence[float]) -> None:
    """Raise `ValueError` for a sparsity that kernels of these sizes cannot have together."""
    highest = highest_sparsity(sizes, most)
    if (sparsity - highest) * np.sum(sizes) > 0.5:
        raise ValueError(
            f"The patterns of the layers can remove {highest:.4g} of all weights at most. Received: sparsity={sparsity}. Pass "
            f"`sparsity={int(highest * 1e4) / 1e4}`, or another pattern for some of the layers."
        )


def _whole(counts, keep, least, sizes):
    """Integers near `counts` with the sum `keep`: the largest remainders are rounded up."""
    whole = np.clip(np.floor(counts + 1e-9), least, sizes).astype(int)
    remainders = counts - whole
    while (missing := keep - whole.sum()) != 0:
        step = int(np.sign(missing))
        room = whole < sizes if step > 0 else whole > least
        if not room.any():
            break
        order = np.argsort(np.where(room, -step * remainders, np.inf), kind="stable")[
            : min(abs(missing), np.count_nonzero(room))
        ]
        whole[order] += step
        remainders[order] -= step
    return whole
