"""Samples as the arrays that a model takes."""

from __future__ import annotations

from typing import Any

import keras
import numpy as np

from keras_renorm.src.core.keras_internals import inputs_structure

SAMPLES = 8
# How long sides of any length are tried to be: "valid" convolutions need more than a few, position embeddings have an end.
FREE_SIDES = (32, 8, 64, 128, 256, 512)


def input_names(model: keras.Model) -> list[str]:
    """The name of each input of the model."""
    return [tensor.name for tensor in keras.tree.flatten(getattr(model, "inputs", None) or [])]


def _specs(model: keras.Model) -> list:
    inputs = getattr(model, "inputs", None)
    if not inputs:
        raise ValueError(
            f"Model '{model.name}' is a subclassed model and does not tell the shape of its inputs, which export needs. Wrap "
            "it: `x = keras.Input(shape); model = keras.Model(x, model(x))`."
        )
    return keras.tree.flatten(inputs)


def as_inputs(model: keras.Model, data: Any, argument: str) -> list[np.ndarray]:
    """Arrays in the order of the inputs of a model, with checked shapes.

    Args:
        model: the model.
        data: an array, a list of arrays, a dict by the names of the inputs, or the structure that the model takes.
        argument: name of the argument in error messages.
    """
    specs = _specs(model)
    if _is_structured(model, data):
        arrays = [np.asarray(array) for array in keras.tree.flatten(data)]
    elif isinstance(data, dict):
        missing = [spec.name for spec in specs if spec.name not in data]
        if missing:
            raise ValueError(
                f"Argument `{argument}` has no entry for inputs {missing} of model '{model.name}'. Received: keys "
                f"{sorted(data)}."
            )
        arrays = [np.asarray(data[spec.name]) for spec in specs]
    elif callable(data) or hasattr(data, "element_spec"):
        raise ValueError(
            f"Argument `{argument}` must hold arrays: one, or a list or dict of them for several inputs. Received: {data!r}. "
            "Collect a few hundred samples first, such as `np.concatenate(list(batches))`."
        )
    else:
        arrays = [np.asarray(array) for array in (data if isinstance(data, (list, tuple)) else [data])]
    wanted = [tuple(spec.shape) for spec in specs]
    received = [array.shape for array in arrays]
    fits = len(wanted) == len(received) and all(
        len(have) == len(want) and have[0] > 0 and all(b in (None, a) for a, b in zip(have[1:], want[1:]))
        for have, want in zip(received, wanted)
    )
    if not fits or len({shape[0] for shape in received}) > 1:
        raise ValueError(
            f"Argument `{argument}` must hold arrays of shapes {wanted} (the first axis is the batch), one for each input of "
            f"model '{model.name}'. Received: shapes {received}."
        )
    if batch := fixed_batch_of(model):
        if received[0][0] < batch:
            raise ValueError(
                f"Argument `{argument}` must hold at least {batch} samples, since model '{model.name}' takes that many at "
                f"once. Received: {received[0][0]}."
            )
        arrays = [array[: len(array) // batch * batch] for array in arrays]
    for array, spec in zip(arrays, specs):
        if np.issubdtype(array.dtype, np.inexact) and not np.isfinite(array).all():
            raise ValueError(f"Argument `{argument}` holds NaN or infinity for input '{spec.name}' of model '{model.name}'.")
        if spec.dtype != "string" and array.dtype.kind in "SUO":
            raise ValueError(
                f"Argument `{argument}` must hold numbers for input '{spec.name}' of model '{model.name}', whose dtype is "
                f"{spec.dtype}. Received: dtype={array.dtype}."
            )
    return [_as_strings(array) if spec.dtype == "string" else array.astype(spec.dtype) for array, spec in zip(arrays, specs)]


def _is_structured(model: keras.Model, data: Any) -> bool:
    """Whether samples have the nested structure of the inputs of a model."""
    structure = inputs_structure(model)
    if not keras.tree.is_nested(structure):
        return False
    try:
        keras.tree.assert_same_structure(structure, data)
    except (ValueError, TypeError):
        return False
    return True


def _as_strings(array: np.ndarray) -> np.ndarray:
    """Strings as bytes, which TensorFlow and the runtime take."""
    encoded = [one if isinstance(one, bytes) else str(one).encode() for one in array.ravel().tolist()]
    return np.array(encoded, object).reshape(array.shape)


def fixed_batch_of(model: keras.Model) -> int | None:
    """The fixed batch size of a model; `None` if it takes any."""
    return next((spec.shape[0] for spec in _specs(model) if spec.shape[0]), None)


def range_notes(model: keras.Model, representative: list[np.ndarray], inputs: list[np.ndarray]) -> list[str]:
    """Notes on inputs outside of the range of the representative data."""
    notes = []
    for spec, seen, given in zip(_specs(model), representative, inputs):
        if spec.dtype == "string":
            continue
        low, high = float(seen.min()), float(seen.max())
        margin = 0.1 * (high - low)
        if float(given.min()) < low - margin or float(given.max()) > high + margin:
            notes.append(
                f"`representative_data` for input '{spec.name}' lies between {low:.3g} and {high:.3g}, but `samples` between "
                f"{given.min():.3g} and {given.max():.3g}: what is outside of its range is cut off."
            )
    return notes


def has_free_sides(model: keras.Model) -> bool:
    """Whether inputs have sides of any length, beside the batch."""
    return any(side is None for spec in _specs(model) for side in spec.shape[1:])


def in_half(layer: keras.Layer) -> bool:
    """Whether a layer computes with floats that are not 32 bits wide."""
    return keras.backend.is_float_dtype(layer.compute_dtype) and layer.compute_dtype != "float32"


def random_inputs(model: keras.Model, side: int = FREE_SIDES[0]) -> list[np.ndarray]:
    """A few random samples for a model.

    Args:
        model: the model.
        side: length of free sides.
    """
    generator = np.random.default_rng(0)
    inputs = []
    for spec in _specs(model):
        shape = [spec.shape[0] or SAMPLES] + [one or side for one in spec.shape[1:]]
        if keras.backend.is_float_dtype(spec.dtype):
            inputs.append(generator.standard_normal(shape).astype(spec.dtype))
            continue
        # Indices that every vocabulary has.
        numbers = generator.integers(0, 2, shape)
        inputs.append(_as_strings(numbers) if spec.dtype == "string" else numbers.astype(spec.dtype))
    return inputs


def answer(model: keras.Model, inputs: list[np.ndarray]) -> Any:
    """The outputs of a model for one batch of flat inputs."""
    fed = [keras.ops.convert_to_tensor(array, "string") if array.dtype == object else array for array in inputs]
    return model.predict_on_batch(structured(model, fed))


def structured(model: keras.Model, inputs: list[np.ndarray]) -> Any:
    """Flat inputs in the structure that the model takes."""
    structure = inputs_structure(model)
    return keras.tree.pack_sequence_as(structure, inputs) if structure is not None else inputs[0]
