"""The pruning arguments of a layer, resolved from names and configs to objects and checked."""

from __future__ import annotations

import dataclasses
from typing import Any

from keras_renorm.src.core import validation
from keras_renorm.src.layers.kernel_plan import resolve_rules
from keras_renorm.src.rules import patterns, schedules


@dataclasses.dataclass(frozen=True)
class PruningArguments:
    """How the kernels of a prunable layer are pruned; see `PrunableLayer` for the arguments.

    Example:

    >>> from keras_renorm.src.layers.arguments import PruningArguments
    >>> PruningArguments(criterion="magnitude").resolve().criterion
    Magnitude()
    """

    pruning_schedule: Any = None
    criterion: Any = "magnitude"
    pattern: Any = "unstructured"
    group: str = "layer"
    renormalize: Any = "auto"
    regrow: bool = False

    def resolve(self) -> PruningArguments:
        """Resolve names and configs to objects. What is resolved already is the same again.

        Raises:
            ValueError: if a name is not known, or two arguments do not go together.
        """
        schedule, pattern = schedules.get(self.pruning_schedule), patterns.get(self.pattern)
        rules = resolve_rules(self.criterion, self.group, self.renormalize)
        pattern.check(getattr(schedule, "max_sparsity", 0.0), rules.group)
        regrow = validation.check_choice(self.regrow, (True, False), "regrow")
        return PruningArguments(schedule, rules.criterion, pattern, rules.group, rules.renormalize, regrow)


PRUNING_ARGUMENTS = tuple(field.name for field in dataclasses.fields(PruningArguments))
