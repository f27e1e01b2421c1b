"""The base class of optimizers around other optimizers."""

from __future__ import annotations

from typing import Any

import keras
from keras import ops

from keras_renorm.src.core import validation
from keras_renorm.src.core.keras_internals import trained_variables


class OptimizerWrapper(keras.optimizers.Optimizer):
    """Base class of optimizers that read or change the gradients before another optimizer applies them.

    Args:
        optimizer: the optimizer that trains: an instance, a name or a config.
        name: name of the wrapper.
    """

    def __init__(self, optimizer: Any, name: str | None = None):
        validation.refuse_legacy_keras(optimizer, "optimizer")
        optimizer = keras.optimizers.get(optimizer)
        if isinstance(optimizer, keras.optimizers.LossScaleOptimizer):
            raise ValueError(
                f"Argument `optimizer` scales the loss, so its gradients are not those of the loss. Received: optimizer="
                f"{optimizer}. Wrap the other way round: `LossScaleOptimizer({type(self).__name__}(inner_optimizer))`."
            )
        super().__init__(learning_rate=0.0, name=name)
        self.inner_optimizer = optimizer

    def build(self, variables):
        if not self.inner_optimizer.built:
            self.inner_optimizer.build(variables)
        super().build(variables)

    @property
    def variables(self):
        return super().variables + self.inner_optimizer.variables

    def apply(self, grads, trainable_variables=None):
        grads = list(grads)
        if not self.built:
            if trainable_variables is None:
                raise ValueError(
                    f"`{type(self).__name__}` was not built and received no variables. Received: trainable_variables=None. "
                    "Pass them, or call `optimizer.build(trainable_variables)` first."
                )
            with keras.name_scope(self.name, caller=self):
                self.build(list(trainable_variables))
        variables = trained_variables(self) if trainable_variables is None else list(trainable_variables)
        known = [
            index
            for index, gradient in enumerate(grads)
            if gradient is not None and not variables[index].overwrite_with_gradient
        ]
        scale = self.inner_optimizer.loss_scale_factor or 1.0
        seen = [_dense(grads[index], variables[index]) / scale for index in known]
        for index, gradient in zip(known, self.before_step(seen, [variables[index] for index in known])):
            grads[index] = gradient * scale
        self.inner_optimizer.apply(grads, trainable_variables)

    def before_step(self, gradients: list, variables: list) -> list:
        """Return the gradients for the inner optimizer. They come from the loss: neither clipped nor accumulated.

        Args:
            gradients: dense tensors, without loss scale; under `tf.distribute`, the gradients of one replica.
            variables: the variables of the gradients.

        Returns:
            List of tensors of the same number and shapes.
        """
        raise NotImplementedError

    def __dir__(self):
        # Keras saves every object that it finds here, and the inner optimizer's variables are saved with this one's.
        return [name for name in super().__dir__() if name != "inner_optimizer"]

    @property
    def iterations(self):
        return self.inner_optimizer.iterations

    @property
    def learning_rate(self):
        return self.inner_optimizer.learning_rate

    @learning_rate.setter
    def learning_rate(self, learning_rate):
        self.inner_optimizer.learning_rate = learning_rate

    def scale_loss(self, loss):
        return self.inner_optimizer.scale_loss(loss)

    def finalize_variable_values(self, var_list):
        self.inner_optimizer.finalize_variable_values(var_list)

    def get_config(self):
        return {"optimizer": keras.saving.serialize_keras_object(self.inner_optimizer), "name": self.name}

    @classmethod
    def from_config(cls, config, custom_objects=None):
        optimizer = keras.saving.deserialize_keras_object(config["optimizer"], custom_objects=custom_objects)
        return cls(**{**config, "optimizer": optimizer})


def _dense(gradient: Any, variable: keras.Variable) -> Any:
    """On TensorFlow, the gradient of an embedding comes as slices, with a slice for every use of a row."""
    return ops.add(ops.zeros(variable.shape, gradient.dtype), gradient) if hasattr(gradient, "indices") else gradient
