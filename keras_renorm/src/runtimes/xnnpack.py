"""The networks whose 1x1 convolutions XNNPACK, the kernel library of the runtime, computes without their zeros.

The rules are those of `xnn_subgraph_rewrite_for_nchw` in XNNPACK's `src/subgraph.c` (2026), which converts a part of a network
to channels first. That part must begin with a certain kind of convolution, end with a global average, and contain only
operations that have a kernel for channels first. This module judges a float network by its operations, whoever lists them.
"""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Hashable, Iterable
from typing import Any

import keras
import numpy as np
from keras import ops

from keras_renorm.src.core.keras_internals import operation_classes
from keras_renorm.src.models.graph import ELEMENTWISE_ACTIVATIONS, GraphCall, graph_of

L = keras.layers
_CONVOLUTIONS = (L.Conv2D, L.DepthwiseConv2D, L.SeparableConv2D)
_ELEMENTWISE = (L.ReLU, L.LeakyReLU, L.ELU, L.Dropout, L.SpatialDropout2D, L.Identity)
_OF_TWO = (L.Add, L.Multiply, *operation_classes("Add", "Multiply"))
# More than this share of the weights of all 1x1 convolutions must be zero.
LEAST_ZEROS = 2 / 3


@dataclasses.dataclass(frozen=True)
class Node:
    """An operation, as far as the rules depend on it.

    Args:
        name: name of the layer.
        kind: `"conv"`, `"depthwise"`, `"elementwise"`, `"mean"` (over rows and columns), or another kind, in words.
        inputs: the values that the operation takes, without weights.
        outputs: the values that the operation makes.
        kernel: rows and columns of the kernel of a convolution.
        strides: strides of a convolution.
        dilation: dilation of a convolution.
        padding: added rows above and below, added columns left and right; `None` if they are not written down, as for padding
            "same" with strides.
        channels: number of input channels of the kernel of a convolution.
        plain: whether a convolution has one group, or a depthwise convolution a multiplier of one.
        zeros: number of zero weights of a 1x1 convolution.
        weights: number of weights of a 1x1 convolution.
    """

    name: str
    kind: str
    inputs: tuple[Hashable, ...]
    outputs: tuple[Hashable, ...]
    kernel: tuple[int, int] = (1, 1)
    strides: tuple[int, int] = (1, 1)
    dilation: tuple[int, int] = (1, 1)
    padding: tuple[int, int, int, int] | None = (0, 0, 0, 0)
    channels: int = 0
    plain: bool = True
    zeros: int = 0
    weights: int = 0

    @property
    def is_pointwise(self) -> bool:
        return self.kind == "conv" and self.kernel == (1, 1)

    @property
    def is_entry(self) -> bool:
        """Whether the operation converts its input to channels first."""
        return self.kind == "conv" and self.plain and self._is_padded(1, (3, 3), (2, 2)) and self.channels == 3

    def _is_padded(self, margin, kernel, strides):
        shape = (self.kernel, self.strides, self.dilation, self.padding)
        return shape == (kernel, strides, (1, 1), (margin,) * 4)

    @property
    def is_supported(self) -> bool:
        """Whether the operation has a kernel for channels first."""
        if self.is_pointwise:
            return self.plain and self._is_padded(0, (1, 1), (1, 1))
        if self.kind == "depthwise":
            shapes = [(1, (3, 3)), (2, (5, 5))]
            return self.plain and any(self._is_padded(*shape, (stride,) * 2) for shape in shapes for stride in (1, 2))
        return self.kind in ("elementwise", "mean")


@dataclasses.dataclass(frozen=True)
class Breaker:
    """A layer that prevents a network from being computed without its zeros, why, and what to do."""

    layer: str
    reason: str
    remedy: str

    def __str__(self) -> str:
        return f"'{self.layer}' {self.reason}. {self.remedy}"


def pointwise_zeros(nodes: Iterable[Node]) -> float:
    """The share of zeros in the weights of all 1x1 convolutions."""
    pointwise = [node for node in nodes if node.is_pointwise]
    return sum(node.zeros for node in pointwise) / max(1, sum(node.weights for node in pointwise))


def find_breakers(nodes: list[Node]) -> list[Breaker]:
    """Find what prevents XNNPACK's sparse path, apart from the number of zeros. The list is empty if the network qualifies.

    Args:
        nodes: the operations of a network, each after those that make its inputs.

    Raises:
        ValueError: if the network has no 1x1 convolution, so that there is nothing to gain.
    """
    if not any(node.is_pointwise for node in nodes):
        raise ValueError("The network has no 1x1 convolution.")
    ends = [node for node in nodes if node.kind == "mean"]
    if not ends:
        last = [node for node in nodes if node.kind in ("conv", "depthwise")][-1]
        return [
            Breaker(
                last.name,
                "is not followed by global average pooling, with which the part that is computed sparsely must end",
                "Put GlobalAveragePooling2D and Dense after the last convolution.",
            )
        ]
    makers = {value: node for node in nodes for value in node.outputs}
    readers = collections.defaultdict(list)
    for node in nodes:
        for value in node.inputs:
            readers[value].append(node)
    part, waiting, found = {}, [ends[-1]], {}
    while waiting:
        node = waiting.pop()
        if id(node) in part:
            continue
        part[id(node)] = node
        if node.is_entry:
            continue
        if not node.is_supported:
            found[node.name] = _describe(node)
        for value in node.inputs:
            if value in makers:
                waiting.append(makers[value])
            elif node.is_supported:
                found[node.name] = Breaker(
                    node.name,
                    "reads the input of the model, where a 3x3 convolution with stride 2 on 3 channels must come first",
                    "Begin with Conv2D(filters, 3, strides=2) after ZeroPadding2D(1).",
                )
    inside = [node for node in nodes if id(node) in part]
    for node in inside:
        outside = [reader for value in node.outputs for reader in readers[value] if id(reader) not in part]
        if outside and node is not ends[-1] and node.name not in found:
            found[node.name] = Breaker(
                node.name,
                f"is also read by '{outside[0].name}', outside of the part that can be computed sparsely",
                "Let everything between the first convolution and the last global average pooling end in that pooling.",
            )
    order = {node.name: index for index, node in enumerate(nodes)}
    return sorted(found.values(), key=lambda breaker: order[breaker.layer])


def _describe(node: Node) -> Breaker:
    if node.kind not in ("conv", "depthwise"):
        return Breaker(node.name, f"is {node.kind}, for which there is no kernel", "Replace it, or prune whole units instead.")
    rows, columns = node.kernel
    shape = f"is a {rows}x{columns} {'depthwise ' if node.kind == 'depthwise' else ''}convolution with strides {node.strides}"
    if node.is_pointwise:
        return Breaker(node.name, shape, "Supported are 1x1 convolutions with strides 1, without padding, groups or dilation.")
    if node.kind == "conv" and (node.kernel, node.strides, node.channels, node.plain) != ((3, 3), (2, 2), 3, True):
        return Breaker(
            node.name,
            f"{shape} on {node.channels} channels",
            "Only the first convolution may be other than 1x1 and depthwise: 3x3, strides 2, 3 channels, after "
            "ZeroPadding2D(1). Build the others of depthwise and 1x1 ones, or prune whole units instead.",
        )
    margin = {(3, 3): 1, (5, 5): 2}.get(node.kernel)
    if margin is None or node.strides not in ((1, 1), (2, 2)) or node.dilation != (1, 1) or not node.plain:
        return Breaker(
            node.name,
            shape,
            "Supported are depthwise convolutions of 3x3 and 5x5 with strides 1 or 2, without dilation, with a depth "
            "multiplier of 1.",
        )
    if node.padding is None or len(set(node.padding)) > 1:
        why = "padding 'same'" if node.padding is None else f"margins {node.padding}"
        return Breaker(
            node.name,
            f"{shape} and {why} instead of equal ones on all sides",
            "`keras_renorm.export.repair` makes them equal.",
        )
    return Breaker(node.name, f"{shape}, padded by {node.padding[0]}", f"Pad by {margin} on all sides.")


def nodes_of(model: keras.Model) -> list[Node]:
    """The operations of a Sequential or Functional model."""
    graph = graph_of(model)
    readers = collections.Counter(id(tensor) for call in graph.calls for tensor in call.inputs)
    readers.update(graph.canonical(tensor) for tensor in keras.tree.flatten(model.outputs))
    padded: dict[int, GraphCall] = {}
    linear: set[int] = set()
    nodes = []
    for call in graph.calls:
        alone = readers[id(call.outputs[0])] == 1
        if type(call.operation) is L.ZeroPadding2D and alone:
            # The runtime makes it a part of the convolution that follows.
            padded[id(call.outputs[0])] = call
            continue
        nodes += _nodes_of_call(call, padded, linear)
        if nodes[-1].kind in ("conv", "depthwise") and alone and call.operation.activation is keras.activations.linear:
            linear.add(id(call.outputs[0]))
    return nodes


def _nodes_of_call(call: GraphCall, padded: dict[int, GraphCall], linear: set[int]) -> list[Node]:
    """`padded`: what only adds margins, by its output; `linear`: outputs of convolutions that normalization is folded into."""
    layer, kind = call.operation, type(call.operation)
    padding = next((padded[id(tensor)] for tensor in call.inputs if id(tensor) in padded), None)
    ends = dict(
        name=layer.name,
        inputs=tuple(id(tensor) for tensor in (padding or call).inputs),
        outputs=tuple(id(tensor) for tensor in call.outputs),
    )
    first = getattr(layer, "data_format", "channels_last") != "channels_last"
    is_conv = kind in _CONVOLUTIONS and not first and layer.activation in ELEMENTWISE_ACTIVATIONS
    if padding is not None and not (is_conv and layer.padding == "valid"):
        return [Node(kind="padding without a convolution that takes it in", **ends)]
    if is_conv:
        return _convolutions(call, padding, ends)
    if kind is L.GlobalAveragePooling2D and not first:
        return [Node(kind="mean", **ends)]
    is_image = all(len(tensor.shape) == 4 for tensor in call.inputs)
    is_activation = kind is L.Activation and layer.activation in ELEMENTWISE_ACTIVATIONS
    is_folded = kind is L.BatchNormalization and id(call.inputs[0]) in linear
    if is_image and (kind in _ELEMENTWISE or is_activation or is_folded or (kind in _OF_TWO and len(call.inputs) == 2)):
        return [Node(kind="elementwise", **ends)]
    return [Node(kind=f"a {kind.__name__}", **ends)]


def _convolutions(call: GraphCall, padding: GraphCall | None, ends: dict) -> list[Node]:
    layer, channels = call.operation, call.inputs[0].shape[-1]
    kernel, strides, dilation = (tuple(map(int, value)) for value in (layer.kernel_size, layer.strides, layer.dilation_rate))
    if layer.padding == "same":
        margins = same_padding(kernel, strides, dilation, call.inputs[0].shape[1:3])
    else:
        margins = sum(padding.operation.padding, ()) if padding else (0, 0, 0, 0)
    shape = dict(kernel=kernel, strides=strides, dilation=dilation, padding=margins)
    if type(layer) is L.Conv2D:
        return [Node(kind="conv", plain=layer.groups == 1, channels=channels, **shape, **_zeros(layer.kernel), **ends)]
    depthwise = dict(kind="depthwise", plain=layer.depth_multiplier == 1, **shape)
    if type(layer) is L.DepthwiseConv2D:
        return [Node(**depthwise, **ends)]
    between = dict(outputs=(id(layer),)), dict(inputs=(id(layer),))
    return [Node(**depthwise, **ends | between[0]), Node(kind="conv", **_zeros(layer.pointwise_kernel), **ends | between[1])]


def same_padding(kernel: tuple, strides: tuple, dilation: tuple, size: tuple) -> tuple[int, int, int, int] | None:
    """The margins of padding "same" for an image of this size; `None` if they depend on an unknown size."""
    margins: tuple = ()
    for side, stride, rate, length in zip(kernel, strides, dilation, size):
        if stride > 1 and length is None:
            return None
        steps = 0 if stride == 1 else (-(-length // stride) - 1) * stride + 1 - length
        total = max(steps + (side - 1) * rate, 0)
        margins += (total // 2, total - total // 2)
    return margins


def _zeros(variable: Any) -> dict[str, int]:
    values = ops.convert_to_numpy(variable)
    return dict(zeros=int(values.size - np.count_nonzero(values)), weights=int(values.size))
