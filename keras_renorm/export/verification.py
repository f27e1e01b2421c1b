"""Loads and runs a `.tflite` file."""

from __future__ import annotations

import pathlib
import warnings
from typing import Any

import keras
import numpy as np

from keras_renorm.export.inputs import input_names, structured

# How far outputs may be off, as a share of the largest, before something must be wrong. Integers are only reported.
_TOLERANCE = {None: 1e-2, "float16": 5e-2, "int8": np.inf}


class Reference:
    """What a Keras model answers, to compare files with.

    Args:
        model: the model.
        inputs: samples, one array an input.

    Attributes:
        range: the largest absolute output.

    Raises:
        ValueError: if the model answers with NaN or infinity.
    """

    def __init__(self, model: keras.Model, inputs: list[np.ndarray]):
        answer = model.predict_on_batch(structured(model, inputs))
        self._inputs, self._names, self._keys = inputs, input_names(model), isinstance(answer, dict)
        self._expected = [np.asarray(value) for value in keras.tree.flatten(answer)]
        self._in_half = any(layer.compute_dtype != "float32" for layer in model._flatten_layers())
        # (The built-in `max` may pass over NaN.)
        self.range = float(np.max([np.max(np.abs(value), initial=0) for value in self._expected]))
        if not np.isfinite(self.range):
            raise ValueError(
                f"Model '{model.name}' gives NaN or infinity on the samples, so the exported file could not be compared with "
                "it. Pass typical inputs as `samples`, or check its weights."
            )

    def tolerance(self, quantize: str | None) -> float:
        """The difference from which on something must be wrong."""
        kinds = [quantize, *(["float16"] if self._in_half else [])]
        share = max(_TOLERANCE[kind] for kind in kinds)
        # Integers may be off by any number, but NaN is none: it counts as an infinite difference.
        return share * self.range if share < np.inf else np.finfo(float).max

    def difference(self, path: pathlib.Path) -> float:
        """The largest absolute difference of a file's outputs."""
        return largest_difference(self._expected, run(path, self._inputs, self._names, keys=self._keys))


def run(path: pathlib.Path, inputs: list[np.ndarray], names: list[str], keys: bool = False) -> list[np.ndarray]:
    """Run a `.tflite` file with LiteRT, or with TensorFlow's interpreter where LiteRT is not installed.

    Args:
        path: the file.
        inputs: arrays with a batch axis.
        names: the Keras model's name of each input.
        keys: whether the Keras model answers with a dict.

    Returns:
        The outputs, in the order of `keras.tree.flatten` of the model's outputs.

    Raises:
        RuntimeError: if the runtime cannot load or run the file.
    """
    runner = Runner(path)
    if len(inputs) == 1:
        names = list(runner.inputs)
    answer = runner(dict(zip(names, inputs)))
    # Keras names the outputs of a list `output_0`, `output_1`, ...; those of a dict keep their keys.
    order = sorted(answer) if keys else sorted(answer, key=lambda name: int(name.removeprefix("output_")))
    return [answer[name] for name in order]


class Runner:
    """A `.tflite` file that answers batches.

    Args:
        path: the file.

    Attributes:
        inputs: what the runtime tells of each input, by its name.

    Raises:
        RuntimeError: if the runtime cannot load the file, or its inputs have no names.
    """

    def __init__(self, path: pathlib.Path):
        interpreter = load(path)
        interpreter.allocate_tensors()
        signatures = list(interpreter.get_signature_list())
        if not signatures:
            raise RuntimeError(f"'{path}' has no signature, which names inputs and outputs: its converter is too old.")
        self._runner = interpreter.get_signature_runner(signatures[0])
        self.inputs = self._runner.get_input_details()

    def __call__(self, feeds: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """The outputs by name, for arrays with a batch axis, by the name of the input.

        Raises:
            RuntimeError: if the runtime cannot run the file.
        """
        feeds = {name: value.astype(self.inputs[name]["dtype"]) for name, value in feeds.items()}
        batch = {len(value) for value in feeds.values()}
        fixed = {detail["shape_signature"][0] for detail in self.inputs.values()}
        if fixed == {1} and batch != {1}:
            singles = [
                self._runner(**{name: value[index : index + 1] for name, value in feeds.items()}) for index in range(*batch)
            ]
            return {name: np.concatenate([single[name] for single in singles]) for name in singles[0]}
        return self._runner(**feeds)


def load(path: pathlib.Path, threads: int | None = None) -> Any:
    """An interpreter for a `.tflite` file.

    Raises:
        RuntimeError: if the runtime cannot load it.
    """
    with warnings.catch_warnings():
        # Whoever has no LiteRT is served by TensorFlow's own, deprecated as it is.
        warnings.filterwarnings("ignore", message=r"(?s)\s*Warning: .*ai_edge_litert")
        return _interpreter()(model_path=str(path), num_threads=threads)


def largest_difference(expected: list[np.ndarray], received: list[np.ndarray]) -> float:
    """The largest absolute difference of two lists of arrays; infinite if shapes differ or a value is NaN."""
    if [value.shape for value in expected] != [value.shape for value in received]:
        return float("inf")
    differences = [
        float(np.max(np.abs(one.astype(float) - other.astype(float)), initial=0)) for one, other in zip(expected, received)
    ]
    return float("inf") if any(np.isnan(differences)) else max(differences)


def _interpreter() -> type:
    try:
        from ai_edge_litert.interpreter import Interpreter
    except ImportError:
        import tensorflow as tf

        return tf.lite.Interpreter
    return Interpreter
