"""Types of arguments of the command line: they check a text and convert it."""

from __future__ import annotations

import argparse
import math
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

from keras_renorm.src.core import names


def file(*suffixes: str) -> Any:
    """A type of argument: a path with one of these endings."""

    def path(text: str) -> pathlib.Path:
        if not text.endswith(suffixes):
            raise argparse.ArgumentTypeError(f"must end in {' or '.join(suffixes)}, but is {text!r}")
        return pathlib.Path(text)

    return path


def model_file(*suffixes: str) -> Any:
    """A type of argument: the path of a model, with one of these endings."""

    def path(text: str) -> pathlib.Path:
        old = pathlib.Path(text)
        if old.suffix in (".h5", ".hdf5"):
            convert = f"keras.models.load_model({text!r}, compile=False).save({str(old.with_suffix('.keras'))!r})"
            raise argparse.ArgumentTypeError(f"must end in {' or '.join(suffixes)}: convert it in Python with `{convert}`")
        return file(*suffixes)(text)

    return path


class PerLayer(argparse.Action):
    """One value for all layers, or a dict of layer to value, with one option for each layer."""

    def __call__(self, parser, namespace, value, option_string=None):
        layer, one = value
        before = getattr(namespace, self.dest)
        given = before is not self.default
        if isinstance(before, dict) and layer in before:
            raise argparse.ArgumentError(self, f"{layer!r} is given twice")
        if layer is None and not given:
            setattr(namespace, self.dest, one)
        elif layer is not None and (not given or isinstance(before, dict)):
            setattr(namespace, self.dest, {**(before if given else {}), layer: one})
        else:
            raise argparse.ArgumentError(self, "give one value for all layers, or LAYER=value for each")


def setting(kind: Callable[[str], Any]) -> Callable[[str], tuple[str | None, Any]]:
    """A type of argument: a value, or `LAYER=value`."""

    def setting(text: str) -> tuple[str | None, Any]:
        layer, _, value = text.rpartition("=")
        return layer or None, kind(value)

    return setting


def share(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 <= value < 1:
        raise argparse.ArgumentTypeError(f"must be a number in [0, 1), such as 0.9 for 90%, but is {text!r}")
    return value


def pattern(text: str) -> tuple[str, tuple[int, ...]]:
    """The name of a pattern and its numbers."""
    name, colon, numbers = text.partition(":")
    sides = tuple(int(side) if side.isdecimal() else 0 for side in numbers.split(",")) if colon else ()
    if colon and (name not in ("block", "n_of_m") or len(sides) != 2 or 0 in sides):
        raise argparse.ArgumentTypeError(f"must be like block:4,1 or n_of_m:2,4, but is {text!r}")
    if name == "n_of_m" and sides and sides[0] >= sides[1]:
        raise argparse.ArgumentTypeError(f"must keep fewer than all, such as n_of_m:2,4, but is {text!r}")
    return name_among(sorted(names.PATTERNS))(name), sides


def name_among(known: Sequence[str]) -> Callable[[str], str]:
    """A type of argument: a name that the library knows, or a name `PACKAGE>NAME` of a module of the user."""

    def name(text: str) -> str:
        if text not in known and ">" not in text:
            raise argparse.ArgumentTypeError(
                f"must be one of {', '.join(known)}, or, in quotes, 'PACKAGE>NAME' with --import, but is {text!r}"
            )
        return text

    return name


def count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be an integer of at least 1, but is {text!r}")
    return int(text)
