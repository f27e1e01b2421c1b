"""A callback that searches masks in the first epochs of `model.fit`."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import Any

import keras
import numpy as np
from keras import ops

from keras_renorm.src.core import validation
from keras_renorm.src.layers.prunable import prunable_layers, sparsity_of
from keras_renorm.src.methods.at_initialization.recording import put_recorder_on, take_recorder_off
from keras_renorm.src.methods.at_initialization.searched_kernel import SearchedKernel
from keras_renorm.src.rules import allocation as allocations
from keras_renorm.src.training.optimizers.recorder import Recorder


class Search(keras.callbacks.Callback):
    """Base class of callbacks that set masks at the end of each of the first epochs of `model.fit`.

    A search is a chain of phases. Each phase is a callback of this class that defines `select`. Epochs count as in Keras, so
    that a resumed training (`fit(..., initial_epoch=1)`) resumes its search.
    """

    needs_gradients = False
    needs_start = False

    def __init__(self, sparsity: float | None, search_epochs: int, allocation: Any, after: Search | None = None):
        super().__init__()
        self.sparsity = None if sparsity is None else validation.check_sparsity(sparsity)
        self.search_epochs = validation.check_count(search_epochs, "search_epochs")
        self.allocation = allocations.get(allocation)
        self.after = after

    def select(self, place: SearchedKernel, sparsity: float | None, epoch: int) -> np.ndarray:
        """The mask of a kernel at the end of epoch `epoch` (from 0) of this phase."""
        raise NotImplementedError

    def log(self, logs: dict) -> None:
        """Write the results of `select` to the logs of the epoch."""

    @property
    def phases(self) -> list[Search]:
        """The phases of the search in order. This callback is the last."""
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
        self._recorder = put_recorder_on(self.model, name, gradients, start) if gradients or start else None
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
                "are not final.",
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
            take_recorder_off(self.model)
            self._recorder = None

    def tasks(self, model: keras.Model, recorder: Recorder | None) -> Iterator[tuple[SearchedKernel, float | None]]:
        """Every kernel of the model with its final sparsity, one kernel at a time in memory."""
        kernels = [(layer, masked) for layer in prunable_layers(model) for masked in layer.masked_kernels]
        sparsities = [None] * len(kernels)
        if self.sparsity is not None:
            values = [ops.convert_to_numpy(masked.variable) for _, masked in kernels]
            most = [layer.pattern.most for layer, _ in kernels]
            sparsities = allocations.allocate(values, self.sparsity, self.allocation, most)
        for index, ((layer, masked), sparsity) in enumerate(zip(kernels, sparsities)):
            yield SearchedKernel(layer, masked, index, recorder), sparsity
