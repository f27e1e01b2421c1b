"""Layers made again from their configs, and variables exchanged in layers."""

from __future__ import annotations

import inspect
import warnings
from typing import Any

import keras

from keras_renorm.src.core import keras_internals
from keras_renorm.src.core.keras_internals import flatten_layers
from keras_renorm.src.models.kinds import track


def with_config(operation: Any, cls: type | None = None, without: tuple[str, ...] = (), **changes) -> Any:
    """A new layer (or operation) with the same config, or of another class, or with other arguments. It is not built.

    Raises:
        ValueError: if it cannot be created from its config.
    """
    cls = cls or type(operation)
    parts = flatten_layers(operation) if isinstance(operation, keras.Layer) else [operation]
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="The object being serialized includes a `lambda`")
            config = {key: value for key, value in operation.get_config().items() if key not in without}
        # Functions and classes that are not registered are at hand here, also lambdas.
        functions = {key: getattr(operation, key, None) for key in config}
        config.update({key: value for key, value in functions.items() if inspect.isfunction(value)})
        if cls is keras.layers.Lambda:
            return cls(**{**config, **changes, "output_shape": keras_internals.lambda_output_shape(operation)})
        with keras.saving.custom_object_scope({type(part).__name__: type(part) for part in parts}):
            return cls.from_config({**config, **changes})
    except Exception as error:
        raise ValueError(
            f"Layer '{operation.name}' (of type {type(operation).__name__}) cannot be rebuilt from its config: {error} "
            "Give it a `get_config()` with all arguments of its constructor, and register what it uses with "
            "`@keras.saving.register_keras_serializable()`."
        ) from error


def exchange_variable(layer: keras.Layer, variable: keras.Variable, other: keras.Variable) -> None:
    """Let a layer use another variable in place of one of its own."""
    for name, value in list(vars(layer).items()):
        if value is variable:
            vars(layer)[name] = other
    keras_internals.replace_variable(layer, variable, other)
    if keras_internals.is_trackable(layer):
        track(layer)
