"""Whether layers reach the sparsity of their schedules; if not, why, and what to do."""

from __future__ import annotations

import warnings
import weakref

import keras
import numpy as np

from keras_renorm.src.core.arrays import as_array
from keras_renorm.src.kernels import masks
from keras_renorm.src.layers.prunable import NEVER, PrunableLayer, prunable_layers
from keras_renorm.src.rules import schedules

# Reasons, in the order in which one is named if layers have several.
NEVER_RAN, PAST, RESTORED, UNFINISHED, UNALIGNED, LIMIT, CHANGED = REASONS = (
    "no event ever ran",
    "the events lie before this training",
    "earlier weights were restored",
    "the events lie beyond this training",
    "the last event comes before the end of the schedule",
    "the pattern gives no more",
    "masks were changed",
)
_told: weakref.WeakKeyDictionary[keras.Model, set[str]] = weakref.WeakKeyDictionary()


def shortfall(model: keras.Model) -> str | None:
    """One sentence for the user if layers are less sparse than their schedules ask for; `None` if they are not."""
    found = _find(model)
    return found and found[1]


def warn_once(model: keras.Model, reasons: tuple[str, ...] = REASONS) -> None:
    """Warn of a missing sparsity that has one of these reasons, once for each reason and model."""
    found = _find(model)
    if found and found[0] in reasons and found[0] not in _told.setdefault(model, set()):
        _told[model].add(found[0])
        warnings.warn(found[1], stacklevel=2)


def _find(model: keras.Model) -> tuple[str, str] | None:
    by_reason: dict[str, list[PrunableLayer]] = {}
    for layer in prunable_layers(model):
        if reason := _reason(layer):
            by_reason.setdefault(reason, []).append(layer)
    reason = next((reason for reason in REASONS if reason in by_reason), None)
    return reason and (reason, _sentence(reason, by_reason[reason]))


def _goal(layer: PrunableLayer) -> schedules.Goal | None:
    return layer.goal or schedules.goal_of(layer.pruning_schedule)


def _step(layer: PrunableLayer) -> int:
    return int(keras.ops.convert_to_numpy(layer.pruning_step))


def _reason(layer: PrunableLayer) -> str | None:
    """Why a layer is less sparse than it should be; `None` if it is not."""
    if layer.pruning_schedule is not None and layer.sparsity == 0 and _step(layer) <= 0:
        return NEVER_RAN
    goal = _goal(layer)
    if goal is None or _reaches(layer, goal.sparsity):
        return None
    step = _step(layer)
    if step == NEVER:
        return NEVER_RAN
    if goal.began > goal.last_event and not _reaches(layer, goal.sparsity_at_last_event):
        return PAST
    if step < goal.last_event:
        return RESTORED if layer.was_restored else UNFINISHED
    if _reaches(layer, goal.sparsity_at_last_event):
        return UNALIGNED
    return LIMIT if _is_all_that_is_possible(layer, goal.sparsity) else CHANGED


def _reaches(layer: PrunableLayer, sparsity: float) -> bool:
    """Whether as many cells are removed as an event at this sparsity removes."""
    return all(
        masks.removes_enough(as_array(kernel.mask), sparsity, layer.pattern, layer.group, kernel.input_axes)
        for kernel in layer.masked_kernels
    )


def _is_all_that_is_possible(layer: PrunableLayer, sparsity: float) -> bool:
    """Whether an event with any scores would leave as many weights as there are."""
    for kernel in layer.masked_kernels:
        mask = as_array(kernel.mask)
        scores = np.arange(mask.size, dtype=np.float32).reshape(mask.shape)
        possible = masks.compute_mask(scores, sparsity, layer.pattern, layer.group, kernel.input_axes)
        if np.count_nonzero(mask) > np.count_nonzero(possible):
            return False
    return True


def _sentence(reason: str, layers: list[PrunableLayer]) -> str:
    names = [layer.name for layer in layers]
    step = max(_step(layer) for layer in layers)
    if reason == NEVER_RAN:
        return (
            f"No pruning event ever ran: layers {names} have a schedule, but were not trained with it; pass the callback, "
            "`model.fit(..., callbacks=[keras_renorm.callbacks.UpdatePruning()])`."
        )
    goals = [_goal(layer) for layer in layers]
    goal = max(goals, key=lambda goal: goal.last_event)
    counts = [layer.count_kept() for layer in layers]
    sizes = [size for _, size in counts]
    asked = np.average([goal.sparsity for goal in goals], weights=sizes)
    there = 1 - sum(kept for kept, _ in counts) / sum(sizes)
    why, remedy = {
        PAST: (
            f"this training began at step {goal.began}, after the last event of the schedule at step {goal.last_event}",
            f"steps are counted from the first training of the model, so add {goal.began} to `begin_step` and `end_step`",
        ),
        RESTORED: (
            f"the weights of step {step} were restored, and the schedule ends at step {goal.last_event}",
            "choose among later epochs only, with `EarlyStopping(..., start_from_epoch=...)`, or in a second `fit` with the "
            "callbacks that choose",
        ),
        UNFINISHED: (
            f"these are the weights of step {step}, and the schedule ends at step {goal.last_event}",
            "continue training with `UpdatePruning`, let the schedule end earlier, or save the best of later epochs only",
        ),
        UNALIGNED: (
            f"the last event came at step {goal.last_event}, before `end_step={goal.end_step}`",
            "choose a `frequency` that divides `end_step - begin_step`",
        ),
        LIMIT: (
            f"{layers[0].pattern!r} cannot remove more weights from kernels of these shapes",
            "pass another pattern, or a lower sparsity",
        ),
        CHANGED: (
            f"the last event came at step {goal.last_event}, and the masks were changed afterwards",
            "prune again, with `update_masks` of these layers or with `keras_renorm.prune`",
        ),
    }[reason]
    return f"The sparsity of {_list(names)} is {there:.4g}, not {asked:.4g}: {why}; {remedy}."


def _list(names: list[str]) -> str:
    if len(names) == 1:
        return f"layer {names[0]!r}"
    return f"layers {names}" if len(names) < 6 else f"{len(names)} layers ({names[0]!r} to {names[-1]!r})"
