from __future__ import annotations

import dataclasses
import os
import pathlib
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from keras_renorm import validation
from keras_renorm.export import flatbuffer
from keras_renorm.export.verification import load


@dataclasses.dataclass(frozen=True)
class Latency:
    """How long one inference of a file takes: median, 10th and 90th percentile, in seconds."""

    path: pathlib.Path
    median: float
    low: float
    high: float


@dataclasses.dataclass(frozen=True)
class Benchmark:
    """Latencies of `.tflite` files, measured in turns. Printing it shows a table; `rows` are the data.

    Attributes:
        rows: tuple of `Latency`, that of the file first.
        runs: how many inferences of each were timed.
        threads: how many threads the runtime had.
    """

    rows: tuple[Latency, ...]
    runs: int
    threads: int

    @property
    def ratio(self) -> float | None:
        """Median of the file over that of the one it was compared with first; `None` if there is none."""
        return self.rows[0].median / self.rows[1].median if len(self.rows) > 1 else None

    def __str__(self) -> str:
        width = max(len(str(row.path)) for row in self.rows)
        lines = [f"median of {self.runs} inferences in turns, batch of one, {self.threads} thread(s)"]
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
) -> Benchmark:
    """Measure how long a `.tflite` file takes for one sample, beside others in the same run.

    Uses LiteRT, or TensorFlow's interpreter where LiteRT is not installed. The files take turns, so that what else the machine
    does meets all of them. Inputs are random; sides without a fixed length are one.

    Args:
        path: a `.tflite` file.
        against: files to compare it with, such as the dense export of the same network.
        threads: how many threads the runtime may use.
        runs: how many inferences of each to time.
        warmup: how many to do before.

    Returns:
        A `Benchmark` with `rows` and `ratio`; print it for a table.

    Raises:
        ValueError: if a count is not positive, or a file is not a `.tflite` model.
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
    low, median, high = in_turns([inference(one, threads) for one in paths], runs, warmup)
    rows = tuple(Latency(one, *map(float, values)) for one, *values in zip(paths, median, low, high))
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


def inference(path: pathlib.Path, threads: int) -> Callable[[], None]:
    """What runs a `.tflite` file on one random sample."""
    interpreter = load(path, threads)
    generator = np.random.default_rng(0)
    for detail in interpreter.get_input_details():
        shape = [1 if side < 0 else int(side) for side in detail["shape_signature"]]
        if list(detail["shape"]) != shape:
            interpreter.resize_tensor_input(detail["index"], shape)
    interpreter.allocate_tensors()
    for detail in interpreter.get_input_details():
        if np.issubdtype(detail["dtype"], np.floating):
            value = generator.standard_normal(detail["shape"])
        else:
            value = generator.integers(0, 2, detail["shape"])
        interpreter.set_tensor(detail["index"], value.astype(detail["dtype"]))
    return interpreter.invoke
