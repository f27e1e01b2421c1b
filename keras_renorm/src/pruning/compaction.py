"""`compact`: a smaller network that computes the same, without dead units."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable
from typing import Any

import keras
import numpy as np

from keras_renorm.src.core import validation
from keras_renorm.src.core.arrays import as_array, for_another
from keras_renorm.src.core.keras_internals import Functional, flatten_layers
from keras_renorm.src.core.tables import format_table
from keras_renorm.src.layers.kernels import Kernel
from keras_renorm.src.layers.prunable import prunable_layers
from keras_renorm.src.models.channels.rule import ChannelRule
from keras_renorm.src.models.channels.table import rule_of
from keras_renorm.src.models.channels.walks import tied_tensors
from keras_renorm.src.models.comparing import check_same
from keras_renorm.src.models.copying import Copier
from keras_renorm.src.models.graph import Graph, check_graph, functional_of, graph_of, rebuild_model
from keras_renorm.src.models.model_copies import compile_like
from keras_renorm.src.pruning.conversion import strip


@dataclasses.dataclass(frozen=True)
class CompactedLayer:
    """A layer that became smaller: the shape of its first weight and its number of parameters, before and after."""

    layer: str
    before: tuple[int, ...]
    after: tuple[int, ...]
    parameters_before: int
    parameters_after: int


@dataclasses.dataclass(frozen=True)
class CompactionReport:
    """The report of `keras_renorm.compact`. Print it for a table; `rows` and `left_whole` are the data.

    Attributes:
        rows: tuple of `CompactedLayer`: the layers that became smaller.
        left_whole: names of the layers through which channels cannot be followed. They and their neighbors keep their channels.
        parameters_before: number of parameters of the whole model before.
        parameters_after: number of parameters of the whole model after.
    """

    rows: tuple[CompactedLayer, ...]
    left_whole: tuple[str, ...]
    parameters_before: int
    parameters_after: int

    def __str__(self) -> str:
        cells = [
            (row.layer, str(row.before), str(row.after), f"{row.parameters_before:,}", f"{row.parameters_after:,}")
            for row in self.rows
        ]
        cells.append(("total", "", "", f"{self.parameters_before:,}", f"{self.parameters_after:,}"))
        header = ("layer", "weight", "now", "parameters", "now")
        table = format_table(header, cells, right=(3, 4), total=True)
        return f"{table}\nLeft whole: {', '.join(self.left_whole)}" if self.left_whole else table

    __repr__ = __str__


def compact(model: keras.Model) -> keras.Model:
    """Remove dead units: the result is a smaller model with the same outputs, which is faster on every device.

    A unit is removed if no layer reads it, or if it is constant (all its weights are zero) and the layers that read it can take
    the constant into their biases. The weights that read a removed unit are removed with it. Channels are followed through
    Dense layers, all kinds of convolutions, normalization, activations, pooling, Flatten, Reshape, Add, Multiply, Concatenate,
    embeddings, attention, recurrent layers, and models inside the model, which are dissolved. If channels reach a layer of
    another kind (your own layer, or a layer that is called in several places), this layer and the channels next to it are kept,
    and the report names it.

    The model that is passed in is not changed.

    Args:
        model: a built Sequential or Functional model, with prunable layers or with plain ones.

    Returns:
        A new model of plain Keras layers. It is compiled if `model` is, with a fresh optimizer. Its attribute
        `compaction_report` tells what became smaller; it is not saved with the model.

    Raises:
        ValueError: if the model is not built, or not Sequential or Functional.
        TypeError: if it is not a Keras 3 model.

    Example:

    >>> import keras, keras_renorm as kr
    >>> model = keras.Sequential([keras.Input((8,)), keras.layers.Dense(16, "relu"), keras.layers.Dense(4)])
    >>> small = kr.compact(kr.prune(model, 0.5, pattern="unit"))
    >>> small.count_params() < model.count_params()
    True
    """
    validation.check_model(model)
    check_graph(model)
    if type(model) not in (keras.Sequential, Functional):
        warnings.warn(
            f"Model '{model.name}' is a {type(model).__name__}, the smaller one a plain one: what the class adds (such as its "
            "own `train_step`) is not carried over.",
            stacklevel=2,
        )
    plain = strip(model) if prunable_layers(model) else model
    graph = graph_of(plain)
    rules = [rule_of(call) for call in graph.calls]
    constants, kept = _channels_to_keep(plain, graph, rules)
    smaller, rows, same = _smaller(plain, graph, rules, constants, kept)
    check_same(model, smaller, same if plain is model else {}, "The compacted copy")
    if model.compiled:
        compile_like(smaller, model)
    whole = [rule.layer.name for rule in rules if not rule.known]
    smaller.compaction_report = CompactionReport(
        tuple(rows), tuple(dict.fromkeys(whole)), plain.count_params(), smaller.count_params()
    )
    return smaller


def units_that_stay(model: keras.Model, kernels: list[Kernel]) -> dict[int, str]:
    """Find the kernels with units without weights that `compact` cannot remove, and why, by the `id` of their variables.

    Args:
        model: a built model.
        kernels: kernels of the model.
    """
    dead = {}
    for kernel in kernels:
        units = ~(as_array(kernel.variable) != 0).any(axis=kernel.input_axes).reshape(-1)
        if units.any():
            dead[id(kernel.variable)] = units
    if functional_of(model) is None:
        return dict.fromkeys(dead, f"the graph of a {type(model).__name__} cannot be seen from outside")
    graph = graph_of(model)
    rules = [rule_of(call) for call in graph.calls] if dead else []
    _, kept = _channels_to_keep(model, graph, rules)
    made_by = {id(variable): rule for rule in rules for variable in rule.makers}
    root = tied_tensors(rules)
    outputs = {root(graph.canonical(tensor)) for tensor in functional_of(model).outputs}
    found = {}
    for key, units in dead.items():
        if key not in made_by:
            found[key] = "these layers stay whole, or are inside one that does"
            continue
        tensor = id(made_by[key].call.outputs[0])
        # At least one unit is kept.
        if np.count_nonzero(kept[tensor] & units) > int(units.all()):
            holding = ["outputs of the model"] if root(tensor) in outputs else []
            holding += [f"inputs or outputs of '{name}'" for name in _holding(rules, root, root(tensor))]
            found[key] = f"their units are {', '.join(holding)}" if holding else "their outputs are constant, but not zero"
    return found


def _holding(rules: list[ChannelRule], root: Callable[[int], int], group: int) -> list[str]:
    """The layers that need all channels of the tensors of one group."""
    names = []
    for rule in rules:
        sides = (rule.call.inputs, rule.call.outputs)
        answers = rule.tie(*([np.zeros(_size(tensor), bool) for tensor in side] for side in sides))
        if any(
            flags.all() and root(id(tensor)) == group
            for side, answer in zip(sides, answers)
            for tensor, flags in zip(side, answer)
        ):
            names.append(rule.layer.name)
    return list(dict.fromkeys(names))


def _size(tensor: Any) -> int:
    return (tensor.shape[-1] or 1) if len(tensor.shape) else 1


def _channels_to_keep(model: keras.Model, graph: Graph, rules: list[ChannelRule]) -> tuple[dict, dict]:
    """By the `id` of each tensor: the values of its constant channels, and which channels are kept."""
    functional = functional_of(model)
    tensors = {id(tensor): tensor for rule in rules for tensor in (*rule.call.inputs, *rule.call.outputs)}
    tensors.update((id(tensor), tensor) for tensor in functional.inputs)
    sizes = {key: _size(tensor) for key, tensor in tensors.items()}
    constants = {key: np.full(size, np.nan) for key, size in sizes.items()}
    for rule in rules:
        made = rule.constants([constants[id(tensor)] for tensor in rule.call.inputs])
        constants.update(zip(map(id, rule.call.outputs), made))
    needed = {key: np.zeros(size, bool) for key, size in sizes.items()}
    for tensor in (*functional.inputs, *functional.outputs):
        needed[graph.canonical(tensor)][:] = True
    for rule in reversed(rules):
        ends = [needed[id(tensor)] for tensor in rule.call.outputs], [constants[id(tensor)] for tensor in rule.call.inputs]
        for tensor, flags in zip(rule.call.inputs, rule.reads(*ends)):
            needed[id(tensor)] |= flags
    return constants, _agree(rules, needed)


def _agree(rules: list[ChannelRule], kept: dict[int, np.ndarray]) -> dict[int, np.ndarray]:
    """Keep more channels until each layer can work with the channels that are kept on its two sides."""
    while True:
        before = sum(int(flags.sum()) for flags in kept.values())
        for flags in kept.values():
            if not flags.any():
                flags[0] = True
        for rule in (*reversed(rules), *rules):
            sides = [[kept[id(tensor)] for tensor in side] for side in (rule.call.inputs, rule.call.outputs)]
            for side, answers in zip((rule.call.inputs, rule.call.outputs), rule.tie(*sides)):
                for tensor, flags in zip(side, answers):
                    kept[id(tensor)] = kept[id(tensor)] | flags
        if sum(int(flags.sum()) for flags in kept.values()) == before:
            return kept


def _smaller(
    model: keras.Model, graph: Graph, rules: list[ChannelRule], constants: dict, kept: dict
) -> tuple[keras.Model, list[CompactedLayer], dict[int, keras.Layer]]:
    """The smaller model, the layers that became smaller, and the layers that compute the same as before, by the `id` of their
    originals.
    """
    copier = Copier(model)
    rebuilt: dict[int, tuple[Any, list[np.ndarray] | None]] = {}
    same: dict[int, keras.Layer] = {}
    names: set[str] = set()
    waiting = iter(rules)

    def operation_for(call):
        rule = next(waiting)
        sides = [[kept[id(tensor)] for tensor in side] for side in (call.inputs, call.outputs)]
        whole = rule.stays(*sides)
        if id(call.operation) not in rebuilt:
            made = [constants[id(tensor)] for tensor in call.inputs]
            rebuilt[id(call.operation)] = (copier.copy(rule.layer), None) if whole else rule.rebuild(*sides, made)
            _give_a_name(rebuilt[id(call.operation)][0], names)
        operation = rebuilt[id(call.operation)][0]
        if all(flags.all() for flags in sides[1]):
            same[id(call.operation)] = operation

        def call_anew(*args, **kwargs):
            args, kwargs = keras.tree.map_structure(counterpart, (args, kwargs))
            args, kwargs = (args, kwargs) if whole else rule.arguments(args, kwargs, sides[1])
            return operation(*args, **kwargs)

        return call_anew

    def counterpart(argument):
        # What is used in several places belongs to layers that stay whole.
        return copier.copy(argument) if isinstance(argument, keras.Variable) else argument

    smaller = rebuild_model(model, graph, operation_for)
    rows = []
    for rule in rules:
        layer, weights = rebuilt.pop(id(rule.layer), (None, None))
        if isinstance(layer, keras.Layer):
            if weights is not None:
                _fill(layer, rule.layer, weights)
            if layer.count_params() < rule.layer.count_params():
                shapes = [tuple(one.variables[0].shape) for one in (rule.layer, layer)]
                rows.append(CompactedLayer(layer.name, *shapes, rule.layer.count_params(), layer.count_params()))
    return smaller, rows, same


def _fill(layer: keras.Layer, original: keras.Layer, weights: list[np.ndarray]) -> None:
    """Give a smaller layer the values of its original, with everything else that the original holds."""
    for variable, value in zip(layer.weights, weights, strict=True):
        variable.assign(value)
    for variable, value in zip(_states(layer), _states(original), strict=True):
        variable.assign(for_another(value))
    for part, before in zip(flatten_layers(layer), flatten_layers(original), strict=True):
        if part.trainable != before.trainable:
            part.trainable = before.trainable


def _states(layer: keras.Layer) -> list[keras.Variable]:
    """The states of a layer beside its weights, such as the state of a random number generator, which do not depend on
    channels.
    """
    weights = {id(weight) for weight in layer.weights}
    return [variable for variable in layer.variables if id(variable) not in weights]


def _give_a_name(layer: Any, names: set[str]) -> None:
    """Give a layer a name of its own: layers of models that are dissolved may have the same names."""
    name, number = layer.name, 1
    while layer.name in names:
        layer.name = f"{name}_{number}"
        number += 1
    names.add(layer.name)
