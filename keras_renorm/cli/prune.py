"""`keras-renorm prune`."""

from __future__ import annotations

import argparse
import dataclasses
import sys
from typing import Any

from keras_renorm.cli import files
from keras_renorm.src.export.inputs import structured
from keras_renorm.src.pruning.compaction import compact
from keras_renorm.src.pruning.one_shot import prune
from keras_renorm.src.rules import patterns


def run(arguments: argparse.Namespace) -> tuple[str, dict]:
    files.import_modules(arguments.modules)
    model = files.load_model(arguments.model)
    samples = files.inputs_from(arguments.calibration, model)
    pattern = arguments.pattern
    pruned = prune(
        model,
        arguments.sparsity,
        criterion=arguments.criterion,
        pattern={name: _pattern(one) for name, one in pattern.items()} if isinstance(pattern, dict) else _pattern(pattern),
        group=arguments.group,
        allocation=arguments.allocation,
        renormalize=None if arguments.renormalize == "none" else arguments.renormalize,
        calibration=None if samples is None else structured(model, samples),
        layers=arguments.layer,
        target=arguments.target,
        recover=arguments.recover and {"augment": arguments.augment},
        batch_size=arguments.batch_size,
        verbose=int(sys.stderr.isatty()),
    )
    report, recovered, smaller = pruned.pruning_report, getattr(pruned, "recovery_report", None), None
    if arguments.compact:
        pruned = compact(pruned)
        smaller = pruned.compaction_report
    with files.written_whole(arguments.output) as path:
        pruned.save(path)
    text = [str(report), *(f"\n{one}" for one in (recovered, smaller) if one), f"\nwritten: {arguments.output}"]
    data = {
        "path": arguments.output,
        "sparsity": report.sparsity,
        "parameters": pruned.count_params(),
        "rows": [dataclasses.asdict(row) | {"sparsity": row.sparsity} for row in report.rows],
        "recovered": dataclasses.asdict(recovered) if recovered else None,
        "compacted": dataclasses.asdict(smaller) if smaller else None,
    }
    return "\n".join(text), data


def _pattern(setting: tuple[str, tuple[int, ...]]) -> Any:
    """The pattern of a name and its numbers, if there are any."""
    name, numbers = setting
    if not numbers:
        return name
    return patterns.Block(numbers) if name == "block" else patterns.NOfM(*numbers)
