"""`repair`: equal or nearly equal layers in place of those that XNNPACK's sparse path cannot run."""

from __future__ import annotations

import collections

import keras
import numpy as np

from keras_renorm.src.core import validation
from keras_renorm.src.export.rewriting import Change, rebuild_with, values_of
from keras_renorm.src.layers.prunable import prunable_layers
from keras_renorm.src.models.comparing import check_same
from keras_renorm.src.models.graph import Graph, GraphCall, check_graph, functional_of, graph_of
from keras_renorm.src.models.model_copies import compile_like
from keras_renorm.src.models.rebuilding import with_config
from keras_renorm.src.pruning.conversion import strip
from keras_renorm.src.runtimes import xnnpack

L = keras.layers
# Layers that do to a vector what they do to an image of one pixel.
_ANY_RANK = (L.Activation, L.ReLU, L.LeakyReLU, L.ELU, L.Dropout, L.Identity, L.Softmax)


def repair(model: keras.Model) -> keras.Model:
    """Change a network so that XNNPACK's sparse path can run it, if only padding or the head prevents that.

    Networks such as MobileNet pad one side only before a convolution with strides. The sparse path has no kernel for that:

    - A 3x3 depthwise convolution becomes a 5x5 convolution that is padded by 2 on all sides, with zeros around the weights. The
      outputs are equal.
    - The image of the first convolution is moved by one pixel and padded by 1 on all sides. The outputs are equal except for
      the first row and column.
    - A 5x5 depthwise convolution is padded by 2 on all sides, which moves it by one pixel up and left. Fine-tune such a
      network, or prune it with `calibration` samples against the original.

    A head of 1x1 convolutions after global average pooling, on which the sparse path fails on Arm, becomes a head of Dense
    layers. The outputs are equal.

    The model that is passed in is not changed.

    Args:
        model: a built Sequential or Functional model, with plain or prunable layers.

    Returns:
        A new model of plain Keras layers. It is compiled if `model` was, with a fresh optimizer. Its attribute `repair_notes`
        is a tuple of sentences on what was changed and whether outputs are equal; it is not saved with the model.

    Raises:
        ValueError: if the model is not built, or not Sequential or Functional.
        TypeError: if it is not a Keras 3 model.

    Example:

    >>> import keras, keras_renorm as kr
    >>> layers = [keras.layers.Conv2D(8, 3, 2, "same"), keras.layers.DepthwiseConv2D(3, 2, "same")]
    >>> repaired = kr.export.repair(keras.Sequential([keras.Input((32, 32, 3)), *layers]))
    >>> len(repaired.repair_notes)
    2
    """
    validation.check_model(model)
    check_graph(model)
    plain = strip(model) if prunable_layers(model) else model
    graph = graph_of(plain)
    changes, notes = _changes_of_padding(graph)
    head, head_notes = _changes_of_head(plain, graph)
    repaired = rebuild_with(plain, graph, changes | head)
    if all(note.endswith("the same outputs") for note in (*notes, *head_notes)):
        check_same(model, repaired, {}, "The repaired copy")
    if model.compiled:
        compile_like(repaired, model)
    repaired.repair_notes = (*notes, *head_notes)
    return repaired


def repair_head(model: keras.Model) -> tuple[keras.Model, list[str]]:
    """The model with Dense layers after global average pooling, and what was changed; the same model if nothing was."""
    if functional_of(model) is None:
        return model, []
    graph = graph_of(model)
    changes, notes = _changes_of_head(model, graph)
    return (rebuild_with(model, graph, changes), notes) if notes else (model, [])


def _changes_of_padding(graph: Graph) -> tuple[dict[int, Change], list[str]]:
    readers = collections.Counter(id(tensor) for call in graph.calls for tensor in call.inputs)
    makers = {id(tensor): call for call in graph.calls for tensor in call.outputs}
    changes: dict[int, Change] = {}
    notes = []
    for call in graph.calls:
        layer = call.operation
        if type(layer) not in (L.Conv2D, L.DepthwiseConv2D) or call.times > 1 or tuple(layer.strides) != (2, 2):
            continue
        before = makers.get(id(call.inputs[0]))
        if type(getattr(before, "operation", None)) is not L.ZeroPadding2D or readers[id(call.inputs[0])] > 1:
            before = None
        size = (before or call).inputs[0].shape[1:3]
        margins = _margins(layer, before, size)
        found = margins and _symmetric(layer, margins, size, call.inputs[0].shape[-1])
        if found:
            layers, note = found
            changes[id(call)] = Change(layers)
            notes.append(f"'{layer.name}': {note}")
            if before is not None:
                changes[id(before)] = Change([])
    return changes, notes


def _margins(layer: keras.Layer, before: GraphCall | None, size: tuple) -> tuple[int, int, int, int] | None:
    """The number of rows above and below and of columns left and right that are added before a convolution; `None` if not
    known.
    """
    if layer.data_format != "channels_last" or None in size or tuple(layer.dilation_rate) != (1, 1):
        return None
    if layer.padding == "valid":
        return sum(before.operation.padding, ()) if before else (0, 0, 0, 0)
    if before is not None:
        return None
    return xnnpack.same_padding(layer.kernel_size, layer.strides, (1, 1), size)


def _symmetric(layer: keras.Layer, margins: tuple, size: tuple, channels: int) -> tuple[list, str] | None:
    """Layers with equal margins on all sides, in place of a convolution with strides of two, and a note on them.

    If the sides of an image are odd, margins are equal already.
    """
    kernel, (weights, *bias) = tuple(layer.kernel_size), values_of(layer)
    is_depthwise = type(layer) is L.DepthwiseConv2D and layer.depth_multiplier == 1
    is_entry = type(layer) is L.Conv2D and kernel == (3, 3) and channels == 3 and layer.groups == 1
    if not is_entry and not (is_depthwise and kernel in ((3, 3), (5, 5))):
        return None
    wanted = kernel[0] // 2
    even = all(side % 2 == 0 for side in size)

    def padded(margin, **changes):
        return [
            (L.ZeroPadding2D(margin, name=f"{layer.name}_padding"), []),
            (with_config(layer, padding="valid", **changes), [weights, *bias]),
        ]

    if not even or margins != (wanted - 1, wanted) * 2:
        return None
    if is_entry:
        layers = [(L.Cropping2D(((1, 0), (1, 0)), name=f"{layer.name}_moved"), []), *padded(1)]
        return layers, "the image moved by a pixel and padded by 1; the same outputs but for the first row and column"
    if kernel == (5, 5):
        return padded(2), "padded by 2 on all sides; outputs change: fine-tune, or prune with calibration against the original"
    weights = np.pad(weights, ((2, 0), (2, 0), (0, 0), (0, 0)))
    return padded(2, kernel_size=(5, 5)), "5x5 with zeros around its weights and padded by 2; the same outputs"


def _changes_of_head(model: keras.Model, graph: Graph) -> tuple[dict[int, Change], list[str]]:
    readers = collections.defaultdict(list)
    for call in graph.calls:
        for tensor in call.inputs:
            readers[id(tensor)].append(call)
    outputs = {graph.canonical(tensor) for tensor in keras.tree.flatten(functional_of(model).outputs)}
    changes: dict[int, Change] = {}
    notes = []
    for call in graph.calls:
        layer = call.operation
        if type(layer) is not L.GlobalAveragePooling2D or not layer.keepdims or layer.data_format != "channels_last":
            continue
        chain = _head(call, readers, outputs)
        if not any(type(one.operation) is L.Conv2D for one in chain):
            continue
        changes[id(call)] = Change([(with_config(layer, keepdims=False), [])])
        for one in chain:
            if type(one.operation) is L.Conv2D:
                changes[id(one)] = Change([_dense_of(one.operation)])
                notes.append(f"'{one.operation.name}': Dense in place of a 1x1 convolution after pooling; the same outputs")
        if len(chain[-1].outputs[0].shape) == 4:
            shape = tuple(chain[-1].outputs[0].shape[1:])
            last = chain[-1].operation
            kept = changes.get(id(chain[-1])) or Change([(with_config(last), values_of(last))])
            changes[id(chain[-1])] = Change([*kept.layers, (L.Reshape(shape, name=f"{layer.name}_shape"), [])])
    return changes, notes


def _head(call: GraphCall, readers: dict, outputs: set[int]) -> list[GraphCall]:
    """The calls from global average pooling to an output of the model, if they are only 1x1 convolutions and elementwise
    layers; else none.
    """
    chain: list[GraphCall] = []
    tensor = call.outputs[0]
    while not chain or len(tensor.shape) == 4:
        if id(tensor) in outputs:
            return chain if not readers[id(tensor)] else []
        if len(readers[id(tensor)]) != 1:
            return []
        (call,) = readers[id(tensor)]
        layer, kind = call.operation, type(call.operation)
        if call.times > 1 or len(call.inputs) > 1:
            return []
        is_pointwise = kind is L.Conv2D and tuple(layer.kernel_size) == (1, 1) and layer.groups == 1
        flattens = kind in (L.Flatten, L.Reshape) and tuple(call.outputs[0].shape[1:]) == (tensor.shape[-1],)
        if not (is_pointwise or flattens or kind in _ANY_RANK):
            return []
        chain.append(call)
        tensor = call.outputs[0]
    return chain


def _dense_of(conv: keras.Layer) -> tuple[keras.Layer, list[np.ndarray]]:
    weights, *bias = values_of(conv)
    dense = L.Dense(
        conv.filters, conv.activation, conv.use_bias, name=conv.name, dtype=conv.dtype_policy, trainable=conv.trainable
    )
    return dense, [weights[0, 0], *bias]
