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
from keras_renorm.src.layers.prunable import PrunableLayer, prunable_layers
from keras_renorm.src.layers.prunable_kernel import PrunableKernel, asking_flags, flag_of
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


class SettlingTrainFunction:
    """A `train_function` of a model, within which settled kernels are used without their masks.

    A kernel is settled if its masked values are zero and remain zero in the steps to come. A flag for each kernel says so. The
    flags belong to this function: no other function, and no other call of a layer, asks them. Kernels are settled for the
    batches of one iterator, trained by one optimizer. `fit` has an iterator of its own, so that nothing of an interrupted `fit`
    remains valid in a later one; `compile` makes another `train_function`.

    Args:
        model: the model that it trains.
        function: the original train function, not traced yet.
    """

    def __init__(self, model: keras.Model, function: Callable):
        self._model, self._function = model, function
        self._kernels = {id(kernel.variable): (kernel, layer) for layer, kernel in _kernels_that_settle(model)}
        with model.distribute_strategy.scope():
            self._flags = {
                key: keras.Variable("zeros", shape=(), dtype="bool", trainable=False, name="settled") for key in self._kernels
            }
        self._seen = self._settled_for = None

    def __call__(self, iterator: Any) -> Any:
        self._seen = weakref.ref(iterator)
        if self._settled_for is not None and not self._holds(iterator):
            self.unsettle()
        with asking_flags(self._flags):
            return self._function(iterator)

    def settle(self) -> None:
        """Settle the kernels that can be, for the iterator of the last batch."""
        optimizer = innermost(self._model.optimizer)
        if type(optimizer) not in _WEIGHT_BY_WEIGHT:
            return
        for key, (kernel, layer) in self._kernels.items():
            slots = _slots(optimizer, kernel)
            if slots is None or layer.regrow or kernel.variable.constraint is not None:
                continue
            mask = ops.convert_to_tensor(kernel.mask)
            for variable in (kernel.variable, *slots):
                variable.assign(ops.where(mask, variable, ops.zeros((), variable.dtype)))
            self._flags[key].assign(True)
            for variable in (kernel.variable, kernel.mask):
                variable.assign = functools.partial(self._assign, kernel, variable)
        self._settled_for = self._seen, optimizer

    def unsettle(self) -> None:
        """Let training steps apply all masks again."""
        for kernel, _ in self._kernels.values():
            self._unsettle(kernel)
        self._settled_for = None

    def is_settled(self, kernel: PrunableKernel) -> bool:
        """Whether the mask of a kernel is left out now."""
        flag = self._flags.get(id(kernel.variable))
        return flag is not None and bool(ops.convert_to_numpy(flag))

    def _holds(self, iterator: Any) -> bool:
        reference, optimizer = self._settled_for
        return reference() is iterator and innermost(self._model.optimizer) is optimizer

    def _assign(self, kernel: PrunableKernel, variable: keras.Variable, value: Any) -> Any:
        """`variable.assign(value)` while a kernel is settled."""
        if flag_of(kernel) is not self._flags[id(kernel.variable)]:
            # Not by the optimizer, in a step of this function.
            self._unsettle(kernel)
        return type(variable).assign(variable, value)

    def _unsettle(self, kernel: PrunableKernel) -> None:
        import tensorflow as tf

        with tf.init_scope():
            self._flags[id(kernel.variable)].assign(False)
        for variable in (kernel.variable, kernel.mask):
            vars(variable).pop("assign", None)


def guard(model: keras.Model) -> None:
    """Let a model train with a function in which kernels can be settled. (A function that is traced already applies masks.)

    Nothing changes for a model with its own `train_step`, or without layers that can settle.
    """
    if type(model).train_step is not keras.Model.train_step or not callable(model.train_function):
        return
    if _kernels_that_settle(model) and not isinstance(model.train_function, SettlingTrainFunction):
        model.train_function = SettlingTrainFunction(model, model.train_function)


def settle(model: keras.Model) -> None:
    """Set masked values, and what the optimizer stores for them, to zero, so that training steps need not apply the masks.

    Not settled are kernels with a constraint, kernels whose weights may come back (`regrow=True`), kernels of optimizers that
    would not keep the zeros, and all kernels of a model that is not guarded. A kernel is no longer settled once it or its mask
    is assigned.

    Args:
        model: a model that is being trained.
    """
    if isinstance(getattr(model, "train_function", None), SettlingTrainFunction):
        model.train_function.settle()


def unsettle(model: keras.Model) -> None:
    """Let training steps apply the masks again, since kernels may change from now on."""
    if isinstance(getattr(model, "train_function", None), SettlingTrainFunction):
        model.train_function.unsettle()


def _kernels_that_settle(model: keras.Model) -> list[tuple[PrunableLayer, PrunableKernel]]:
    if keras.backend.backend() != "tensorflow":
        return []
    return [(layer, kernel) for layer in prunable_layers(model) if layer.can_settle for kernel in layer.masked_kernels]


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
