"""What is to be pruned, and by which rules: the arguments of a method, resolved once."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import keras
import numpy as np

from keras_renorm.src.core import names, validation
from keras_renorm.src.core.moments import Moments
from keras_renorm.src.core.statistics import Statistics
from keras_renorm.src.kernels.events import prune_kernel
from keras_renorm.src.layers.kernels import Kernel
from keras_renorm.src.rules import criteria, patterns, renorm
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
    def statistics(self) -> type[Statistics]:
        """The statistics that the criterion needs of calibration samples."""
        return getattr(self.criterion, "statistics", Moments)

    @property
    def needs_labels(self) -> bool:
        """Whether the criterion needs samples with labels."""
        return getattr(self.criterion, "needs_labels", False)

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


def resolve_rules(criterion: Any, group: str, renormalize: Any, calibrated: bool = False) -> PruningRules:
    """Resolve names and configs to objects.

    Args:
        criterion: what scores the weights.
        group: `"layer"` or `"unit"`.
        renormalize: what changes the kept weights.
        calibrated: whether there are calibration samples. Defaults to `False`.

    Raises:
        ValueError: if a name is not known, or an argument needs calibration samples and there are none.
    """
    validation.check_choice(group, names.GROUPS, "group")
    return PruningRules(criteria.get(criterion, calibrated), group, renorm.get(renormalize, group, calibrated))


def prune_planned(
    plan: KernelPlan, rules: PruningRules, values: np.ndarray, scored_by: Callable, **state: Any
) -> tuple[np.ndarray, np.ndarray]:
    """Compute the mask and the scales of a kernel at its sparsity, without assigning them.

    Args:
        plan: the kernel, its pattern and its sparsity.
        rules: how to prune it.
        values: the values of the kernel.
        scored_by: callable `kernel -> scores`.
        **state: the other arguments of `keras_renorm.src.kernels.events.prune_kernel`.
    """
    return prune_kernel(
        values,
        plan.sparsity,
        scored_by,
        plan.pattern,
        rules.group,
        rules.data_free_renormalize,
        plan.kernel.input_axes,
        description=plan.description,
        **state,
    )
