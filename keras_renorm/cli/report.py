"""`keras-renorm report`."""

from __future__ import annotations

import argparse
import dataclasses
import math

from keras_renorm.cli import files
from keras_renorm.export import Explanation, explain, flatbuffer
from keras_renorm.summary import summary


def run(arguments: argparse.Namespace) -> tuple[str, dict]:
    files.import_modules(arguments.modules)
    if arguments.file.suffix == ".tflite":
        flatbuffer.read(arguments.file, "FILE")
        found = explain(arguments.file)
        return str(found), _explanation(found)
    if arguments.explain:
        files.check_backend()
    model = files.load_model(arguments.file)
    table = summary(model)
    size = arguments.file.stat().st_size
    data = {
        "path": arguments.file,
        "bytes": size,
        "sparsity": table.sparsity,
        "weights": table.weights,
        "kept": table.kept,
        "rows": [dataclasses.asdict(row) | {"sparsity": row.sparsity} for row in table.rows],
        "notes": table.notes,
    }
    text = f"{arguments.file}: {size:,} bytes\n{table}"
    if arguments.explain:
        found = explain(model)
        text, data = f"{text}\n\n{found}", data | {"exported": _explanation(found)}
    return text, data


def _explanation(found: Explanation) -> dict:
    sizes = [math.prod(row.shape) for row in found.rows]
    kept = sum(row.density * size for row, size in zip(found.rows, sizes))
    return dataclasses.asdict(found) | {"sparsity": 1 - kept / sum(sizes) if sizes else 0.0}
