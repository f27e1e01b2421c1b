"""An optimizer that records gradients and first values while another one trains."""

from __future__ import annotations

from typing import Any

import keras
import numpy as np
from keras import ops

from keras_renorm.src.core import registry
from keras_renorm.src.core.keras_internals import index_in_optimizer, trained_variables, update_all
from keras_renorm.src.training.optimizers.wrapper import OptimizerWrapper


@registry.register
class Recorder(OptimizerWrapper):
    """Records the sum of gradient magnitudes and the first values of weights, while another optimizer trains.

    For each of the two it has a slot variable for every trainable weight of rank two or more, which is saved with a compiled
    model. `keras_renorm.methods.KStarts` and `DissipatingGradients` put the recorder on and take it off themselves.

    Args:
        optimizer: the optimizer that trains: an instance, a name or a config.
        gradients: whether to sum `|gradient|`. Defaults to `True`.
        start: whether to record the value that each weight has when `reset_start()` is called. Defaults to `True`.
        name: name of the wrapper. Defaults to `None`.

    Attributes:
        epochs: integer variable in which a user of the records can count epochs.

    Example:

    >>> import keras, numpy as np, keras_renorm as kr
    >>> model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(1, use_bias=False, kernel_initializer="ones")])
    >>> recorder = kr.optimizers.Recorder("sgd")
    >>> model.compile(recorder, "mse")
    >>> history = model.fit(np.array([[1.0, 2.0]]), np.array([[2.0]]), epochs=1, verbose=0)
    >>> recorder.gradient(model.layers[0].kernel).ravel().tolist()
    [2.0, 4.0]
    """

    def __init__(self, optimizer: Any, gradients: bool = True, start: bool = True, name: str | None = None):
        super().__init__(optimizer, name=name)
        self.records_gradients, self.records_start = gradients, start

    def build(self, variables):
        super().build(variables)
        self.epochs = self.add_variable((), dtype="int", aggregation="only_first_replica", name="epochs")
        self._gradients = self._start = None
        if self.records_gradients:
            self._gradients = [self._add_slot(variable, "gradient") for variable in variables]
        if self.records_start:
            self._start = [self._add_slot(variable, "start") for variable in variables]

    def _add_slot(self, variable, name):
        if len(variable.shape) < 2:
            return None
        if keras.backend.standardize_dtype(variable.dtype) in ("float16", "bfloat16"):
            # A sum of many small numbers would stall.
            name = f"{variable.path.replace('/', '_')}_{name}"
            return self.add_variable(variable.shape, dtype="float32", name=name)
        return self.add_variable_from_reference(variable, name)

    def before_step(self, gradients, variables):
        if gradients and self.records_gradients:
            # The way of Keras' own optimizers: under `tf.distribute` it sums over replicas first.
            update_all(self, gradients, variables, self.learning_rate)
        return gradients

    def update_step(self, gradient, variable, learning_rate):
        slot = self._gradients[index_in_optimizer(self, variable)]
        if slot is not None:
            self.assign_add(slot, ops.cast(ops.abs(gradient), slot.dtype))

    def gradient(self, variable: keras.Variable) -> np.ndarray:
        """The sum of `|gradient|` over the batches since the last `reset_gradients()`, of the shape of `variable`."""
        return self._read(self._gradients, variable, "gradients")

    def start(self, variable: keras.Variable) -> np.ndarray:
        """The values of the weights at the last `reset_start()`, of the shape of `variable`; zeros before the first."""
        return self._read(self._start, variable, "start")

    def _read(self, slots, variable, argument):
        slot = slots and slots[index_in_optimizer(self, variable)]
        if slot is None:
            raise ValueError(
                f"Nothing is recorded of variable '{variable.path}' of shape {tuple(variable.shape)}. Received: {argument}="
                f"{slots is not None}. Variables of rank two or more are recorded, with `Recorder(optimizer, {argument}=True)`."
            )
        return ops.convert_to_numpy(slot)

    def reset_gradients(self) -> None:
        """Set the sums to zero."""
        for slot in self._gradients or ():
            if slot is not None:
                slot.assign(ops.zeros(slot.shape, slot.dtype))

    def reset_start(self) -> None:
        """Record the present values of the weights."""
        for slot, variable in zip(self._start or (), trained_variables(self)):
            if slot is not None:
                slot.assign(ops.cast(ops.copy(variable), slot.dtype))

    def load_own_variables(self, store):
        if len(store.keys()) == len(self.inner_optimizer.variables):
            # Saved before the recorder was put on, or after it was taken off.
            self.inner_optimizer.load_own_variables(store)
        else:
            super().load_own_variables(store)

    def get_config(self):
        return {**super().get_config(), "gradients": self.records_gradients, "start": self.records_start}
