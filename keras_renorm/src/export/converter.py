"""TensorFlow's converter, as Keras calls it."""

from __future__ import annotations

import contextlib
import logging
import pathlib
import warnings
from collections.abc import Iterator

import keras
import numpy as np

from keras_renorm.src.core.keras_internals import flatten_layers, inputs_structure
from keras_renorm.src.export import failures
from keras_renorm.src.export.inputs import fixed_batch_of, input_names


def convert(
    model: keras.Model,
    path: pathlib.Path,
    quantize: str | None = None,
    representative: list[np.ndarray] | None = None,
    fixed_batch: bool = False,
    integer_io: bool = False,
) -> None:
    """Write a model as a `.tflite` file with every tensor stored in full.

    Args:
        model: a model of plain Keras layers.
        path: path of the file.
        quantize: as in `keras_renorm.export_tflite`.
        representative: representative data, one array for each input. Defaults to `None`.
        fixed_batch: whether the file takes one sample at a time (or as many as the inputs of the model say), instead of any
            number.
        integer_io: as in `keras_renorm.export_tflite`.

    Raises:
        RuntimeError: if the model cannot be converted.
    """
    settings = _settings(model, quantize, representative)
    if fixed_batch:
        settings["input_signature"] = _with_batch(model)
    if integer_io:
        import tensorflow as tf

        settings |= {"inference_input_type": tf.int8, "inference_output_type": tf.int8}
    try:
        with _quiet(), failures.whole_tracebacks():
            model.export(str(path), format="litert", verbose=False, **settings)
    except Exception as error:
        reason = failures.reason(error, layer_names(model))
        raise RuntimeError(f"TensorFlow could not convert model '{model.name}': {reason}") from error


def layer_names(model: keras.Model) -> frozenset[str]:
    """The names of the layers of a model, also inside other layers."""
    return frozenset(layer.name for layer in flatten_layers(model) if not isinstance(layer, keras.Model))


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Suppress the messages of TensorFlow about temporary folders."""
    logger = logging.getLogger("tensorflow")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


def _settings(model: keras.Model, quantize: str | None, representative: list[np.ndarray] | None) -> dict:
    import tensorflow as tf

    if quantize is None:
        return {}
    settings: dict = {"optimizations": [tf.lite.Optimize.DEFAULT]}
    if quantize == "float16":
        settings["target_spec"] = {"supported_types": [tf.float16]}
    if representative is not None:
        names = input_names(model)

        size = fixed_batch_of(model) or 1

        def batches():
            for start in range(0, len(representative[0]), size):
                yield {name: array[start : start + size] for name, array in zip(names, representative)}

        settings["representative_dataset"] = batches
    return settings


def _with_batch(model: keras.Model) -> list:
    def fix(tensor):
        return keras.layers.InputSpec(shape=(tensor.shape[0] or 1, *tensor.shape[1:]), dtype=tensor.dtype, name=tensor.name)

    structure = inputs_structure(model)
    return [keras.tree.map_structure(fix, model.inputs[0] if structure is None else structure)]
