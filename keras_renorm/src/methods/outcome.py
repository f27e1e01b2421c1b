"""What rounds of pruning have to hold, and where they ended."""

from __future__ import annotations

import dataclasses
from typing import Any

import keras

from keras_renorm.src.core import validation
from keras_renorm.src.reports.run_plots import history as draw_history

LARGER_IS_BETTER = ("acc", "accuracy", "auc", "precision", "recall", "f1_score", "iou", "r2_score")
SMALLER_IS_BETTER = ("loss", "error", "perplexity", "mae", "mse", "crossentropy")


@dataclasses.dataclass(frozen=True)
class Round:
    """One round: the model was pruned to `sparsity` (by `step`) and trained for `epochs`.

    `held` says whether `metric` held the floor; if not, the model went back to the last round that had. `note` says what else
    went wrong, `details` what the method has to say of the pruning. Round 0 is the dense model.
    """

    round: int
    sparsity: float
    step: float
    metric: float
    held: bool
    epochs: int
    seconds: float
    note: str = ""
    details: dict[str, Any] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Outcome:
    """Where rounds of pruning ended.

    Attributes:
        model: the sparsest model that held the floor, of plain Keras layers.
        history: tuple of `Round`.
        metric: name of the metric.
        floor: the value that it had to hold, or `None`.
    """

    model: keras.Model
    history: tuple[Round, ...]
    metric: str
    floor: float | None

    @property
    def sparsity(self) -> float:
        """Fraction of zeros over the prunable weights of `model`."""
        return max(row.sparsity for row in self.history if row.held)

    def plot(self, ax: Any = None) -> Any:
        """Draw the rounds: `keras_renorm.plots.history`.

        Args:
            ax: matplotlib axes; new ones if `None`.

        Returns:
            The axes.
        """
        return draw_history(self, ax)


@dataclasses.dataclass(frozen=True)
class Goal:
    """What has to be held: `metric` at `floor`, or within `tolerance` of the dense model's; with neither, all is held."""

    metric: str
    better: str
    floor: float | None = None
    tolerance: float | None = None

    def floor_after(self, dense: float) -> float | None:
        """The floor, when the metric of the dense model is known."""
        if self.tolerance is None:
            return self.floor
        return dense - self.tolerance if self.better == "max" else dense + self.tolerance

    def holds(self, value: float, floor: float | None) -> bool:
        return floor is None or (value >= floor if self.better == "max" else value <= floor)


def direction(metric: str, mode: str) -> str:
    """`"max"` or `"min"`: whether larger or smaller values of a metric are better."""
    if validation.check_choice(mode, ("auto", "max", "min"), "mode") != "auto":
        return mode
    for endings, direction in ((LARGER_IS_BETTER, "max"), (SMALLER_IS_BETTER, "min")):
        if metric.endswith(endings):
            return direction
    raise ValueError(
        f"Argument `metric` does not tell whether larger or smaller values are better. Received: metric={metric!r}. Pass "
        "`mode='max'` or `mode='min'`."
    )
