"""`export_tflite`: from a Keras model to a `.tflite` file that has run and computes the same."""

from __future__ import annotations

import gzip
import os
import pathlib
from typing import Any

import keras
import numpy as np

from keras_renorm.src.core import names, validation
from keras_renorm.src.export import failures, notes
from keras_renorm.src.export.beside import folder_beside
from keras_renorm.src.export.flatbuffer import weight_tensors
from keras_renorm.src.export.inputs import as_inputs, range_notes
from keras_renorm.src.export.operations import with_written_margins
from keras_renorm.src.export.preparation import flattened, prepare
from keras_renorm.src.export.report import ExportReport
from keras_renorm.src.export.running import convert_to_run, reference_of, store_to_run
from keras_renorm.src.export.storage import Storage
from keras_renorm.src.pruning.conversion import strip
from keras_renorm.src.pruning.delivery import shortfall
from keras_renorm.src.reports.summary import summary
from keras_renorm.version import __version__

# Networks whose weights take at most this many bytes fit a microcontroller, where sparse files do not run.
_MICROCONTROLLER = 2**18


def export_tflite(
    model: keras.Model,
    path: str | os.PathLike,
    quantize: str | None = None,
    representative_data: Any = None,
    samples: Any = None,
    smallest: bool = False,
    storage: str = "auto",
    integer_io: bool = False,
) -> ExportReport:
    """Write a model as a `.tflite` file that is smaller because it is sparse.

    The function strips the model, converts it with `model.export(format="litert")`, and stores each tensor without its zeros
    where that is smaller. Then it loads the file and compares its outputs with those of the Keras model. Tensors that the
    runtime cannot run sparse are stored in full, and the report names them. The file takes its name only when it is complete
    and has run; until then an older file of that name stays. Its metadata say how the model was pruned (see
    `keras_renorm.export.explain`).

    Args:
        model: a built model, with prunable layers or with plain ones.
        path: path of the file, which ends in `.tflite`.
        quantize: `None` for float32, `"float16"`, or `"int8"`. With `"int8"` and `representative_data` the weights and the
            activations are integers; without `representative_data` the weights alone are (dynamic range). Defaults to `None`.
        representative_data: a few hundred typical inputs for `quantize="int8"`, with a batch axis: an array, or, for several
            inputs, a list or dict of arrays (or the structure that the model takes). Defaults to `None`.
        samples: inputs to compare the outputs on, of the same kind. Defaults to `None`: the first of `representative_data`,
            or random inputs.
        smallest: whether to store integers of fully connected layers without their zeros even where that makes the runtime
            slower (single weights do, blocks of 16 inputs do not). Defaults to `False`.
        storage: `"sparse"` stores tensors without their zeros, which LiteRT reads. `"full"` stores every tensor in full, which
            TensorFlow Lite for Microcontrollers reads, too. `"auto"` is sparse, unless the weights take at most 256 kB in a
            type that microcontrollers run (float32, or integers with `representative_data`). Defaults to `"auto"`.
        integer_io: whether inputs and outputs are 8-bit integers, too, as microcontrollers need them; requires
            `representative_data`. The file holds their scales. Defaults to `False`.

    Returns:
        An `ExportReport`; print it for a table.

    Raises:
        ValueError: if an argument is wrong, the model gives NaN, or TensorFlow is not the backend of Keras.
        OSError: if the file cannot be written.
        RuntimeError: if the model cannot be converted, the runtime does not run what came out, or its outputs are wrong.

    Example:

    >>> import keras, keras_renorm as kr
    >>> model = kr.prune(keras.Sequential([keras.Input((512,)), keras.layers.Dense(512)]), sparsity=0.9)
    >>> report = kr.export_tflite(model, "model.tflite")  # doctest: +SKIP
    >>> report.ratio < 0.5  # doctest: +SKIP
    True
    """
    path = _check_arguments(model, path, quantize, representative_data, storage, integer_io)
    told = [note] if (note := shortfall(model)) else []
    representative = None if representative_data is None else as_inputs(model, representative_data, "representative_data")
    inputs = None if samples is None else as_inputs(model, samples, "samples")
    if representative is not None and inputs is not None:
        told += range_notes(model, representative, inputs)
    metadata = _metadata(model, quantize)
    # The outputs of the model that was passed in, not of what is made of it below.
    reference = reference_of(model, inputs, representative)
    plain = strip(model)
    sparse = _stored_sparse(storage, representative is not None, plain.count_params())
    plain, changes = prepare(plain, quantize, unroll=representative is not None, smallest=smallest, sparse=sparse[quantize])
    plain, of_outputs = flattened(plain)
    with failures.full_disk_told(path), folder_beside(path) as folder:
        whole, stored = folder / "whole.tflite", folder / "stored.tflite"
        difference, of_conversion = convert_to_run(plain, whole, quantize, representative, reference, integer_io)
        told += changes + of_outputs + of_conversion
        _check_difference(model, path, difference, reference, quantize)
        data = whole.read_bytes()
        file = Storage(with_written_margins(data) if sparse[quantize] else data, smallest)
        candidates = file.candidates if sparse[quantize] else ()
        kept, distance, errors = store_to_run(file, candidates, stored, metadata, reference, difference)
        if sparse[quantize]:
            told += notes.stored_in_full(file, kept, errors)
        data, dense_data = stored.read_bytes(), file.write([], metadata)
        _replace(stored, path)
    estimates = {
        name: len(data) if kind == quantize else file.estimated_bytes(name, sparse[kind]) for kind, name in notes.TYPES.items()
    }
    if storage == "auto" and not sparse[quantize]:
        told += notes.stored_in_full_for_boards(file, metadata)
    told += notes.how_to_run(model, bool(kept))
    told += notes.far_off(quantize, representative is not None, distance, reference.range)
    told += notes.smaller_type(quantize, estimates)
    return ExportReport(
        path=path,
        quantize=quantize,
        bytes=len(data),
        gzip_bytes=len(gzip.compress(data, 6)),
        dense_bytes=len(dense_data),
        dense_gzip_bytes=len(gzip.compress(dense_data, 6)),
        stored_sparse=bool(kept),
        tensors=weight_tensors(data),
        difference=distance,
        output_range=reference.range,
        notes=tuple(told),
        estimated_bytes=estimates,
    )


def _check_arguments(model, path, quantize, representative_data, storage, integer_io) -> pathlib.Path:
    validation.check_model(model)
    if keras.backend.backend() != "tensorflow":
        raise ValueError(
            f"Export to .tflite needs Keras on TensorFlow. Received: the {keras.backend.backend()} backend. Save the model "
            "(`keras_renorm.strip(model).save('model.keras')`), start Python with KERAS_BACKEND=tensorflow, load it and "
            "export it there."
        )
    validation.check_choice(quantize, (None, *names.QUANTIZE), "quantize")
    validation.check_choice(storage, names.STORAGE, "storage")
    if representative_data is not None and quantize != "int8":
        raise ValueError(
            f"Argument `representative_data` is used with `quantize='int8'` only. Received: quantize={quantize!r}."
        )
    if integer_io and representative_data is None:
        raise ValueError(
            "Argument `integer_io` is used with `quantize='int8'` and `representative_data`, which tells what an integer is "
            f"worth. Received: integer_io={integer_io!r}, quantize={quantize!r}, representative_data=None."
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


def _stored_sparse(storage: str, has_data: bool, weights: int) -> dict[str | None, bool]:
    """For each value of `quantize`, whether tensors are stored without their zeros.

    Args:
        storage: the argument of `export_tflite`.
        has_data: whether there is representative data.
        weights: the number of weights of the model.
    """
    if storage != "auto":
        return dict.fromkeys(notes.TYPES, storage == "sparse")
    # TensorFlow Lite for Microcontrollers runs neither half floats nor integers among floats.
    runs_there = {None: True, "float16": False, "int8": has_data}
    return {
        kind: not runs_there[kind] or weights * np.dtype(name).itemsize > _MICROCONTROLLER for kind, name in notes.TYPES.items()
    }


def _check_difference(model: keras.Model, path: pathlib.Path, difference: float, reference: Any, quantize: str | None) -> None:
    # Infinite if there is NaN, or if shapes differ.
    if difference > reference.tolerance(quantize) or difference == np.inf:
        raise RuntimeError(
            f"The outputs of the converted model differ from those of model '{model.name}' by {difference:.2g}, where the "
            f"largest is {reference.range:.2g}, so '{path}' was not written. An operation may be converted wrongly: export "
            "parts of the model to find it, or pass typical inputs as `samples`."
        )


def _replace(written: pathlib.Path, path: pathlib.Path) -> None:
    try:
        os.replace(written, path)
    except OSError as error:
        raise OSError(f"'{path}' cannot be written: {error.strerror}.") from error


def _metadata(model: keras.Model, quantize: str | None) -> dict:
    """How the model was pruned, for the reader of the file."""
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
