"""Changes of images under which a network should compute the same."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import keras

from keras_renorm.src.core import names


def flip() -> keras.Layer:
    return keras.layers.RandomFlip("horizontal")


def shift() -> keras.Layer:
    return keras.layers.RandomTranslation(0.1, 0.1, fill_mode="nearest")


KNOWN = names.resolve(names.AUGMENTATIONS)


def get(augment: Any, model: keras.Model) -> Callable[[Any], Any] | None:
    """The function of a layer, a function, a name, or a list of these.

    Raises:
        ValueError: if a name is unknown, or the inputs of the model are not one batch of images.
        TypeError: if it is none of these.
    """
    if augment is None:
        return None
    parts = [_part(one, model) for one in (augment if isinstance(augment, (list, tuple)) else [augment])]

    def function(inputs):
        for part in parts:
            inputs = part(inputs)
        return inputs

    return function


def _part(augment: Any, model: keras.Model) -> Callable[[Any], Any]:
    if isinstance(augment, str):
        inputs = keras.tree.flatten(getattr(model, "inputs", None) or [])
        if augment not in KNOWN:
            raise ValueError(
                f"Argument `augment` must be one of {sorted(KNOWN)}, a layer or a function. Received: augment={augment!r}."
            )
        if len(inputs) != 1 or len(inputs[0].shape) != 4:
            raise ValueError(
                f"Argument `augment` can be a name only for models with one input of images. Received: augment={augment!r} for "
                f"model '{model.name}' with inputs of the shapes {[tuple(one.shape) for one in inputs]}. Pass a function."
            )
        augment = KNOWN[augment]()
    if isinstance(augment, keras.Layer):
        layer = augment
        return lambda inputs: layer(inputs, training=True)
    if not callable(augment):
        raise TypeError(
            f"Argument `augment` must be a name, a layer, a function, or a list of these. Received: augment={augment!r} (of "
            f"type {type(augment)})."
        )
    return augment
