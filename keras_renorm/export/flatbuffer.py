"""Reads how the tensors of a `.tflite` file are stored."""

from __future__ import annotations

import numpy as np

from keras_renorm.export.report import TensorReport


def weight_tensors(data: bytes) -> tuple[TensorReport, ...]:
    """The constant numeric tensors of rank two or more in a `.tflite` file, each once.

    Args:
        data: the file's bytes.

    Returns:
        One report a tensor, in the order of the file.
    """
    from tensorflow.lite.python import schema_py_generated as schema

    dtypes = {
        schema.TensorType.FLOAT32: np.float32,
        schema.TensorType.FLOAT16: np.float16,
        schema.TensorType.INT8: np.int8,
        schema.TensorType.INT16: np.int16,
    }
    model = schema.ModelT.InitFromPackedBuf(data, 0)
    reports, seen = [], set()
    for tensor in (tensor for graph in model.subgraphs for tensor in graph.tensors):
        values = model.buffers[tensor.buffer].data
        if values is None or len(values) == 0 or tensor.buffer in seen or tensor.type not in dtypes:
            continue
        shape = tuple(int(side) for side in tensor.shape)
        if len(shape) < 2:
            continue
        seen.add(tensor.buffer)
        # Weights are quantized symmetrically: zero stays zero.
        kept = np.count_nonzero(np.frombuffer(np.asarray(values, np.uint8).tobytes(), dtypes[tensor.type]))
        reports.append(
            TensorReport(
                name=tensor.name.decode(),
                shape=shape,
                dtype=np.dtype(dtypes[tensor.type]).name,
                sparsity=1 - int(kept) / int(np.prod(shape)),
                bytes=len(values) + _index_bytes(tensor.sparsity),
                stored_sparse=tensor.sparsity is not None,
            )
        )
    return tuple(reports)


def _index_bytes(sparsity) -> int:
    """Bytes of the segments and indices of a tensor that is stored sparse."""
    if sparsity is None:
        return 0
    vectors = [vector for axis in sparsity.dimMetadata for vector in (axis.arraySegments, axis.arrayIndices)]
    return sum(np.asarray(vector.values).nbytes for vector in vectors if vector is not None)
