"""The report of one-shot pruning: what happened to each kernel, as data and as a table."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

from keras_renorm.src.core.tables import format_table


@dataclasses.dataclass(frozen=True)
class LayerReport:
    """One kernel.

    Args:
        layer: name of the layer.
        kernel: path of the kernel below the layer.
        weights: number of weights.
        kept: number of weights that are kept.
        criterion: criterion that chose the weights; `"-"` for a layer that was not pruned but fitted, since pruned layers come
            before it.
        renormalize: renormalizer that changed the kept weights.
        scale: the smallest and the largest factor, over the units, by which the norm of the kept weights grew.
        error_before: mean squared error of the outputs of the layer after plain pruning, as a share of their variance, with the
            layers before it pruned and renormalized; `None` without calibration samples.
        error_after: the same error after renormalization.
        plain_units: number of units that keep their plain weights, because the fitted weights were worse or extremely large.
    """

    layer: str
    kernel: str
    weights: int
    kept: int
    criterion: str
    renormalize: str
    scale: tuple[float, float]
    error_before: float | None = None
    error_after: float | None = None
    plain_units: int = 0

    @property
    def sparsity(self) -> float:
        return 1 - self.kept / self.weights if self.weights else 0.0


@dataclasses.dataclass(frozen=True)
class PruningReport:
    """The report of `keras_renorm.prune`. Print it for a table; `rows` are the data.

    Args:
        rows: a `LayerReport` for each kernel.
        error: mean squared error of the outputs of the model on the calibration samples, as a share of their variance; `None`
            if nothing was fitted to samples.
        plain_error: the same error after plain pruning (`renormalize=None`).
        notes: sentences on what was not done as asked.
    """

    rows: tuple[LayerReport, ...]
    error: float | None = None
    plain_error: float | None = None
    notes: tuple[str, ...] = ()

    @property
    def weights(self) -> int:
        """Number of weights of the pruned kernels."""
        return sum(row.weights for row in self.rows if row.criterion != "-")

    @property
    def kept(self) -> int:
        """Number of their weights that are kept."""
        return sum(row.kept for row in self.rows if row.criterion != "-")

    @property
    def sparsity(self) -> float:
        """Fraction of zeros in the pruned kernels."""
        return 1 - self.kept / self.weights

    def __str__(self) -> str:
        header = ("layer", "kernel", "weights", "kept", "sparsity", "criterion", "renormalize", "scale")
        header += ("error before", "error after")
        cells = [
            (
                row.layer,
                row.kernel,
                f"{row.weights:,}",
                f"{row.kept:,}",
                f"{row.sparsity:.4f}",
                row.criterion,
                row.renormalize,
                "1" if row.scale == (1, 1) else f"{row.scale[0]:.3g} to {row.scale[1]:.3g}",
                *("-" if error is None else f"{error:.4f}" for error in (row.error_before, row.error_after)),
            )
            for row in self.rows
        ]
        total = ("total pruned", "", f"{self.weights:,}", f"{self.kept:,}", f"{self.sparsity:.4f}")
        cells.append(total + ("",) * (len(header) - len(total)))
        lines = [format_table(header, cells, right=(2, 3, 4, 8, 9), total=True)]
        if self.error is not None:
            lines.append(f"Error of the outputs on the samples: {self.error:.4f} (plain pruning: {self.plain_error:.4f}).")
        return "\n".join([*lines, *(f"Note: {note}" for note in self.notes)])

    __repr__ = __str__


def describe(rule: Any) -> str:
    """The name of a criterion or a renormalizer in a table."""
    return "none" if rule is None else getattr(rule, "__name__", None) or type(rule).__name__


def growth(kept: np.ndarray, fitted: np.ndarray, axis: int | tuple[int, ...]) -> tuple[float, float]:
    """The smallest and the largest factor by which the norm of the kept weights of a unit grew; `axis` runs over its inputs."""
    before, after = (np.sqrt(np.sum(np.square(part), axis=axis)) for part in (kept, fitted))
    factors = after[before > 0] / before[before > 0]
    return (float(factors.min()), float(factors.max())) if factors.size else (1.0, 1.0)
