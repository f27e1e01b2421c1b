"""What kind of object a value is, and what TensorFlow is told about a copied layer."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import Any

import keras

from keras_renorm.src.core import keras_internals
from keras_renorm.src.models.captures import FOREIGN


def is_compiled(value: Any) -> bool:
    """Whether a function was made by `tf.function`."""
    return type(value).__module__.startswith("tensorflow.") and hasattr(value, "python_function")


def is_raw_variable(value: Any) -> bool:
    tensorflow = sys.modules.get("tensorflow")
    return tensorflow is not None and isinstance(value, tensorflow.Variable)


def is_torch(value: Any) -> bool:
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(value, torch.Tensor)


def is_plain_object(value: Any) -> bool:
    """Whether an object consists of its attributes only."""
    cls = type(value)
    if isinstance(value, keras_internals.Tracker):
        return True
    torch = sys.modules.get("torch")
    if torch is not None and isinstance(value, torch.nn.Module):
        return True
    return (
        hasattr(value, "__dict__")
        and cls.__reduce__ is object.__reduce__
        and cls.__reduce_ex__ is object.__reduce_ex__
        and not hasattr(cls, "__deepcopy__")
        and not any(getattr(base, "__slots__", ()) for base in cls.__mro__)
        and cls.__module__.split(".")[0] not in FOREIGN
        and object.__new__ is cls.__new__
    )


def is_watched_container(value: Any) -> bool:
    return isinstance(value, (list, dict)) and type(value).__module__.split(".")[0] == "tensorflow"


def track(layer: Any, watched: Iterable[str] = ()) -> None:
    """Register the dependencies of a layer with TensorFlow, as setting attributes does: objects, lists and dicts."""
    import tensorflow as tf

    with keras_internals.untracked():
        for name in watched:
            if name in vars(layer):
                vars(layer)[name] = tf.__internal__.tracking.wrap(vars(layer)[name])
        for name, value in list(vars(layer).items()):
            if isinstance(value, tf.__internal__.tracking.Trackable) and not isinstance(value, keras.optimizers.Optimizer):
                keras_internals.track_trackable(layer, value, name)
