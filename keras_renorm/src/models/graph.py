"""Models as graphs of calls, with inner models dissolved, and the same graph with other layers."""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Callable
from typing import Any

import keras

from keras_renorm.src.core.keras_internals import (
    Functional,
    flat_arguments,
    flatten_layers,
    functional_in,
    history_of,
    inbound_nodes,
    inputs_structure,
    nodes_of,
    outputs_structure,
    takes_training,
)
from keras_renorm.src.models.captures import captured_by

L = keras.layers

# Others, such as softmax or a function of the user's, may mix channels: whoever reads one output reads them all.
ELEMENTWISE_ACTIVATIONS = {
    keras.activations.get(name)
    for name in """
        linear relu relu6 leaky_relu elu selu celu gelu silu mish softplus softsign tanh sigmoid hard_sigmoid hard_silu
        exponential log_sigmoid
    """.split()  # noqa: SIM905
}


@dataclasses.dataclass(frozen=True)
class GraphCall:
    """One call of a layer or an operation.

    Args:
        operation: the layer or operation.
        inputs: the tensors that it takes.
        outputs: the tensors that it makes.
        node: Keras' record of the call, whose own tensors correspond to `inputs` and `outputs`.
        times: how often the operation, a part of it or one of its variables is used in the whole graph.
        training: the argument `training` of the call, or of the call of the outermost model around it; `None` if it is not
            given.
    """

    operation: Any
    inputs: list
    outputs: list
    node: Any
    times: int = 1
    training: bool | None = None

    def fill_in(self, tensors: dict[int, Any]) -> tuple[tuple, dict[str, Any]]:
        """The arguments of the call with other tensors.

        Args:
            tensors: the replacement of each of `inputs`, by its `id`. All other arguments are kept.
        """
        values = {id(key): tensors[id(tensor)] for key, tensor in zip(self.node.input_tensors, self.inputs)}
        args, kwargs = self.node.arguments.fill_in(values)
        if self.training is not None and takes_training(self.operation):
            kwargs = {**kwargs, "training": self.training}
        return args, kwargs


@dataclasses.dataclass(frozen=True)
class Graph:
    """A Sequential or Functional model as calls, each after the calls that make its inputs, with inner models dissolved.

    Args:
        calls: the calls.
        tensors: the tensors of the calls for the tensors of the model itself, by `id`. They may differ, because a model may be
            called on its own inputs.
    """

    calls: list[GraphCall]
    tensors: dict[int, Any]

    def canonical(self, tensor: Any) -> int:
        """The `id` of the tensor of the calls for a tensor of the model itself."""
        return id(self.tensors[id(tensor)])


def graph_of(model: keras.Model) -> Graph:
    """The calls of a built Sequential or Functional model. Models that are called more than once remain calls."""
    calls: list[GraphCall] = []
    taken: set[int] = set()

    def own(tensor):
        """A tensor of its own for each call: those of a model that is called within another may be in use there, too."""
        if id(tensor) in taken:
            tensor = keras.KerasTensor(tensor.shape, tensor.dtype, name=tensor.name)
        taken.add(id(tensor))
        return tensor

    def enter(functional, tensors, training):
        inner = [node for node in nodes_of(functional) if not node.is_input]
        uses = collections.Counter(id(node.operation) for node in inner)
        for node in inner:
            inputs = [tensors[id(tensor)] for tensor in node.input_tensors]
            # As in Keras, the argument of the call of a model has precedence over those of the calls inside it.
            here = node.arguments.kwargs.get("training") if training is None else training
            within = functional_of(node.operation) if uses[id(node.operation)] == 1 else None
            if within is not None and _takes_as_they_are(within, node):
                made = enter(within, dict(zip(map(id, within.inputs), inputs)), here)
                outputs = [made[id(tensor)] for tensor in within.outputs]
            else:
                outputs = [own(tensor) for tensor in node.outputs]
                calls.append(GraphCall(node.operation, inputs, outputs, node, training=here))
            tensors.update(zip(map(id, node.outputs), outputs))
        return tensors

    functional = functional_of(model)
    taken.update(map(id, functional.inputs))
    tensors = enter(functional, {id(tensor): tensor for tensor in functional.inputs}, None)
    parts = {id(part): part for part in (*flatten_layers(model), *model.variables)}
    used = [_used_by(call, parts) for call in calls]
    users = collections.Counter(key for keys in used for key in keys)
    counted = [dataclasses.replace(call, times=max(users[key] for key in keys)) for call, keys in zip(calls, used)]
    return Graph(counted, tensors)


def users_of(model: keras.Model) -> dict[int, list[Any]]:
    """The layers and operations that use a layer or a variable, by its `id`. Models are not listed, but their layers are."""
    parts = {id(part): part for part in (*flatten_layers(model), *model.variables)}
    graphs = [found for part in flatten_layers(model) if (found := functional_of(part)) is not None]
    nodes = [node for graph in graphs for node in nodes_of(graph)]
    users: dict[int, list[Any]] = {}
    for node in {id(node): node for node in nodes if not isinstance(node.operation, (keras.Sequential, Functional))}.values():
        for key in _used_by(GraphCall(node.operation, [], [], node), parts):
            if all(node.operation is not known for known in users.setdefault(key, [])):
                users[key].append(node.operation)
    return users


def _takes_as_they_are(within: Functional, node: Any) -> bool:
    """Whether a model passes its inputs to its layers unchanged. It may cast them, add axes, or look them up by their names."""
    given = node.input_tensors
    others = [value for name, value in node.arguments.kwargs.items() if name != "training"]
    return (
        len(given) == len(within.inputs)
        and len(node.arguments.args) == 1
        and _in_the_same_order(inputs_structure(within), node.arguments.args[0])
        and all(value is None for value in keras.tree.flatten(others))
        and all(one.dtype == other.dtype and len(one.shape) == len(other.shape) for one, other in zip(given, within.inputs))
    )


def _in_the_same_order(wanted: Any, given: Any) -> bool:
    if isinstance(wanted, dict) or isinstance(given, dict):
        return (
            isinstance(wanted, dict)
            and isinstance(given, dict)
            and wanted.keys() == given.keys()
            and all(_in_the_same_order(wanted[key], given[key]) for key in wanted)
        )
    if isinstance(wanted, (list, tuple)) and isinstance(given, (list, tuple)):
        return len(wanted) == len(given) and all(map(_in_the_same_order, wanted, given))
    return True


def _used_by(call: GraphCall, parts: dict[int, Any]) -> set[int]:
    """The `id` of everything that a call uses.

    That is its operation, the layers inside it, their variables, variables among its arguments, and what its functions capture.
    """
    used = [call.operation, *captured_by(call.operation, parts)]
    for one in tuple(used):
        if isinstance(one, keras.Layer):
            used += [*flatten_layers(one), *one.variables]
    used += [one for one in flat_arguments(call.node) if isinstance(one, keras.Variable)]
    return set(map(id, used))


def functional_of(model: Any) -> Functional | None:
    """The functional graph of a model; `None` for anything else, such as a subclass with its own `call`."""
    if isinstance(model, keras.Sequential):
        return functional_in(model) if type(model).call is keras.Sequential.call else None
    return model if isinstance(model, Functional) and type(model).call is Functional.call else None


def check_graph(model: keras.Model) -> None:
    """Raise if the calls of a model cannot be listed."""
    if functional_of(model) is None:
        raise ValueError(
            f"Argument `model` must be a Sequential or Functional model. Received: model={model.name} (of type "
            f"{type(model).__name__}), whose graph is not known."
        )


def rebuild_model(model: keras.Model, graph: Graph, operation_for: Callable[[GraphCall], Callable]) -> keras.Model:
    """Build a model with the same graph and other operations.

    Args:
        model: the model.
        graph: its calls.
        operation_for: returns the replacement of the operation of each call, which is called with the same arguments.

    Returns:
        A new model, which is Sequential if `model` is and the new operations are a chain.
    """
    functional = functional_of(model)
    inputs = [_input_like(tensor) for tensor in functional.inputs]
    made = dict(zip(map(id, functional.inputs), inputs))
    for call in graph.calls:
        args, kwargs = call.fill_in(made)
        made.update(zip(map(id, call.outputs), keras.tree.flatten(operation_for(call)(*args, **kwargs))))
    ends = [
        keras.tree.map_structure(lambda tensor: made[graph.canonical(tensor)], structure)
        for structure in (inputs_structure(functional), outputs_structure(functional))
    ]
    if isinstance(model, keras.Sequential) and (layers := _chain(ends[1])) is not None:
        return keras.Sequential([inputs[0], *layers], name=model.name)
    return keras.Model(*ends, name=model.name)


def _input_like(tensor: Any) -> Any:
    layer = history_of(tensor).operation
    made = keras.Input(
        batch_shape=tensor.shape,
        dtype=tensor.dtype,
        sparse=tensor.sparse,
        name=layer.name,
        optional=getattr(layer, "optional", False),
    )
    # Where the user gave no name, that of the layer is another.
    made.name = tensor.name
    return made


def _chain(output: Any) -> list | None:
    """The layers of a chain that ends with this tensor, each of which takes the output of the one before; `None` if it is no
    chain.
    """
    layers: list = []
    while True:
        operation, index, _ = history_of(output)
        if isinstance(operation, L.InputLayer):
            return layers[::-1]
        sources = inbound_nodes(operation)[index].input_tensors
        if len(sources) != 1 or not isinstance(operation, keras.Layer):
            return None
        layers.append(operation)
        output = sources[0]
