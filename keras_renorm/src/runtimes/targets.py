"""The pattern of zeros that a runtime can use, layer by layer; and names of layers."""

from __future__ import annotations

import collections
import fnmatch
from typing import Any

import keras

from keras_renorm.src.core import names, validation
from keras_renorm.src.core.keras_internals import Functional
from keras_renorm.src.models.graph import functional_of
from keras_renorm.src.rules import patterns
from keras_renorm.src.runtimes import xnnpack

L = keras.layers
_BLOCKS = {"litert": 4, "litert-int8": 16}
_CONVOLUTIONS = (L.Conv1D, L.Conv2D, L.Conv3D, L.Conv1DTranspose, L.Conv2DTranspose, L.Conv3DTranspose)


def choose_patterns(
    pattern: Any, target: str | None, model: keras.Model, layers: list[keras.Layer]
) -> dict[int, patterns.Pattern | None]:
    """Choose the pattern of each layer, by its `id`; `None` for a layer that should not be pruned.

    Args:
        pattern: a pattern for all layers, or a dict of layer name (or glob) to pattern, which has precedence over the target.
        target: `None` or one of `names.TARGETS`, which chooses the patterns of all layers that no dict names.
        model: the model of the layers.
        layers: the layers to prune.

    Raises:
        ValueError: if a name matches no layer, a pattern or the target is not known, both are given, or no layer is left to
            prune.
    """
    validation.check_choice(target, (None, *names.TARGETS), "target")
    if not isinstance(pattern, dict):
        if target is None:
            return {id(layer): patterns.get(pattern) for layer in layers}
        if patterns.get(pattern) != patterns.Unstructured():
            raise ValueError(
                f"Pass `target` or a pattern for all layers, not both. Received: target={target!r}, pattern={pattern!r}. A "
                "dict of layer name to pattern has precedence over the target."
            )
        pattern = {}
    called = names_of(model)
    for name in pattern:
        if not any(is_named(called[id(layer)], name) for layer in layers):
            raise ValueError(
                f"Argument `pattern` names no layer to prune. Received: {name!r}. The layers are: "
                f"{[layer.name for layer in layers]}."
            )
    chosen = {name: patterns.get(value) for name, value in pattern.items()}
    has_path = target == "litert" and _has_sparse_path(model)
    found = {
        id(layer): by_name(
            chosen, called[id(layer)], patterns.Unstructured() if target is None else _usable(layer, target, has_path)
        )
        for layer in layers
    }
    if not any(found.values()):
        raise ValueError(
            f"The runtime has no use for zeros in any of the layers {[layer.name for layer in layers]}. Received: "
            f"target={target!r}. Name their pattern in a dict as `pattern`, or leave `target` out."
        )
    return found


def names_of(model: keras.Model) -> dict[int, list[str]]:
    """The names by which the layers of a model can be called, by their `id`, the longest name first.

    A layer of an inner model has its own name, and the same name after those of the models around it: `"user/fc1"` is the layer
    `"fc1"` of the model `"user"`.
    """
    names: dict[int, list[str]] = {}

    def walk(container, around):
        for layer in container.layers:
            path = [*around, layer.name]
            known = names.setdefault(id(layer), [])
            known += [name for start in range(len(path)) if (name := "/".join(path[start:])) not in known]
            if isinstance(layer, (keras.Sequential, Functional)):
                walk(layer, path)

    walk(model, [])
    return names


def unique_names(model: keras.Model) -> dict[int, str]:
    """The shortest name of each layer that no other layer has, by its `id`."""
    names = names_of(model)
    counts = collections.Counter(name for known in names.values() for name in known)
    return {key: min(known, key=lambda name: (counts[name], len(name))) for key, known in names.items()}


def is_named(names: list[str], name: str) -> bool:
    """Whether a name or a glob matches one of the names of a layer."""
    return any(fnmatch.fnmatchcase(one, name) for one in names)


def by_name(table: dict[str, Any], names: list[str], default: Any = None) -> Any:
    """Look a layer up in a dict of names and globs.

    A name has precedence over a glob, a longer name over a shorter one, an earlier glob over a later one.

    Args:
        table: the dict.
        names: the names of the layer, from `names_of`.
        default: what to return if there is no match. Defaults to `None`.
    """
    exact = (table[name] for name in names if name in table)
    globs = (value for name, value in table.items() if is_named(names, name))
    return next(exact, next(globs, default))


def _usable(layer: keras.Layer, target: str, has_path: bool) -> patterns.Pattern | None:
    if type(layer) is L.Dense and layer.kernel.shape[0] % _BLOCKS[target] == 0:
        return patterns.Block((_BLOCKS[target], 1))
    if has_path and type(layer) in (L.Conv2D, L.DepthwiseConv2D):
        return patterns.Unstructured() if tuple(layer.kernel_size) == (1, 1) else None
    if isinstance(layer, L.DepthwiseConv2D):
        return None
    return patterns.Unit() if type(layer) in _CONVOLUTIONS else patterns.Unstructured()


def _has_sparse_path(model: keras.Model) -> bool:
    """Whether XNNPACK skips the zeros of the 1x1 convolutions, if there are enough of them."""
    if functional_of(model) is None:
        return False
    nodes = xnnpack.nodes_of(model)
    return any(node.is_pointwise for node in nodes) and not xnnpack.find_breakers(nodes)
