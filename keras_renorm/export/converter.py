"""TensorFlow's converter, as Keras calls it."""

from __future__ import annotations

import contextlib
import logging
import pathlib
import re
import warnings
from collections.abc import Iterator

import keras
import numpy as np

from keras_renorm.export.inputs import input_names


def convert(
    model: keras.Model,
    path: pathlib.Path,
    quantize: str | None = None,
    representative: list[np.ndarray] | None = None,
    one_sample: bool = False,
) -> None:
    """Write a model as a `.tflite` file, every tensor stored in full.

    Args:
        model: a model of plain Keras layers.
        path: where to write.
        quantize: as in `keras_renorm.export_tflite`.
        representative: likewise, one array an input.
        one_sample: whether the file takes one sample at a time, instead of a batch of any size.

    Raises:
        RuntimeError: if the model cannot be converted.
    """
    settings = _settings(model, quantize, representative)
    if one_sample:
        settings["input_signature"] = _batch_of_one(model)
    try:
        with _quiet():
            model.export(str(path), format="litert", verbose=False, **settings)
    except Exception as error:
        raise RuntimeError(f"TensorFlow could not convert model '{model.name}': {_reason(error)}") from error


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Nothing of what TensorFlow says while it writes to temporary folders, which nobody can use."""
    logger = logging.getLogger("tensorflow")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


def _reason(error: Exception) -> str:
    """Which operations the converter does not know, and where they are, if that is what an error is about."""
    names = re.findall(r"^(?:Custom|Flex) ops: (.+)$", str(error), re.MULTILINE)
    if not names:
        return first_line(error)
    places = dict.fromkeys(place for place in re.findall(r'"([^"@]+/[^"@]+)@', str(error)))
    return (
        f"TFLite has no operation {', '.join(names)} (in {', '.join(places) or 'the model'}). Write that layer with operations "
        "that it has, or export the part of the model before it."
    )


def _settings(model: keras.Model, quantize: str | None, representative: list[np.ndarray] | None) -> dict:
    import tensorflow as tf

    if quantize is None:
        return {}
    settings: dict = {"optimizations": [tf.lite.Optimize.DEFAULT]}
    if quantize == "float16":
        settings["target_spec"] = {"supported_types": [tf.float16]}
    if representative is not None:
        names = input_names(model)

        def batches():
            for index in range(len(representative[0])):
                yield {name: array[index : index + 1] for name, array in zip(names, representative)}

        settings["representative_dataset"] = batches
    return settings


def _batch_of_one(model: keras.Model) -> list:
    def fix(tensor):
        return keras.layers.InputSpec(shape=(1, *tensor.shape[1:]), dtype=tensor.dtype, name=tensor.name)

    structure = getattr(model, "_inputs_struct", None)
    return [keras.tree.map_structure(fix, model.inputs[0] if structure is None else structure)]


def first_line(error: Exception) -> str:
    """What an error says, in short."""
    return str(error).strip().splitlines()[0][:200] if str(error).strip() else type(error).__name__
