"""How a user's own layer uses its weights: multiplied with its inputs, used as a lookup table, or added to the inputs.

Position embeddings and class tokens are tables of weights that a network adds to its inputs, or concatenates with them. A zero
in such a table is a value like any other: it saves no computation, and it makes no unit less important. So they are not
kernels.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from typing import Any

import keras

from keras_renorm.src.core.keras_internals import (
    LISTS_OF_VARIABLES,
    build_shapes,
    flatten_layers,
    history_of,
    inbound_nodes,
    names_in_use,
    outbound_nodes,
)

# Operations that put tensors together without a product of their values, such as sums, and those that choose among them.
_JOINING = {"Add", "Append", "Concatenate", "Hstack", "Maximum", "Minimum", "Stack", "Subtract", "Vstack", "Where"}
_NAMES_OF_ADDED = re.compile(r"position|pos_?emb|(class|cls|dist|distillation|mask|register)_?token")


def added_weights(layer: keras.Layer, weights: list[keras.Variable]) -> set[int]:
    """Find the weights of a layer that are only added to its inputs, or do not meet the inputs at all.

    The layer is called once on symbolic tensors of the shapes that it was built for. A weight is multiplied if it, or a tensor
    made from it, meets a tensor made from the inputs in any operation other than a sum, a concatenation or a choice among
    values: in a product, a convolution, or a lookup with the inputs as indices. If it is passed to another layer beside the
    inputs, it counts as data. Tables of `Embedding` layers inside the layer that are only looked up by constants count as
    added. If the call cannot be followed (it uses operations of TensorFlow, for example), names and shapes decide: names with
    "position" or "token", or a shape `(1, ..., n)` that is broadcast over samples.

    Args:
        layer: a built layer.
        weights: variables that the layer itself holds.

    Returns:
        The `id` of these variables, and of the tables of such embeddings.
    """
    within = flatten_layers(layer, include_self=False, recursive=False)
    tables = [part for part in within if isinstance(part, keras.layers.Embedding) and part.built]
    if not weights and not tables:
        return set()
    try:
        multiplied, met, by_constants = _follow(layer, weights, tables)
    except Exception:
        added = {id(weight) for weight in weights if _NAMES_OF_ADDED.search(weight.name) or _is_broadcast(weight)}
        return added | {id(part.embeddings) for part in tables if _NAMES_OF_ADDED.search(part.name)}
    return (met - multiplied) | {id(part.embeddings) for part in by_constants}


def _is_broadcast(weight: keras.Variable) -> bool:
    return len(weight.shape) > 2 and weight.shape[0] == 1


def _follow(layer, weights, tables) -> tuple[set[int], set[int], list]:
    """The weights that are multiplied, the weights that are used at all, and the tables that only constants look up."""
    called: set[int] = set()
    with contextlib.ExitStack() as stack:
        stack.enter_context(_without_traces(layer))
        of_weights = {id(weight): keras.KerasTensor(weight.shape, weight.dtype) for weight in weights}
        args, kwargs = _symbolic_inputs(layer)
        stack.enter_context(_in_place_of_weights(layer, of_weights))
        before = {id(part): len(inbound_nodes(part)) for part in tables}
        for part in tables:
            stack.enter_context(_attribute(part, "call", _noting(part, called)))
        with keras.StatelessScope():
            outputs = layer.call(*args, **kwargs)
        by_constants = [part for part in tables if id(part) in called and len(inbound_nodes(part)) == before[id(part)]]
        multiplied, met = _meetings(outputs, {id(tensor): key for key, tensor in of_weights.items()})
    return multiplied, met, by_constants


def _symbolic_inputs(layer: keras.Layer) -> tuple[list, dict[str, Any]]:
    """Symbolic inputs of the shapes that the layer was built for, with 2 for free sides."""
    shapes = build_shapes(layer)

    def symbolic(shape):
        return keras.KerasTensor([2 if side is None else side for side in shape], layer.compute_dtype)

    tensors = {name: keras.tree.map_shape_structure(symbolic, shape) for name, shape in shapes.items()}
    if len(tensors) == 1:
        return list(tensors.values()), {}
    return [], {name.removesuffix("_shape"): tensor for name, tensor in tensors.items()}


def _meetings(outputs: Any, weights: dict[int, int]) -> tuple[set[int], set[int]]:
    """The weights that are multiplied on their way to the outputs, and those that are on the way at all."""
    multiplied: set[int] = set()
    met: set[int] = set()
    # Of each tensor: the weights that it is made of alone, or `None` if something of the inputs is in it.
    made_of: dict[int, set[int] | None] = {}

    def of(tensor):
        return made_of.get(id(tensor), {weights[id(tensor)]} if id(tensor) in weights else None)

    for node in _nodes_before(outputs):
        parts = [of(tensor) for tensor in node.input_tensors]
        alone = set().union(*(part for part in parts if part))
        met |= alone
        from_inputs = any(part is None for part in parts)
        if from_inputs and not isinstance(node.operation, keras.Layer) and type(node.operation).__name__ not in _JOINING:
            multiplied |= alone
        made_of.update((id(tensor), None if from_inputs else alone) for tensor in node.outputs)
    met |= {weights[id(tensor)] for tensor in keras.tree.flatten(outputs) if id(tensor) in weights}
    return multiplied, met


def _nodes_before(outputs: Any) -> list:
    """The calls that make some tensors, each after the calls that make its inputs."""
    ordered, seen = [], set()
    stack = [(tensor, False) for tensor in keras.tree.flatten(outputs)]
    while stack:
        tensor, done = stack.pop()
        history = history_of(tensor)
        if history is None or history.operation is None:
            continue
        node = inbound_nodes(history.operation)[history.node_index]
        if done:
            ordered.append(node)
        elif id(node) not in seen:
            seen.add(id(node))
            stack.append((tensor, True))
            stack.extend((source, False) for source in node.input_tensors)
    return ordered


@contextlib.contextmanager
def _without_traces(layer: keras.Layer) -> Iterator[None]:
    """Undo what the calls inside the context leave behind: nodes, and used names."""
    nodes = [nodes for part in flatten_layers(layer) for nodes in (inbound_nodes(part), outbound_nodes(part))]
    lengths = [len(one) for one in nodes]
    taken = names_in_use()
    before = None if taken is None else dict(taken)
    try:
        yield
    finally:
        for one, length in zip(nodes, lengths):
            del one[length:]
        if before is not None:
            taken.clear()
            taken.update(before)


@contextlib.contextmanager
def _in_place_of_weights(layer: keras.Layer, tensors: dict[int, Any]) -> Iterator[None]:
    """Put tensors in place of the weights in the attributes of a layer, also in lists and dicts."""

    def exchanged(value):
        if isinstance(value, (list, tuple)):
            return [exchanged(one) for one in value]
        if isinstance(value, dict):
            return {key: exchanged(one) for key, one in value.items()}
        return tensors.get(id(value), value)

    # Keras' own lists of weights stay.
    kept = {name: value for name, value in vars(layer).items() if name not in LISTS_OF_VARIABLES and _holds(value, tensors)}
    try:
        # Not by `setattr`, which would let Keras track what is set.
        vars(layer).update([(name, exchanged(value)) for name, value in kept.items()])
        yield
    finally:
        vars(layer).update(kept)


def _holds(value: Any, tensors: dict[int, Any]) -> bool:
    if isinstance(value, (list, tuple, dict)):
        return any(_holds(one, tensors) for one in (value.values() if isinstance(value, dict) else value))
    return id(value) in tensors


@contextlib.contextmanager
def _attribute(part: keras.Layer, name: str, value: Any) -> Iterator[None]:
    """An attribute of one layer that hides the attribute of its class."""
    had = name in vars(part)
    before = vars(part).get(name)
    vars(part)[name] = value
    try:
        yield
    finally:
        if had:
            vars(part)[name] = before
        else:
            del vars(part)[name]


def _noting(part: keras.Layer, called: set[int]) -> Any:
    call = part.call

    def noting(*args, **kwargs):
        called.add(id(part))
        return call(*args, **kwargs)

    return noting
