from __future__ import annotations

import gzip
import os
import pathlib
from typing import Any

import keras
import numpy as np

from keras_renorm.src.core import names, validation
from keras_renorm.src.export import failures
from keras_renorm.src.export.beside import folder_beside
from keras_renorm.src.export.converter import convert, layer_names
from keras_renorm.src.export.flatbuffer import weight_tensors
from keras_renorm.src.export.inputs import (
    FREE_SIDES,
    SAMPLES,
    as_inputs,
    fixed_batch_of,
    has_free_sides,
    random_inputs,
    range_notes,
)
from keras_renorm.src.export.operations import foreign_operations, has_loops, with_written_margins
from keras_renorm.src.export.preparation import flattened, prepare
from keras_renorm.src.export.report import ExportReport
from keras_renorm.src.export.storage import Storage, largest_working
from keras_renorm.src.export.verification import Reference
from keras_renorm.src.pruning.conversion import strip
from keras_renorm.src.pruning.delivery import shortfall
from keras_renorm.src.reports.summary import summary
from keras_renorm.version import __version__

# Networks whose weights take at most so many bytes fit a microcontroller, where sparse files do not run.
_MICROCONTROLLER = 2**18
_TYPES = {None: "float32", "float16": "float16", "int8": "int8"}
_SPARSE = (
    "Tensors stored sparse are read by LiteRT (and TensorFlow Lite) on CPUs. TensorFlow Lite for Microcontrollers refuses the "
    "file: export with `storage='full'` for it."
)
# A share of the largest output: integers that are further off are worth a word.
_FAR = 0.1


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
            several inputs (or nested as the model takes them), with a batch axis.
        samples: inputs to compare outputs on, of the same kind; by default the first of `representative_data`, or random ones.
        smallest: whether to store integers of fully connected layers without their zeros also where the runtime is slower
            with them (single weights; blocks of 16 inputs are not).
        storage: `"sparse"`: tensors are stored without their zeros, which LiteRT reads. `"full"`: every tensor is stored in
            full, which TensorFlow Lite for Microcontrollers reads, too. `"auto"`: sparse, unless the weights take at most
            256 kB in a type that microcontrollers run (float32, or integers with `representative_data`).
        integer_io: whether inputs and outputs are 8-bit integers, too, as boards want them; with `representative_data`. The
            file says what an integer is worth.

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
    notes = [note] if (note := shortfall(model)) else []
    representative = None if representative_data is None else as_inputs(model, representative_data, "representative_data")
    inputs = None if samples is None else as_inputs(model, samples, "samples")
    if representative is not None and inputs is not None:
        notes += range_notes(model, representative, inputs)
    metadata = _metadata(model, quantize)
    # The model that was passed in, and not what is made of it below.
    reference = _reference(model, inputs, representative)
    plain = strip(model)
    # Which formats are stored sparse, this one and those that it is told beside.
    sparse = {
        kind: _stores_sparse(storage, kind, representative is not None, plain.count_params() * np.dtype(name).itemsize)
        for kind, name in _TYPES.items()
    }
    plain, changes = prepare(plain, quantize, unroll=representative is not None, smallest=smallest, sparse=sparse[quantize])
    plain, of_outputs = flattened(plain)
    with failures.full_disk_told(path), folder_beside(path) as folder:
        whole, stored = folder / "whole.tflite", folder / "stored.tflite"
        difference, of_conversion = _convert_to_run(plain, whole, quantize, representative, reference, integer_io)
        notes += changes + of_outputs + of_conversion
        # Infinite: NaN, or other shapes.
        if difference > reference.tolerance(quantize) or difference == np.inf:
            raise RuntimeError(
                f"The outputs of the converted model differ from those of model '{model.name}' by {difference:.2g}, where the "
                f"largest is {reference.range:.2g}, so '{path}' was not written. An operation may be converted wrongly: export "
                "parts of the model to find it, or pass typical inputs as `samples`."
            )
        data = whole.read_bytes()
        file = Storage(with_written_margins(data) if sparse[quantize] else data, smallest)
        candidates = file.candidates if sparse[quantize] else ()
        kept, distance, errors = _store_to_run(file, candidates, stored, metadata, reference, difference)
        if sparse[quantize]:
            notes += _stored_in_full(file, kept, errors)
        data, dense_data = stored.read_bytes(), file.write([], metadata)
        _replace(stored, path)
    estimates = {
        name: len(data) if kind == quantize else file.estimated_bytes(name, sparse[kind]) for kind, name in _TYPES.items()
    }
    if storage == "auto" and not sparse[quantize] and file.candidates:
        notes.append(
            "Stored in full, for a network as small as this may be meant for a microcontroller, which cannot read sparse "
            f"tensors: `storage='sparse'` takes {len(file.write(file.candidates, metadata)):,} bytes, for LiteRT."
        )
    if kept:
        notes.append(_SPARSE)
    if has_free_sides(model):
        notes.append(
            "Inputs have sides of any length: set them with `resize_tensor_input` before `allocate_tensors`, or run the file "
            "by its signature, which does."
        )
    notes += _far_off(quantize, representative is not None, distance, reference.range) + _smaller(quantize, estimates)
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
        notes=tuple(notes),
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


def _stores_sparse(storage: str, quantize: str | None, has_data: bool, size: int) -> bool:
    """Whether tensors are stored without their zeros, given how many bytes all of them take in full."""
    if storage != "auto":
        return storage == "sparse"
    # TensorFlow Lite for Microcontrollers runs neither half floats nor integers among floats.
    runs_there = quantize is None or (quantize == "int8" and has_data)
    return not runs_there or size > _MICROCONTROLLER


def _reference(model: keras.Model, samples: list[np.ndarray] | None, representative: list[np.ndarray] | None) -> Reference:
    """What a model answers on samples, or else on the first of its representative data, or on random inputs."""
    batch = fixed_batch_of(model)
    if samples is not None:
        return Reference(model, [array[:batch] for array in samples])
    if representative is not None:
        return Reference(model, [array[: batch or SAMPLES] for array in representative])
    if not has_free_sides(model):
        return Reference(model, random_inputs(model))
    for side in FREE_SIDES:
        try:
            return Reference(model, random_inputs(model, side))
        except RuntimeError as error:
            # Too short for its windows, or longer than its positions.
            last = error
    raise RuntimeError(f"{last} Sides of any length were tried with {FREE_SIDES}: pass typical inputs as `samples`.") from last


def _convert_to_run(
    model: keras.Model,
    path: pathlib.Path,
    quantize: str | None,
    representative: list[np.ndarray] | None,
    reference: Reference,
    integer_io: bool,
) -> tuple[float, list[str]]:
    """Write a file that the runtime runs: how far it is from the Keras model, and notes."""
    several = fixed_batch_of(model)
    fixed_batch = several is not None
    notes = [] if several in (None, 1) else [f"Takes {several} samples at a time, as the model does."]
    # Calibrating a network that does not run, or that has a loop, would bring the process down.
    first = quantize if representative is None else None
    try:
        convert(model, path, first, fixed_batch=fixed_batch)
        difference = _compare(model, path, reference)
        if not fixed_batch:
            reference.run_first(path)
    except (RuntimeError, ValueError):
        if fixed_batch:
            raise
        # Recurrent layers need a batch whose size is known.
        fixed_batch = True
        convert(model, path, first, fixed_batch=True)
        difference = _compare(model, path, reference)
        notes.append("Takes one sample at a time: the runtime does not run this network with a batch of any size.")
    if representative is not None:
        if has_loops(path.read_bytes()):
            raise ValueError(
                f"Model '{model.name}' has a loop, such as a recurrent layer over any number of steps, and TensorFlow's "
                "converter crashes where it calibrates one. Give its inputs a fixed number of steps, or leave "
                "`representative_data` out."
            )
        convert(model, path, quantize, representative, fixed_batch, integer_io)
        difference = _compare(model, path, reference)
    foreign, places = foreign_operations(path.read_bytes(), layer_names(model))
    if foreign:
        notes.append(f"Runs with the Flex delegate only: {failures.unknown_operations(foreign, places)}")
    return difference, notes


def _compare(model: keras.Model, path: pathlib.Path, reference: Reference) -> float:
    """How far a converted file is from the Keras model, in a runtime that may not run it."""
    try:
        return reference.difference(path)
    except (RuntimeError, ValueError) as error:
        foreign, places = foreign_operations(path.read_bytes(), layer_names(model))
        why = failures.unknown_operations(foreign, places) if foreign else failures.first_line(error)
        raise RuntimeError(
            f"Nothing was written: the runtime does not run what the converter made of model '{model.name}': {why}"
        ) from error


def _store_to_run(
    file: Storage, candidates: tuple, path: pathlib.Path, metadata: dict, reference: Reference, difference: float
) -> tuple[list, float, list[str]]:
    """Write a file with as many of its tensors sparse as the runtime runs: these, how far it is from the Keras model, and what
    went wrong with others.

    Args:
        file: what can be stored sparse.
        candidates: the tensors to store sparse.
        path: where to write.
        metadata: what the file is to say.
        reference: the Keras model's answers.
        difference: how far the file with every tensor in full is from them.
    """
    errors: list[str] = []
    distances: list[float] = []

    def works(tensors):
        path.write_bytes(file.write(tensors, metadata))
        try:
            distances.append(reference.difference(path))
        except (RuntimeError, ValueError) as error:
            errors.append(failures.first_line(error))
            return False
        if distances[-1] > 2 * difference + 1e-3 * reference.range:
            errors.append(f"outputs differ by {distances[-1]:.2g}")
            return False
        return True

    kept = largest_working(candidates, works)
    if not works(kept):
        raise RuntimeError(f"The runtime does not run the file that was made: {errors[-1]}.")
    return kept, distances[-1], errors


def _replace(written: pathlib.Path, path: pathlib.Path) -> None:
    try:
        os.replace(written, path)
    except OSError as error:
        raise OSError(f"'{path}' cannot be written: {error.strerror}.") from error


def _far_off(quantize: str | None, has_data: bool, difference: float, reach: float) -> list[str]:
    """What to tell of outputs that integers change much."""
    if quantize != "int8" or difference <= _FAR * reach:
        return []
    remedies = ["`quantize='float16'`"]
    if has_data:
        remedies = ["more, and typical, `representative_data`", "integers as weights only (without it)", *remedies]
    return [
        f"Outputs differ by {difference:.2g} where they reach {reach:.2g}: integers are coarse for this network. Measure its "
        f"accuracy, and try {', '.join(remedies[:-1])}{' or ' if has_data else ''}{remedies[-1]}."
    ]


def _smaller(quantize: str | None, estimates: dict[str, int]) -> list[str]:
    """What to tell of a type that is more exact and takes fewer bytes, too."""
    order = list(_TYPES.values())
    exact = {name: estimates[name] for name in order[: order.index(_TYPES[quantize])]}
    least = min(exact, key=exact.get, default=None)
    # Estimates know nothing of what goes with each tensor.
    if least is None or exact[least] + 4096 > 0.9 * estimates[_TYPES[quantize]]:
        return []
    return [
        f"{least} is more exact, and smaller: about {exact[least]:,} bytes, where zeros of {_TYPES[quantize]} are stored in "
        "full."
    ]


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
