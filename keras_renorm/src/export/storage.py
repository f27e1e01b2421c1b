"""Stores weight tensors of a `.tflite` file without their zeros.

TFLite reads a sparse tensor in two ways. Its fully connected kernels read a few block formats directly and skip the zeros. For
everything else an operation DENSIFY unpacks the tensor once, when the model is loaded. TensorFlow Lite for Microcontrollers
cannot read sparse tensors, and would take the stored values for those of the whole tensor. It has no DENSIFY, so it refuses a
file with that operation instead of computing wrong values.
"""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np

from keras_renorm.src.export import flatbuffer

# The blocks of consecutive inputs that fully connected kernels of the runtime read, by the type of the weights.
BLOCKS = {"float32": 4, "int8": 16}
# What a layout that makes the layer faster may cost in bytes, beside the smallest.
_WORTH = 1.1
# A tensor is stored sparse if it takes less than this share of its bytes. The description of a sparse tensor takes some, too.
_PAYS = 0.9
_OVERHEAD = 512
# The version of FULLY_CONNECTED that XNNPACK leaves to the runtime's own kernels: it would take sparse weights for dense ones,
# and does not find integers that were unpacked.
_NOT_DELEGATED = 8


@dataclasses.dataclass(frozen=True)
class Layout:
    """How the zeros of a tensor are left out.

    Args:
        order: the axes from the outermost to the innermost. Along the innermost only nonzero blocks are stored.
        block: number of neighbors along it that are stored or left out together.
        direct: whether the kernel of the runtime reads it without DENSIFY.
    """

    order: tuple[int, ...]
    block: int = 1
    direct: bool = False


@dataclasses.dataclass(frozen=True)
class Encoded:
    """The stored values and their places along the innermost axis: blocks `segments[i]` to `segments[i + 1]` of row i are at
    `indices`.
    """

    values: np.ndarray
    segments: np.ndarray
    indices: np.ndarray

    @property
    def bytes(self) -> int:
        return self.values.nbytes + self.segments.nbytes + self.indices.nbytes


def encode(values: np.ndarray, layout: Layout) -> Encoded:
    """Leave the zeros of an array out.

    >>> import numpy as np
    >>> encoded = encode(np.array([[0, 7, 0], [0, 0, 0], [1, 0, 2]], "float32"), Layout((0, 1)))
    >>> encoded.values.tolist(), encoded.segments.tolist(), encoded.indices.tolist()
    ([7.0, 1.0, 2.0], [0, 1, 1, 3], [1, 0, 2])
    """
    rows = _rows(values, layout)
    stored = (rows != 0).any(axis=-1)
    segments = np.concatenate([[0], np.cumsum(np.count_nonzero(stored, axis=1))])
    indices = np.flatnonzero(stored) % stored.shape[1]
    kinds = [_smallest_type(most) for most in (segments[-1], stored.shape[1] - 1)]
    return Encoded(rows[stored].reshape(-1), segments.astype(kinds[0]), indices.astype(kinds[1]))


def choose_layout(values: np.ndarray, block: int | None = None) -> Layout | None:
    """Choose the smallest layout of an array, or the layout of blocks that the runtime reads directly if it is hardly larger.

    Args:
        values: the array.
        block: length of such blocks, if the runtime has any for it.

    Returns:
        A `Layout`; `None` if storing the array in full is as good.
    """
    axes = tuple(range(values.ndim))
    orders = [(*(axis for axis in axes if axis != last), last) for last in axes]
    layouts = [Layout(order) for order in orders]
    if block and values.shape[-1] % block == 0:
        layouts.append(Layout(axes, block, direct=True))
    sizes = [encoded_bytes(values, layout) for layout in layouts]
    least = min(sizes)
    if least + _OVERHEAD > _PAYS * values.nbytes:
        return None
    if layouts[-1].direct and sizes[-1] <= _WORTH * least:
        return layouts[-1]
    return layouts[sizes.index(least)]


def _rows(values: np.ndarray, layout: Layout) -> np.ndarray:
    return values.transpose(layout.order).reshape(-1, values.shape[layout.order[-1]] // layout.block, layout.block)


def encoded_bytes(values: np.ndarray, layout: Layout) -> int:
    """The number of bytes that `encode` makes."""
    innermost = values.shape[layout.order[-1]] // layout.block
    rows = values.size // (innermost * layout.block)
    # Single weights are as many in any order.
    stored = np.count_nonzero(values if layout.block == 1 else (_rows(values, layout) != 0).any(axis=-1))
    index, segment = (np.dtype(_smallest_type(most)).itemsize for most in (innermost - 1, stored))
    return int(stored * (layout.block * values.itemsize + index) + (rows + 1) * segment)


def _smallest_type(most: int) -> type:
    return np.uint8 if most < 2**8 else np.uint16 if most < 2**16 else np.int32


class Storage:
    """A `.tflite` file whose tensors can be stored sparse one by one.

    Args:
        data: bytes of the file, with every tensor stored in full.
        smallest: whether integers are stored sparse even if that makes the layer slower.

    Attributes:
        candidates: tuple of the tensors, as `(subgraph, tensor)`, that take fewer bytes without their zeros.
        slower: tuple of tensors that would take fewer bytes, but are stored in full because the runtime is slower without their
            zeros.
        fails: tuple of tensors that would take fewer bytes, but are stored in full because the runtime fails (integers of
            layers that are not fully connected).
    """

    def __init__(self, data: bytes, smallest: bool = False):
        self._data, self._smallest = data, smallest
        self._layouts: dict[tuple[int, int], Layout] = {}
        slower, fails = [], []
        for place, values, fully_connected in _weights_alone(flatbuffer.parse(data)):
            layout = _layout_for(values, fully_connected)
            if layout is None:
                continue
            if values.dtype == np.int8 and not fully_connected:
                fails.append(place)
            elif values.dtype == np.int8 and not layout.direct and not smallest:
                slower.append(place)
            else:
                self._layouts[place] = layout
        self.candidates, self.slower, self.fails = tuple(self._layouts), tuple(slower), tuple(fails)

    def write(self, sparse: Iterable[tuple[int, int]], metadata: dict) -> bytes:
        """The file with these candidates stored sparse, and with metadata as JSON."""
        model = flatbuffer.parse(self._data)
        layouts = {place: self._layouts[place] for place in sparse}
        for place, layout in layouts.items():
            _store(model, place, layout)
        if layouts and all(layout.direct for layout in layouts.values()):
            _guard(model)
        flatbuffer.add_metadata(model, metadata)
        return flatbuffer.pack(model)

    def estimated_bytes(self, dtype: str, sparse: bool) -> int:
        """The estimated size of the file with weights of another type, such as `"float16"`, sparse or in full."""
        total = len(self._data)
        for _, values, fully_connected in _weights_alone(flatbuffer.parse(self._data)):
            mask = (values != 0).astype(dtype)
            layout = _layout_for(mask, fully_connected) if sparse else None
            if layout and dtype == "int8" and not (fully_connected and (layout.direct or self._smallest)):
                layout = None
            total += (encoded_bytes(mask, layout) if layout else mask.nbytes) - values.nbytes
        return total

    def name(self, place: tuple[int, int]) -> str:
        return flatbuffer.first_name(flatbuffer.parse(self._data).subgraphs[place[0]].tensors[place[1]])


def largest_working(items: Iterable, works: Callable[[list], bool]) -> list:
    """Of items that may or may not work together, as many as do, found by halving.

    >>> largest_working(range(6), lambda some: 4 not in some)
    [0, 1, 2, 3, 5]
    """
    kept: list = []

    def add(group):
        if not group:
            return
        if works(kept + group):
            kept.extend(group)
        elif len(group) > 1:
            middle = len(group) // 2
            add(group[:middle])
            add(group[middle:])

    add(list(items))
    return kept


def _layout_for(values: np.ndarray, fully_connected: bool) -> Layout | None:
    return choose_layout(values, BLOCKS.get(values.dtype.name) if fully_connected else None)


def _weights_alone(model: Any):
    """The weights that can be stored sparse: their place, their values, and whether only fully connected layers read them."""
    uses = collections.Counter(tensor.buffer for graph in model.subgraphs for tensor in graph.tensors)
    for place, tensor, consumers in _weights(model):
        values = flatbuffer.tensor_values(model, tensor)
        if values is not None and uses[tensor.buffer] == 1:
            yield place, values, consumers == {"FULLY_CONNECTED"}


def _weights(model: Any):
    """Constant tensors of rank two or more: their place, the tensor, and the names of the operations that take them as weights.

    An operation that takes the tensor as another input counts as an operation of its own.
    """
    for g, graph in enumerate(model.subgraphs):
        consumers: dict[int, set[str]] = {}
        for operator in graph.operators:
            for position, index in enumerate(operator.inputs if operator.inputs is not None else ()):
                name = flatbuffer.operator_name(model, operator)
                consumers.setdefault(int(index), set()).add(name if position == 1 else f"{name} {position}")
        for t, tensor in enumerate(graph.tensors):
            if t in consumers and model.buffers[tensor.buffer].data is not None:
                yield (g, t), tensor, consumers[t]


def _store(model: Any, place: tuple[int, int], layout: Layout) -> None:
    graph = model.subgraphs[place[0]]
    tensor = graph.tensors[place[1]]
    encoded = encode(flatbuffer.tensor_values(model, tensor), layout)
    model.buffers[tensor.buffer].data = np.frombuffer(encoded.values.tobytes(), np.uint8)
    if layout.direct or flatbuffer.dtype_of(tensor) is np.int8:
        _not_delegated(model, graph, place[1])
    if not layout.direct:
        _unpack_before_use(model, graph, place[1])
    tensor.sparsity = _sparsity(tensor, layout, encoded)


def _guard(model: Any) -> None:
    """Add a sparse tensor that nothing reads and unpack it, so that a runtime without sparse tensors refuses the file."""
    graph, values, layout = model.subgraphs[0], np.ones(1, np.float32), Layout((0,))
    encoded = encode(values, layout)
    model.buffers.append(flatbuffer.make("Buffer", data=np.frombuffer(encoded.values.tobytes(), np.uint8)))
    tensor = flatbuffer.make(
        "Tensor",
        name=b"needs_sparse_tensors",
        shape=np.array(values.shape, np.int32),
        type=flatbuffer.schema().TensorType.FLOAT32,
        buffer=len(model.buffers) - 1,
    )
    tensor.sparsity = _sparsity(tensor, layout, encoded)
    graph.tensors.append(tensor)
    _unpack_before_use(model, graph, len(graph.tensors) - 1)


def _sparsity(tensor: Any, layout: Layout, encoded: Encoded) -> Any:
    schema = flatbuffer.schema()

    def dense(size):
        return flatbuffer.make("DimensionMetadata", format=schema.DimensionType.DENSE, denseSize=int(size))

    def vector(numbers):
        kind = {"uint8": "Uint8Vector", "uint16": "Uint16Vector", "int32": "Int32Vector"}[numbers.dtype.name]
        return getattr(schema.SparseIndexVector, kind), flatbuffer.make(kind, values=numbers)

    (segments_type, segments), (indices_type, indices) = vector(encoded.segments), vector(encoded.indices)
    innermost = flatbuffer.make(
        "DimensionMetadata",
        format=schema.DimensionType.SPARSE_CSR,
        arraySegmentsType=segments_type,
        arraySegments=segments,
        arrayIndicesType=indices_type,
        arrayIndices=indices,
    )
    order, metadata, blocks = list(layout.order), [dense(tensor.shape[axis]) for axis in layout.order[:-1]], None
    metadata.append(innermost)
    if layout.block > 1:
        order.append(len(order))
        metadata.append(dense(layout.block))
        blocks = np.array([layout.order[-1]], np.int32)
    return flatbuffer.make(
        "SparsityParameters", traversalOrder=np.array(order, np.int32), blockMap=blocks, dimMetadata=metadata
    )


def _unpack_before_use(model: Any, graph: Any, index: int) -> None:
    """Insert DENSIFY between a tensor and everything that reads it."""
    schema = flatbuffer.schema()
    sparse = graph.tensors[index]
    fields = ("shape", "shapeSignature", "hasRank", "type", "quantization")
    kept = {field: getattr(sparse, field) for field in fields}
    dense = flatbuffer.make("Tensor", name=sparse.name + b"/dense", **kept)
    graph.tensors.append(dense)
    for operator in graph.operators:
        if operator.inputs is not None:
            inputs = np.asarray(operator.inputs)
            operator.inputs = np.where(inputs == index, len(graph.tensors) - 1, inputs).astype(np.int32)
    operator = flatbuffer.make(
        "Operator",
        opcodeIndex=flatbuffer.operator_index(model, schema.BuiltinOperator.DENSIFY, 1),
        inputs=np.array([index], np.int32),
        outputs=np.array([len(graph.tensors) - 1], np.int32),
        builtinOptionsType=schema.BuiltinOptions.DensifyOptions,
        builtinOptions=flatbuffer.make("DensifyOptions"),
    )
    graph.operators.insert(0, operator)


def _not_delegated(model: Any, graph: Any, index: int) -> None:
    number = flatbuffer.schema().BuiltinOperator.FULLY_CONNECTED
    for operator in graph.operators:
        if flatbuffer.operator_code(model.operatorCodes[operator.opcodeIndex]) == number and operator.inputs[1] == index:
            operator.opcodeIndex = flatbuffer.operator_index(model, number, _NOT_DELEGATED)
