"""Latency of `.tflite` files, measured in turns."""

from __future__ import annotations

import dataclasses
import os
import pathlib
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np

from keras_renorm.src.core import validation
from keras_renorm.src.export import flatbuffer
from keras_renorm.src.export.verification import load

# As `inputs.random_inputs` has it.
_FREE_SIDE = 32


@dataclasses.dataclass(frozen=True)
class Latency:
    """The time of one inference of a file: median, 10th and 90th percentile, in seconds, and the shapes of its inputs."""

    path: pathlib.Path
    median: float
    low: float
    high: float
    shapes: tuple[tuple[int, ...], ...] = ()


@dataclasses.dataclass(frozen=True)
class Benchmark:
    """Latencies of `.tflite` files, measured in turns. Print it for a table; `rows` are the data.

    Attributes:
        rows: tuple of `Latency`, that of the file first.
        runs: number of timed inferences of each file.
        threads: number of threads of the runtime.
    """

    rows: tuple[Latency, ...]
    runs: int
    threads: int

    @property
    def ratio(self) -> float | None:
        """Median of the file over the median of the first file it was compared with; `None` if there is none."""
        return self.rows[0].median / self.rows[1].median if len(self.rows) > 1 else None

    def __str__(self) -> str:
        width = max(len(str(row.path)) for row in self.rows)
        inputs = shapes_of(self.rows[0].shapes)
        lines = [f"median of {self.runs} inferences in turns, of one sample ({inputs}), {self.threads} thread(s)"]
        for index, row in enumerate(self.rows):
            ratio = f"   {self.rows[0].median / row.median:5.2f} of it" if index else ""
            spread = f"({1e3 * row.low:.3f} to {1e3 * row.high:.3f})"
            lines.append(f"  {str(row.path).ljust(width)}  {1e3 * row.median:9.3f} ms {spread}{ratio}")
        return "\n".join(lines)

    __repr__ = __str__


def benchmark(
    path: str | os.PathLike,
    against: str | os.PathLike | Sequence[str | os.PathLike] = (),
    threads: int = 1,
    runs: int = 50,
    warmup: int = 5,
    samples: Any = None,
) -> Benchmark:
    """Measure the latency of a `.tflite` file for one sample, beside other files in the same run.

    The function uses LiteRT, or the interpreter of TensorFlow if LiteRT is not installed. The files take turns, so that other
    work of the machine affects all of them.

    Args:
        path: a `.tflite` file.
        against: files to compare it with, such as the dense export of the same network. Defaults to `()`.
        threads: number of threads that the runtime may use. Defaults to 1.
        runs: number of inferences of each file to time. Defaults to 50.
        warmup: number of inferences of each file before the measurement. Defaults to 5.
        samples: inputs, of which the first sample is timed: an array or, for files with several inputs, a dict of arrays by the
            names of the inputs. Defaults to `None`: random inputs, with 32 for the length of free sides.

    Returns:
        A `Benchmark` with `rows` and `ratio`. Print it for a table.

    Raises:
        ValueError: if a count is not positive, a file is not a `.tflite` model, or the samples do not fit a file.
        OSError: if a file cannot be read.
        RuntimeError: if the runtime cannot load or run a file.

    Example:

    >>> import keras_renorm as kr
    >>> print(kr.export.benchmark("pruned.tflite", against="dense.tflite"))  # doctest: +SKIP
    """
    for value, argument in ((threads, "threads"), (runs, "runs"), (warmup, "warmup")):
        validation.check_count(value, argument)
    others = [against] if isinstance(against, (str, os.PathLike)) else list(against)
    paths = [pathlib.Path(one) for one in (path, *others)]
    for one in paths:
        flatbuffer.read(one, "path" if one is paths[0] else "against")
    timed = [Inference(one, threads, samples) for one in paths]
    low, median, high = in_turns(timed, runs, warmup)
    rows = tuple(Latency(one, *map(float, values), call.shapes) for one, call, *values in zip(paths, timed, median, low, high))
    return Benchmark(rows, runs, threads)


def in_turns(calls: Sequence[Callable[[], Any]], runs: int, warmup: int) -> np.ndarray:
    """Time functions in turns: 10th percentile, median and 90th percentile in seconds, of shape `(3, len(calls))`."""
    seconds = np.zeros((len(calls), runs))
    for run in range(-warmup, runs):
        for index, call in enumerate(calls):
            started = time.perf_counter()
            call()
            if run >= 0:
                seconds[index, run] = time.perf_counter() - started
    return np.percentile(seconds, [10, 50, 90], axis=1)


class Inference:
    """Runs a `.tflite` file on one sample when it is called.

    Args:
        path: the file.
        threads: number of threads that the runtime may use.
        samples: as in `benchmark`.

    Attributes:
        shapes: shapes of the inputs.

    Raises:
        ValueError: if the samples do not fit the file.
        RuntimeError: if the runtime cannot load or run the file.
    """

    def __init__(self, path: pathlib.Path, threads: int, samples: Any = None):
        self._interpreter = load(path, threads)
        details = _inputs(self._interpreter)
        values = _random(details) if samples is None else _first(samples, details, path)
        for name, detail in details.items():
            if tuple(detail["shape"]) != values[name].shape:
                self._interpreter.resize_tensor_input(detail["index"], values[name].shape)
        try:
            self._interpreter.allocate_tensors()
        except RuntimeError as error:
            remedy = "Pass `samples` of a size that it takes. " if samples is None and _free(details) else ""
            raise RuntimeError(
                f"The runtime cannot run '{path}' on inputs of {shapes_of(value.shape for value in values.values())}. "
                f"{remedy}({error})"
            ) from error
        for name, detail in details.items():
            self._interpreter.set_tensor(detail["index"], values[name])
        self.shapes = tuple(value.shape for value in values.values())

    def __call__(self) -> None:
        self._interpreter.invoke()


def shapes_of(shapes: Iterable[Sequence[int]]) -> str:
    """Shapes as text, such as `1x24x24x3`."""
    return ", ".join("x".join(map(str, shape)) for shape in shapes)


def _inputs(interpreter: Any) -> dict[str, dict]:
    """The details of each input, by its name in the signature of the file."""
    if signatures := list(interpreter.get_signature_list()):
        return interpreter.get_signature_runner(signatures[0]).get_input_details()
    return {detail["name"]: detail for detail in interpreter.get_input_details()}


def _free(details: dict[str, dict]) -> bool:
    """Whether inputs have sides of any length, beside the batch."""
    return any(side < 0 for detail in details.values() for side in detail["shape_signature"][1:])


def _random(details: dict[str, dict]) -> dict[str, np.ndarray]:
    generator = np.random.default_rng(0)
    values = {}
    for name, detail in details.items():
        shape = [int(side) if side >= 0 else (_FREE_SIDE if axis else 1) for axis, side in enumerate(detail["shape_signature"])]
        floats = np.issubdtype(detail["dtype"], np.floating)
        value = generator.standard_normal(shape) if floats else generator.integers(0, 2, shape)
        values[name] = value.astype(detail["dtype"])
    return values


def _first(samples: Any, details: dict[str, dict], path: pathlib.Path) -> dict[str, np.ndarray]:
    """The first sample, by the names of the inputs."""
    if not isinstance(samples, dict) and len(details) == 1:
        samples = dict.fromkeys(details, samples)
    if not isinstance(samples, dict) or not set(details) <= set(samples):
        received = sorted(samples) if isinstance(samples, dict) else type(samples)
        raise ValueError(
            f"Argument `samples` must be a dict of arrays for inputs {sorted(details)} of '{path}'. Received: {received}."
        )
    values = {}
    for name, detail in details.items():
        batch, *sides = map(int, detail["shape_signature"])
        value = np.asarray(samples[name])
        value = value[: max(1, batch)] if value.ndim else value
        wanted = [max(1, batch), *sides]
        if value.ndim != len(wanted) or any(side not in (-1, have) for side, have in zip(wanted, value.shape)):
            raise ValueError(
                f"Argument `samples` must hold an array of shape {(batch, *sides)} (-1 for any length; the first axis is the "
                f"sample) for input '{name}' of '{path}'. Received: shape {np.shape(samples[name])}."
            )
        values[name] = value.astype(detail["dtype"])
    return values
