"""Prune a little, train a little, as long as a metric holds."""

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
from keras_renorm.src.pruning.conversion import copy_model, plain_copy, to_prunable
from keras_renorm.src.pruning.model_event import update_masks
from keras_renorm.src.rules import allocation as allocations
from keras_renorm.src.rules import criteria
from keras_renorm.src.rules.criteria.admm import ADMM
from keras_renorm.src.rules.criteria.base import CalibratedCriterion, score


@dataclasses.dataclass(frozen=True)
class IterativePruning(rounds.Outcome):
    """What `prune_iteratively` found. Printing it shows the rounds as a table."""

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
    """The sparsest model that still holds a given quality: prune, train, check; go on, or go back and try a smaller step.

    Round 0 trains the model as it is. Each further round removes `step` of the weights that are left and trains. If `metric`
    holds the floor, the next round goes on from there. If not, the model goes back to the last round that held, and the step
    is halved. It ends when the step would be smaller than `smallest_step`.

    The model passed in stays as it is. A model that was compiled with a `keras_renorm.optimizers.IrrelevanceDecay` is trained
    with it; its `restart()` is called with every pruning.

    Source: the loop around the regularizer of G. Bonetta, M. Ribero and R. Cancelliere, arXiv 2204.04977, which removes a fixed
    share of the weights, by magnitude over the whole model, whenever the metric is above the floor, and ends when it no longer
    is. Going back and halving the step are added here.

    Args:
        model: a compiled Sequential or Functional model, plain or with prunable layers, trained or not.
        fit: the training of a round: a dict of arguments of `model.fit`, such as
            `dict(x=x, y=y, epochs=3, validation_split=0.1)`; or a function `model -> logs` (or `History`), which trains the
            model in place.
        metric: name of the metric in the logs of `fit`; its value in the last epoch counts.
        floor: the value that the metric has to hold; or
        tolerance: how far it may be from the dense model's, in its own units. Pass one of the two.
        mode: `"max"` if larger values are better, `"min"` if smaller ones are, `"auto"` to tell by the metric's name.
        step: fraction of the weights left that a round removes, in (0, 1).
        smallest_step: the step below which there is no further try.
        stop_early: whether a round ends as soon as the metric holds, before `fit`'s epochs are over (with a dict as `fit`).
        layers: which layers of a plain model, as in `keras_renorm.to_prunable`.
        criterion: what scores the weights; with `calibration` also `"activation"`, `"activity"` and `"obs"`, with
            labels `"taylor"`.
        pattern: which weights live and die together.
        group: `"layer"` or `"unit"`.
        allocation: how the sparsity is divided among kernels; `"global"`, one threshold on the scores over all of them.
        renormalize: what is done to the survivors at each pruning. (For layers that are prunable already, these five stay.)
        max_rounds: number of rounds after which to end in any case.
        directory: folder for the state, written after every round. If it holds the state of the same run, the run goes on
            where it was. One run at a time can have it.
        seed: integer. Round `r` begins with `keras.utils.set_random_seed(seed + r)`, so that a run that was stopped ends
            as one that was not.
        calibration: samples, as in `keras_renorm.prune`, for criteria that need them; `(x, y)` for those that need labels.
        batch_size: how many of these to run at once, where they come as arrays.
        verbose: `"auto"`, 0, 1, or 2: the progress bar.

    Returns:
        An `IterativePruning` with `model`, `history`, `sparsity`, and `plot()`.

    Raises:
        ValueError: if an argument is not possible, the metric is not in the logs, the dense model does not hold the floor, or
            the directory holds the state of another run, is used by another run now, or holds a damaged state.

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
    better = rounds.direction(metric, mode)
    if (floor is None) == (tolerance is None):
        raise ValueError(
            "Pass either `floor` (the value that the metric has to hold) or `tolerance` (how far it may be from the dense "
            f"model's). Received: floor={floor}, tolerance={tolerance}."
        )
    if max_rounds is not None:
        validation.check_count(max_rounds, "max_rounds")
    plan = rounds.Plan(
        fit=rounds.check_fit(fit, model),
        goal=rounds.Goal(metric, better, floor, tolerance),
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
            f"Argument `criterion` must give scores, by which `step` of the weights go. Received: criterion={criterion!r}. "
            "Take 'magnitude', 'activation', 'activity', 'obs' or 'taylor'; a share of the activity is what "
            "`keras_renorm.methods.neural_relief` keeps."
        )
    if prunable_layers(model):
        pruned, _ = copy_model(model)
    else:
        pruned = to_prunable(model, layers, None, "magnitude" if by_data else criterion, pattern, group, renormalize)
    settings = dict(metric=metric, floor=floor, tolerance=tolerance, mode=better, step=step, stop_early=stop_early, seed=seed)
    settings["allocation"] = rounds.name_of(allocation)
    if by_data:
        settings["criterion"] = rounds.name_of(criterion)
    with contextlib.ExitStack() as stack:
        labels = by_data and criterion.statistics.of == "gradients"
        samples = stack.enter_context(Samples(calibration, model, batch_size, labels)) if by_data else None

        def prune(step):
            scores = _scores_by_data(pruned, criterion, samples) if by_data else _scores(pruned)
            _prune(pruned, scores, 1 - (1 - sparsity_of(pruned)) * (1 - step), allocation)
            return {}

        state = rounds.run_rounds(pruned, prune, plan, directory, settings)
    return IterativePruning(plain_copy(pruned)[0], tuple(state.history), metric, state.floor)


def _scores(model: keras.Model) -> dict[int, np.ndarray]:
    """The scores of all kernels, each by its layer's own criterion, by the `id` of the variable."""
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
    """Remove the weights with the lowest scores, until the model has the sparsity."""
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
