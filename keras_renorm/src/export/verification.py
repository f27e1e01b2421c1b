"""Loads and runs a `.tflite` file."""

from __future__ import annotations

import contextlib
import pathlib
import warnings
from collections.abc import Iterator
from typing import Any

import keras
import numpy as np

from keras_renorm.src.core.keras_internals import flatten_layers
from keras_renorm.src.export import failures
from keras_renorm.src.export.inputs import answer, in_half, input_names

# How far outputs may be off, as a share of the largest, before something must be wrong. Integers are only reported.
_TOLERANCE = {None: 1e-2, "float16": 5e-2, "int8": np.inf}


class Reference:
    """The outputs of a Keras model, to compare files with.

    Args:
        model: the model.
        inputs: samples, one array for each input.

    Attributes:
        range: the largest absolute output.

    Raises:
        ValueError: if outputs are NaN or infinite.
        RuntimeError: if the model cannot run.
    """

    def __init__(self, model: keras.Model, inputs: list[np.ndarray]):
        try:
            with _states_kept(model), failures.whole_tracebacks():
                expected = answer(model, inputs)
        except Exception as error:
            raise RuntimeError(f"Model '{model.name}' does not run on the samples: {failures.reason(error)}") from error
        self._inputs, self._names = inputs, input_names(model)
        # Outputs that are nested are written in a list.
        self._keys = isinstance(expected, dict) and not any(map(keras.tree.is_nested, expected.values()))
        self._expected = [np.asarray(value) for value in keras.tree.flatten(expected)]
        self._in_half = any(map(in_half, flatten_layers(model)))
        numbers = [value for value in self._expected if value.dtype.kind not in "SUO"]
        # (The built-in `max` may pass over NaN.)
        self.range = float(np.max([np.max(np.abs(value.astype(float)), initial=0) for value in numbers], initial=0))
        if not np.isfinite(self.range):
            raise ValueError(
                f"Model '{model.name}' gives NaN or infinity on the samples, so the exported file could not be compared with "
                "it. Pass typical inputs as `samples`, or check its weights."
            )

    def tolerance(self, quantize: str | None) -> float:
        """The difference above which something must be wrong."""
        kinds = [quantize, *(["float16"] if self._in_half else [])]
        share = max(_TOLERANCE[kind] for kind in kinds)
        # Integers may be off by any number, but NaN is none: it counts as an infinite difference.
        return share * self.range if share < np.inf else np.finfo(float).max

    def difference(self, path: pathlib.Path) -> float:
        """The largest absolute difference between the outputs and those of a file."""
        return largest_difference(self._expected, run(path, self._inputs, self._names, keys=self._keys))

    def run_first(self, path: pathlib.Path) -> None:
        """Run a file for any number of samples with one sample, as a phone does.

        Raises:
            RuntimeError: if the runtime cannot run it, which may happen for one sample only.
        """
        run(path, [array[:1] for array in self._inputs], self._names, keys=self._keys)


def run(path: pathlib.Path, inputs: list[np.ndarray], names: list[str], keys: bool = False) -> list[np.ndarray]:
    """Run a `.tflite` file with LiteRT, or with the interpreter of TensorFlow if LiteRT is not installed.

    Args:
        path: the file.
        inputs: arrays with a batch axis.
        names: the names of the inputs of the Keras model.
        keys: whether the outputs of the Keras model are a dict.

    Returns:
        The outputs, in the order of `keras.tree.flatten` of the outputs of the model.

    Raises:
        RuntimeError: if the runtime cannot load or run the file.
    """
    runner = Runner(path)
    if len(inputs) == 1:
        names = list(runner.inputs)
    answers = runner(dict(zip(names, inputs)))
    # Keras names the outputs of a list `output_0`, `output_1`, ...; those of a dict keep their keys.
    order = sorted(answers) if keys else sorted(answers, key=lambda name: int(name.removeprefix("output_")))
    return [answers[name] for name in order]


@contextlib.contextmanager
def _states_kept(model: keras.Model) -> Iterator[None]:
    """Restore the states of stateful layers of a model afterwards."""
    layers = [layer for layer in flatten_layers(model) if getattr(layer, "stateful", False)]
    variables = keras.tree.flatten([getattr(layer, "states", None) or [] for layer in layers])
    values = [np.array(variable) for variable in variables]
    try:
        yield
    finally:
        for variable, value in zip(variables, values):
            variable.assign(value)


class Runner:
    """A loaded `.tflite` file that is called with batches.

    Quantized integers are passed and returned as floats.

    Args:
        path: the file.

    Attributes:
        inputs: the details of each input in the runtime, by its name. `dtype` is the type to pass.

    Raises:
        RuntimeError: if the runtime cannot load the file, or its inputs have no names.
    """

    def __init__(self, path: pathlib.Path):
        # Nothing is allocated before the sizes of the inputs are known: a file whose inputs have any size says 1.
        interpreter = load(path)
        signatures = list(interpreter.get_signature_list())
        if not signatures:
            raise RuntimeError(f"'{path}' has no signature, which names inputs and outputs: its converter is too old.")
        self._runner = interpreter.get_signature_runner(signatures[0])
        self._inputs, self._outputs = self._runner.get_input_details(), self._runner.get_output_details()
        self.inputs = {name: detail | {"dtype": _given_dtype(detail)} for name, detail in self._inputs.items()}

    def __call__(self, feeds: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """The outputs by name, for arrays with a batch axis, by the name of the input.

        Raises:
            RuntimeError: if the runtime cannot run the file.
        """
        feeds = {name: _encode(value, self._inputs[name]) for name, value in feeds.items()}
        count = max(map(len, feeds.values()))
        # How many samples the file takes at once: -1 for any number.
        size = max(int(detail["shape_signature"][0]) for detail in self._inputs.values())
        if size in (-1, count):
            answers = self._runner(**feeds)
        else:
            starts = range(0, count, size)
            parts = [self._runner(**{name: value[at : at + size] for name, value in feeds.items()}) for at in starts]
            answers = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
        return {name: _decode(value, self._outputs[name]) for name, value in answers.items()}


def _scale(detail: dict) -> tuple[float, int] | None:
    """The scale and the zero point of quantized integers."""
    scale, zero = detail["quantization"]
    return (float(scale), int(zero)) if scale and np.issubdtype(detail["dtype"], np.integer) else None


def _given_dtype(detail: dict) -> str:
    if _scale(detail):
        return "float32"
    return "string" if detail["dtype"] is np.bytes_ else np.dtype(detail["dtype"]).name


def _encode(values: np.ndarray, detail: dict) -> np.ndarray:
    dtype = detail["dtype"]
    if dtype is np.bytes_:
        return values
    if (known := _scale(detail)) and np.issubdtype(values.dtype, np.floating):
        limits = np.iinfo(dtype)
        values = np.clip(np.round(values / known[0]) + known[1], limits.min, limits.max)
    return values.astype(dtype)


def _decode(values: np.ndarray, detail: dict) -> np.ndarray:
    known = _scale(detail)
    return values if known is None else ((values.astype("int64") - known[1]) * known[0]).astype("float32")


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
    """The largest absolute difference between two lists of arrays; infinite if shapes or strings differ, or a value is NaN."""
    if [value.shape for value in expected] != [value.shape for value in received]:
        return float("inf")
    differences = [_difference(one, other) for one, other in zip(expected, received)]
    return float("inf") if any(np.isnan(differences)) else max(differences)


def _difference(one: np.ndarray, other: np.ndarray) -> float:
    if one.dtype.kind in "SUO":
        return 0.0 if np.array_equal(one, other) else float("inf")
    return float(np.max(np.abs(one.astype(float) - other.astype(float)), initial=0))


def _interpreter() -> type:
    try:
        from ai_edge_litert.interpreter import Interpreter
    except ImportError:
        import tensorflow as tf

        return tf.lite.Interpreter
    return Interpreter
