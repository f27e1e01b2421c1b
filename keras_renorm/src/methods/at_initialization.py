"""Pruning at initialization: the first epochs of the one training run decide which weights stay.

Source: M. Haroon, What to prune and what not to prune at initialization, arXiv 2209.02201. Its abstract was at hand, its
formulas were not; where it is silent, what measures best was taken (`docs/at_initialization.md`).
"""

from __future__ import annotations

import contextlib
import math
import numbers
import warnings
from collections.abc import Iterator
from typing import Any

import keras
import numpy as np
from keras import ops

from keras_renorm.src.core import validation
from keras_renorm.src.core.keras_internals import save_with_optimizer
from keras_renorm.src.kernels import masks
from keras_renorm.src.kernels.events import effective, in_float, new_scale
from keras_renorm.src.layers.prunable import PrunableKernel, PrunableLayer, prunable_layers, sparsity_of
from keras_renorm.src.rules import allocation as allocations
from keras_renorm.src.training.optimizers.recorder import Recorder

FITNESS = ("magnitude", "gradient", "combined")
RECOMBINE = ("weight", "unit", None)
MOVEMENT = ("absolute", "relative")


class Search(keras.callbacks.Callback):
    """Base class: a callback that sets masks at the end of each of the first epochs of `model.fit`.

    A search is a chain of phases, each a callback of this class that defines `select`. Epochs count as Keras counts them, so
    that a run which goes on (`fit(..., initial_epoch=1)`) goes on with its search.
    """

    needs_gradients = False
    needs_start = False

    def __init__(self, sparsity: float | None, search_epochs: int, allocation: Any, after: Search | None = None):
        super().__init__()
        self.sparsity = None if sparsity is None else validation.check_sparsity(sparsity)
        self.search_epochs = validation.check_count(search_epochs, "search_epochs")
        self.allocation = allocations.get(allocation)
        self.after = after

    def select(self, place: Place, sparsity: float | None, epoch: int) -> np.ndarray:
        """The mask of a kernel at the end of epoch `epoch` (from 0) of this phase."""
        raise NotImplementedError

    def log(self, logs: dict) -> None:
        """Write what `select` found out into the logs of the epoch."""

    @property
    def phases(self) -> list[Search]:
        """The phases of the search, in order, this one last."""
        return [*(self.after.phases if self.after else []), self]

    @property
    def total_epochs(self) -> int:
        return sum(phase.search_epochs for phase in self.phases)

    def on_train_begin(self, logs=None):
        name = type(self).__name__
        if not prunable_layers(self.model):
            raise ValueError(
                f"Model '{self.model.name}' has no prunable layers, so `{name}` has nothing to do. Convert it first: "
                "`model = keras_renorm.to_prunable(model)`."
            )
        kernels = [(layer, masked) for layer in prunable_layers(self.model) for masked in layer.masked_kernels]
        sizes, most = [masked.size for _, masked in kernels], [layer.pattern.most for layer, _ in kernels]
        for phase in self.phases:
            allocations.check_reachable(sizes, phase.sparsity or 0.0, most)
        epochs = self.params.get("epochs") or 1
        if epochs < self.total_epochs:
            raise ValueError(
                f"Argument `search_epochs` is longer than the training: `{name}` searches for {self.total_epochs} epochs, "
                f"`model.fit` was called with epochs={epochs}. Train for more epochs (at least as many again, for the sparse "
                "model to learn), or pass fewer `search_epochs`."
            )
        # Before the first epoch, as a callback like `BackupAndRestore` may be about to restore what the recorder held.
        gradients = any(phase.needs_gradients for phase in self.phases)
        start = any(phase.needs_start for phase in self.phases)
        self._recorder = _put_recorder_on(self.model, name, gradients, start) if gradients or start else None
        self._first_epoch = self._searching = True

    def on_epoch_begin(self, epoch, logs=None):
        _ = self.model  # On JAX, brings the variables up to date.
        if self._first_epoch:
            self._begin(epoch)
            self._first_epoch = False
        if self._recorder and epoch < self.total_epochs:
            self._recorder.reset_gradients()

    def _begin(self, epoch: int) -> None:
        if epoch >= self.total_epochs:
            if not any(layer.sparsity for layer in prunable_layers(self.model)):
                warnings.warn(
                    f"`{type(self).__name__}` searches in epochs 0 to {self.total_epochs - 1}, and training begins with "
                    f"epoch {epoch} of a model without masks: it stays dense. Begin with `initial_epoch=0`.",
                    stacklevel=2,
                )
            self._finish()
        elif self._recorder and epoch == 0:
            self._recorder.reset_start()
            self._recorder.epochs.assign(0)
        elif self._recorder and int(ops.convert_to_numpy(self._recorder.epochs)) != epoch:
            raise ValueError(
                f"Training goes on with epoch {epoch}, but what `{type(self).__name__}` recorded in the epochs before is not "
                "there. Load a model that was saved whole (`model.save`, with its optimizer) after that epoch, put this "
                "callback before `BackupAndRestore`, or begin again with `initial_epoch=0`."
            )

    def on_epoch_end(self, epoch, logs=None):
        logs = {} if logs is None else logs
        model = self.model
        if epoch < self.total_epochs:
            phase, first = self._phase_at(epoch)
            updates = [
                place.update(phase.select(place, sparsity, epoch - first))
                for place, sparsity in phase.tasks(model, self._recorder)
            ]
            # Only now is anything changed: a kernel that has become NaN leaves the model as it was.
            for masked, mask, scale in updates:
                masked.mask.assign(mask)
                masked.scale.assign(np.reshape(scale, masked.scale.shape))
            phase.log(logs)
            if self._recorder:
                self._recorder.epochs.assign(epoch + 1)
            if epoch == self.total_epochs - 1:
                self._finish()
        logs["sparsity"] = sparsity_of(model)

    def on_train_end(self, logs=None):
        if self._searching:
            warnings.warn(
                f"Training ended before the {self.total_epochs} search epochs of `{type(self).__name__}` were over: the masks "
                "are not what they should become.",
                stacklevel=2,
            )

    def _phase_at(self, epoch: int) -> tuple[Search, int]:
        first = 0
        for phase in self.phases:
            if epoch < first + phase.search_epochs:
                return phase, first
            first += phase.search_epochs

    def _finish(self) -> None:
        self._searching = False
        if self._recorder:
            _take_recorder_off(self.model)
            self._recorder = None

    def tasks(self, model: keras.Model, recorder: Recorder | None) -> Iterator[tuple[Place, float | None]]:
        """Every kernel of the model with the sparsity that it is to have in the end, one kernel at a time in memory."""
        kernels = [(layer, masked) for layer in prunable_layers(model) for masked in layer.masked_kernels]
        sparsities = [None] * len(kernels)
        if self.sparsity is not None:
            values = [ops.convert_to_numpy(masked.variable) for _, masked in kernels]
            most = [layer.pattern.most for layer, _ in kernels]
            sparsities = allocations.allocate(values, self.sparsity, self.allocation, most)
        for index, ((layer, masked), sparsity) in enumerate(zip(kernels, sparsities)):
            yield Place(layer, masked, index, recorder), sparsity


class DissipatingGradients(Search):
    """Removes the weights that hardly moved in the first epochs of training, whatever their magnitude.

    At the end of each search epoch the weights that moved least since training began are removed, a share of them each time;
    then training goes on sparse. Works with prunable layers of every kind; their pattern, group and renormalization apply.

    Source: M. Haroon, arXiv 2209.02201. Its rule is `movement="relative"` with a `fraction`: remove `w` where
    `|w - w0| <= fraction * |w0|`. By default the movement itself counts, which keeps more accuracy.

    Args:
        sparsity: fraction of the weights of the prunable layers to remove in the end, in [0, 1); or
        fraction: how far a weight must have moved to stay, as a fraction of its start (`"relative"`) or of the mean magnitude
            of its kernel at the start (`"absolute"`). The data then decide the sparsity. Pass one of the two.
        search_epochs: number of epochs after each of which weights are removed.
        movement: `"absolute"` (default), `|w - w0|`, or `"relative"`, `|w - w0| / |w0|`.
        allocation: how `sparsity` is divided among kernels, as in `keras_renorm.prune`.

    Raises:
        ValueError: if an argument is not possible; when training begins, if the model has no prunable layers, their patterns
            cannot give the sparsity, the fit is shorter than the search, or the optimizer cannot be recorded.

    Example:

    >>> import keras, numpy as np, keras_renorm as kr
    >>> model = keras.Sequential([keras.Input((8,)), kr.layers.PrunableDense(4), keras.layers.Dense(1)])
    >>> model.compile("adam", "mse")
    >>> x, y = np.ones((16, 8)), np.ones((16, 1))
    >>> pruning = kr.methods.DissipatingGradients(0.75, search_epochs=2)
    >>> history = model.fit(x, y, epochs=4, verbose=0, callbacks=[pruning])
    >>> history.history["sparsity"]
    [0.375, 0.75, 0.75, 0.75]
    """

    needs_start = True

    def __init__(
        self,
        sparsity: float | None = None,
        fraction: float | None = None,
        search_epochs: int = 2,
        movement: str = "absolute",
        allocation: Any = "balanced",
    ):
        if (sparsity is None) == (fraction is None):
            raise ValueError(
                "Pass either `sparsity` (how much to remove) or `fraction` (how far a weight must have moved to stay). "
                f"Received: sparsity={sparsity}, fraction={fraction}."
            )
        super().__init__(sparsity, search_epochs, allocation)
        if fraction is not None and (not isinstance(fraction, numbers.Real) or not fraction > 0):
            raise ValueError(
                "Argument `fraction` must be a positive number: how far a weight must have moved to stay, such as 0.1. "
                f"Received: fraction={fraction!r}."
            )
        self.fraction = fraction
        self.movement = validation.check_choice(movement, MOVEMENT, "movement")

    def select(self, place, sparsity, epoch):
        movement = self._movement(place)
        if self.fraction is None:
            return place.best(movement, sparsity * (epoch + 1) / self.search_epochs)
        return place.best(movement, self._dissipated(place, movement))

    def _movement(self, place):
        moved, unit = np.abs(place.kernel - place.start), np.abs(place.start)
        if self.movement == "absolute":
            return moved / max(unit.mean(dtype=np.float64), np.finfo(np.float32).tiny)
        # A weight that started at zero has moved infinitely far if it moved at all.
        return np.divide(moved, unit, out=np.where(moved > 0, np.inf, 0).astype(moved.dtype), where=unit > 0)

    def _dissipated(self, place, movement):
        gone = np.count_nonzero(~place.mask | (movement <= self.fraction))
        if gone == movement.size:
            raise ValueError(
                f"Argument `fraction` is too large: no weight of {place.name} moved farther. Received: fraction="
                f"{self.fraction}; the largest movement is {movement.max():.2g}."
            )
        return min(gone / movement.size, place.layer.pattern.most)


class KStarts(Search):
    """Draws `k` random masks for every kernel, trains for a few epochs, and keeps the fittest.

    A candidate's fitness is what its kept weights have together: of magnitude, of gradient magnitude over the last epoch, or
    of both. Whole random masks of a large kernel are all nearly equally fit, by the law of large numbers. So by default
    candidates are recombined, as in evolutionary search: the offspring takes the fittest of all weights that some candidate
    keeps. (As fitness is a sum over weights, no longer line of generations among these candidates gets any further.)

    Candidates are never stored: each is drawn again from its seed when it is needed.

    Source: M. Haroon, arXiv 2209.02201. Recombination, of which the paper's abstract says nothing, and the share of the total
    as unit of fitness are this library's.

    Args:
        sparsity: fraction of the weights of the prunable layers to remove, in [0, 1).
        k: number of candidates for each kernel.
        search_epochs: number of epochs to train before the choice.
        fitness: `"magnitude"`, `"gradient"` (the sum of `|gradient|` over an epoch) or `"combined"` (both, each divided by its
            mean over the kernel).
        recombine: `"weight"` (default), the best mask that can be made of the candidates; `"unit"`, each unit takes the
            fittest of its `k` candidates; or `None`, one candidate for the whole kernel, the plain reading of the paper.
        after: what goes before: a `DissipatingGradients`, whose search epochs come first and among whose survivors candidates
            are drawn; or `"dissipating_gradients"`, one epoch of it. Both methods then remove the same share of what they find.
        allocation: how `sparsity` is divided among kernels, as in `keras_renorm.prune`.
        seed: integer. The same seed draws the same candidates.

    Attributes:
        history: list with a dict for each search epoch, by the path of the kernel: `candidates`, the fitness of each candidate
            as a share of what all weights have together, and `best`, that of the mask which the epoch would choose. The logs
            hold the mean of the latter as `fitness`.

    Raises:
        ValueError: as for `DissipatingGradients`.

    Example:

    >>> import keras, numpy as np, keras_renorm as kr
    >>> model = keras.Sequential([keras.Input((8,)), kr.layers.PrunableDense(4), keras.layers.Dense(1)])
    >>> model.compile("adam", "mse")
    >>> x, y = np.ones((16, 8)), np.ones((16, 1))
    >>> pruning = kr.methods.KStarts(0.75, k=8, search_epochs=1)
    >>> history = model.fit(x, y, epochs=3, verbose=0, callbacks=[pruning])
    >>> history.history["sparsity"]
    [0.75, 0.75, 0.75]
    """

    def __init__(
        self,
        sparsity: float,
        k: int = 32,
        search_epochs: int = 2,
        fitness: str = "magnitude",
        recombine: str | None = "weight",
        after: DissipatingGradients | str | None = None,
        allocation: Any = "balanced",
        seed: int = 0,
    ):
        if after == "dissipating_gradients":
            left = math.sqrt(1 - validation.check_sparsity(sparsity))
            after = DissipatingGradients(1 - left, search_epochs=1, allocation=allocation)
        elif after is not None and not isinstance(after, DissipatingGradients):
            raise ValueError(
                "Argument `after` must be a `DissipatingGradients`, 'dissipating_gradients' or `None`. Received: "
                f"after={after!r}."
            )
        super().__init__(sparsity, search_epochs, allocation, after)
        self.k = validation.check_count(k, "k")
        self.fitness = validation.check_choice(fitness, FITNESS, "fitness")
        self.recombine = validation.check_choice(recombine, RECOMBINE, "recombine")
        self.seed = seed
        self.history = []

    @property
    def needs_gradients(self):
        return self.fitness != "magnitude"

    def on_train_begin(self, logs=None):
        if self.recombine == "unit":
            spanning = [layer.name for layer in prunable_layers(self.model) if layer.pattern.units_per_cell != 1]
            if spanning:
                raise ValueError(
                    f"Argument `recombine='unit'` cannot be used with layers {spanning}: cells of their patterns span several "
                    "units. Pass `recombine='weight'`, the default."
                )
        super().on_train_begin(logs)
        self.history = []

    def on_epoch_end(self, epoch, logs=None):
        self._found = {}
        super().on_epoch_end(epoch, logs)

    def select(self, place, sparsity, epoch):
        fitness = self._fitness(place)
        total = max(fitness.sum(dtype=np.float64), np.finfo(np.float32).tiny)
        mask, sums = self._fittest(place, fitness, sparsity)
        best = np.sum(fitness, where=mask, dtype=np.float64)
        self._found[place.path] = dict(candidates=np.array(sums) / total, best=float(best / total))
        return mask if epoch == self.search_epochs - 1 else place.mask

    def log(self, logs):
        self.history.append(self._found)
        logs["fitness"] = float(np.mean([one["best"] for one in self._found.values()]))

    def _fitness(self, place):
        parts = []
        if self.fitness != "gradient":
            parts.append(np.abs(place.current))
        if self.fitness != "magnitude":
            parts.append(np.where(place.mask, place.gradient, 0))
        if len(parts) == 1:
            return parts[0]
        return sum(part / max(part.mean(dtype=np.float64), np.finfo(np.float32).tiny) for part in parts)

    def _fittest(self, place, fitness, sparsity):
        """The mask to choose, and the fitness of each candidate."""
        by_unit = self.recombine == "unit"
        axes = place.masked.input_axes if by_unit else None
        chosen, highest, sums = np.zeros_like(place.mask), -np.inf, []
        for candidate in range(self.k):
            generator = np.random.default_rng([self.seed, place.index, candidate])
            mask = place.best(generator.random(fitness.shape, np.float32), sparsity, "unit" if by_unit else None)
            value = np.sum(fitness, axis=axes, where=mask, dtype=np.float64, keepdims=True)
            sums.append(float(value.sum()))
            chosen = chosen | mask if self.recombine == "weight" else np.where(value > highest, mask, chosen)
            highest = np.maximum(value, highest)
        if self.recombine == "weight":
            chosen = place.best(fitness, sparsity, among=chosen)
        return chosen, sums


class Place:
    """One kernel of a model, with what a search knows of it, as arrays."""

    def __init__(self, layer: PrunableLayer, masked: PrunableKernel, index: int, recorder: Recorder | None):
        self.layer, self.masked, self.index, self._recorder = layer, masked, index, recorder
        self.path = masked.variable.path
        self.name = f"kernel '{self.path}' of layer '{layer.name}'"
        self.mask, self.scale = (ops.convert_to_numpy(variable) for variable in (masked.mask, masked.scale))
        values = ops.convert_to_numpy(masked.variable)
        self.kernel = in_float(values)
        self.current = effective(self.kernel, self.mask, self.scale, f"K{self.name[1:]}")

    @property
    def start(self) -> np.ndarray:
        """The values that the weights had when training began."""
        return self._recorded("start")

    @property
    def gradient(self) -> np.ndarray:
        """The sum of gradient magnitudes over the last epoch."""
        gradient = self._recorded("gradient")
        if not gradient.any():
            raise ValueError(
                f"The optimizer recorded no gradient for {self.name}. Does the model's own `train_step` use another optimizer "
                "than `model.optimizer`, or does nothing of the layer reach the loss?"
            )
        validation.check_finite(gradient, f"The gradient of {self.name}")
        return gradient

    def _recorded(self, what: str) -> np.ndarray:
        return getattr(self._recorder, what)(self.masked.variable)

    def best(self, scores: np.ndarray, sparsity: float, group: str | None = None, among: np.ndarray | None = None):
        """The mask that keeps the highest scores, of what is left (or of `among`)."""
        return masks.compute_mask(
            scores,
            sparsity,
            self.layer.pattern,
            group or self.layer.group,
            self.masked.input_axes,
            mask=self.mask if among is None else among,
        )

    def update(self, mask: np.ndarray) -> tuple[PrunableKernel, np.ndarray, np.ndarray]:
        """What to assign for the kernel to have a mask: the kernel, the mask and the scales that go with it."""
        if mask is self.mask:
            return self.masked, mask, self.scale
        scale = new_scale(self.kernel, self.mask, mask, self.scale, self.layer.renormalize, self.masked.input_axes)
        return self.masked, mask, scale


def _put_recorder_on(model: keras.Model, method: str, gradients: bool, start: bool) -> Recorder:
    """The recorder among the optimizers of a model, put there if there is none."""
    optimizer = model.optimizer
    if not isinstance(optimizer, keras.optimizers.Optimizer):
        raise ValueError(
            f"`{method}` records what the optimizer sees, and model '{model.name}' has no Keras optimizer. Received: "
            f"model.optimizer={optimizer!r}. Compile it first: `model.compile(optimizer, loss)`."
        )
    frozen = [layer.name for layer in prunable_layers(model) if not all(k.variable.trainable for k in layer.masked_kernels)]
    if frozen:
        raise ValueError(
            f"`{method}` watches weights move, and layers {frozen} are frozen (`trainable=False`). Make them "
            "trainable, or leave them out: `keras_renorm.to_prunable(model, layers=...)`."
        )
    outer = optimizer if isinstance(optimizer, keras.optimizers.LossScaleOptimizer) else None
    inner = outer.inner_optimizer if outer else optimizer
    if isinstance(inner, Recorder):
        if (gradients and not inner.records_gradients) or (start and not inner.records_start):
            raise ValueError(
                f"`{method}` needs more than the optimizer records. Received: {inner.get_config()}. Compile the model with "
                f"`keras_renorm.optimizers.Recorder(optimizer, gradients={gradients}, start={start})`, or with the plain "
                "optimizer: the recorder is then put on and taken off for you."
            )
        return inner
    with _distribution_scope(model):
        recorder = Recorder(inner, gradients, start)
        recorder.build(model.trainable_variables)
    _replace_optimizer(model, inner, recorder)
    return recorder


def _take_recorder_off(model: keras.Model) -> None:
    optimizer = model.optimizer
    recorder = getattr(optimizer, "inner_optimizer", None) if not isinstance(optimizer, Recorder) else optimizer
    _replace_optimizer(model, recorder, recorder.inner_optimizer)


def _replace_optimizer(model: keras.Model, old: Any, new: Any) -> None:
    """Train on with another optimizer, without compiling anew: metrics and losses stay as they are."""
    if model.optimizer is old:
        model.optimizer = new
    else:
        model.optimizer.inner_optimizer = new
    # What `model.save` writes down, for the optimizer's variables to find their place when it is loaded.
    save_with_optimizer(model, new)
    model.train_function = None
    model.make_train_function()


def _distribution_scope(model: keras.Model) -> contextlib.AbstractContextManager:
    strategy = getattr(model, "distribute_strategy", None)
    return strategy.scope() if strategy else contextlib.nullcontext()
