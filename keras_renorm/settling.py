"""Masked values that are zero and stay zero while an optimizer trains, so that training steps need not apply the masks.

A masked weight gets no gradient. If it is zero, and with it all that the optimizer remembers of it, then steps that treat
every weight on its own leave it where it is.
"""

from __future__ import annotations

import keras
from keras import ops

from keras_renorm.layers.masked import MaskedKernel, masked_layers
from keras_renorm.optimizers.wrapper import OptimizerWrapper

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


def settle(model: keras.Model) -> None:
    """Set masked values, and what the optimizer remembers of them, to zero, for a training step that costs no more than before.

    Kernels with a constraint, those whose weights may come back (`regrow=True`), those of optimizers that would not keep the
    zeros, and all in models with a `train_step` of their own, which may train in any way, stay as they are.

    Args:
        model: a model that is being trained.
    """
    optimizer = _innermost(getattr(model, "optimizer", None))
    if type(optimizer) not in _WEIGHT_BY_WEIGHT or type(model).train_step is not keras.Model.train_step:
        return
    for layer in masked_layers(model):
        for kernel in layer.masked_kernels:
            slots = _slots(optimizer, kernel)
            if kernel.settled is None or slots is None or layer.regrow or kernel.variable.constraint is not None:
                continue
            mask = ops.convert_to_tensor(kernel.mask)
            for variable in (kernel.variable, *slots):
                variable.assign(ops.where(mask, variable, ops.zeros((), variable.dtype)))
            kernel.set_settled(True)


def unsettle(model: keras.Model) -> None:
    """From now on anybody may change the kernels: training steps apply the masks again."""
    for layer in masked_layers(model):
        for kernel in layer.masked_kernels:
            kernel.set_settled(False)


def _innermost(optimizer: keras.optimizers.Optimizer | None) -> keras.optimizers.Optimizer | None:
    """The optimizer that takes the steps."""
    while isinstance(optimizer, (keras.optimizers.LossScaleOptimizer, OptimizerWrapper)):
        optimizer = optimizer.inner_optimizer
    return optimizer


def _slots(optimizer: keras.optimizers.Optimizer, kernel: MaskedKernel) -> list[keras.Variable] | None:
    """The optimizer's variables that hold one value for each weight of a kernel: momenta, averages, accumulated gradients.

    `None` for a kernel that it does not train.
    """
    known = [id(variable) for variable in optimizer._trainable_variables]
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
