"""Gradients of the loss with respect to kernels, on every backend that can differentiate."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import keras
import numpy as np
from keras import ops

from keras_renorm.src.layers.prunable import prunable_layers


def loss_gradients(model: keras.Model, batch: tuple, variables: Sequence[keras.Variable]) -> list[np.ndarray]:
    """The gradients of the mean loss of a batch, without regularization, with respect to variables, trainable or not.

    The model computes as in inference, and is not changed. For a prunable kernel it is the gradient with respect to the
    effective kernel, as if there were no mask: masked weights have a gradient too, which tells how much they would reduce the
    loss.

    Args:
        model: a model that is compiled with its loss.
        batch: `(x, y)` or `(x, y, sample_weight)`.
        variables: variables of the model.

    Returns:
        An array for each variable, of its shape.

    Raises:
        ValueError: if the model has no loss, or the backend cannot compute gradients.
    """
    check_loss(model)
    x, y, *rest = batch
    y, *rest = keras.tree.map_structure(ops.convert_to_tensor, (y, *rest))
    kernels = {id(kernel.variable): kernel for layer in prunable_layers(model) for kernel in layer.masked_kernels}
    without_masks = []
    for kernel in kernels.values():
        without_masks += [(one, ops.ones(one.shape, one.dtype)) for one in (kernel.mask, kernel.scale)]
    values = [
        kernels[id(variable)].effective() if id(variable) in kernels else ops.convert_to_tensor(variable.value)
        for variable in variables
    ]
    others = [(kernel.variable, kernel.effective()) for key, kernel in kernels.items() if key not in set(map(id, variables))]

    def loss(values):
        mapping = [*zip(variables, values), *others, *without_masks]
        with keras.StatelessScope(state_mapping=mapping):
            outputs = model(x, training=False)
            total = model.compute_loss(x=x, y=y, y_pred=outputs, sample_weight=rest[0] if rest else None)
            return total - sum(v.regularizer(v) for v in model.trainable_variables if v.regularizer is not None)

    return [np.asarray(ops.convert_to_numpy(one)) for one in _differentiator()(loss, values)]


def check_loss(model: keras.Model) -> None:
    """Raise `ValueError` if a model has no loss."""
    own = type(model).compute_loss is not keras.Model.compute_loss
    if not model.compiled or (getattr(model, "loss", None) is None and not own):
        raise ValueError(
            f"Model '{model.name}' has no loss, so there are no gradients. Compile it with the loss of its training: "
            "`model.compile(loss=...)`. (`keras.models.load_model` restores it, unless it is called with `compile=False`.)"
        )


def _differentiator() -> Callable[[Callable, list], list]:
    backend = keras.backend.backend()
    if backend not in _DIFFERENTIATORS:
        raise ValueError(
            f"Keras runs on the backend '{backend}', which does not compute gradients. Set the environment variable "
            f"KERAS_BACKEND to one of {sorted(_DIFFERENTIATORS)}, or use another criterion."
        )
    return _DIFFERENTIATORS[backend]


def _by_tensorflow(loss: Callable, values: list) -> list:
    import tensorflow as tf

    with tf.GradientTape() as tape:
        for value in values:
            tape.watch(value)
        result = loss(values)
    return [tf.convert_to_tensor(one) for one in tape.gradient(result, values, unconnected_gradients="zero")]


def _by_jax(loss: Callable, values: list) -> list:
    import jax

    return jax.grad(loss)(values)


def _by_torch(loss: Callable, values: list) -> list:
    import torch

    values = [value.detach().clone().requires_grad_() for value in values]
    with torch.enable_grad():
        gradients = torch.autograd.grad(loss(values), values, allow_unused=True)
    return [torch.zeros_like(value) if one is None else one for value, one in zip(values, gradients)]


_DIFFERENTIATORS: dict[str, Callable[[Callable, list], Any]] = {
    "tensorflow": _by_tensorflow,
    "jax": _by_jax,
    "torch": _by_torch,
}
