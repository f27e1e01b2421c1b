"""`summary`: the sparsity of each kernel of a model, as data and as a table."""

from __future__ import annotations

import dataclasses

import keras
import numpy as np

from keras_renorm.src.core import validation
from keras_renorm.src.core.arrays import as_array
from keras_renorm.src.core.tables import format_table
from keras_renorm.src.layers.kernels import name_within
from keras_renorm.src.layers.prunable import PrunableLayer, prunable_layers
from keras_renorm.src.pruning.delivery import shortfall
from keras_renorm.src.pruning.selection import kernels_by_layer, outermost_layers
from keras_renorm.src.runtimes.targets import unique_names


@dataclasses.dataclass(frozen=True)
class Row:
    """One kernel.

    Args:
        layer: name of the layer.
        kernel: path of the kernel below the layer.
        pattern: pattern of the layer; `"-"` in a plain layer.
        weights: number of weights.
        kept: number of weights that are not pruned.
        scale: the smallest and the largest scale of the units.
    """

    layer: str
    kernel: str
    pattern: str
    weights: int
    kept: int
    scale: tuple[float, float]

    @property
    def sparsity(self) -> float:
        return 1 - self.kept / self.weights


@dataclasses.dataclass(frozen=True)
class Summary:
    """The kernels of a model. Printing it shows a table; `rows`, `sparsity` and `notes` are the data."""

    rows: tuple[Row, ...]
    notes: tuple[str, ...]

    @property
    def weights(self) -> int:
        return sum(row.weights for row in self.rows)

    @property
    def kept(self) -> int:
        return sum(row.kept for row in self.rows)

    @property
    def sparsity(self) -> float:
        """Fraction of zeros over all prunable weights; biases and normalization weights do not count."""
        return 1 - self.kept / self.weights if self.weights else 0.0

    def __str__(self) -> str:
        header = ("layer", "kernel", "pattern", "weights", "kept", "sparsity", "scale")
        cells = [
            (
                row.layer,
                row.kernel,
                row.pattern,
                f"{row.weights:,}",
                f"{row.kept:,}",
                f"{row.sparsity:.4f}",
                "1" if row.scale == (1, 1) else f"{row.scale[0]:.3g} to {row.scale[1]:.3g}",
            )
            for row in self.rows
        ]
        cells.append(("total", "", "", f"{self.weights:,}", f"{self.kept:,}", f"{self.sparsity:.4f}", ""))
        return "\n".join([format_table(header, cells, right=(3, 4, 5), total=True), *self.notes])

    __repr__ = __str__


def summary(model: keras.Model) -> Summary:
    """Summarize the sparsity of a model.

    Zeros count as pruned, in a prunable layer by its mask, in a plain layer by the values of its kernel.

    Args:
        model: a built model, with prunable layers or with plain ones.

    Returns:
        A `Summary`. Print it for a table, or read `rows`, `sparsity` and `notes`.

    Example:

    >>> import keras, keras_renorm as kr
    >>> model = keras.Sequential([keras.Input((8,)), keras.layers.Dense(4)])
    >>> kr.summary(kr.prune(model, sparsity=0.75)).sparsity
    0.75
    """
    validation.check_model(model)
    rows, notes = {}, []
    names = unique_names(model)
    kernels = kernels_by_layer(model)
    for layer in outermost_layers(model):
        name, parts, found = names[id(layer)], prunable_layers(layer), kernels[id(layer)]
        made = [(kernel, _masked_row(layer, name, part, kernel)) for part in parts for kernel in part.masked_kernels]
        if not made and isinstance(found, ValueError):
            notes.append(f"Not pruned: {found}.")
            continue
        # What is only added to inputs counts where it was pruned.
        plain = [] if made else [(kernel, _plain_row(layer, name, kernel)) for kernel in found]
        made += [(kernel, row) for kernel, row in plain if row.sparsity or not kernel.added]
        # A kernel that several layers share counts once.
        for kernel, row in made:
            rows.setdefault(id(kernel.variable), row)
    missing = shortfall(model)
    return Summary(tuple(rows.values()), tuple(notes + ([missing] if missing else [])))


def _masked_row(layer: keras.Layer, name: str, part: PrunableLayer, kernel) -> Row:
    scale = as_array(kernel.scale)
    kept = int(np.count_nonzero(as_array(kernel.mask)))
    limits = (float(scale.min()), float(scale.max()))
    return Row(name, name_within(kernel.variable, layer), repr(part.pattern), kernel.size, kept, limits)


def _plain_row(layer: keras.Layer, name: str, kernel) -> Row:
    kept = int(np.count_nonzero(as_array(kernel.variable)))
    return Row(name, name_within(kernel.variable, layer), "-", kernel.size, kept, (1.0, 1.0))
