"""The recorder of gradients and first values, put around the optimizer of a model for the epochs of a search."""

from __future__ import annotations

import contextlib
from typing import Any

import keras

from keras_renorm.src.core.keras_internals import save_with_optimizer
from keras_renorm.src.layers.prunable import prunable_layers
from keras_renorm.src.training.optimizers.recorder import Recorder


def put_recorder_on(model: keras.Model, method: str, gradients: bool, start: bool) -> Recorder:
    """Return the recorder of the optimizer of a model. Wrap the optimizer in a recorder if it has none."""
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


def take_recorder_off(model: keras.Model) -> None:
    optimizer = model.optimizer
    recorder = getattr(optimizer, "inner_optimizer", None) if not isinstance(optimizer, Recorder) else optimizer
    _replace_optimizer(model, recorder, recorder.inner_optimizer)


def _replace_optimizer(model: keras.Model, old: Any, new: Any) -> None:
    """Replace the optimizer without compiling the model again: metrics and losses are kept."""
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
