"""The operations of a `.tflite` file, as XNNPACK's rules ask for them."""

from __future__ import annotations

import collections
from typing import Any

import numpy as np

from keras_renorm.src.export import flatbuffer
from keras_renorm.src.export.failures import layer_of
from keras_renorm.src.runtimes import xnnpack

_UNARY = frozenset(
    """
    ABS CEIL ELU EXP FLOOR GELU HARD_SWISH LEAKY_RELU LOGISTIC NEG RELU RELU6 RELU_0_TO_1 RELU_N1_TO_1 ROUND RSQRT SQRT SQUARE
    TANH
    """.split()  # noqa: SIM905
)


class Constants:
    """Which tensors of a graph are constant, directly or after unpacking."""

    def __init__(self, model: Any, graph: Any):
        self._model, self._graph = model, graph
        self._made_of: dict[int, int] = {}
        self.unpacking = []
        for operator in graph.operators:
            unpacks = flatbuffer.operator_name(model, operator) in ("DENSIFY", "DEQUANTIZE")
            if unpacks and self.source(operator.inputs[0]) is not None:
                self._made_of[int(operator.outputs[0])] = int(operator.inputs[0])
                self.unpacking.append(operator)

    def source(self, index: int) -> Any | None:
        """The stored tensor that a tensor is, or is unpacked from; `None` if it is not constant."""
        while index in self._made_of:
            index = self._made_of[index]
        tensor = self._graph.tensors[index] if index >= 0 else None
        return tensor if tensor is not None and self._model.buffers[tensor.buffer].data is not None else None

    def is_unpacked(self, index: int) -> bool:
        return int(index) in self._made_of


def inputs_of(operator: Any) -> list[int]:
    """The tensors that an operation takes; -1 for an omitted one."""
    return [int(index) for index in (operator.inputs if operator.inputs is not None else ())]


def outputs_of(operator: Any) -> list[int]:
    """The tensors that an operation makes; none if it only assigns a state."""
    return [int(index) for index in (operator.outputs if operator.outputs is not None else ())]


def shape_of(tensor: Any) -> tuple[int, ...]:
    """The shape of a tensor; empty if it has none."""
    return tuple(int(side) for side in (tensor.shape if tensor.shape is not None else ()))


def layer_name(tensors: list, layers: frozenset[str]) -> str:
    """The layer of the tensors of an operation. A fused operation has the names of all operations that it was made of.

    Args:
        tensors: the tensors.
        layers: names of the layers of the Keras model, if they are known.
    """
    names = [name for tensor in tensors for name in (tensor.name or b"").decode().split(";")]
    if known := next(filter(None, (layer_of(name, layers) for name in names)), None):
        return known
    scopes = [name.split("/") for name in names]
    kinds = ("convolution", "depthwise", "MatMul")
    named = (scope[-2] for scope in scopes if len(scope) > 1 and scope[-1].rstrip("0123456789") in kinds)
    return next(named, names[0] if names else "?")


def nodes_of(model: Any, layers: frozenset[str]) -> list[xnnpack.Node]:
    """The operations of the main graph of a model; `layers` are names of the layers of the Keras model, if they are known."""
    graph = model.subgraphs[0]
    constants = Constants(model, graph)
    readers = collections.Counter(index for operator in graph.operators for index in inputs_of(operator))
    readers.update(int(index) for index in graph.outputs)
    padded: dict[int, Any] = {}
    nodes = []
    for operator in graph.operators:
        if operator in constants.unpacking:
            continue
        name, inputs, outputs = flatbuffer.operator_name(model, operator), inputs_of(operator), outputs_of(operator)
        alone = len(outputs) == 1 and readers[outputs[0]] == 1
        if name == "PAD" and alone and constants.source(inputs[1]) is not None:
            padded[outputs[0]] = operator
        else:
            nodes.append(_node(model, graph, operator, constants, padded, layers))
    return nodes


def _node(model: Any, graph: Any, operator: Any, constants: Constants, padded: dict, layers: frozenset) -> xnnpack.Node:
    kind, inputs = flatbuffer.operator_name(model, operator), inputs_of(operator)
    options = operator.builtinOptions
    padding = next((padded[index] for index in inputs if index in padded), None)
    values = [index for index in inputs if index >= 0 and constants.source(index) is None]
    weights = constants.source(inputs[1]) if len(inputs) > 1 else None
    is_conv = kind in ("CONV_2D", "DEPTHWISE_CONV_2D") and weights is not None
    # An operation that assigns a state has no outputs.
    ends_of = outputs_of(operator) or [index for index in inputs if index >= 0]
    named = [*([weights] if is_conv else []), *(graph.tensors[index] for index in ends_of[:1])]
    ends = dict(
        name=layer_name(named, layers),
        inputs=tuple(inputs_of(padding)[:1] if padding is not None else values),
        outputs=tuple(outputs_of(operator)),
    )
    source = graph.tensors[inputs[0]] if inputs else None
    of_integers = source is not None and flatbuffer.dtype_of(source) is np.int8
    if padding is not None and not (is_conv and options.padding == flatbuffer.schema().Padding.VALID):
        return xnnpack.Node(kind="padding without a convolution that takes it in", **ends)
    if is_conv and not of_integers:
        margins = None if padding is None else flatbuffer.numbers(model, constants.source(inputs_of(padding)[1]))
        return _convolution(model, kind, options, weights, margins, shape_of(source)[-1], ends)
    if kind == "MEAN" and weights is not None and set(flatbuffer.numbers(model, weights)) == {1, 2}:
        return xnnpack.Node(kind="mean", **ends)
    ranks = {len(shape_of(graph.tensors[index])) for index in inputs if index >= 0}
    if kind in (*_UNARY, "ADD", "MUL") and ranks == {4} and not of_integers:
        return xnnpack.Node(kind="elementwise", **ends)
    return xnnpack.Node(kind=f"{kind} of integers" if of_integers else kind, **ends)


def _convolution(model, kind, options, weights, padding, channels, ends) -> xnnpack.Node:
    units, rows, columns, depth = shape_of(weights)
    shape = dict(
        kernel=(rows, columns),
        strides=(options.strideH, options.strideW),
        dilation=(options.dilationHFactor, options.dilationWFactor),
    )
    if options.padding == flatbuffer.schema().Padding.SAME:
        # With strides XNNPACK does not look at what "same" comes to.
        margins = xnnpack.same_padding(*shape.values(), (None, None))
    else:
        margins = (0, 0, 0, 0) if padding is None else tuple(padding[2:6])
    if kind == "DEPTHWISE_CONV_2D":
        return xnnpack.Node(kind="depthwise", padding=margins, plain=options.depthMultiplier in (0, 1), **shape, **ends)
    report = flatbuffer.describe(model, weights)
    size = units * rows * columns * depth
    counts = dict(zeros=round(report.sparsity * size), weights=size)
    return xnnpack.Node(kind="conv", padding=margins, channels=channels, plain=channels == depth, **shape, **counts, **ends)


def with_written_margins(data: bytes) -> bytes:
    """Write padding "same" with strides as explicit margins, where the margins are equal on all sides.

    It is done only if XNNPACK's sparse path holds with it (given enough zeros) and does not without; otherwise the file is
    returned as it is.
    """
    model = flatbuffer.parse(data)
    if not _has_path(model):
        graph = model.subgraphs[0]
        for operator in list(graph.operators):
            if flatbuffer.operator_name(model, operator) in ("CONV_2D", "DEPTHWISE_CONV_2D"):
                _write_margins(model, graph, operator)
        if _has_path(model):
            return flatbuffer.pack(model)
    return data


def has_loops(data: bytes) -> bool:
    """Whether a file repeats a part of its graph until a condition holds."""
    model = flatbuffer.parse(data)
    return any(flatbuffer.operator_name(model, one) == "WHILE" for graph in model.subgraphs for one in graph.operators)


def foreign_operations(data: bytes, layers: frozenset[str]) -> tuple[list[str], list[str]]:
    """The operations of a file that are not TFLite's but TensorFlow's ("Flex"), and their layers.

    Args:
        data: the file.
        layers: names of the layers of the Keras model.
    """
    model = flatbuffer.parse(data)
    found: dict[str, str] = {}
    for graph in model.subgraphs:
        for operator in graph.operators:
            code = model.operatorCodes[operator.opcodeIndex].customCode
            if code and code.startswith(b"Flex"):
                places = [graph.tensors[index] for index in (*outputs_of(operator), *inputs_of(operator)) if index >= 0]
                found.setdefault(code.decode(), layer_name(places, layers))
    known = set(found.values()) & layers
    return list(found), sorted(known or set(found.values()))


def _has_path(model: Any) -> bool:
    nodes = nodes_of(model, frozenset())
    return not any(node.is_pointwise for node in nodes) or not xnnpack.find_breakers(nodes)


def _write_margins(model: Any, graph: Any, operator: Any) -> None:
    schema, options = flatbuffer.schema(), operator.builtinOptions
    source, weights = (graph.tensors[index] for index in operator.inputs[:2])
    size = shape_of(source)[1:3]
    strides = (options.strideH, options.strideW)
    dilation = (options.dilationHFactor, options.dilationWFactor)
    margins = xnnpack.same_padding(shape_of(weights)[1:3], strides, dilation, size)
    if options.padding != schema.Padding.SAME or strides == (1, 1) or len(set(margins)) > 1 or margins[0] == 0:
        return
    margin = margins[0]
    paddings = np.array([[0, 0], [margin, margin], [margin, margin], [0, 0]], np.int32)
    model.buffers.append(flatbuffer.make("Buffer", data=np.frombuffer(paddings.tobytes(), np.uint8)))
    name = graph.tensors[operator.outputs[0]].name
    constant = flatbuffer.make(
        "Tensor",
        shape=np.array(paddings.shape, np.int32),
        type=schema.TensorType.INT32,
        buffer=len(model.buffers) - 1,
        name=name + b"/margins",
    )
    padded = flatbuffer.make("Tensor", type=source.type, name=name + b"/padded", quantization=source.quantization)
    for field in ("shape", "shapeSignature"):
        sides = getattr(source, field)
        if sides is not None:
            moved = np.array([0, 2 * margin, 2 * margin, 0], np.int32)
            setattr(padded, field, np.where(np.asarray(sides) < 0, sides, sides + moved).astype(np.int32))
    graph.tensors += [constant, padded]
    count = len(graph.tensors)
    pad = flatbuffer.make(
        "Operator",
        opcodeIndex=flatbuffer.operator_index(model, schema.BuiltinOperator.PAD, 1),
        inputs=np.array([operator.inputs[0], count - 2], np.int32),
        outputs=np.array([count - 1], np.int32),
        builtinOptionsType=schema.BuiltinOptions.PadOptions,
        builtinOptions=flatbuffer.make("PadOptions"),
    )
    graph.operators.insert(graph.operators.index(operator), pad)
    operator.inputs = np.array([count - 1, *operator.inputs[1:]], np.int32)
    options.padding = schema.Padding.VALID
