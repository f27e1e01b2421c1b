"""The report of a recovery."""

from __future__ import annotations

import dataclasses

from keras_renorm.src.core.tables import format_table


@dataclasses.dataclass(frozen=True)
class Place:
    """A place at which the pruned model is compared with the dense model on the held-out samples.

    Args:
        name: name of the layer or operation.
        before: the distance there before recovery.
        after: the same distance after recovery.
    """

    name: str
    before: float
    after: float


@dataclasses.dataclass(frozen=True)
class RecoveryReport:
    """The report of `keras_renorm.recover`. Print it for a table; `places` are the data.

    Args:
        places: a `Place` for each part of the loss: the sums inside the model where branches meet, and the outputs.
        layers: a `Place` for each layer with pruned kernels, in the order of the calls: the relative squared error of its
            outputs. Empty for a subclassed model, and for a model whose layers have fewer units than those of the dense model.
        before: the loss on the held-out samples before recovery: the sum of those of the outputs, and the mean of the others.
        after: the same loss after recovery.
        agreement_before: share of the held-out samples for which the largest output of the two models is the same, before
            recovery; `None` for outputs of one number.
        agreement_after: the same share after recovery.
        samples: number of samples to learn from.
        held_out: number of samples that were held out.
        steps: number of training steps.
        best_step: the step whose weights were kept; 0 if nothing was better than the start.
        seconds: duration.
        notes: sentences on what was not done as asked.
    """

    places: tuple[Place, ...]
    layers: tuple[Place, ...]
    before: float
    after: float
    agreement_before: float | None
    agreement_after: float | None
    samples: int
    held_out: int
    steps: int
    best_step: int
    seconds: float
    notes: tuple[str, ...] = ()

    def __str__(self) -> str:
        total = ("outputs, and mean of the others", f"{self.before:.4f}", f"{self.after:.4f}")
        lines = [format_table(("loss", "before", "after"), [*_cells(self.places), total], right=(1, 2), total=True)]
        if self.layers:
            lines.insert(0, format_table(("error of layer", "before", "after"), _cells(self.layers), right=(1, 2)) + "\n")
        if self.agreement_before is not None:
            lines.append(
                f"Agreement with the dense model: {self.agreement_before:.4f} before, {self.agreement_after:.4f} after."
            )
        lines.append(
            f"{self.samples:,} samples, {self.steps:,} steps in {self.seconds:.0f} s; the weights of step {self.best_step:,}. "
            f"Losses and agreement are those of {self.held_out:,} samples that were held out."
        )
        return "\n".join([*lines, *(f"Note: {note}" for note in self.notes)])

    __repr__ = __str__


def _cells(places: tuple[Place, ...]) -> list[tuple[str, str, str]]:
    return [(place.name, f"{place.before:.4f}", f"{place.after:.4f}") for place in places]
