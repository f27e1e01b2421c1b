"""The callback that prunes during `fit`."""

from __future__ import annotations

from typing import Any

import keras
import numpy as np

from keras_renorm.src.core.keras_internals import flatten_layers, times_applied
from keras_renorm.src.layers.prunable import NEVER, PrunableLayer, prunable_layers, sparsity_of
from keras_renorm.src.pruning import delivery
from keras_renorm.src.pruning.model_event import update_masks
from keras_renorm.src.rules import schedules
from keras_renorm.src.training.settling import guard, innermost, settle, unsettle

# Batches without a change of masks: settling costs what it saves in as many. Steps that are often pruned are not worth it.
_SETTLE_AFTER = 10


class UpdatePruning(keras.callbacks.Callback):
    """Prunes the prunable layers of a model during training, when their schedules say so.

    The step of a schedule is the number of batches that have been trained. An event at step 0 comes before the first batch.
    With `steps_per_execution`, the last event within an execution takes place at the end of that execution. The step is saved
    with the model, so that training resumes where it stopped; it counts from the first training of the model on.

    After an event the logs hold `sparsity`, the fraction of zeros among all prunable weights. The progress bar, `History` and
    TensorBoard show it (put this callback before TensorBoard).

    If training ends below the sparsity of a schedule, or begins after the last event of a schedule, a warning says by how much,
    why, and what to do. It appears once for each model.

    Args:
        pruning_schedule: the schedule of layers that have no schedule of their own: a schedule of `keras_renorm.schedules` or
            of tfmot, or a callable `step -> (should_prune, sparsity)`. Defaults to `None`.

    Raises:
        ValueError: when training begins, if the model has no prunable layers, or a layer has no schedule; at an event, if a
            kernel holds NaN or infinity (then no layer is changed).

    Example:

    >>> import keras, numpy as np, keras_renorm as kr
    >>> model = keras.Sequential([keras.Input((4,)), kr.layers.PrunableDense(1)])
    >>> model.compile("sgd", "mse")
    >>> schedule = kr.schedules.PolynomialDecay(0.0, 0.75, begin_step=0, end_step=4, frequency=1)
    >>> x, y = np.ones((8, 4)), np.ones((8, 1))
    >>> history = model.fit(x, y, batch_size=2, verbose=0, callbacks=[kr.callbacks.UpdatePruning(schedule)])
    >>> history.history["sparsity"]
    [0.75]

    In a custom training loop, call `step()` after every batch:

    ```python
    pruning = kr.callbacks.UpdatePruning(schedule)
    pruning.set_model(model)
    for x, y in batches:
        train_step(x, y)
        pruning.step()
    ```
    """

    def __init__(self, pruning_schedule: Any = None):
        super().__init__()
        self.pruning_schedule = schedules.get(pruning_schedule)
        self.sparsity = None
        self._layers = None

    def set_model(self, model):
        super().set_model(model)
        self._layers = None

    def on_train_begin(self, logs=None):
        self._find_layers()
        self._tell_after(getattr(self._model, "history", None))

    def on_epoch_begin(self, epoch, logs=None):
        # Not in `on_train_begin`, where `BackupAndRestore` may still be about to restore the step.
        if self._trained is None:
            self._begin()
            if self._trained == NEVER:
                self._advance(1)
        # Settle again: at the end of an epoch anything may have happened to the kernels.
        unsettle(self._model)
        guard(self._model)
        self._since_change = 0
        self._last_batch = -1

    def on_train_batch_end(self, batch, logs=None):
        self._since_change = 0 if self._advance(self._batches_until(batch)) else self._since_change + 1
        if batch + 1 >= (self.params.get("steps") or np.inf):
            # Before callbacks that take the weights at the end of the epoch, wherever they stand in the list.
            self._count_steps(write=True)
        if self._since_change == _SETTLE_AFTER:
            settle(self._model)
        self._last_batch = batch
        self._log(logs)

    def on_epoch_end(self, epoch, logs=None):
        self._count_steps(write=True)
        self._log(logs)

    def on_train_end(self, logs=None):
        unsettle(self._model)

    def _tell_after(self, history: keras.callbacks.History | None) -> None:
        """Warn of a missing sparsity after all other callbacks have ended: a later one may still restore earlier weights.

        Keras puts the history at the end of the list of callbacks.
        """
        if not isinstance(history, keras.callbacks.History):
            return

        def on_train_end(logs=None):
            del history.on_train_end
            self._bring_up_to_date()
            delivery.warn_once(self._model)

        history.on_train_end = on_train_end

    def step(self) -> None:
        """Count one trained batch, in a custom training loop, and prune if an event is due."""
        if self._layers is None:
            self._find_layers()
            self._begin()
        self._advance(2 if self._trained == NEVER else 1)

    def _find_layers(self) -> None:
        layers = prunable_layers(self.model)
        if not layers and any(isinstance(part, PrunableLayer) for part in flatten_layers(self.model)):
            raise ValueError(
                f"Model '{self.model.name}' has prunable layers, but no weights yet, which `UpdatePruning` needs. Call "
                "it on a batch of data, or `model.build(input_shape)`, before `fit`."
            )
        if not layers:
            raise ValueError(
                f"Model '{self.model.name}' has no prunable layers, so `UpdatePruning` has nothing to do. Convert it first: "
                "`model = keras_renorm.to_prunable(model)`."
            )
        missing = [layer.name for layer in layers if layer.pruning_schedule is None]
        if missing and self.pruning_schedule is None:
            raise ValueError(
                f"Layers {missing} have no pruning schedule. Pass one for all layers, `UpdatePruning(pruning_schedule)`, or "
                "to the layers: `keras_renorm.to_prunable(model, pruning_schedule=...)`."
            )
        self._layers = [(layer, layer.pruning_schedule or self.pruning_schedule) for layer in layers]
        for layer, schedule in self._layers:
            _check_reachable(layer, getattr(schedule, "max_sparsity", 0.0))
        self._trained = None

    def _begin(self) -> None:
        """Read the step from the model."""
        self._bring_up_to_date()
        self._trained = max(int(keras.ops.convert_to_numpy(layer.pruning_step)) for layer, _ in self._layers)
        self._count_steps(write=True)
        for layer, schedule in self._layers:
            layer.goal = schedules.goal_of(schedule, began=self._trained)
        delivery.warn_once(self._model, reasons=(delivery.PAST,))
        self._applied = self._times_applied()
        self._measure()

    def _batches_until(self, batch: int) -> int:
        """The number of batches trained since the last call, when Keras reports the end of batch `batch`."""
        by_index = batch - self._last_batch
        if getattr(self._model, "steps_per_execution", 1) == 1:
            return by_index
        # An execution of several steps may reach past the end of the data, where the index does not follow.
        steps = self.params.get("steps")
        within_epoch = min(by_index, steps - 1 - self._last_batch) if steps else by_index
        before, self._applied = self._applied, self._times_applied()
        counted = min(self._applied - before, by_index)
        if counted <= 0 or isinstance(self._model.optimizer, keras.optimizers.LossScaleOptimizer):
            # No count: the model does not train with its optimizer. Or too low a one: batches whose gradients overflow.
            return max(counted, within_epoch)
        return counted

    def _times_applied(self) -> int:
        """The number of batches that the optimizer has seen. Its `iterations` are fewer if it accumulates gradients."""
        optimizer = innermost(getattr(self._model, "optimizer", None))
        if getattr(self._model, "steps_per_execution", 1) == 1 or optimizer is None:
            return 0
        self._bring_up_to_date()
        return int(keras.ops.convert_to_numpy(times_applied(optimizer)))

    def _advance(self, batches: int) -> bool:
        """Count trained batches and run the events that are due, only the last of them for each layer.

        Returns:
            Whether a mask or a scale changed.
        """
        due: dict[int, float] = {}
        answers = {}
        for step in range(self._trained + 1, self._trained + 1 + batches):
            for layer, schedule in self._layers:
                key = (id(schedule), step)
                if key not in answers:
                    answers[key] = schedules.evaluate(schedule, step)
                should_prune, sparsity = answers[key]
                if should_prune:
                    due[id(layer)] = sparsity
                    if schedules.goal_of(schedule) is None:
                        # All that is known of its end is where it has come so far.
                        layer.goal = schedules.Goal(sparsity, step, sparsity, step)
        for layer, _ in self._layers:
            _check_reachable(layer, due.get(id(layer), 0.0))
        self._trained += batches
        changed = update_masks(self.model, due) if due else False
        if changed:
            self._measure()
        self._count_steps(write=bool(due))
        return changed

    def _bring_up_to_date(self) -> None:
        """On JAX, write the state of the training to the variables, which hold the values of the last epoch until then."""
        _ = self.model

    def _measure(self) -> None:
        self.sparsity = sparsity_of(self.model)

    def _count_steps(self, write: bool) -> None:
        if write:
            self._bring_up_to_date()
        for layer, _ in self._layers:
            layer.count_steps(self._trained, write)

    def _log(self, logs: dict | None) -> None:
        if logs is not None:
            logs["sparsity"] = self.sparsity


def _check_reachable(layer: PrunableLayer, sparsity: float) -> None:
    try:
        layer.pattern.check(sparsity, layer.group)
    except ValueError as error:
        raise ValueError(
            f"Layer '{layer.name}' cannot follow its schedule: {error} A layer may have a schedule of its own: "
            f"`model.get_layer({layer.name!r}).pruning_schedule = keras_renorm.schedules...`."
        ) from error
