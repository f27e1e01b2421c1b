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
import itertools
import random
import sys
import types
import warnings
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from typing import Any

import keras
import numpy as np

from keras_renorm.src.core import keras_internals
from keras_renorm.src.core.arrays import for_another
from keras_renorm.src.core.keras_internals import flatten_layers, inbound_nodes, outbound_nodes, raw_value

_NEVER_CHANGES = (type(None), bool, int, float, complex, str, bytes, type, types.ModuleType, types.BuiltinFunctionType)
# Most of what there is, asked for first.
_PLAIN_VALUES = frozenset({type(None), bool, int, float, str})
# Objects of these packages hold nothing of a model, unless they are Keras' own classes.
_FOREIGN = {"tensorflow", "tensorflow_text", "jax", "jaxlib", "torch", "numpy", "sentencepiece", "tokenizers"}
_GENERATORS = (np.random.Generator, np.random.RandomState, random.Random)
# TensorFlow's notes of what an object depends on are written anew.
_OF_TENSORFLOW = {
    *("_self_setattr_tracking", "_self_unconditional_checkpoint_dependencies", "_self_unconditional_dependency_names"),
    *("_self_unconditional_deferred_dependencies", "_self_update_uid", "_self_name_based_restores"),
    "_self_saveable_object_factories",
}
# Methods that Keras wraps for each layer.
_WRAPPED = ("build", "quantize")


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
        if type(value) in _PLAIN_VALUES or isinstance(value, _NEVER_CHANGES):
            return value
        if id(value) in self.copies:
            return self.copies[id(value)]
        if isinstance(value, keras.Variable):
            return self._variable(value)
        if isinstance(value, keras.Layer) and self._convert is not None:
            other = self._convert(value, self)
            if other is not None:
                self.replace(value, other)
                return other
        if isinstance(value, keras.KerasTensor):
            return self._made(value, _blank(value, {k: v for k, v in vars(value).items() if k != keras_internals.HISTORY}))
        if isinstance(value, keras_internals.Node):
            return self._node(value)
        if isinstance(value, keras_internals.KerasSaveable):
            return self._object(value)
        if isinstance(value, (list, dict, set, collections.deque)):
            return self._container(value)
        if isinstance(value, (tuple, frozenset)):
            return self._immutable(value)
        if isinstance(value, types.FunctionType):
            return self._function(value)
        if isinstance(value, types.MethodType):
            owner, function = self._copy(value.__self__), self._copy(value.__func__)
            return value if owner is value.__self__ and function is value.__func__ else types.MethodType(function, owner)
        if isinstance(value, functools.partial):
            return self._made(
                value, functools.partial(*map(self._copy, (value.func, *value.args)), **self._values(value.keywords))
            )
        if isinstance(value, np.ndarray):
            return self._made(value, value.copy())
        if isinstance(value, _GENERATORS):
            return self._made(value, copy.deepcopy(value))
        return self._other(value)

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
            state = {key: item for key, item in state.items() if key not in _WRAPPED}
        if (own := keras_internals.TORCH_PARAMETERS) in state.get("_modules", ()):
            # PyTorch's own list of the parameters is made anew.
            self._last.append(lambda: keras_internals.track_torch_parameters(new))
            state["_modules"] = {key: item for key, item in state["_modules"].items() if key != own}
        vars(new).update(self._values(state))
        if isinstance(value, keras.Layer):
            vars(new).update({name: _rebound(vars(value)[name], value, new) for name in _WRAPPED if name in vars(value)})
        if isinstance(value, keras.Function):
            self._copy_calls(value, new)
        if isinstance(value, keras_internals.Tracker):
            self._last.append(lambda: keras_internals.renew_ids(new))
        if keras_internals.has_indices(value):
            self._last.append(lambda: keras_internals.renew_indices(new))
        if isinstance(value, keras.Operation) and keras_internals.is_trackable(new):
            watched = [name for name, item in vars(value).items() if _is_watched_container(item)]
            self._last.append(lambda: _track(new, watched))

    def _methods(self, value: Any, state: dict) -> dict:
        """Methods of a user's own classes that read parts of the model from the scope of the class."""
        cls = type(value)
        if cls not in self._methods_of:
            self._methods_of[cls] = {name: one for name, one in _methods(cls).items() if self._captures(one)}
        return {
            name: types.MethodType(function, value) for name, function in self._methods_of[cls].items() if name not in state
        }

    def _container(self, value: Any) -> Any:
        kinds = (collections.OrderedDict, dict, list, set, collections.deque)
        kind = next(cls for cls in kinds if isinstance(value, cls))
        # TensorFlow's own lists and dicts note what happens to them.
        own = type(value) if type(value).__module__.split(".")[0] not in _FOREIGN else kind
        new = self._made(value, own.__new__(own))
        if isinstance(new, collections.defaultdict):
            new.default_factory = value.default_factory

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
                if not _is_empty(old):
                    cell.cell_contents = self._copy(old.cell_contents)
            new.__defaults__ = self._copy(function.__defaults__)
            new.__kwdefaults__ = self._copy(function.__kwdefaults__)
            new.__dict__.update(self._values(vars(function)))
            for name in ("__module__", "__qualname__", "__doc__", "__annotations__"):
                setattr(new, name, getattr(function, name))

        self._todo.append(fill)
        return new

    def _captures(self, function: Any) -> bool:
        return any(True for _ in _read_by(function, lambda key: key in self._own or key in self.copies))

    def _own_globals(self, function: types.FunctionType) -> list[str]:
        return [name for name in _names(function.__code__) if id(function.__globals__.get(name)) in self._own]

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
        if _is_compiled(value):
            return self._compiled(value)
        if _is_raw_variable(value):
            return self._made(value, type(value)(value))
        if _is_torch(value):
            return self._made(value, copy.deepcopy(value))
        if _is_plain_object(value):
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
            found = _reaches(value, self._own)
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


def _is_watched_container(value: Any) -> bool:
    return isinstance(value, (list, dict)) and type(value).__module__.split(".")[0] == "tensorflow"


def _track(layer: Any, watched: Iterable[str] = ()) -> None:
    """Register the dependencies of a layer with TensorFlow, as setting attributes does: objects, lists and dicts."""
    import tensorflow as tf

    with keras_internals.untracked():
        for name in watched:
            if name in vars(layer):
                vars(layer)[name] = tf.__internal__.tracking.wrap(vars(layer)[name])
        for name, value in list(vars(layer).items()):
            if isinstance(value, tf.__internal__.tracking.Trackable) and not isinstance(value, keras.optimizers.Optimizer):
                keras_internals.track_trackable(layer, value, name)


def _note_readers(node: keras_internals.Node) -> None:
    for tensor in node.arguments.keras_tensors:
        operation = keras_internals.history_of(tensor).operation
        if operation is not None:
            outbound_nodes(operation).append(node)


def _methods(cls: type) -> dict[str, types.FunctionType]:
    """The methods of a class that are not Keras' own."""
    return {
        name: function
        for base in reversed(cls.__mro__)
        if base.__module__.split(".")[0] not in {"keras", "builtins", *_FOREIGN}
        for name, function in vars(base).items()
        if isinstance(function, types.FunctionType) and not name.startswith("__")
    }


def captured_by(operation: Any, parts: Mapping[int, Any]) -> list[Any]:
    """Find what the functions of an operation read without holding it: by a closure, a default, or a global name.

    Args:
        operation: a layer or an operation.
        parts: layers and variables that may be read, by `id`.
    """
    held = [value for name, value in vars(operation).items() if name not in _WRAPPED]
    functions = [value for value in held if isinstance(value, (types.FunctionType, types.MethodType, functools.partial))]
    found = {
        key for function in (*functions, *_methods(type(operation)).values()) for key in _read_by(function, parts.__contains__)
    }
    return [parts[key] for key in found - {id(operation)}]


def _read_by(function: Any, is_part: Callable[[int], bool]) -> Iterator[int]:
    """The `id` of each part of a model that a function reads."""
    stack, seen = [function], set()
    while stack:
        value = stack.pop()
        if id(value) in seen or isinstance(value, _NEVER_CHANGES):
            continue
        seen.add(id(value))
        if is_part(id(value)):
            yield id(value)
        elif isinstance(value, types.FunctionType):
            stack += [cell.cell_contents for cell in value.__closure__ or () if not _is_empty(cell)]
            stack += [value.__defaults__, value.__kwdefaults__, vars(value)]
            known = (value.__globals__.get(name) for name in _names(value.__code__))
            stack += [one for one in known if is_part(id(one))]
        elif isinstance(value, types.MethodType):
            stack += [value.__self__, value.__func__]
        elif isinstance(value, functools.partial):
            stack += [value.func, value.args, value.keywords]
        elif isinstance(value, (list, tuple, set)):
            stack += list(value)
        elif isinstance(value, dict):
            stack += list(value.values())


def _names(code: types.CodeType) -> Iterable[str]:
    """The names of globals and attributes in a function and its inner functions."""
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _names(constant)


def _is_empty(cell: types.CellType) -> bool:
    try:
        return cell.cell_contents is cell
    except ValueError:
        return True


def _is_compiled(value: Any) -> bool:
    """Whether a function was made by `tf.function`."""
    return type(value).__module__.startswith("tensorflow.") and hasattr(value, "python_function")


def _is_raw_variable(value: Any) -> bool:
    tensorflow = sys.modules.get("tensorflow")
    return tensorflow is not None and isinstance(value, tensorflow.Variable)


def _is_torch(value: Any) -> bool:
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(value, torch.Tensor)


def _is_plain_object(value: Any) -> bool:
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
        and cls.__module__.split(".")[0] not in _FOREIGN
        and object.__new__ is cls.__new__
    )


def _reaches(value: Any, own: Collection[int], depth: int = 3) -> Any:
    """A part of a model that an object holds, or `None`."""
    level, seen = [value], {id(value)}
    for _ in range(depth):
        level = [
            item
            for item in itertools.chain.from_iterable(map(_held_by, level))
            if not isinstance(item, _NEVER_CHANGES) and id(item) not in seen and not seen.add(id(item))
        ]
        for item in level:
            if id(item) in own:
                return item
    return None


def _held_by(value: Any) -> list[Any]:
    """What an object holds; for a function what it captures, without all globals of its module."""
    if isinstance(value, types.FunctionType):
        cells = [cell.cell_contents for cell in value.__closure__ or () if not _is_empty(cell)]
        return [*cells, value.__defaults__, value.__kwdefaults__, vars(value)]
    return gc.get_referents(value)


def _describe(value: Any) -> str:
    return f"Layer '{value.name}'" if isinstance(value, keras.Layer) else f"Variable '{value.path}'"


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
            f"Layer '{operation.name}' (of type {type(operation).__name__}) cannot be made anew from its config: {error} "
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
        _track(layer)
