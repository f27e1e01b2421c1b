"""Samples as the arrays that a model takes."""

from __future__ import annotations

from typing import Any

import keras
import numpy as np

SAMPLES = 8
_FREE_SIDE = 32


def input_names(model: keras.Model) -> list[str]:
    """The model's name of each input."""
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
    """Arrays in the order of the model's inputs, checked against their shapes."""
    specs = _specs(model)
    if isinstance(data, dict):
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
    for array, spec in zip(arrays, specs):
        if np.issubdtype(array.dtype, np.inexact) and not np.isfinite(array).all():
            raise ValueError(f"Argument `{argument}` holds NaN or infinity for input '{spec.name}' of model '{model.name}'.")
    return [array.astype(spec.dtype) for array, spec in zip(arrays, specs)]


def range_notes(model: keras.Model, representative: list[np.ndarray], inputs: list[np.ndarray]) -> list[str]:
    """What to tell of inputs that integers cannot stand for."""
    notes = []
    for spec, seen, given in zip(_specs(model), representative, inputs):
        low, high = float(seen.min()), float(seen.max())
        margin = 0.1 * (high - low)
        if float(given.min()) < low - margin or float(given.max()) > high + margin:
            notes.append(
                f"`representative_data` for input '{spec.name}' lies between {low:.3g} and {high:.3g}, but `samples` between "
                f"{given.min():.3g} and {given.max():.3g}: what is outside of its range is cut off."
            )
    return notes


def random_inputs(model: keras.Model) -> list[np.ndarray]:
    """A few samples for a model that nothing is known of but the shapes and types of its inputs."""
    generator = np.random.default_rng(0)
    inputs = []
    for spec in _specs(model):
        shape = [spec.shape[0] or SAMPLES] + [side or _FREE_SIDE for side in spec.shape[1:]]
        if keras.backend.is_float_dtype(spec.dtype):
            inputs.append(generator.standard_normal(shape).astype(spec.dtype))
        else:
            # Indices that every vocabulary has.
            inputs.append(generator.integers(0, 2, shape).astype(spec.dtype))
    return inputs


def structured(model: keras.Model, inputs: list[np.ndarray]) -> Any:
    """Flat inputs in the structure that the model takes."""
    structure = getattr(model, "_inputs_struct", None)
    return keras.tree.pack_sequence_as(structure, inputs) if structure is not None else inputs[0]
