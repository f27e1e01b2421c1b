"""Training steps without masks, while masked values are zero and remain zero.

A masked weight gets no gradient. If the weight and everything that the optimizer stores for it are zero, then steps that treat
every weight on its own do not change it.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable
from typing import Any

import keras
from keras import ops

from keras_renorm.src.core.keras_internals import trained_variables
from keras_renorm.src.layers.prunable import PrunableKernel, is_trusted, prunable_layers, trusting
from keras_renorm.src.training.optimizers.wrapper import OptimizerWrapper

# Their steps are zero for a weight whose value, gradient and memory are zero. Those of Muon and Lamb mix a kernel's weights.
_WEIGHT_BY_WEIGHT = {
    keras.optimizers.SGD,
    keras.optimizers.Adam,
    keras.optimizers.AdamW,
    keras.optimizers.Adamax,
    keras.optimizers.Nadam,
    keras.optimizers.RMSprop,
    keras.optimizers.Adagrad,
    keras.optimizers.Adadelta,
    keras.optimizers.Lion,
}


class GuardedTrainFunction:
    """A `train_function` of a model, within which settled kernels are used without their masks.

    Kernels are settled for the batches of one iterator, trained by one optimizer. `fit` has an iterator of its own, so that
    nothing of an interrupted `fit` remains valid in a later one; `compile` makes another `train_function`.

    Args:
        model: the model that it trains.
        function: the original train function.
    """

    def __init__(self, model: keras.Model, function: Callable):
        self._model, self._function = model, function
        self._kernels = _kernels(model)
        self._seen = self._settled_for = None

    def __call__(self, iterator: Any) -> Any:
        self._seen = weakref.ref(iterator)
        if self._settled_for is not None and not self._holds(iterator):
            unsettle(self._model)
            self._settled_for = None
        with trusting(self._kernels):
            return self._function(iterator)

    def settled(self) -> None:
        """Settle the kernels from now on, for the iterator of the last batch."""
        self._settled_for = self._seen, innermost(self._model.optimizer)

    def _holds(self, iterator: Any) -> bool:
        reference, optimizer = self._settled_for
        return reference() is iterator and innermost(self._model.optimizer) is optimizer


def guard(model: keras.Model) -> None:
    """Let a model train with a function in which kernels can be settled. (A function that is traced already applies masks.)"""
    settles = any(kernel.settled is not None for kernel in _kernels(model))
    if settles and callable(model.train_function) and not isinstance(model.train_function, GuardedTrainFunction):
        model.train_function = GuardedTrainFunction(model, model.train_function)


def settle(model: keras.Model) -> None:
    """Set masked values, and what the optimizer stores for them, to zero, so that training steps need not apply the masks.

    Not settled are kernels with a constraint, kernels whose weights may come back (`regrow=True`), kernels of optimizers that
    would not keep the zeros, and all kernels of a model with its own `train_step`. A kernel is no longer settled once it or its
    mask is assigned.

    Args:
        model: a model that is being trained.
    """
    optimizer = innermost(getattr(model, "optimizer", None))
    function = getattr(model, "train_function", None)
    if type(optimizer) not in _WEIGHT_BY_WEIGHT or type(model).train_step is not keras.Model.train_step:
        return
    if not isinstance(function, GuardedTrainFunction):
        return
    for layer in prunable_layers(model):
        for kernel in layer.masked_kernels:
            slots = _slots(optimizer, kernel)
            if kernel.settled is None or slots is None or layer.regrow or kernel.variable.constraint is not None:
                continue
            mask = ops.convert_to_tensor(kernel.mask)
            for variable in (kernel.variable, *slots):
                variable.assign(ops.where(mask, variable, ops.zeros((), variable.dtype)))
            kernel.settled.assign(True)
            for variable in (kernel.variable, kernel.mask):
                variable.assign = functools.partial(_assign_and_unsettle, kernel, variable)
    function.settled()


def _assign_and_unsettle(kernel: PrunableKernel, variable: keras.Variable, value: Any) -> Any:
    """`variable.assign(value)` while a kernel is settled."""
    if not is_trusted(kernel):
        _unsettle_kernel(kernel)
    return type(variable).assign(variable, value)


def unsettle(model: keras.Model) -> None:
    """Let training steps apply the masks again, since kernels may change from now on."""
    for kernel in _kernels(model):
        if kernel.settled is not None:
            _unsettle_kernel(kernel)


def _kernels(model: keras.Model) -> list[PrunableKernel]:
    return [kernel for layer in prunable_layers(model) for kernel in layer.masked_kernels]


def _unsettle_kernel(kernel: PrunableKernel) -> None:
    import tensorflow as tf

    with tf.init_scope():
        kernel.settled.assign(False)
    for variable in (kernel.variable, kernel.mask):
        vars(variable).pop("assign", None)


def innermost(optimizer: keras.optimizers.Optimizer | None) -> keras.optimizers.Optimizer | None:
    """The innermost optimizer, which takes the steps."""
    while isinstance(optimizer, (keras.optimizers.LossScaleOptimizer, OptimizerWrapper)):
        optimizer = optimizer.inner_optimizer
    return optimizer


def _slots(optimizer: keras.optimizers.Optimizer, kernel: PrunableKernel) -> list[keras.Variable] | None:
    """The variables of the optimizer with one value for each weight of a kernel: momenta, averages, accumulated gradients.

    `None` for a kernel that the optimizer does not train.
    """
    known = [id(variable) for variable in trained_variables(optimizer)]
    if id(kernel.variable) not in known:
        return None
    place = known.index(id(kernel.variable))
    lists = [value for value in vars(optimizer).values() if isinstance(value, list) and len(value) == len(known)]
    return [
        values[place]
        for values in lists
        if isinstance(values[place], keras.Variable)
        and values[place] is not kernel.variable
        and values[place].shape == kernel.variable.shape
    ]
