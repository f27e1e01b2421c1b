"""The pruning arguments of a layer, resolved from names and configs to objects and checked."""

from __future__ import annotations

import dataclasses
from typing import Any

from keras_renorm.src.core import names, validation
from keras_renorm.src.rules import criteria, patterns, renorm, schedules


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
        schedule = schedules.get(self.pruning_schedule)
        pattern, group = patterns.get(self.pattern), validation.check_choice(self.group, names.GROUPS, "group")
        pattern.check(getattr(schedule, "max_sparsity", 0.0), group)
        return PruningArguments(
            schedule,
            criteria.get(self.criterion),
            pattern,
            group,
            renorm.get(self.renormalize, group),
            validation.check_choice(self.regrow, (True, False), "regrow"),
        )


PRUNING_ARGUMENTS = tuple(field.name for field in dataclasses.fields(PruningArguments))
