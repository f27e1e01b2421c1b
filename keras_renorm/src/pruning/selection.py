"""Which layers of a model are pruned, and which kernels each of them has."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import Any

import keras

from keras_renorm.src.core.keras_internals import Functional, flatten_layers
from keras_renorm.src.layers.kernels import Kernel, find_kernels
from keras_renorm.src.layers.prunable import PrunableLayer
from keras_renorm.src.rules.patterns import Pattern
from keras_renorm.src.runtimes.targets import choose_patterns, is_named, names_of

# Classes whose layers can be exchanged from outside.
REBUILT = (keras.Sequential, Functional)


def choose_layers(model: keras.Model, layers: Any, argument: str = "layers") -> dict[int, keras.Layer]:
    """Choose the layers of a plain model to prune, by `id`.

    Args:
        model: a built model.
        layers: as in `to_prunable`.
        argument: name of the argument in error messages. Defaults to `"layers"`.

    Raises:
        ValueError: if a name matches no layer, or there is nothing to prune.
    """
    selectors = list(layers) if isinstance(layers, (list, tuple, set)) else [layers]
    candidates = list(outermost_layers(model))
    names = names_of(model)
    for selector in selectors:
        if isinstance(selector, str) and not any(is_named(names[id(layer)], selector) for layer in candidates):
            raise ValueError(
                f"Argument `{argument}` names no layer of model '{model.name}'. Received: {selector!r}. Its layers are: "
                f"{[layer.name for layer in candidates]}."
            )
    chosen, refused = {}, []
    kernels = kernels_by_layer(model)
    for layer in candidates:
        if isinstance(layer, PrunableLayer) or not any(_selects(selector, layer, names[id(layer)]) for selector in selectors):
            continue
        found = kernels[id(layer)]
        if isinstance(found, ValueError):
            refused.append(str(found))
        elif found and (layers is not None or not found[0].added):
            chosen[id(layer)] = layer
        elif layers is not None:
            refused.append(f"layer '{layer.name}' has no kernel")
    if not chosen:
        reason = f"Left as they are: {'; '.join(refused)}." if refused else "None of its layers has a kernel."
        if layers is not None and not refused:
            reason = f"No layer was chosen. Its layers are: {[layer.name for layer in candidates]}."
        raise ValueError(f"Model '{model.name}' has nothing to prune. Received: {argument}={layers!r}. {reason}")
    if refused:
        warnings.warn(f"Left as they are: {'; '.join(refused)}.", stacklevel=4)
    return chosen


def choose_with_patterns(
    model: keras.Model, layers: Any, pattern: Any, target: str | None, argument: str = "layers"
) -> tuple[dict[int, keras.Layer], dict[int, Pattern]]:
    """Choose the layers to prune and the pattern of each, both by the `id` of the layer; see `choose_layers`."""
    chosen = choose_layers(model, layers, argument)
    patterns_of = choose_patterns(pattern, target, model, list(chosen.values()))
    kept = [key for key in chosen if patterns_of[key] is not None]
    return {key: chosen[key] for key in kept}, {key: patterns_of[key] for key in kept}


def _selects(selector: Any, layer: keras.Layer, names: list[str]) -> bool:
    if selector is None:
        return True
    if isinstance(selector, str):
        return is_named(names, selector)
    if isinstance(selector, type):
        return isinstance(layer, selector)
    if isinstance(selector, keras.Layer):
        return layer is selector
    if callable(selector):
        return bool(selector(layer))
    raise ValueError(
        "Argument `layers` must be a name, a layer class, a predicate `layer -> bool`, or a list of these. "
        f"Received: {selector!r}."
    )


def outermost_layers(model: keras.Model) -> Iterator[keras.Layer]:
    """The layers of a model and of the Sequential and Functional models inside it, each once."""
    seen = set()

    def walk(container):
        for layer in container.layers:
            if id(layer) in seen:
                continue
            seen.add(id(layer))
            if isinstance(layer, REBUILT):
                yield from walk(layer)
            else:
                yield layer

    return walk(model)


def kernels_by_layer(model: keras.Model) -> dict[int, list[Kernel] | ValueError]:
    """Find the kernels of each of the `outermost_layers`, by its `id`. Each kernel counts for one layer only.

    A layer that holds another of these layers reads the kernels of that layer. A layer that cannot be pruned has an error in
    place of its kernels, which says why.
    """
    layers = list(outermost_layers(model))
    ids = set(map(id, layers))
    readers = [layer for layer in layers if any(id(part) in ids for part in flatten_layers(layer, include_self=False))]
    found: dict[int, list[Kernel] | ValueError] = {}
    taken: set[int] = set()
    for layer in [layer for layer in layers if layer not in readers] + readers:
        try:
            kernels = [kernel for kernel in find_kernels(layer) if id(kernel.variable) not in taken]
        except ValueError as error:
            found[id(layer)] = error
            continue
        found[id(layer)] = kernels
        taken.update(id(kernel.variable) for kernel in kernels)
    return found
