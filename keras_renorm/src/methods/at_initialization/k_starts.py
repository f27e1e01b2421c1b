"""K-starts: of `k` random masks for each kernel, the fittest is kept."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from keras_renorm.src.core import validation
from keras_renorm.src.layers.prunable import prunable_layers
from keras_renorm.src.methods.at_initialization.dissipating_gradients import DissipatingGradients
from keras_renorm.src.methods.at_initialization.search import Search

FITNESS = ("magnitude", "gradient", "combined")
RECOMBINE = ("weight", "unit", None)


class KStarts(Search):
    """Draws `k` random masks for every kernel, trains for a few epochs, and keeps the fittest mask.

    The fitness of a candidate is the sum over its kept weights of their magnitude, of their gradient magnitude in the last
    epoch, or of both. By the law of large numbers, all random masks of a large kernel are nearly equally fit. Therefore
    candidates are recombined by default, as in evolutionary search: the offspring takes the fittest of all weights that any
    candidate keeps. (Fitness is a sum over weights, so further generations among the same candidates do not improve it.)

    Candidates are not stored: each is drawn again from its seed when it is needed.

    Source: M. Haroon, arXiv 2209.02201. Deviation: recombination, which the abstract of the paper does not mention, and fitness
    as a share of the total are choices of this library.

    Args:
        sparsity: fraction of the weights of the prunable layers to remove, in [0, 1).
        k: number of candidates for each kernel. Defaults to 32.
        search_epochs: number of epochs to train before the choice. Defaults to 2.
        fitness: `"magnitude"`, `"gradient"` (the sum of `|gradient|` over an epoch) or `"combined"` (the sum of both, each
            divided by its mean over the kernel). Defaults to `"magnitude"`.
        recombine: `"weight"` for the best mask that can be made of the candidates, `"unit"` for the fittest candidate of each
            unit, or `None` for one candidate for the whole kernel, which is the plain reading of the paper. Defaults to
            `"weight"`.
        after: a `DissipatingGradients` that searches first; candidates are then drawn among the weights that it keeps. Or
            `"dissipating_gradients"` for one epoch of it, in which case both methods remove the same share of the weights that
            they find. Defaults to `None`.
        allocation: how `sparsity` is divided among the kernels, as in `keras_renorm.prune`. Defaults to `"balanced"`.
        seed: integer. The same seed draws the same candidates. Defaults to 0.

    Attributes:
        history: list with one dict for each search epoch, by the path of the kernel: `candidates` is the fitness of each
            candidate as a share of the fitness of all weights together, `best` is that of the mask which the epoch would
            choose. The logs hold the mean of `best` as `fitness`.

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
