"""Copies of models, object by object: layers, variables, and what they hold, share and capture.

Keras copies a layer by its config, which does not contain its later state: adapted statistics, vocabularies, frozen parts,
shared weights, values drawn in `build`. Here nothing is built again. Each object that belongs to the model is copied once,
wherever it is found, so that shared objects remain shared. Objects that cannot change, or that hold nothing of the model, are
the same in both models.
"""

from __future__ import annotations

import collections
import copy
import functools
import gc
import inspect
import random
import types
from collections.abc import Callable
from typing import Any

import keras
import numpy as np

from keras_renorm.src.core import keras_internals
from keras_renorm.src.core.arrays import for_another
from keras_renorm.src.core.keras_internals import flatten_layers, inbound_nodes, outbound_nodes, raw_value
from keras_renorm.src.models.captures import (
    FOREIGN,
    NEVER_CHANGES,
    WRAPPED,
    is_empty,
    methods_of,
    names_read,
    part_within,
    read_by,
)
from keras_renorm.src.models.kinds import is_compiled, is_plain_object, is_raw_variable, is_torch, is_watched_container, track

# Most of what there is, asked for first.
_PLAIN_VALUES = frozenset({type(None), bool, int, float, str})
_GENERATORS = (np.random.Generator, np.random.RandomState, random.Random)
# TensorFlow's notes of what an object depends on are written anew.
_OF_TENSORFLOW = {
    *("_self_setattr_tracking", "_self_unconditional_checkpoint_dependencies", "_self_unconditional_dependency_names"),
    *("_self_unconditional_deferred_dependencies", "_self_update_uid", "_self_name_based_restores"),
    "_self_saveable_object_factories",
}


class Copier:
    """Copies the objects of one model, each once.

    Args:
        model: the model.
        convert: returns the replacement of a layer, or `None` to copy the layer.

    Attributes:
        copies: the copy of each object that was copied, by its `id`.
    """

    def __init__(self, model: keras.Layer, convert: Callable[[keras.Layer, Copier], keras.Layer | None] | None = None):
        self.copies: dict[int, Any] = {}
        self._convert = convert
        self._originals: list = []
        self._shared: list = []
        self._methods_of: dict[type, dict[str, Callable]] = {}
        self._kinds: dict[type, Callable[[Any], Any]] = {}
        # What is to be done, one after the other: fill objects, convert layers, connect calls, and what waits for all this.
        self._todo: collections.deque = collections.deque()
        self._conversions: list[tuple[keras.Layer, tuple[Callable, ...]]] = []
        self._calls: collections.deque = collections.deque()
        self._last: collections.deque = collections.deque()
        parts = flatten_layers(model) if isinstance(model, keras.Layer) else [model]
        self._own = {id(part): part for part in (*parts, *getattr(model, "variables", ()))}

    def copy(self, value: Any) -> Any:
        """Copy an object with everything that it holds.

        Raises:
            ValueError: if something cannot be copied and holds a part of the model.
        """
        result = self._copy(value)
        _run(self._todo)
        # A layer has more layers in it than each of these.
        self._conversions.sort(key=lambda pair: len(flatten_layers(pair[0])))
        for number in range(2):
            for layer, steps in self._conversions:
                for step in steps[number : number + 1]:
                    step(layer)
        self._conversions.clear()
        _run(self._calls)
        _run(self._last)
        self._check_shared()
        return result

    def copy_as(self, layer: keras.Layer, cls: type, *steps: Callable[[keras.Layer], None]) -> keras.Layer:
        """Copy a layer as a layer of another class, for use in its own place or inside its replacement.

        When everything is copied, the steps are called with it: the first step of each layer, then the second; inner layers
        come first.
        """
        new = self._object(layer, cls)
        self._conversions.append((new, steps))
        return new

    def replace(self, original: Any, other: Any) -> None:
        """Use `other` in place of an object from now on."""
        self.copies[id(original)] = other
        # An `id` is only good for as long as its object lives.
        self._originals.append(original)

    def _copy(self, value: Any) -> Any:
        """Copy a value. Its contents may be filled in later, so that no depth of nesting is too deep."""
        if type(value) in _PLAIN_VALUES:
            return value
        if id(value) in self.copies:
            return self.copies[id(value)]
        if type(value) not in self._kinds:
            self._kinds[type(value)] = self._kind_of(value)
        return self._kinds[type(value)](value)

    def _kind_of(self, value: Any) -> Callable[[Any], Any]:
        """The method that copies values of a type."""
        kinds = (
            (NEVER_CHANGES, lambda value: value),
            (keras.Variable, self._variable),
            (keras.Layer, self._layer),
            (keras.KerasTensor, self._symbolic),
            (keras_internals.Node, self._node),
            (keras_internals.KerasSaveable, self._object),
            ((list, dict, set, collections.deque), self._container),
            ((tuple, frozenset), self._immutable),
            (types.FunctionType, self._function),
            (types.MethodType, self._method),
            (functools.partial, self._partial),
            (np.ndarray, lambda value: self._made(value, value.copy())),
            (_GENERATORS, lambda value: self._made(value, copy.deepcopy(value))),
        )
        # Not `issubclass`: TensorFlow's dicts only say that they are dicts.
        return next((method for kind, method in kinds if isinstance(value, kind)), self._other)

    def _layer(self, layer: keras.Layer) -> keras.Layer:
        other = None if self._convert is None else self._convert(layer, self)
        return self._object(layer) if other is None else self._made(layer, other)

    def _symbolic(self, tensor: keras.KerasTensor) -> keras.KerasTensor:
        state = {key: value for key, value in vars(tensor).items() if key != keras_internals.HISTORY}
        return self._made(tensor, _blank(tensor, state))

    def _method(self, method: types.MethodType) -> types.MethodType:
        owner, function = self._copy(method.__self__), self._copy(method.__func__)
        return method if owner is method.__self__ and function is method.__func__ else types.MethodType(function, owner)

    def _partial(self, value: functools.partial) -> functools.partial:
        args = [self._copy(one) for one in (value.func, *value.args)]
        return self._made(value, functools.partial(*args, **self._values(value.keywords)))

    def _made(self, value: Any, result: Any) -> Any:
        self.replace(value, result)
        return result

    def _values(self, mapping: dict) -> dict:
        return {key: self._copy(value) for key, value in mapping.items()}

    def _variable(self, variable: keras.Variable) -> keras.Variable:
        # Without methods of its own, by which somebody may watch what is assigned to this one.
        state = {key: value for key, value in vars(variable).items() if not callable(getattr(type(variable), key, None))}
        new = self._made(variable, _blank(variable, {key: state[key] for key in state if key not in _OF_TENSORFLOW}))
        if raw_value(variable) is not None:
            # TensorFlow asks a variable once, when it is made, whether there will be gradients: frozen ones may thaw.
            keras_internals.flag_trainable(new, getattr(raw_value(variable), "trainable", variable.trainable))
            value = for_another(variable)
            # On PyTorch the two would share memory.
            keras_internals.initialize(new, value.copy() if isinstance(value, np.ndarray) else value)
            keras_internals.flag_trainable(new, variable.trainable)
            self.replace(raw_value(variable), raw_value(new))

        def fill():
            new.regularizer, new.constraint = self._copy(variable.regularizer), self._copy(variable.constraint)

        self._todo.append(fill)
        return new

    def _object(self, value: Any, cls: type | None = None) -> Any:
        """Copy an object with attributes: a layer, an operation, a metric, an optimizer, an object of a user's own class."""
        new = self._made(value, object.__new__(cls or type(value)))
        self._todo.append(lambda: self._fill_object(value, new))
        return new

    def _fill_object(self, value: Any, new: Any) -> None:
        state = dict(vars(value))
        if isinstance(value, keras.Model):
            state = {key: item for key, item in state.items() if key not in keras_internals.OF_TRAINING}
            state |= keras_internals.before_training()
        if isinstance(value, keras.Operation):
            state |= {key: make() for key, make in keras_internals.OF_CALLS.items() if key in state}
            state = {key: item for key, item in state.items() if key not in _OF_TENSORFLOW}
            state |= self._methods(value, state)
        if isinstance(value, keras.Layer):
            state = {key: item for key, item in state.items() if key not in WRAPPED}
        if (own := keras_internals.TORCH_PARAMETERS) in state.get("_modules", ()):
            # PyTorch's own list of the parameters is made anew.
            self._last.append(lambda: keras_internals.track_torch_parameters(new))
            state["_modules"] = {key: item for key, item in state["_modules"].items() if key != own}
        vars(new).update(self._values(state))
        if isinstance(value, keras.Layer):
            vars(new).update({name: _rebound(vars(value)[name], value, new) for name in WRAPPED if name in vars(value)})
        if isinstance(value, keras.Function):
            self._copy_calls(value, new)
        if isinstance(value, keras_internals.Tracker):
            self._last.append(lambda: keras_internals.renew_ids(new))
        if keras_internals.has_indices(value):
            self._last.append(lambda: keras_internals.renew_indices(new))
        if isinstance(value, keras.Operation) and keras_internals.is_trackable(new):
            watched = [name for name, item in vars(value).items() if is_watched_container(item)]
            self._last.append(lambda: track(new, watched))

    def _methods(self, value: Any, state: dict) -> dict:
        """Methods of a user's own classes that read parts of the model from the scope of the class."""
        cls = type(value)
        if cls not in self._methods_of:
            self._methods_of[cls] = {name: one for name, one in methods_of(cls).items() if self._captures(one)}
        return {
            name: types.MethodType(function, value) for name, function in self._methods_of[cls].items() if name not in state
        }

    def _container(self, value: Any) -> Any:
        kinds = (collections.OrderedDict, dict, list, set, collections.deque)
        kind = next(cls for cls in kinds if isinstance(value, cls))
        # TensorFlow's own lists and dicts note what happens to them.
        own = type(value) if type(value).__module__.split(".")[0] not in FOREIGN else kind
        new = self._made(value, own.__new__(own))
        if isinstance(new, collections.defaultdict):
            new.default_factory = value.default_factory
        if not value and not hasattr(new, "__dict__"):
            return new

        def fill():
            # Methods of a subclass may do more than to hold what they are given.
            if issubclass(kind, dict):
                for key, item in list(value.items()):
                    kind.__setitem__(new, self._copy(key), self._copy(item))
            elif kind is set:
                set.update(new, map(self._copy, value))
            else:
                kind.extend(new, map(self._copy, value))
            if hasattr(new, "__dict__"):
                vars(new).update(self._values(vars(value)))

        self._todo.append(fill)
        return new

    def _immutable(self, value: Any) -> Any:
        items = [self._copy(item) for item in value]
        if all(new is old for new, old in zip(items, value)):
            return value
        return self._made(value, type(value)._make(items) if hasattr(value, "_make") else type(value)(items))

    def _function(self, function: types.FunctionType) -> types.FunctionType:
        """The function itself, or a function that reads the copy where this one reads the model."""
        if not self._captures(function):
            return function
        cells = tuple(types.CellType() for _ in function.__closure__ or ())
        names = {name: self._copy(function.__globals__[name]) for name in self._own_globals(function)}
        scope = {**function.__globals__, **names} if names else function.__globals__
        new = types.FunctionType(function.__code__, scope, function.__name__, None, cells or None)
        self.replace(function, new)

        def fill():
            for cell, old in zip(cells, function.__closure__ or ()):
                if not is_empty(old):
                    cell.cell_contents = self._copy(old.cell_contents)
            new.__defaults__ = self._copy(function.__defaults__)
            new.__kwdefaults__ = self._copy(function.__kwdefaults__)
            new.__dict__.update(self._values(vars(function)))
            for name in ("__module__", "__qualname__", "__doc__", "__annotations__"):
                setattr(new, name, getattr(function, name))

        self._todo.append(fill)
        return new

    def _captures(self, function: Any) -> bool:
        return any(True for _ in read_by(function, lambda key: key in self._own or key in self.copies))

    def _own_globals(self, function: types.FunctionType) -> list[str]:
        return [name for name in names_read(function.__code__) if id(function.__globals__.get(name)) in self._own]

    def _copy_calls(self, function: keras.Function, new: keras.Function) -> None:
        """Copy the calls of a graph of operations, in the order in which each operation was called."""
        nodes = sorted(keras_internals.nodes_of(function), key=lambda node: inbound_nodes(node.operation).index(node))
        nodes = [self._copy(node) for node in nodes]
        self._last.append(lambda: keras_internals.name_nodes(new, nodes))

    def _node(self, node: keras_internals.Node) -> keras_internals.Node:
        new = self._made(node, _blank(node, {}))
        operation = self._copy(node.operation)
        outputs = [self._copy(tensor) for tensor in node.outputs]
        vars(new).update(operation=operation, outputs=outputs, is_input=node.is_input, arguments=self._copy(node.arguments))

        def connect():
            inbound_nodes(operation).append(new)
            for place, tensor in enumerate(outputs):
                keras_internals.set_history(tensor, operation, len(inbound_nodes(operation)) - 1, place)

        self._calls.append(connect)
        self._last.append(lambda: _note_readers(new))
        return new

    def _other(self, value: Any) -> Any:
        if is_compiled(value):
            return self._compiled(value)
        if is_raw_variable(value):
            return self._made(value, type(value)(value))
        if is_torch(value):
            return self._made(value, copy.deepcopy(value))
        if is_plain_object(value):
            return self._object(value)
        self.replace(value, value)
        if gc.is_tracked(value) and not hasattr(value, "dtype") and not isinstance(value, inspect.Signature):
            self._shared.append(value)
        return value

    def _compiled(self, value: Any) -> Any:
        if not self._captures(value.python_function):
            return value
        import tensorflow as tf

        inner = self._copy(value.python_function)
        return self._made(value, tf.function(inner, value.input_signature, jit_compile=value._jit_compile))

    def _check_shared(self) -> None:
        """Raise if an object that could not be copied holds a part of the model."""
        for value in self._shared:
            found = part_within(value, self._own)
            if found is not None:
                raise ValueError(
                    f"{_describe(found)} is held by an object of type {type(value)}, which cannot be copied, so a copy of the "
                    "model would use the original's. Hold it in an attribute of a layer, a list or a dict instead. Nothing was "
                    "changed."
                )
        self._shared.clear()


def _run(steps: collections.deque) -> None:
    while steps:
        steps.popleft()()


def _blank(value: Any, state: dict) -> Any:
    """An object of the same class, without calling its constructor."""
    new = object.__new__(type(value))
    vars(new).update(state)
    return new


def _rebound(function: types.FunctionType, old: Any, new: Any) -> types.FunctionType:
    """A function that Keras wraps around a method of each layer, for another layer."""

    def bind(held):
        if held is old:
            return new
        is_method = isinstance(held, types.MethodType) and held.__self__ is old
        return getattr(type(new), held.__name__).__get__(new) if is_method else held

    cells = tuple(types.CellType(bind(cell.cell_contents)) for cell in function.__closure__ or ())
    made = types.FunctionType(function.__code__, function.__globals__, function.__name__, function.__defaults__, cells)
    made.__kwdefaults__ = function.__kwdefaults__
    vars(made).update({name: bind(value) for name, value in vars(function).items()})
    for name in ("__doc__", "__module__", "__qualname__"):
        setattr(made, name, getattr(function, name))
    return made


def _note_readers(node: keras_internals.Node) -> None:
    for tensor in node.arguments.keras_tensors:
        operation = keras_internals.history_of(tensor).operation
        if operation is not None:
            outbound_nodes(operation).append(node)


def _describe(value: Any) -> str:
    return f"Layer '{value.name}'" if isinstance(value, keras.Layer) else f"Variable '{value.path}'"
