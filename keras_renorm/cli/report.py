"""`keras-renorm report`."""

from __future__ import annotations

import argparse
import dataclasses
import math

from keras_renorm.cli import files
from keras_renorm.src.export import flatbuffer
from keras_renorm.src.export.explain import Explanation, explain
from keras_renorm.src.reports.summary import summary

# What an explanation advises in Python, and the options of `prune` that say it.
_OPTIONS = {
    "Block((4, 1))": "--pattern block:4,1",
    "Block((16, 1))": "--pattern block:16,1",
    "pattern='unit'": "--pattern unit --compact",
}


def run(arguments: argparse.Namespace) -> tuple[str, dict]:
    files.import_modules(arguments.modules)
    if arguments.file.suffix == ".tflite":
        # So that an error names the file as the help does.
        flatbuffer.read(arguments.file, "FILE")
        found = explain(arguments.file)
        return _text(found), _explanation(found)
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
        text, data = f"{text}\n\n{_text(found)}", data | {"exported": _explanation(found)}
    return text, data


def _text(found: Explanation) -> str:
    advice = " ".join(row.remedy for row in found.rows)
    options = [f"`{option}`" for python, option in _OPTIONS.items() if python in advice]
    return "\n".join([str(found), *([f"With `keras-renorm prune`: {', '.join(options)}."] if options else [])])


def _explanation(found: Explanation) -> dict:
    sizes = [math.prod(row.shape) for row in found.rows]
    kept = sum(row.density * size for row, size in zip(found.rows, sizes))
    return dataclasses.asdict(found) | {"sparsity": 1 - kept / sum(sizes) if sizes else 0.0}
