"""Names, instances, configs and callables as objects, and back."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import keras

PACKAGE = "keras_renorm"

register = keras.saving.register_keras_serializable(package=PACKAGE)


class Configurable:
    """A small value object: the arguments of its constructor are its attributes, its config and its identity."""

    def get_config(self) -> dict:
        names = inspect.signature(type(self)).parameters
        return {name: getattr(self, name) for name in names}

    @classmethod
    def from_config(cls, config: dict):
        return cls(**config)

    def __eq__(self, other: Any) -> bool:
        return type(self) is type(other) and self.get_config() == other.get_config()

    def __hash__(self) -> int:
        return hash((type(self), repr(self)))

    def __repr__(self) -> str:
        arguments = ", ".join(f"{name}={value!r}" for name, value in self.get_config().items())
        return f"{type(self).__name__}({arguments})"


def get(identifier: Any, known: dict[str, Callable[[], Any]], base: type, argument: str) -> Any:
    """Get the object of a string, an instance, a config or a callable.

    Args:
        identifier: a key of `known`, an instance of `base`, a Keras config dict, or any callable.
        known: dict of name to class. The classes have no required arguments.
        base: class of the instances, which is public in the module of its name.
        argument: name of the argument in the error message.

    Returns:
        An instance of `base`, or the callable that was passed in.
    """
    if isinstance(identifier, base):
        return identifier
    if isinstance(identifier, dict):
        return get(keras.saving.deserialize_keras_object(identifier), known, base, argument)
    if isinstance(identifier, str):
        if identifier in known:
            return known[identifier]()
        registered = keras.saving.get_registered_object(identifier)
        if registered is not None:
            return registered() if inspect.isclass(registered) else registered
    elif callable(identifier) and not inspect.isclass(identifier):
        return identifier
    public = f"keras_renorm.{base.__module__.split('.')[3]}.{base.__name__}"
    raise ValueError(
        f"Argument `{argument}` is not known. Received: {argument}={identifier!r}. Pass one of {sorted(known)}, an "
        f"instance of `{public}`, or a callable with the same signature."
    )


def serialize(value: Any) -> Any:
    """The JSON-ready config of an object that `get` returned, for `get_config`."""
    return value if value is None or isinstance(value, str) else keras.saving.serialize_keras_object(value)
