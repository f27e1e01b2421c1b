"""Loads the weights of a plain model into the same model with prunable layers.

Keras compares the number of arrays for `set_weights` with the number of `weights`, and finds the variables of a layer in a file
by the name of its class. A layer cannot change either for a model of Keras' own classes, so the two functions are extended
here. Calls that work without the extension are not changed.
"""

from __future__ import annotations

import contextlib
import functools
import json
import pathlib
import zipfile
from collections.abc import Callable, Iterator
from typing import Any

import h5py
import keras

from keras_renorm.src.core.keras_internals import flatten_layers
from keras_renorm.src.layers.plain_variables import plain_weights, reset_masks
from keras_renorm.src.layers.prunable import PrunableLayer, prunable_layers, without_added
from keras_renorm.src.layers.wrapper import RenormalizedPruning


@functools.cache
def accept_plain_weights() -> None:
    """Let `set_weights` and `load_weights` of every Keras model accept plain weights for prunable layers."""
    keras.Layer.set_weights = _extend_set_weights(keras.Layer.set_weights)
    keras.Model.load_weights = _extend_load_weights(keras.Model.load_weights)
    keras.saving.load_weights = _extend_load_weights(keras.saving.load_weights)


def _extend_set_weights(keras_set_weights: Callable) -> Callable:
    @functools.wraps(keras_set_weights)
    def set_weights(self, weights):
        own, plain = self.weights, plain_weights(self)
        if len(weights) == len(own) or len(plain) == len(own):
            keras_set_weights(self, weights)
            return
        if len(weights) != len(plain):
            raise ValueError(
                f"Argument `weights` must hold {len(own)} arrays for '{self.name}', as its `get_weights()` does, or "
                f"{len(plain)}, as its plain counterpart has them. Received: {len(weights)} arrays."
            )
        for variable, value in zip(plain, weights):
            if tuple(variable.shape) != tuple(value.shape):
                raise ValueError(
                    f"Argument `weights` must hold an array of shape {tuple(variable.shape)} for '{variable.path}'. "
                    f"Received: shape={tuple(value.shape)}. Nothing was changed."
                )
        for variable, value in zip(plain, weights):
            variable.assign(value)
        reset_masks(self, plain)

    return set_weights


def _extend_load_weights(keras_load_weights: Callable) -> Callable:
    @functools.wraps(keras_load_weights)
    def load_weights(model, filepath, skip_mismatch=False, **kwargs):
        if not prunable_layers(model) or _holds_masks(filepath):
            keras_load_weights(model, filepath, skip_mismatch, **kwargs)
            return
        with _resetting_masks(model), _seen_as_plain(model):
            keras_load_weights(model, filepath, skip_mismatch, **kwargs)

    return load_weights


@contextlib.contextmanager
def _resetting_masks(model: keras.Model) -> Iterator[None]:
    """Keep all weights of the kernels that are assigned meanwhile. Keras may skip some, and assigns in several ways."""
    kernels = [kernel.variable for layer in prunable_layers(model) for kernel in layer.masked_kernels]
    assigned = []

    def assign(variable, value):
        type(variable).assign(variable, value)
        assigned.append(variable)

    try:
        for variable in kernels:
            vars(variable)["assign"] = functools.partial(assign, variable)
        yield
    finally:
        for variable in kernels:
            vars(variable).pop("assign", None)
        reset_masks(model, assigned)


@contextlib.contextmanager
def _seen_as_plain(model: keras.Model) -> Iterator[None]:
    """Let Keras see the plain counterpart of each prunable layer."""
    layers = [(layer, type(layer)) for layer in flatten_layers(model) if isinstance(layer, PrunableLayer)]
    views = [_wrapped_view(layer) if isinstance(layer, RenormalizedPruning) else _drop_in_view(cls) for layer, cls in layers]
    try:
        for (layer, _), view in zip(layers, views):
            object.__setattr__(layer, "__class__", view)
        yield
    finally:
        for layer, cls in layers:
            object.__setattr__(layer, "__class__", cls)


def _drop_in_view(cls: type[PrunableLayer]) -> type[PrunableLayer]:
    """A class with the name of the plain class, whose layers hide masks, scales and steps."""

    @property
    def weights(self):
        return without_added(cls.weights.fget(self), [self])

    return type(cls.plain_class.__name__, (cls,), {"weights": weights})


def _wrapped_view(wrapper: RenormalizedPruning) -> type[RenormalizedPruning]:
    """A class with which a wrapper looks like the layer inside it."""
    inner = wrapper.layer
    methods = {"__getattribute__": lambda self, name: getattr(inner, name), "__dir__": lambda self: dir(inner)}
    return type(type(inner).__name__, (RenormalizedPruning,), methods)


def _holds_masks(filepath: str | pathlib.Path) -> bool:
    """Whether a file holds bool variables, as a file with masks does. Also true for a file of which Keras must say what is
    wrong.
    """
    path = pathlib.Path(filepath)
    try:
        if path.suffix == ".keras":
            with zipfile.ZipFile(path) as archive, archive.open("model.weights.h5") as weights:
                return _holds_bools(weights)
        if path.suffix == ".json":
            shards = json.loads(path.read_text())["weight_map"].values()
            names = {name for shard in shards for name in ([shard] if isinstance(shard, str) else shard)}
            return any(_holds_bools(path.parent / name) for name in names)
        return _holds_bools(path)
    except (OSError, KeyError, ValueError, zipfile.BadZipFile):
        return True


def _holds_bools(file: Any) -> bool:
    with h5py.File(file, "r") as group:
        return bool(group.visititems(lambda _, item: (isinstance(item, h5py.Dataset) and item.dtype == bool) or None))
