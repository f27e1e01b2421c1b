"""Models as graphs of calls, and which units of a layer are read by what follows it.

A unit whose output meets only pruned weights does nothing for the network, and its own weights are the first that can go.
The walk goes from the outputs of a model back to its inputs and follows channels along the last axis of the tensors.
Wherever it does not know a layer (a subclass may do anything), it takes everything to be read.
"""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import keras
import numpy as np
from keras.src.models import Functional

from keras_renorm.layers.masked import MaskedLayer

L = keras.layers

# Channel i of the output depends on channel i of the input only.
CHANNEL_BY_CHANNEL = (
    L.Activation,
    L.ReLU,
    L.LeakyReLU,
    L.ELU,
    L.Dropout,
    L.SpatialDropout1D,
    L.SpatialDropout2D,
    L.SpatialDropout3D,
    L.GaussianDropout,
    L.GaussianNoise,
    L.Identity,
    L.Rescaling,
    L.MaxPooling1D,
    L.MaxPooling2D,
    L.MaxPooling3D,
    L.AveragePooling1D,
    L.AveragePooling2D,
    L.AveragePooling3D,
    L.GlobalMaxPooling1D,
    L.GlobalMaxPooling2D,
    L.GlobalMaxPooling3D,
    L.GlobalAveragePooling1D,
    L.GlobalAveragePooling2D,
    L.GlobalAveragePooling3D,
    L.ZeroPadding1D,
    L.ZeroPadding2D,
    L.ZeroPadding3D,
    L.Cropping1D,
    L.Cropping2D,
    L.Cropping3D,
    L.UpSampling1D,
    L.UpSampling2D,
    L.UpSampling3D,
    L.Add,
    L.Subtract,
    L.Multiply,
    L.Average,
    L.Maximum,
    L.Minimum,
)
_KERNEL_TIMES_CHANNELS = (L.Dense, L.Conv1D, L.Conv2D, L.Conv3D)
# Others, such as softmax or a function of the user's, may mix channels: whoever reads one output reads them all.
ELEMENTWISE_ACTIVATIONS = {
    keras.activations.get(name)
    for name in """
        linear relu relu6 leaky_relu elu selu celu gelu silu mish softplus softsign tanh sigmoid hard_sigmoid hard_silu
        exponential log_sigmoid
    """.split()  # noqa: SIM905
}


def walk_back(model: keras.Model, visit: Callable[[keras.Layer, np.ndarray], np.ndarray | None]) -> None:
    """Visit the Dense and convolution layers of a model from its outputs to its inputs.

    Args:
        model: a built model. Layers inside other models in it, and those of a subclassed model, are not visited.
        visit: called as `visit(layer, read)` with a bool for each unit of the layer: whether anything reads it. It answers
            with the kernel's mask, bool and shaped like the kernel, or `None` for a mask of ones.
    """
    # A Sequential model that Keras could not trace has no outputs.
    if not isinstance(model, (keras.Sequential, Functional)) or not getattr(model, "outputs", None):
        return
    nodes = list(_nodes_from_the_outputs(model))
    # A layer may also be called within another one: in a model in the model, or a wrapper.
    calls = collections.Counter(
        id(part)
        for node in nodes
        for part in (node.operation._flatten_layers() if isinstance(node.operation, keras.Layer) else ())
    )
    masks: dict[int, np.ndarray | None] = {}
    read: dict[int, np.ndarray] = {}

    def mark(tensor, channels):
        size = tensor.shape[-1] if len(tensor.shape) else None
        if size is None:
            return
        known = read.setdefault(id(tensor), np.zeros(size, bool))
        known |= True if channels is None or len(channels) != size else channels

    for tensor in keras.tree.flatten(model.outputs):
        mark(tensor, None)
    for node in nodes:
        wanted = [read.get(id(tensor)) for tensor in node.outputs]
        channels = wanted[0] if len(wanted) == 1 else None
        operation = node.operation
        layer = operation.layer if isinstance(operation, MaskedLayer) and hasattr(operation, "layer") else operation
        if channels is None:
            answers = [None] * len(node.input_tensors)
        elif getattr(layer, "plain_class", type(layer)) in _KERNEL_TIMES_CHANNELS and _by_last_axis(layer):
            if layer.activation not in ELEMENTWISE_ACTIVATIONS or calls[id(layer)] > 1:
                channels = np.ones_like(channels)
            if id(operation) not in masks:
                masks[id(operation)] = visit(operation, channels)
            mask = masks[id(operation)]
            reading = np.ones(layer.kernel.shape, bool) if mask is None else mask
            answers = [(reading & channels).reshape(-1, *reading.shape[-2:]).any(axis=(0, 2))]
        else:
            answers = _inputs_read(layer, channels, node.input_tensors)
        for tensor, answer in zip(node.input_tensors, answers):
            mark(tensor, answer)


def _inputs_read(layer, channels, inputs) -> list[np.ndarray | None]:
    """Which channels of each input a layer without a kernel reads for these channels of its output; `None` = all."""
    kind = type(layer)
    if kind is L.Activation and layer.activation not in ELEMENTWISE_ACTIVATIONS:
        return [None] * len(inputs)
    if kind in CHANNEL_BY_CHANNEL and getattr(layer, "data_format", "channels_last") != "channels_first":
        return [channels] * len(inputs)
    if kind is L.BatchNormalization and layer.axis in (-1, len(inputs[0].shape) - 1):
        return [channels]
    if kind is L.Flatten and layer.data_format != "channels_first" and inputs[0].shape[-1]:
        return [channels.reshape(-1, inputs[0].shape[-1]).any(axis=0)]
    if kind is L.Concatenate and layer.axis in (-1, len(inputs[0].shape) - 1):
        return np.split(channels, np.cumsum([tensor.shape[-1] for tensor in inputs])[:-1])
    return [None] * len(inputs)


def _by_last_axis(layer: keras.Layer) -> bool:
    return getattr(layer, "groups", 1) == 1 and getattr(layer, "data_format", "channels_last") != "channels_first"


def _nodes_from_the_outputs(model: keras.Model) -> Iterator:
    """The calls that make the outputs, each after all calls that use what it makes."""
    ordered, seen = [], set()

    def descend(tensor):
        stack = [(tensor, False)]
        while stack:
            tensor, done = stack.pop()
            operation, index, _ = tensor._keras_history
            node = operation._inbound_nodes[index]
            if done:
                ordered.append(node)
            elif id(node) not in seen and not node.is_input:
                seen.add(id(node))
                stack.append((tensor, True))
                stack.extend((source, False) for source in node.input_tensors)

    for tensor in keras.tree.flatten(model.outputs):
        descend(tensor)
    return reversed(ordered)


@dataclasses.dataclass(frozen=True)
class Call:
    """One call of a layer or an operation.

    Args:
        operation: the layer or operation.
        inputs: the tensors that it takes.
        outputs: the tensors that it makes.
        node: Keras' record of the call; its own tensors stand for `inputs` and `outputs`.
        times: how often the operation is called in the whole graph.
    """

    operation: Any
    inputs: list
    outputs: list
    node: Any
    times: int


@dataclasses.dataclass(frozen=True)
class Graph:
    """A Sequential or Functional model as calls, each after those that make its inputs, models within it taken apart.

    `same` gives for the `id` of a tensor of a model within the `id` of the tensor that is passed in or out there.
    """

    calls: list[Call]
    same: dict[int, int]

    def canonical(self, tensor: Any) -> int:
        key = id(tensor)
        while key in self.same:
            key = self.same[key]
        return key


def graph_of(model: keras.Model) -> Graph:
    """The calls of a built Sequential or Functional model. Models that are called more than once stay calls of their own."""
    nodes: list = []
    same: dict[int, int] = {}
    tensors: dict[int, Any] = {}

    def enter(functional):
        by_depth = functional._nodes_by_depth
        inner = [node for depth in sorted(by_depth, reverse=True) for node in by_depth[depth] if not node.is_input]
        uses = collections.Counter(id(node.operation) for node in inner)
        for node in inner:
            tensors.update((id(tensor), tensor) for tensor in (*node.input_tensors, *node.outputs))
            within = functional_of(node.operation)
            if within is None or uses[id(node.operation)] > 1:
                nodes.append(node)
                continue
            same.update((id(key), id(tensor)) for key, tensor in zip(within.inputs, node.input_tensors))
            enter(within)
            same.update((id(tensor), id(key)) for tensor, key in zip(node.outputs, within.outputs))

    enter(functional_of(model))
    graph = Graph([], same)
    counts = collections.Counter(
        id(part)
        for node in nodes
        for part in (node.operation._flatten_layers() if isinstance(node.operation, keras.Layer) else (node.operation,))
    )
    for node in nodes:
        ends = [[tensors[graph.canonical(tensor)] for tensor in side] for side in (node.input_tensors, node.outputs)]
        graph.calls.append(Call(node.operation, *ends, node, counts[id(node.operation)]))
    return graph


def functional_of(model: Any) -> Functional | None:
    """The functional graph of a model; `None` for anything else."""
    found = getattr(model, "_functional", None) if isinstance(model, keras.Sequential) else model
    return found if isinstance(found, Functional) else None


def check_graph(model: keras.Model) -> None:
    """Raise if the calls of a model cannot be seen."""
    if functional_of(model) is None:
        raise ValueError(
            f"Argument `model` must be a Sequential or Functional model. Received: model={model.name} (of type "
            f"{type(model).__name__}), whose graph cannot be seen from outside."
        )


def remake(model: keras.Model, graph: Graph, operation_for: Callable[[Call], Callable]) -> keras.Model:
    """A model of the same graph with other operations.

    Args:
        model: the model.
        graph: its calls.
        operation_for: gives for each call what is called in its place, with the same arguments.

    Returns:
        A new model; Sequential if `model` is and the new operations make a chain.
    """
    functional = functional_of(model)
    inputs = [keras.Input(batch_shape=tensor.shape, dtype=tensor.dtype, name=tensor.name) for tensor in functional.inputs]
    made = dict(zip(map(id, functional.inputs), inputs))
    for call in graph.calls:
        values = {id(key): made[id(tensor)] for key, tensor in zip(call.node.input_tensors, call.inputs)}
        args, kwargs = call.node.arguments.fill_in(values)
        made.update(zip(map(id, call.outputs), keras.tree.flatten(operation_for(call)(*args, **kwargs))))
    ends = [
        keras.tree.map_structure(lambda tensor: made[graph.canonical(tensor)], structure)
        for structure in (functional._inputs_struct, functional._outputs_struct)
    ]
    if isinstance(model, keras.Sequential) and (layers := _chain(ends[1])) is not None:
        return keras.Sequential([inputs[0], *layers], name=model.name)
    return keras.Model(*ends, name=model.name)


def _chain(output: Any) -> list | None:
    """The layers of which each takes what the one before makes, and the last makes this tensor; `None` if there are others."""
    layers: list = []
    while True:
        operation, index, _ = output._keras_history
        if isinstance(operation, L.InputLayer):
            return layers[::-1]
        sources = operation._inbound_nodes[index].input_tensors
        if len(sources) != 1 or not isinstance(operation, keras.Layer):
            return None
        layers.append(operation)
        output = sources[0]
