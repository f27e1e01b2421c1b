"""What is to be pruned, and by which rules: the arguments of a method, resolved once."""

from __future__ import annotations

import dataclasses
from typing import Any

import keras
import numpy as np

from keras_renorm.src.layers.kernels import Kernel
from keras_renorm.src.rules import patterns, renorm
from keras_renorm.src.rules.criteria.base import CalibratedCriterion
from keras_renorm.src.rules.criteria.magnitude import Magnitude
from keras_renorm.src.rules.renorm import CalibratedRenormalizer


@dataclasses.dataclass(frozen=True)
class KernelPlan:
    """A kernel to prune.

    Args:
        layer: the outermost layer that holds the kernel.
        kernel: the kernel.
        pattern: which of its weights are removed together.
        sparsity: fraction of its weights to remove; `None` if the criterion decides.
        keep: bool array of the shape of the kernel, if its mask is chosen already. Defaults to `None`.
    """

    layer: keras.Layer
    kernel: Kernel
    pattern: patterns.Pattern
    sparsity: float | None
    keep: np.ndarray | None = None

    @property
    def by_units(self) -> bool:
        """Whether whole units are removed."""
        return self.pattern.by_units

    @property
    def description(self) -> str:
        """The kernel in an error message."""
        return f"Kernel '{self.kernel.variable.path}' of layer '{self.layer.name}'"


@dataclasses.dataclass(frozen=True)
class PruningRules:
    """The rules by which every kernel of a model is pruned.

    Args:
        criterion: what scores the weights.
        group: which weights compete with each other: `"layer"` or `"unit"`.
        renormalize: what changes the kept weights, or `None`.
        names: names of layers in a report, by the `id` of the layer. Defaults to the names that the layers have.
    """

    criterion: Any
    group: str
    renormalize: Any
    names: dict[int, str] = dataclasses.field(default_factory=dict)

    def name_of(self, layer: keras.Layer) -> str:
        """The name of a layer in a report."""
        return self.names.get(id(layer), layer.name)

    @property
    def fits(self) -> bool:
        """Whether the kept weights are fitted to calibration samples."""
        return isinstance(self.renormalize, CalibratedRenormalizer)

    @property
    def data_free_criterion(self) -> Any:
        """The criterion for kernels that calibration samples cannot score."""
        return Magnitude() if isinstance(self.criterion, CalibratedCriterion) else self.criterion

    @property
    def data_free_renormalize(self) -> Any:
        """The renormalizer for kernels that cannot be fitted to calibration samples."""
        return renorm.get("auto", self.group) if self.fits else self.renormalize
