"""Changes to Keras models that the converter and the runtime need. The function of the model is the same."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import keras

from keras_renorm.src.core.keras_internals import build_shapes, flatten_layers, inputs_structure, outputs_structure
from keras_renorm.src.export.inputs import in_half
from keras_renorm.src.export.narrowing import narrow_layers
from keras_renorm.src.export.repair import repair_head
from keras_renorm.src.models.copying import Copier
from keras_renorm.src.models.graph import functional_of
from keras_renorm.src.models.model_copies import copy_model
from keras_renorm.src.models.rebuilding import with_config
from keras_renorm.src.pruning.conversion import rebuilt_layer


def prepare(
    model: keras.Model, quantize: str | None, unroll: bool, smallest: bool, sparse: bool = True
) -> tuple[keras.Model, list[str]]:
    """Change a model where TFLite cannot take it, or would store it with more bytes.

    Args:
        model: a model of plain Keras layers, which is not changed.
        quantize: as in `keras_renorm.export_tflite`.
        unroll: whether recurrent layers over a fixed number of steps are written without a loop.
        smallest: as in `keras_renorm.export_tflite`.
        sparse: whether tensors are stored without their zeros.

    Returns:
        The model, and notes on the changes.
    """
    notes = []
    if any(map(in_half, flatten_layers(model))):
        model, _ = copy_model(model, _in_float32)
        notes.append("Computes in float32: TFLite has no kernels for the layers that Keras computed in half precision.")
    if functional_of(model) is None:
        return model, notes
    if unroll and any(_loops(layer) for layer in flatten_layers(model, include_self=False)):
        model, _ = copy_model(model, _unrolled)
        notes.append("Recurrent layers are unrolled: TensorFlow's converter crashes where it calibrates a loop.")
    model, of_head = repair_head(model)
    model, of_width = narrow_layers(model, quantize, smallest) if sparse else (model, [])
    return model, notes + of_head + of_width


def flattened(model: keras.Model) -> tuple[keras.Model, list[str]]:
    """The model with a list of outputs in place of nested outputs, which a `.tflite` file cannot hold, and notes.

    It shares its layers with the model that is passed in.
    """
    outputs = outputs_structure(model)
    parts = list(outputs.values()) if isinstance(outputs, dict) else outputs if isinstance(outputs, (list, tuple)) else []
    if not any(map(keras.tree.is_nested, parts)):
        return model, []
    names = ", ".join(f"`output_{index}` is {path}" for index, path in enumerate(_paths(outputs)))
    flat = keras.Model(model.inputs, keras.tree.flatten(model(inputs_structure(model))), name=model.name)
    return flat, [f"Nested outputs are written in a list, for a `.tflite` file holds no other: {names}."]


def _paths(structure: Any) -> list[str]:
    """The path of each output in a structure, such as `['y'][0]`."""
    paths = keras.tree.flatten_with_path(structure)
    return ["".join(f"[{key!r}]" for key in path) for path, _ in paths]


def _in_float32(layer: keras.Layer, copier: Copier) -> keras.Layer | None:
    """The layer with the policy float32, also for its inner layers; `None` if it computes in float32 already."""
    if isinstance(layer, keras.Model) or not any(map(in_half, flatten_layers(layer))):
        return None
    return rebuilt_layer(copier, layer, _with_changes(layer, lambda key, value: "float32" if _is_policy(value) else value))


def _is_policy(value: Any) -> bool:
    return isinstance(value, dict) and "DTypePolicy" in str(value.get("class_name"))


def _unrolled(layer: keras.Layer, copier: Copier) -> keras.Layer | None:
    """The layer with its recurrent layers unrolled over a fixed number of steps; `None` if there is nothing to unroll."""
    if isinstance(layer, keras.Model) or not _loops(layer):
        return None
    return rebuilt_layer(copier, layer, _with_changes(layer, lambda key, value: True if key == "unroll" else value))


def _loops(layer: keras.Layer) -> bool:
    """Whether inner recurrent layers loop over a fixed number of steps."""
    loops = [part for part in flatten_layers(layer) if getattr(part, "unroll", None) is False]
    steps = [build_shapes(part).get("input_shape", build_shapes(part).get("sequences_shape")) for part in loops]
    return bool(loops) and not any(shape is None or shape[1] is None for shape in steps)


def _with_changes(layer: keras.Layer, change: Callable[[str, Any], Any]) -> keras.Layer:
    """A layer with other values in its config, and in the configs inside it."""

    def replace(key, value):
        changed = change(key, value)
        if changed is not value:
            return changed
        if isinstance(value, dict):
            return {inner: replace(inner, item) for inner, item in value.items()}
        return [replace("", item) for item in value] if isinstance(value, (list, tuple)) else value

    config = layer.get_config()
    changes = {key: replace(key, value) for key, value in config.items()}
    return with_config(layer, **{key: value for key, value in changes.items() if value != config[key]})
