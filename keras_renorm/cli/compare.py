"""`keras-renorm compare`."""

from __future__ import annotations

import argparse
import gzip
import pathlib
import re
import sys
from collections.abc import Callable
from typing import Any

import keras
import numpy as np

from keras_renorm.cli import files
from keras_renorm.src.core.tables import format_table
from keras_renorm.src.export import flatbuffer
from keras_renorm.src.export.benchmark import Inference, in_turns, shapes_of
from keras_renorm.src.export.inputs import as_inputs, random_inputs, structured
from keras_renorm.src.export.verification import Runner

_BATCH = 128
_WARMUP = 5


class _KerasFile:
    """A `.keras` file that is run; `name` and `inputs` are those of its model."""

    def __init__(self, path: pathlib.Path):
        self.model = files.load_model(path)
        self.name, self.inputs = str(path), self.model.inputs

    def answer(self, batch: list[np.ndarray]) -> list[np.ndarray]:
        answer = self.model.predict_on_batch(structured(self.model, batch))
        return _in_order(answer) if isinstance(answer, dict) else [np.asarray(one) for one in keras.tree.flatten(answer)]

    def inference(self, sample: list[np.ndarray], threads: int) -> Callable[[], Any]:
        return lambda: self.answer(sample)


class _LiteFile:
    """A `.tflite` file that is run."""

    def __init__(self, path: pathlib.Path):
        flatbuffer.read(path, "file")
        self.path, self.name = path, str(path)
        self.runner = Runner(path)
        self.inputs = [
            keras.KerasTensor([None if side < 0 else int(side) for side in one["shape_signature"]], one["dtype"], name=name)
            for name, one in self.runner.inputs.items()
        ]

    def answer(self, batch: list[np.ndarray]) -> list[np.ndarray]:
        return _in_order(self.runner(self._by_name(batch)))

    def inference(self, sample: list[np.ndarray], threads: int) -> Callable[[], Any]:
        return Inference(self.path, threads, self._by_name(sample))

    def _by_name(self, arrays: list[np.ndarray]) -> dict[str, np.ndarray]:
        return {spec.name: array for spec, array in zip(self.inputs, arrays)}


def run(arguments: argparse.Namespace) -> tuple[str, dict]:
    files.import_modules(arguments.modules)
    paths = [arguments.a, arguments.b]
    both = [(_LiteFile if path.suffix == ".tflite" else _KerasFile)(path) for path in paths]
    samples, labels = _samples(both, arguments.data)
    outputs = _answers(both, samples)
    reach = max(float(np.max(np.abs(one), initial=0)) for one in outputs[0])
    distances = np.concatenate([np.abs(one - other).ravel() for one, other in zip(*outputs)])
    contents = [path.read_bytes() for path in paths]
    timed = [file.inference([array[:1] for array in inputs], arguments.threads) for file, inputs in zip(both, samples)]
    low, median, high = in_turns(timed, arguments.runs, _WARMUP)
    rows = [
        {"path": path, "bytes": len(content), "gzip_bytes": len(gzip.compress(content, 6))}
        | {"seconds": float(median[index]), "seconds_low": float(low[index]), "seconds_high": float(high[index])}
        for index, (path, content) in enumerate(zip(paths, contents))
    ]
    if labels is not None:
        for row, of_one in zip(rows, outputs):
            row["accuracy"] = _accuracy(of_one, labels, arguments.data)
    data = {
        "files": rows,
        "samples": len(samples[0][0]),
        "shapes": shapes_of(array[:1].shape for array in samples[0]),
        "random": arguments.data is None,
        "difference": float(distances.max(initial=0)),
        "mean_difference": float(distances.mean()),
        "output_range": reach,
        "same_class": _same_class(*outputs),
        "runs": arguments.runs,
        "threads": arguments.threads,
    }
    return _table(data), data


def _samples(both: list, path: pathlib.Path | None) -> tuple[list[list[np.ndarray]], np.ndarray | None]:
    """The inputs of both files, and the labels."""
    names = [[spec.name for spec in file.inputs] for file in both]
    if path is None:
        drawn = random_inputs(both[0])
        by_name = dict(zip(names[0], drawn))
        same = [by_name[name] for name in names[1]] if set(names[0]) == set(names[1]) else drawn
        try:
            return [drawn, as_inputs(both[1], same, "B")], None
        except ValueError as error:
            shapes = [[tuple(spec.shape) for spec in file.inputs] for file in both]
            raise ValueError(
                f"The two files take different inputs: '{both[0].name}' {shapes[0]}, '{both[1].name}' {shapes[1]}."
            ) from error
    arrays = files.load_arrays(path)
    samples = [as_inputs(file, files.samples_of(arrays, of_one, path), "data") for file, of_one in zip(both, names)]
    labels = arrays.get("y")
    if labels is not None and len(labels) != len(samples[0][0]):
        raise ValueError(
            f"'{path}' must hold a label for each sample. It holds {len(samples[0][0])} samples, {len(labels)} labels."
        )
    return samples, labels


def _answers(both: list, samples: list[list[np.ndarray]]) -> list[list[np.ndarray]]:
    """The outputs of both files, as floats."""
    starts = range(0, len(samples[0][0]), _BATCH)
    progress = keras.utils.Progbar(2 * len(starts), verbose=int(sys.stderr.isatty()), unit_name="batch")
    answers = []
    for file, inputs in zip(both, samples):
        batches = []
        for start in starts:
            batches.append(file.answer([array[start : start + _BATCH] for array in inputs]))
            progress.add(1)
        answers.append([np.concatenate(parts).astype(float) for parts in zip(*batches)])
        if not all(np.isfinite(one).all() for one in answers[-1]):
            raise ValueError(f"'{file.name}' gives NaN or infinity. Pass typical inputs with --data, or check its weights.")
    shapes = [[one.shape for one in of_one] for of_one in answers]
    if shapes[0] != shapes[1]:
        raise ValueError(f"The outputs of the two files cannot be compared: their shapes are {shapes[0]} and {shapes[1]}.")
    return answers


def _in_order(answer: dict[str, np.ndarray]) -> list[np.ndarray]:
    """Outputs by their names, `output_2` before `output_10`."""
    return [
        np.asarray(answer[name])
        for name in sorted(answer, key=lambda name: [(len(part), part) for part in re.split(r"(\d+)", name)])
    ]


def _accuracy(outputs: list[np.ndarray], labels: np.ndarray, path: pathlib.Path) -> float:
    """The share of correct outputs: of classes, one-hot classes, or binary labels."""
    if len(outputs) == 1 and labels.dtype.kind in "biuf" and (labels == labels.astype(int)).all():
        (answer,) = outputs
        classes = labels.astype(int)
        if answer.shape[-1] > 1:
            if classes.shape == answer.shape:
                return float(np.mean(answer.argmax(axis=-1) == classes.argmax(axis=-1)))
            if classes.size == answer[..., 0].size and not 0 <= classes.min() <= classes.max() < answer.shape[-1]:
                raise ValueError(
                    f"The labels `y` in '{path}' must be classes below {answer.shape[-1]}, the number of the model's outputs. "
                    f"They reach from {classes.min()} to {classes.max()}."
                )
            if classes.reshape(-1).shape == answer.shape[:-1] or classes.shape == answer.shape[:-1]:
                return float(np.mean(answer.argmax(axis=-1) == classes.reshape(answer.shape[:-1])))
        elif classes.size == answer.size and set(np.unique(classes)) <= {0, 1}:
            # Logits are told from probabilities by leaving [0, 1].
            middle = 0.5 if answer.min() >= 0 and answer.max() <= 1 else 0.0
            return float(np.mean((answer.reshape(-1) > middle) == classes.reshape(-1)))
    raise ValueError(
        f"The labels `y` in '{path}' must be classes (integers, or one-hot) for a model with one output. They have shape "
        f"{labels.shape} and dtype {labels.dtype}, the outputs {[one.shape for one in outputs]}. Leave `y` out to compare "
        "outputs."
    )


def _same_class(first: list[np.ndarray], second: list[np.ndarray]) -> float | None:
    """The number of samples for which both give the same class, if they give classes."""
    if len(first) != 1 or first[0].ndim != 2 or first[0].shape[-1] == 1:
        return None
    return float(np.mean(first[0].argmax(axis=-1) == second[0].argmax(axis=-1)))


def _table(data: dict) -> str:
    rows = data["files"]

    def share(key):
        return f"{rows[1][key] / rows[0][key]:.2f} of it"

    cells = [
        (key.replace("gzip_bytes", "gzipped"), *(f"{row[key]:,}" for row in rows), share(key))
        for key in ("bytes", "gzip_bytes")
    ]
    if "accuracy" in rows[0]:
        accuracies = [row["accuracy"] for row in rows]
        cells.append(("accuracy", *(f"{one:.4f}" for one in accuracies), f"{accuracies[1] - accuracies[0]:+.4f}"))
    cells.append(("latency", *(f"{1e3 * row['seconds']:.3f} ms" for row in rows), share("seconds")))
    spread = (f"{1e3 * row['seconds_low']:.3f} to {1e3 * row['seconds_high']:.3f}" for row in rows)
    cells.append(("  10% to 90%", *spread, ""))
    runtimes = {".keras": "Keras (not what a phone would take)", ".tflite": f"LiteRT ({data['threads']} thread(s))"}
    where = " and ".join(runtimes[suffix] for suffix in sorted({row["path"].suffix for row in rows}))
    lines = [
        format_table(("", *(str(row["path"]) for row in rows), ""), cells, right=(1, 2, 3)),
        f"Latencies are medians of {data['runs']} inferences of one sample ({data['shapes']}), in turns, in {where}.",
        f"Outputs differ by {data['difference']:.2g} at most and {data['mean_difference']:.2g} in the mean, where they reach "
        f"{data['output_range']:.2g}, on {data['samples']:,} {'random inputs' if data['random'] else 'samples'}.",
    ]
    if data["same_class"] is not None:
        lines.append(f"Both give the same class for {data['same_class']:.2%} of them.")
    return "\n".join(lines)
