"""The goal of rounds of pruning, and their result."""

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
    """One round of pruning and training. Round 0 is the dense model.

    Args:
        round: number of the round.
        sparsity: sparsity of the model in this round.
        step: the step by which the round pruned.
        metric: value of the metric after training.
        held: whether the metric held the floor. If not, the model was restored to the last round that did.
        epochs: number of epochs of training.
        seconds: duration of the round.
        note: what else went wrong.
        details: what the method reports of the pruning.
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
    """The result of rounds of pruning.

    Attributes:
        model: the sparsest model that held the floor, of plain Keras layers.
        history: tuple of `Round`.
        metric: name of the metric.
        floor: the value that the metric had to reach, or `None`.
    """

    model: keras.Model
    history: tuple[Round, ...]
    metric: str
    floor: float | None

    @property
    def sparsity(self) -> float:
        """Fraction of zeros among the prunable weights of `model`."""
        return max(row.sparsity for row in self.history if row.held)

    def plot(self, ax: Any = None) -> Any:
        """Draw the rounds with `keras_renorm.plots.history`.

        Args:
            ax: matplotlib axes. Defaults to `None`: new axes.

        Returns:
            The axes.
        """
        return draw_history(self, ax)


@dataclasses.dataclass(frozen=True)
class Goal:
    """The goal of a run: `metric` reaches `floor`, or is within `tolerance` of the dense model. With neither, every value
    holds.
    """

    metric: str
    better: str
    floor: float | None = None
    tolerance: float | None = None

    def floor_after(self, dense: float) -> float | None:
        """The floor, once the metric of the dense model is known."""
        if self.tolerance is None:
            return self.floor
        return dense - self.tolerance if self.better == "max" else dense + self.tolerance

    def holds(self, value: float, floor: float | None) -> bool:
        return floor is None or (value >= floor if self.better == "max" else value <= floor)


def direction(metric: str, mode: str) -> str:
    """Whether larger (`"max"`) or smaller (`"min"`) values of a metric are better."""
    if validation.check_choice(mode, ("auto", "max", "min"), "mode") != "auto":
        return mode
    for endings, direction in ((LARGER_IS_BETTER, "max"), (SMALLER_IS_BETTER, "min")):
        if metric.endswith(endings):
            return direction
    raise ValueError(
        f"Argument `metric` does not tell whether larger or smaller values are better. Received: metric={metric!r}. Pass "
        "`mode='max'` or `mode='min'`."
    )
