"""What functions and objects of a model read without holding it in an attribute: by a closure, a default, or a global name."""

from __future__ import annotations

import functools
import gc
import itertools
import types
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from typing import Any

# Objects of these packages hold nothing of a model, unless they are Keras' own classes.
FOREIGN = {"tensorflow", "tensorflow_text", "jax", "jaxlib", "torch", "numpy", "sentencepiece", "tokenizers"}
NEVER_CHANGES = (type(None), bool, int, float, complex, str, bytes, type, types.ModuleType, types.BuiltinFunctionType)
# Methods that Keras wraps for each layer.
WRAPPED = ("build", "quantize")


def methods_of(cls: type) -> dict[str, types.FunctionType]:
    """The methods of a class that are not Keras' own."""
    return {
        name: function
        for base in reversed(cls.__mro__)
        if base.__module__.split(".")[0] not in {"keras", "builtins", *FOREIGN}
        for name, function in vars(base).items()
        if isinstance(function, types.FunctionType) and not name.startswith("__")
    }


def captured_by(operation: Any, parts: Mapping[int, Any]) -> list[Any]:
    """Find what the functions of an operation read without holding it: by a closure, a default, or a global name.

    Args:
        operation: a layer or an operation.
        parts: layers and variables that may be read, by `id`.
    """
    held = [value for name, value in vars(operation).items() if name not in WRAPPED]
    functions = [value for value in held if isinstance(value, (types.FunctionType, types.MethodType, functools.partial))]
    found = {
        key for function in (*functions, *methods_of(type(operation)).values()) for key in read_by(function, parts.__contains__)
    }
    return [parts[key] for key in found - {id(operation)}]


def read_by(function: Any, is_part: Callable[[int], bool]) -> Iterator[int]:
    """The `id` of each part of a model that a function reads."""
    stack, seen = [function], set()
    while stack:
        value = stack.pop()
        if id(value) in seen or isinstance(value, NEVER_CHANGES):
            continue
        seen.add(id(value))
        if is_part(id(value)):
            yield id(value)
        elif isinstance(value, types.FunctionType):
            stack += [cell.cell_contents for cell in value.__closure__ or () if not is_empty(cell)]
            stack += [value.__defaults__, value.__kwdefaults__, vars(value)]
            known = (value.__globals__.get(name) for name in names_read(value.__code__))
            stack += [one for one in known if is_part(id(one))]
        elif isinstance(value, types.MethodType):
            stack += [value.__self__, value.__func__]
        elif isinstance(value, functools.partial):
            stack += [value.func, value.args, value.keywords]
        elif isinstance(value, (list, tuple, set)):
            stack += list(value)
        elif isinstance(value, dict):
            stack += list(value.values())


def names_read(code: types.CodeType) -> Iterable[str]:
    """The names of globals and attributes in a function and its inner functions."""
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from names_read(constant)


def is_empty(cell: types.CellType) -> bool:
    try:
        return cell.cell_contents is cell
    except ValueError:
        return True


def part_within(value: Any, own: Collection[int], depth: int = 3) -> Any:
    """A part of a model that an object holds, or `None`."""
    level, seen = [value], {id(value)}
    for _ in range(depth):
        level = [
            item
            for item in itertools.chain.from_iterable(map(_held_by, level))
            if not isinstance(item, NEVER_CHANGES) and id(item) not in seen and not seen.add(id(item))
        ]
        for item in level:
            if id(item) in own:
                return item
    return None


def _held_by(value: Any) -> list[Any]:
    """What an object holds; for a function what it captures, without all globals of its module."""
    if isinstance(value, types.FunctionType):
        cells = [cell.cell_contents for cell in value.__closure__ or () if not is_empty(cell)]
        return [*cells, value.__defaults__, value.__kwdefaults__, vars(value)]
    return gc.get_referents(value)
