"""Loads and runs a `.tflite` file."""

from __future__ import annotations

import pathlib
import re
from typing import Any

import keras
import numpy as np


def run(path: pathlib.Path, inputs: list[np.ndarray], names: list[str]) -> list[np.ndarray]:
    """Run a `.tflite` file with LiteRT, or with TensorFlow's interpreter where LiteRT is not installed.

    Args:
        path: the file.
        inputs: arrays with a batch axis.
        names: the Keras model's name of each input.

    Returns:
        The outputs, in the order of `keras.tree.flatten` of the model's outputs.

    Raises:
        RuntimeError: if the runtime cannot load or run the file.
    """
    interpreter = _interpreter()(model_path=str(path))
    interpreter.allocate_tensors()
    signature = next(iter(interpreter.get_signature_list()))
    runner = interpreter.get_signature_runner(signature)
    details = runner.get_input_details()
    if len(inputs) == 1:
        names = list(details)
    feeds = {name: value.astype(details[name]["dtype"]) for name, value in zip(names, inputs)}
    batch = {len(value) for value in inputs}
    fixed = {detail["shape_signature"][0] for detail in details.values()}
    if fixed == {1} and batch != {1}:
        outputs = [runner(**{name: value[index : index + 1] for name, value in feeds.items()}) for index in range(*batch)]
        answer = {name: np.concatenate([output[name] for output in outputs]) for name in outputs[0]}
    else:
        answer = runner(**feeds)
    return [answer[name] for name in sorted(answer, key=_output_order)]


def largest_difference(expected: list[np.ndarray], received: list[np.ndarray]) -> float:
    """The largest absolute difference of two lists of arrays; infinite if shapes differ or a value is NaN."""
    if [value.shape for value in expected] != [value.shape for value in received]:
        return float("inf")
    differences = [float(np.max(np.abs(one - other), initial=0)) for one, other in zip(expected, received)]
    return float("inf") if any(np.isnan(differences)) else max(differences)


def keras_outputs(model: keras.Model, inputs: Any) -> list[np.ndarray]:
    """The Keras model's outputs as a flat list of arrays."""
    return [np.asarray(value) for value in keras.tree.flatten(model.predict_on_batch(inputs))]


def _interpreter() -> type:
    try:
        from ai_edge_litert.interpreter import Interpreter
    except ImportError:
        from tensorflow.lite import Interpreter
    return Interpreter


def _output_order(name: str) -> tuple:
    """Keras names the outputs of a list `output_0`, `output_1`, ...; those of a dict keep their keys."""
    number = re.fullmatch(r"output_(\d+)", name)
    return (0, int(number[1]), "") if number else (1, 0, name)
