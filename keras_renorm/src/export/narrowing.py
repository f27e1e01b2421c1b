"""Dense layers in parts that are narrow enough for indices of one byte.

A sparse tensor stores an index for each weight, which takes one byte along an axis of at most 256. So a layer with more inputs
and more units is written as several layers of 256 units each, whose outputs are concatenated.
"""

from __future__ import annotations

import keras
import numpy as np

from keras_renorm.src.export.rewriting import Change, rebuild_with, values_of
from keras_renorm.src.export.storage import BLOCKS, Layout, choose_layout, encoded_bytes
from keras_renorm.src.models.graph import ELEMENTWISE_ACTIVATIONS, functional_of, graph_of

L = keras.layers
_WIDTH = 256
# Less of the bytes than this must be left to be worth several layers.
_PAYS = 0.95
_STORED = {None: "float32", "float16": "float16", "int8": "int8"}


def narrow_layers(model: keras.Model, quantize: str | None, smallest: bool) -> tuple[keras.Model, list[str]]:
    """Split sparse Dense layers into parts if that makes the file smaller.

    Args:
        model: a model of plain Keras layers, which is not changed.
        quantize: as in `keras_renorm.export_tflite`.
        smallest: as in `keras_renorm.export_tflite`.

    Returns:
        The model, which is the same if nothing was split, and notes.
    """
    if functional_of(model) is None or (quantize == "int8" and not smallest):
        return model, []
    graph = graph_of(model)
    changes, notes = {}, []
    for call in graph.calls:
        layer = call.operation
        if type(layer) is L.Dense and call.times == 1 and layer.activation in ELEMENTWISE_ACTIVATIONS:
            kernel, *bias = values_of(layer)
            if _pays((kernel.T != 0).astype(_STORED[quantize])):
                starts = range(0, layer.units, _WIDTH)
                changes[id(call)] = Change([_part(layer, kernel, bias, start) for start in starts], abreast=True)
                notes.append(f"'{layer.name}' is stored in {len(starts)} parts of {_WIDTH} units, which take fewer bytes.")
    return (rebuild_with(model, graph, changes), notes) if changes else (model, [])


def _pays(values: np.ndarray) -> bool:
    """Whether a kernel takes fewer bytes in parts. It is given by its mask, in the type of its values, units first."""
    if min(values.shape) <= _WIDTH:
        return False
    layout = choose_layout(values, BLOCKS.get(values.dtype.name))
    if layout is None or layout.direct:
        return False
    parts = [values[start : start + _WIDTH] for start in range(0, len(values), _WIDTH)]
    return sum(encoded_bytes(part, Layout((1, 0))) for part in parts) < _PAYS * encoded_bytes(values, layout)


def _part(layer: keras.Layer, kernel: np.ndarray, bias: list[np.ndarray], start: int) -> tuple[keras.Layer, list[np.ndarray]]:
    units = slice(start, start + _WIDTH)
    part = L.Dense(
        len(kernel[0, units]),
        layer.activation,
        layer.use_bias,
        dtype=layer.dtype_policy,
        name=f"{layer.name}_part_{start // _WIDTH}",
    )
    return part, [kernel[:, units], *(values[units] for values in bias)]
