"""Reads and writes the parts of a `.tflite` file."""

from __future__ import annotations

import functools
import json
import pathlib
from typing import Any

import numpy as np

from keras_renorm.src.export.report import TensorReport

METADATA = "keras_renorm"


def schema() -> Any:
    try:
        from tensorflow.lite.python import schema_py_generated
    except ImportError as error:
        raise ImportError(
            "`.tflite` files are read with TensorFlow, which is not installed: `pip install tensorflow`."
        ) from error
    return schema_py_generated


def make(kind: str, **fields: Any) -> Any:
    """A new object of a class of the schema, such as `"Tensor"`."""
    made = getattr(schema(), f"{kind}T")()
    for name, value in fields.items():
        setattr(made, name, value)
    return made


def parse(data: bytes) -> Any:
    """The contents of a file, in the classes that TensorFlow generates from the schema."""
    model = schema().ModelT.InitFromPackedBuf(data, 0)
    for graph in model.subgraphs:
        for part in ("inputs", "outputs", "operators", "tensors"):
            # What is empty may be left out of a file.
            if getattr(graph, part) is None:
                setattr(graph, part, [])
    return model


def read(path: pathlib.Path, argument: str) -> tuple[bytes, Any]:
    """Read the bytes and the contents of a file.

    The runtime itself may crash on a file that is cut off.

    Raises:
        OSError: if the file cannot be read.
        ValueError: if it is not a complete `.tflite` model.
        ImportError: if TensorFlow is missing.
    """
    data = path.read_bytes()
    if data[4:8] != b"TFL3":
        raise ValueError(
            f"Argument `{argument}` must be a `.tflite` model, which this file is not. Received: {argument}={str(path)!r}."
        )
    try:
        return data, parse(data)
    except ImportError:
        raise
    except Exception as error:
        raise damaged(path, argument, error) from error


def damaged(path: pathlib.Path, argument: str, error: Exception) -> ValueError:
    """The error for a file that begins like a `.tflite` model and is damaged."""
    return ValueError(
        f"Argument `{argument}` must be a whole `.tflite` model. It begins like one, but is damaged: copy or export "
        f"it again. Received: {argument}={str(path)!r}."
    )


def pack(model: Any) -> bytes:
    """The bytes of a file, from its contents."""
    import flatbuffers

    for buffer in model.buffers:
        buffer.Pack = functools.partial(_pack_buffer, buffer)
    size = sum(len(buffer.data) for buffer in model.buffers if buffer.data is not None)
    builder = flatbuffers.Builder(size + 2**16)
    builder.Finish(model.Pack(builder), file_identifier=b"TFL3")
    return bytes(builder.Output())


def _pack_buffer(buffer: Any, builder: Any) -> int:
    """Write a buffer at a multiple of 16 bytes, which the schema demands and the generated code does not do."""
    generated = schema()
    data = None
    if buffer.data is not None and len(buffer.data):
        raw = np.ascontiguousarray(buffer.data, np.uint8).tobytes()
        builder.StartVector(1, len(raw), 16)
        builder.head -= len(raw)
        builder.Bytes[builder.head : builder.head + len(raw)] = raw
        data = builder.EndVector()
    generated.BufferStart(builder)
    if data is not None:
        generated.BufferAddData(builder, data)
    return generated.BufferEnd(builder)


def dtype_of(tensor: Any) -> type | None:
    """The NumPy type of the values of a tensor; `None` for a type that no weights have."""
    types = schema().TensorType
    known = {types.FLOAT32: np.float32, types.FLOAT16: np.float16, types.INT8: np.int8, types.INT16: np.int16}
    return known.get(tensor.type)


def tensor_values(model: Any, tensor: Any) -> np.ndarray | None:
    """The values of a constant tensor of rank two or more that is stored in full; `None` for any other tensor."""
    dtype = dtype_of(tensor)
    data = model.buffers[tensor.buffer].data
    if dtype is None or tensor.shape is None or len(tensor.shape) < 2 or data is None or tensor.sparsity is not None:
        return None
    values = np.frombuffer(np.asarray(data, np.uint8), dtype)
    return values.reshape(tensor.shape) if values.size and values.size == int(np.prod(tensor.shape)) else None


def first_name(tensor: Any) -> str:
    """The first name of a tensor. A fused operation has the names of all operations that it was made of."""
    return tensor.name.decode().split(";")[0] if tensor.name else "?"


def operator_name(model: Any, operator: Any) -> str:
    """The name of an operation in the schema, such as `"CONV_2D"`."""
    return _operator_names()[operator_code(model.operatorCodes[operator.opcodeIndex])]


@functools.lru_cache
def _operator_names() -> dict[int, str]:
    builtin = schema().BuiltinOperator
    return {value: name for name, value in vars(builtin).items() if isinstance(value, int)}


def operator_code(code: Any) -> int:
    """The number of an operation in the schema."""
    # Files of old converters fill the deprecated field alone.
    return max(code.builtinCode, code.deprecatedBuiltinCode)


def operator_index(model: Any, number: int, version: int) -> int:
    """The index of an operation in the table of a model, to which it is added if it is missing."""
    for index, code in enumerate(model.operatorCodes):
        if (operator_code(code), code.version) == (number, version):
            return index
    code = make("OperatorCode", deprecatedBuiltinCode=min(number, 127), builtinCode=number, version=version)
    model.operatorCodes.append(code)
    return len(model.operatorCodes) - 1


def add_metadata(model: Any, metadata: dict) -> None:
    """Add JSON to a model."""
    model.buffers.append(make("Buffer", data=np.frombuffer(json.dumps(metadata).encode(), np.uint8)))
    entry = make("Metadata", name=METADATA, buffer=len(model.buffers) - 1)
    model.metadata = [*(model.metadata or []), entry]


def read_metadata(data: bytes) -> dict | None:
    """The metadata that `keras_renorm` wrote into a file; `None` if there are none."""
    model = parse(data)
    for entry in model.metadata or []:
        if entry.name and entry.name.decode() == METADATA:
            return json.loads(bytes(np.asarray(model.buffers[entry.buffer].data, np.uint8)))
    return None


def weight_tensors(data: bytes) -> tuple[TensorReport, ...]:
    """The constant numeric tensors of rank two or more in a `.tflite` file, each once.

    Args:
        data: the bytes of the file.

    Returns:
        A report for each tensor, in the order of the file.
    """
    model = parse(data)
    reports, seen = [], set()
    for tensor in (tensor for graph in model.subgraphs for tensor in graph.tensors):
        values = model.buffers[tensor.buffer].data
        if values is None or len(values) == 0 or tensor.buffer in seen or dtype_of(tensor) is None or len(tensor.shape) < 2:
            continue
        seen.add(tensor.buffer)
        reports.append(describe(model, tensor))
    return tuple(reports)


def describe(model: Any, tensor: Any) -> TensorReport:
    """How a constant tensor is stored."""
    values = np.asarray(model.buffers[tensor.buffer].data, np.uint8)
    shape = tuple(int(side) for side in tensor.shape)
    size = int(np.prod(shape))
    if tensor.sparsity is None and len(values) != size * np.dtype(dtype_of(tensor)).itemsize:
        raise ValueError(f"tensor '{first_name(tensor)}' of shape {shape} has {len(values)} bytes")
    # Weights are quantized symmetrically: zero stays zero.
    kept = np.count_nonzero(np.frombuffer(values.tobytes(), dtype_of(tensor)))
    return TensorReport(
        name=tensor.name.decode(),
        shape=shape,
        dtype=np.dtype(dtype_of(tensor)).name,
        sparsity=1 - int(kept) / size,
        bytes=len(values) + _index_bytes(tensor.sparsity),
        stored_sparse=tensor.sparsity is not None,
    )


def numbers(model: Any, tensor: Any) -> list[int]:
    """The values of a constant tensor of 32-bit integers, such as axes or margins."""
    return np.frombuffer(np.asarray(model.buffers[tensor.buffer].data, np.uint8).tobytes(), np.int32).tolist()


def _index_bytes(sparsity) -> int:
    """The bytes of the segments and indices of a sparse tensor."""
    if sparsity is None:
        return 0
    vectors = [vector for axis in sparsity.dimMetadata for vector in (axis.arraySegments, axis.arrayIndices)]
    return sum(np.asarray(vector.values).nbytes for vector in vectors if vector is not None)
