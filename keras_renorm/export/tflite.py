from __future__ import annotations

import gzip
import os
import pathlib
import tempfile
from typing import Any

import keras
import numpy as np

from keras_renorm import validation
from keras_renorm.conversion import strip
from keras_renorm.delivery import shortfall
from keras_renorm.export.converter import convert, first_line
from keras_renorm.export.flatbuffer import weight_tensors
from keras_renorm.export.inputs import SAMPLES, as_inputs, random_inputs, range_notes
from keras_renorm.export.operations import has_loops, with_written_margins
from keras_renorm.export.preparation import prepare
from keras_renorm.export.report import ExportReport
from keras_renorm.export.storage import Storage, largest_working
from keras_renorm.export.verification import Reference
from keras_renorm.summary import summary
from keras_renorm.version import __version__

QUANTIZE = (None, "float16", "int8")


def export_tflite(
    model: keras.Model,
    path: str | os.PathLike,
    quantize: str | None = None,
    representative_data: Any = None,
    samples: Any = None,
    smallest: bool = False,
) -> ExportReport:
    """Write a model as a `.tflite` file that is smaller because it is sparse.

    Strips the model, converts it with `model.export(format="litert")`, stores each tensor without its zeros where that is
    smaller, loads the file again, and compares its outputs with the Keras model's. Tensors that the runtime does not run so
    are stored in full, and the report names them. The file appears under its name only when it is complete and was seen to
    run; until then an older one stays. It says, as metadata, how the model was pruned (see `keras_renorm.export.explain`).

    Args:
        model: a built model, with prunable layers or plain.
        path: where to write; ends in `.tflite`.
        quantize: `None` for float32; `"float16"`; `"int8"`: with `representative_data` weights and activations are integers
            inside the network, without it only the weights are (dynamic range).
        representative_data: a few hundred typical inputs for `quantize="int8"`: an array, or a list or dict of arrays for
            several inputs, with a batch axis.
        samples: inputs to compare outputs on, of the same kind; by default the first of `representative_data`, or random ones.
        smallest: whether to store integers of fully connected layers without their zeros also where the runtime is slower
            with them (single weights; blocks of 16 inputs are not).

    Returns:
        An `ExportReport`; print it for a table.

    Raises:
        ValueError: if an argument is wrong, the model gives NaN, or TensorFlow is not the backend of Keras.
        OSError: if the file cannot be written.
        RuntimeError: if the model cannot be converted, the runtime does not run what came out, or its outputs are wrong.

    Example:

    >>> import keras, keras_renorm as kr
    >>> model = kr.prune(keras.Sequential([keras.Input((64,)), keras.layers.Dense(64)]), sparsity=0.9)
    >>> report = kr.export_tflite(model, "model.tflite")  # doctest: +SKIP
    >>> report.ratio < 0.5  # doctest: +SKIP
    True
    """
    path = _check_arguments(model, path, quantize, representative_data)
    notes = [note] if (note := shortfall(model)) else []
    representative = None if representative_data is None else as_inputs(model, representative_data, "representative_data")
    if samples is not None:
        inputs = as_inputs(model, samples, "samples")
        notes += range_notes(model, representative, inputs) if representative is not None else []
    else:
        inputs = random_inputs(model) if representative is None else [array[:SAMPLES] for array in representative]
    metadata = _metadata(model, quantize)
    plain = strip(model)
    reference = Reference(plain, inputs)
    plain, changes = prepare(plain, quantize, unroll=representative is not None, smallest=smallest)
    with _folder_beside(path) as folder:
        dense, sparse = pathlib.Path(folder, "dense.tflite"), pathlib.Path(folder, "sparse.tflite")
        difference, notes_of_conversion = _convert_to_run(plain, dense, quantize, representative, reference)
        notes += changes + notes_of_conversion
        if difference > reference.tolerance(quantize):
            raise RuntimeError(
                f"The outputs of the converted model differ from those of model '{model.name}' by {difference:.2g}, where the "
                f"largest is {reference.range:.2g}, so '{path}' was not written. An operation may be converted wrongly: export "
                "parts of the model to find it, or pass typical inputs as `samples`."
            )
        storage = Storage(with_written_margins(dense.read_bytes()), smallest)
        errors: list[str] = []
        distances: list[float] = []

        def works(tensors):
            sparse.write_bytes(storage.write(tensors, metadata))
            try:
                distances.append(reference.difference(sparse))
            except (RuntimeError, ValueError) as error:
                errors.append(first_line(error))
                return False
            if distances[-1] > 2 * difference + 1e-3 * reference.range:
                errors.append(f"outputs differ by {distances[-1]:.2g}")
                return False
            return True

        kept = largest_working(storage.candidates, works)
        if not works(kept):
            raise RuntimeError(f"The runtime does not run the file that was made of model '{model.name}': {errors[-1]}.")
        notes += _stored_in_full(storage, kept, errors)
        data, dense_data = sparse.read_bytes(), storage.write([], metadata)
        os.replace(sparse, path)
    return ExportReport(
        path=path,
        quantize=quantize,
        bytes=len(data),
        gzip_bytes=len(gzip.compress(data, 6)),
        dense_bytes=len(dense_data),
        dense_gzip_bytes=len(gzip.compress(dense_data, 6)),
        stored_sparse=bool(kept),
        tensors=weight_tensors(data),
        difference=distances[-1],
        output_range=reference.range,
        notes=tuple(notes),
    )


def _check_arguments(model, path, quantize, representative_data) -> pathlib.Path:
    validation.check_model(model)
    if keras.backend.backend() != "tensorflow":
        raise ValueError(
            f"Export to .tflite needs Keras on TensorFlow. Received: the {keras.backend.backend()} backend. Save the model "
            "(`keras_renorm.strip(model).save('model.keras')`), start Python with KERAS_BACKEND=tensorflow, load it and "
            "export it there."
        )
    validation.check_choice(quantize, QUANTIZE, "quantize")
    if representative_data is not None and quantize != "int8":
        raise ValueError(
            f"Argument `representative_data` is used with `quantize='int8'` only. Received: quantize={quantize!r}."
        )
    if not isinstance(path, (str, os.PathLike)):
        raise TypeError(f"Argument `path` must be a string or a path. Received: path={path!r} (of type {type(path)}).")
    path = pathlib.Path(path)
    if path.suffix != ".tflite":
        raise ValueError(f"Argument `path` must end in '.tflite'. Received: path={str(path)!r}.")
    if path.is_dir() or not path.parent.is_dir() or not os.access(path.parent, os.W_OK):
        raise OSError(
            f"Argument `path` cannot be written: {'it is a folder' if path.is_dir() else 'its folder is missing or closed'}. "
            f"Received: path={str(path)!r}."
        )
    return path


def _folder_beside(path: pathlib.Path) -> tempfile.TemporaryDirectory:
    try:
        return tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.")
    except OSError as error:
        raise OSError(f"'{path}' cannot be written: {error.strerror}.") from error


def _convert_to_run(
    model: keras.Model,
    path: pathlib.Path,
    quantize: str | None,
    representative: list[np.ndarray] | None,
    reference: Reference,
) -> tuple[float, list[str]]:
    """Write a file that the runtime runs: how far it is from the Keras model, and notes."""
    notes = []
    one_sample = False
    # Calibrating a network that does not run, or that has a loop, would bring the process down.
    first = quantize if representative is None else None
    try:
        try:
            convert(model, path, first)
            difference = reference.difference(path)
        except (RuntimeError, ValueError):
            # Recurrent layers need a batch whose size is known.
            one_sample = True
            convert(model, path, first, one_sample=True)
            difference = reference.difference(path)
            notes.append("Takes one sample at a time: the runtime does not run this network with a batch of any size.")
    except (RuntimeError, ValueError) as error:
        raise RuntimeError(
            f"Nothing was written: the runtime does not run what the converter made of model '{model.name}': {error}"
        ) from error
    if representative is not None:
        if has_loops(path.read_bytes()):
            raise ValueError(
                f"Model '{model.name}' has a loop, such as a recurrent layer over any number of steps, and TensorFlow's "
                "converter crashes where it calibrates one. Give its inputs a fixed number of steps, or leave "
                "`representative_data` out."
            )
        convert(model, path, quantize, representative, one_sample)
        difference = reference.difference(path)
    return difference, notes


def _metadata(model: keras.Model, quantize: str | None) -> dict:
    """How a model was pruned, for who finds the file."""
    table = summary(model)
    report = getattr(model, "pruning_report", None)
    rules = {(row.layer, row.kernel): row for row in report.rows} if report else {}
    layers = []
    for row in table.rows:
        rule = rules.get((row.layer, row.kernel))
        known = dict(criterion=rule.criterion, renormalize=rule.renormalize) if rule else {}
        pattern = {} if row.pattern == "-" else {"pattern": row.pattern}
        layers.append(dict(layer=row.layer, kernel=row.kernel, weights=row.weights, kept=row.kept) | pattern | known)
    return dict(keras_renorm=__version__, model=model.name, quantize=quantize, sparsity=table.sparsity, layers=layers)


def _stored_in_full(storage: Storage, kept: list, errors: list[str]) -> list[str]:
    """What to tell of tensors with zeros that were not stored sparse."""

    def names(tensors):
        return ", ".join(storage.name(tensor) for tensor in tensors)

    notes = []
    if fell_back := [tensor for tensor in storage.candidates if tensor not in kept]:
        notes.append(f"Stored in full, for the runtime does not run them sparse ({errors[-1]}): {names(fell_back)}.")
    if storage.fails:
        notes.append(
            f"Stored in full, for the runtime fails on sparse integers of other layers than Dense: {names(storage.fails)}."
        )
    if storage.slower:
        notes.append(
            "Stored in full, for the runtime is slower with sparse integers that are not in blocks of 16 inputs (pass "
            f"`smallest=True` to store them sparse all the same): {names(storage.slower)}."
        )
    return notes
