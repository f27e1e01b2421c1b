"""Iterative pruning: prune a little and train a little, as long as a metric holds."""

from __future__ import annotations

import contextlib
import dataclasses
import numbers
import os
from collections.abc import Callable, Mapping
from typing import Any

import keras
import numpy as np
from keras import ops

from keras_renorm.src.calibration.gathering import gather_statistics, scores_of
from keras_renorm.src.calibration.samples import Samples
from keras_renorm.src.core import validation
from keras_renorm.src.core.tables import format_table
from keras_renorm.src.layers.prunable import prunable_layers, sparsity_of
from keras_renorm.src.methods import rounds
from keras_renorm.src.methods.outcome import Goal, Outcome, direction
from keras_renorm.src.methods.round_training import check_fit
from keras_renorm.src.methods.run_state import name_of
from keras_renorm.src.models.model_copies import copy_model
from keras_renorm.src.pruning.conversion import plain_copy, to_prunable
from keras_renorm.src.pruning.model_event import update_masks
from keras_renorm.src.rules import allocation as allocations
from keras_renorm.src.rules import criteria
from keras_renorm.src.rules.criteria.admm import ADMM
from keras_renorm.src.rules.criteria.base import CalibratedCriterion, score


@dataclasses.dataclass(frozen=True)
class IterativePruning(Outcome):
    """The result of `prune_iteratively`. Print it for a table of the rounds."""

    def __str__(self) -> str:
        header = ("round", "sparsity", "step", self.metric, "held", "epochs", "seconds", "note")
        cells = [
            (
                str(row.round),
                f"{row.sparsity:.4f}",
                f"{row.step:.3g}",
                f"{row.metric:.4g}",
                "yes" if row.held else "no",
                str(row.epochs),
                f"{row.seconds:.1f}",
                row.note,
            )
            for row in self.history
        ]
        return f"{format_table(header, cells, right=(0, 1, 2, 3, 5, 6))}\nfloor of {self.metric}: {self.floor:.4g}"

    __repr__ = __str__


def prune_iteratively(
    model: keras.Model,
    fit: Mapping[str, Any] | Callable[[keras.Model], Any],
    metric: str = "val_accuracy",
    floor: float | None = None,
    tolerance: float | None = None,
    mode: str = "auto",
    step: float = 0.2,
    smallest_step: float = 0.02,
    stop_early: bool = True,
    layers: Any = None,
    criterion: Any = "magnitude",
    pattern: Any = "unstructured",
    group: str = "layer",
    allocation: Any = "global",
    renormalize: Any = "auto",
    max_rounds: int | None = None,
    directory: str | os.PathLike | None = None,
    seed: int = 0,
    calibration: Any = None,
    batch_size: int = 128,
    verbose: int | str = "auto",
) -> IterativePruning:
    """Find the sparsest model that still reaches a given quality, in rounds of pruning and training.

    Round 0 trains the model as it is. Each further round removes a fraction `step` of the remaining weights and trains. If
    `metric` holds the floor, the next round continues from that model. If not, the model is restored to the last round that
    held the floor, and the step is halved. The loop ends when the step would fall below `smallest_step`.

    The model that is passed in is not changed. A model that is compiled with `keras_renorm.optimizers.IrrelevanceDecay` trains
    with it, and its `restart()` is called at every pruning.

    Source: the loop around the regularizer of G. Bonetta, M. Ribero and R. Cancelliere, arXiv 2204.04977. It removes a fixed
    share of the weights, by magnitude over the whole model, whenever the metric is above the floor, and ends when the metric is
    not. Deviation: restoring the model and halving the step are additions of this library.

    Args:
        model: a compiled Sequential or Functional model, with plain or prunable layers, trained or not.
        fit: the training of a round: a dict of arguments of `model.fit`, such as
            `dict(x=x, y=y, epochs=3, validation_split=0.1)`; or a function `model -> logs` (or `History`) that trains the model
            in place.
        metric: name of the metric in the logs of `fit`. Its value in the last epoch counts. Defaults to `"val_accuracy"`.
        floor: the value that the metric must reach. Defaults to `None`.
        tolerance: how much worse than the dense model the metric may be, in its own units. Pass either `floor` or `tolerance`.
            Defaults to `None`.
        mode: `"max"` if larger values are better, `"min"` if smaller values are, `"auto"` to decide by the name of the metric.
            Defaults to `"auto"`.
        step: fraction of the remaining weights that a round removes, in (0, 1). Defaults to 0.2.
        smallest_step: the smallest step to try. Defaults to 0.02.
        stop_early: whether a round ends as soon as the metric holds, before all epochs of `fit` (if `fit` is a dict). Defaults
            to `True`.
        layers: the layers of a plain model to prune, as in `keras_renorm.to_prunable`. Defaults to `None`: all.
        criterion: what scores the weights; with `calibration` also `"activation"`, `"activity"` and `"obs"`, and with labels
            `"taylor"`. Defaults to `"magnitude"`.
        pattern: which weights are removed together. Defaults to `"unstructured"`.
        group: which weights compete with each other: `"layer"` or `"unit"`. Defaults to `"layer"`.
        allocation: how the sparsity is divided among the kernels. Defaults to `"global"`: one threshold on the scores for all.
        renormalize: how the kept weights are rescaled at each pruning. Layers that are prunable already keep their own
            `criterion`, `pattern`, `group` and `renormalize`. Defaults to `"auto"`.
        max_rounds: the largest number of rounds. Defaults to `None`: no limit.
        directory: folder for the state, which is written after every round. If the folder holds the state of the same run, that
            run is resumed. Only one run at a time can use it. Defaults to `None`: no state is kept.
        seed: integer. Round `r` begins with `keras.utils.set_random_seed(seed + r)`, so that a resumed run ends like one that
            was not stopped. Defaults to 0.
        calibration: samples, as in `keras_renorm.prune`, for criteria that need them; `(x, y)` for criteria that need labels.
            Defaults to `None`.
        batch_size: batch size for `calibration`, if it is an array. Defaults to 128.
        verbose: `"auto"`, 0, 1, or 2: the progress bar. Defaults to `"auto"`.

    Returns:
        An `IterativePruning` with `model`, `history`, `sparsity`, and `plot()`.

    Raises:
        ValueError: if an argument is not possible, the metric is not in the logs, the dense model does not reach the floor, or
            the directory holds the state of another run, is in use by another run, or holds a damaged state.

    Example:

    >>> import keras, numpy as np, keras_renorm as kr
    >>> keras.utils.set_random_seed(0)
    >>> x = np.random.default_rng(0).standard_normal((256, 8)).astype("float32")
    >>> model = keras.Sequential([keras.Input((8,)), keras.layers.Dense(16, "relu"), keras.layers.Dense(1)])
    >>> model.compile(keras.optimizers.Adam(0.01), "mse")
    >>> fit = dict(x=x, y=x[:, :1], epochs=20)
    >>> found = kr.methods.prune_iteratively(model, fit, metric="loss", floor=0.1, step=0.5, max_rounds=3, verbose=0)
    >>> [row.held for row in found.history], round(found.sparsity, 3)
    ([True, True, True, True], 0.875)
    """
    validation.check_model(model)
    _check_steps(step, smallest_step)
    better = direction(metric, mode)
    if (floor is None) == (tolerance is None):
        raise ValueError(
            "Pass either `floor` (the value that the metric has to hold) or `tolerance` (how far it may be from the dense "
            f"model's). Received: floor={floor}, tolerance={tolerance}."
        )
    if max_rounds is not None:
        validation.check_count(max_rounds, "max_rounds")
    plan = rounds.RunPlan(
        fit=check_fit(fit, model),
        goal=Goal(metric, better, floor, tolerance),
        step=step,
        smallest_step=smallest_step,
        max_rounds=max_rounds,
        stop_early=stop_early,
        seed=seed,
        verbose=validation.check_verbose(verbose),
    )
    criterion, allocation = criteria.get(criterion, calibration is not None), allocations.get(allocation)
    by_data = isinstance(criterion, CalibratedCriterion)
    if isinstance(criterion, ADMM) or getattr(criterion, "chooses_count", False):
        raise ValueError(
            f"Argument `criterion` must return scores, by which each round removes `step` of the weights. "
            f"Received: criterion={criterion!r}. Pass 'magnitude', 'activation', 'activity', 'obs' or 'taylor'; a share of "
            "the activity is what `keras_renorm.methods.neural_relief` keeps."
        )
    if prunable_layers(model):
        pruned, _ = copy_model(model)
    else:
        pruned = to_prunable(model, layers, None, "magnitude" if by_data else criterion, pattern, group, renormalize)
    settings = dict(metric=metric, floor=floor, tolerance=tolerance, mode=better, step=step, stop_early=stop_early, seed=seed)
    settings["allocation"] = name_of(allocation)
    if by_data:
        settings["criterion"] = name_of(criterion)
    with contextlib.ExitStack() as stack:
        samples = stack.enter_context(Samples(calibration, model, batch_size, criterion.needs_labels)) if by_data else None

        def prune(step):
            scores = _scores_by_data(pruned, criterion, samples) if by_data else _scores(pruned)
            _prune(pruned, scores, 1 - (1 - sparsity_of(pruned)) * (1 - step), allocation)
            return {}

        state = rounds.run_rounds(pruned, prune, plan, directory, settings)
    return IterativePruning(plain_copy(pruned)[0], tuple(state.history), metric, state.floor)


def _scores(model: keras.Model) -> dict[int, np.ndarray]:
    """The scores of all kernels, each by the criterion of its layer, by the `id` of the variable."""
    return {
        id(masked.variable): score(layer.criterion, ops.convert_to_numpy(masked.effective()))
        for layer in prunable_layers(model)
        for masked in layer.masked_kernels
    }


def _scores_by_data(model: keras.Model, criterion: CalibratedCriterion, samples: Samples) -> dict[int, np.ndarray]:
    plain, variables = plain_copy(model)
    scores = scores_of(gather_statistics(plain, samples, criterion.statistics), criterion)
    kernels = [(layer, masked.variable) for layer in prunable_layers(model) for masked in layer.masked_kernels]
    unseen = [layer.name for layer, variable in kernels if id(variables[id(variable)]) not in scores]
    if unseen:
        raise ValueError(
            f"Criterion {criterion!r} cannot score the kernels of layers {unseen}: samples do not show what their inputs "
            "carry. Leave these layers out with `layers=`, or take `criterion='magnitude'`."
        )
    return {id(variable): scores[id(variables[id(variable)])] for _, variable in kernels}


def _prune(model: keras.Model, scores: dict[int, np.ndarray], sparsity: float, allocation: Callable) -> None:
    """Remove the weights with the lowest scores until the model has the sparsity."""
    kernels = [(layer, masked) for layer in prunable_layers(model) for masked in layer.masked_kernels]
    most, sizes = [layer.pattern.most for layer, _ in kernels], [masked.size for _, masked in kernels]
    one_weight_each = 1 - len(kernels) / sum(sizes)
    sparsity = min(sparsity, one_weight_each, allocations.highest_sparsity(sizes, most))
    in_order = [scores[id(masked.variable)] for _, masked in kernels]
    sparsities: dict[int, list[float]] = {}
    for (layer, _), one in zip(kernels, allocations.allocate(in_order, sparsity, allocation, most)):
        sparsities.setdefault(id(layer), []).append(one)
    update_masks(model, sparsities, scores)


def _check_steps(step: Any, smallest_step: Any) -> None:
    for argument, value in (("step", step), ("smallest_step", smallest_step)):
        if isinstance(value, bool) or not isinstance(value, numbers.Real) or not 0 < value < 1:
            raise ValueError(
                f"Argument `{argument}` must be a number in (0, 1): the fraction of the weights left that a round removes. "
                f"Received: {argument}={value!r}."
            )
