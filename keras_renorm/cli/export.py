"""`keras-renorm export`."""

from __future__ import annotations

import argparse
import dataclasses

from keras_renorm.cli import files
from keras_renorm.src.export.tflite import export_tflite


def run(arguments: argparse.Namespace) -> tuple[str, dict]:
    files.check_backend()
    files.import_modules(arguments.modules)
    model = files.load_model(arguments.model)
    report = export_tflite(
        model,
        arguments.output,
        quantize=arguments.quantize,
        representative_data=files.inputs_from(arguments.representative_data, model),
        samples=files.inputs_from(arguments.samples, model),
        smallest=arguments.smallest,
        storage=arguments.storage,
        integer_io=arguments.integer_io,
    )
    return str(report), dataclasses.asdict(report) | {"ratio": report.ratio}
