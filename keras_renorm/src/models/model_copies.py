"""Copies of a model that compute what the model computes, and are compiled like it."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import keras

from keras_renorm.src.models.comparing import check_same
from keras_renorm.src.models.copying import Copier


def copy_model(
    model: keras.Model,
    convert: Callable[[keras.Layer, Copier], keras.Layer | None] | None = None,
    inputs: Any = None,
) -> tuple[keras.Model, dict[int, Any]]:
    """Copy a model. The copy has its own weights and computes the same.

    Args:
        model: a built model.
        convert: returns the replacement of a layer, or `None` to copy the layer. Defaults to `None`: all layers are copied.
        inputs: samples on which to compare the two, in the structure that the model takes. Defaults to `None`: random samples.

    Returns:
        The copy, and its objects by the `id` of the objects of `model`, such as layers and variables.

    Raises:
        ValueError: if the model cannot be copied, or its copy does not compute the same.
    """
    copier = Copier(model, convert)
    new = copier.copy(model)
    check_same(model, new, copier.copies, inputs=inputs)
    if model.compiled:
        compile_like(new, model)
    return new, copier.copies


def compile_like(rebuilt: keras.Model, model: keras.Model) -> None:
    """Compile a model with the arguments of another one and a fresh optimizer."""
    try:
        if type(model).compile is not keras.Model.compile:
            raise ValueError(f"{type(model).__name__} has a `compile` of its own")
        rebuilt.compile_from_config(model.get_compile_config())
    except Exception as error:
        warnings.warn(
            f"The new model '{rebuilt.name}' is not compiled: the arguments of `compile` of the old one cannot be copied "
            f"({error}). Call `compile` on it before training.",
            stacklevel=5,
        )
