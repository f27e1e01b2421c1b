"""Whether two models compute the same, tested by running them."""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import keras
import numpy as np
from keras import ops

from keras_renorm.src.core.keras_internals import (
    Functional,
    build_shapes,
    flatten_layers,
    functional_in,
    inputs_structure,
    takes_training,
)

_SAMPLES = 1
# Sides of inputs that a model leaves free: what is convolved and pooled has to be large enough.
_FREE_SIDES = (32, 8, 64, 224)
# Sides of images to try first, even if the model takes larger ones: convolutions take most of the time.
_SMALL_SIDE = 64
# Of the largest output. Layers that compute the same in another order differ by less.
_TOLERANCE = 1e-3
_TOLERANCE_IN_HALF = 5e-2


def made_inputs(
    model: keras.Model, samples: int = _SAMPLES, free_side: int = _FREE_SIDES[0], largest_side: float = math.inf
) -> Any:
    """Make inputs for a model from the shapes that it was built with, in the structure that it takes.

    Args:
        model: a built model.
        samples: number of samples.
        free_side: length of axes that the model leaves free.
        largest_side: largest side of images, to make them smaller than the model says.

    Returns:
        Tensors, or `None` if the model does not tell the shapes of its inputs.
    """
    generator = np.random.default_rng(0)

    def make(shape, dtype):
        shape = [shape[0] or samples, *(side or free_side for side in shape[1:])]
        if len(shape) > 3:
            shape[1:-1] = [min(side, largest_side) for side in shape[1:-1]]
        if dtype == "string":
            return ops.convert_to_tensor(np.array(["a", "b"])[generator.integers(0, 2, shape)])
        if keras.backend.is_float_dtype(dtype):
            return ops.convert_to_tensor(generator.standard_normal(shape).astype("float32"), dtype)
        # Indices that every vocabulary has.
        return ops.convert_to_tensor(generator.integers(0, 2, shape), dtype)

    structure = _graph_inputs(model)
    if structure is not None:
        return keras.tree.map_structure(lambda tensor: make(tensor.shape, tensor.dtype), structure)
    shapes = list(build_shapes(model).values())
    if len(shapes) != 1:
        return None
    return keras.tree.map_shape_structure(lambda shape: make(shape, model.input_dtype), shapes[0])


def _graph_inputs(model: keras.Model) -> Any:
    """The symbolic inputs of a Sequential or Functional model, in its structure; `None` for other models."""
    return inputs_structure(functional_in(model) or model)


def _batches(model: keras.Model, inputs: Any) -> Iterator[Any]:
    """The batches on which to compare, in the order in which to try them."""
    if inputs is not None:
        yield inputs
    sides = [tensor.shape[1:] for tensor in keras.tree.flatten(_graph_inputs(model)) if tensor is not None]
    if any(len(one) > 2 and max(side or 0 for side in one[:-1]) > _SMALL_SIDE for one in sides):
        yield made_inputs(model, largest_side=_SMALL_SIDE)
    for side in _FREE_SIDES:
        yield made_inputs(model, free_side=side)


def check_same(
    model: keras.Model, other: keras.Model, twins: Mapping[int, Any], what: str = "The copy", inputs: Any = None
) -> None:
    """Raise if two models do not compute the same.

    Both run on a few inputs, and neither is changed: no statistics, no states of random number generators.

    Args:
        model: a built model.
        other: a model that should compute the same.
        twins: the layers of `other`, by the `id` of the layers of `model`.
        what: name of `other` in the error.
        inputs: samples in the structure that the models take. Defaults to `None`: a few random samples.

    Raises:
        ValueError: if the outputs differ. The message names the first layer that differs.
    """
    for batch in _batches(model, inputs):
        try:
            expected = _run(model, batch)
        except Exception:
            # What is made up is not what every model takes.
            continue
        break
    else:
        return
    try:
        received = _run(other, batch)
    except Exception as error:
        raise ValueError(
            f"{what} of model '{model.name}' does not run where the model does: {error} Nothing was changed."
        ) from error
    in_half = _rounds_coarsely() or any(layer.compute_dtype not in ("float32", "float64") for layer in flatten_layers(model))
    differ = functools.partial(_differ, tolerance=_TOLERANCE_IN_HALF if in_half else _TOLERANCE)
    if differ(expected, received) is None or differ(expected, _run(model, batch)) is not None:
        # The second: a model that draws random numbers of its own answers differently each time.
        return
    layers = [layer for layer in flatten_layers(model, include_self=False) if id(layer) in twins]
    seen = _record(lambda: _run(model, batch), {id(layer): layer for layer in layers})
    made = _record(lambda: _run(other, batch), {id(layer): twins[id(layer)] for layer in layers})
    for (key, one), (twin, another) in zip(seen, made):
        difference = differ(one, another) if key == twin else None
        if difference is not None:
            layer = next(layer for layer in layers if id(layer) == key)
            # A layer that is called within another one is seen first.
            place = f"Layer '{layer.name}' (of type {type(layer).__name__}) is the first that differs: {difference}"
            break
    else:
        place = f"Its outputs differ: {differ(expected, received)}"
    raise ValueError(
        f"{what} of model '{model.name}' does not compute what the model computes. {place}. Nothing was changed. A custom "
        "layer should keep all of its state in variables and attributes."
    )


@functools.cache
def _rounds_coarsely() -> bool:
    """Whether products of float32 are computed with fewer bits, as GPUs do by default (TF32)."""
    generator = np.random.default_rng(0)
    inputs, kernel = (generator.standard_normal(shape).astype("float32") for shape in ((16, 64), (64, 64)))
    exact = inputs.astype("float64") @ kernel
    products = ops.matmul(inputs, kernel), ops.conv(inputs[:, None, None], kernel[None, None], data_format="channels_last")
    return any(
        np.abs(ops.convert_to_numpy(product).reshape(exact.shape) - exact).max() > 1e-5 * np.abs(exact).max()
        for product in products
    )


def _run(model: keras.Model, inputs: Any) -> list[np.ndarray]:
    """The outputs of a model in inference, which is left as it was."""
    # A graph says which sizes of images it was built for, and most of its layers take others.
    call = model.call if type(model).call in (keras.Sequential.call, Functional.call) else model
    with keras.StatelessScope():
        outputs = call(inputs, training=False) if takes_training(model) else call(inputs)
    return _arrays(outputs)


def _arrays(outputs: Any) -> list[np.ndarray]:
    return [np.asarray(ops.convert_to_numpy(value)) for value in keras.tree.flatten(outputs) if value is not None]


def _differ(expected: list[np.ndarray], received: list[np.ndarray], tolerance: float = _TOLERANCE) -> str | None:
    """How two lists of arrays differ, in words; `None` if they do not."""
    shapes = [[tuple(value.shape) for value in values] for values in (expected, received)]
    if shapes[0] != shapes[1]:
        return f"shapes {shapes[0]} became {shapes[1]}"
    for one, other in zip(expected, received):
        if not np.issubdtype(one.dtype, np.number) and one.dtype.name not in ("bfloat16", "bool"):
            if not np.array_equal(one, other):
                return "other strings"
            continue
        one, other = one.astype(np.float64), other.astype(np.float64)
        finite = np.isfinite(one)
        if not np.array_equal(np.where(finite, 0, one), np.where(np.isfinite(other), 0, other), equal_nan=True):
            return "NaN or infinity elsewhere"
        difference = float(np.abs(one[finite] - other[finite]).max(initial=0))
        reach = float(np.abs(one[finite]).max(initial=0))
        if difference > tolerance * reach + math.ulp(reach):
            return f"by {difference:.3g}, where its outputs reach {reach:.3g}"
    return None


def _record(run: Callable[[], Any], layers: Mapping[Any, keras.Layer]) -> list[tuple[Any, list[np.ndarray]]]:
    """The outputs of layers while a function runs, in the order of the calls."""
    seen: list = []

    def watch(key, layer):
        call = layer.call

        def recorded(*args, **kwargs):
            outputs = call(*args, **kwargs)
            with contextlib.suppress(Exception):
                seen.append((key, _arrays(outputs)))
            return outputs

        return recorded

    with contextlib.ExitStack() as stack:
        for key, layer in layers.items():
            stack.callback(_restore, layer, vars(layer).get("call"))
            object.__setattr__(layer, "call", watch(key, layer))
        with contextlib.suppress(Exception):
            run()
    return seen


def _restore(layer: keras.Layer, call: Callable | None) -> None:
    if call is None:
        object.__delattr__(layer, "call")
    else:
        object.__setattr__(layer, "call", call)
