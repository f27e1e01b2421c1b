from __future__ import annotations

import gzip
import os
import pathlib
import re
import tempfile
import warnings
from typing import Any

import keras
import numpy as np

from keras_renorm import validation
from keras_renorm.conversion import never_pruned, strip
from keras_renorm.export.flatbuffer import weight_tensors
from keras_renorm.export.operations import has_loops, with_written_margins
from keras_renorm.export.preparation import prepare
from keras_renorm.export.report import ExportReport
from keras_renorm.export.storage import Storage, largest_working
from keras_renorm.export.verification import largest_difference, run
from keras_renorm.summary import summary
from keras_renorm.version import __version__

QUANTIZE = (None, "float16", "int8")
# How far outputs may be off, as a share of the largest, before something must be wrong. Integers are only reported.
_TOLERANCE = {None: 1e-2, "float16": 5e-2, "int8": np.inf}
_SAMPLES = 8
_FREE_SIDE = 32


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
    notes = [note] if (note := never_pruned(model)) else []
    representative = None if representative_data is None else _as_inputs(model, representative_data, "representative_data")
    if samples is not None:
        inputs = _as_inputs(model, samples, "samples")
    else:
        inputs = _random_inputs(model) if representative is None else [array[:_SAMPLES] for array in representative]
    if representative is not None and samples is not None:
        notes += _range_notes(model, representative, inputs)
    metadata = _metadata(model, quantize)
    plain = strip(model)
    answer = plain.predict_on_batch(_structured(plain, inputs))
    expected = [np.asarray(value) for value in keras.tree.flatten(answer)]
    output_range = max(float(np.max(np.abs(value), initial=0)) for value in expected)
    if not np.isfinite(output_range):
        raise ValueError(
            f"Model '{model.name}' gives NaN or infinity on the samples, so the exported file could not be compared with it. "
            "Pass typical inputs as `samples`, or check its weights."
        )
    tolerance = _TOLERANCE[quantize]
    if any(layer.compute_dtype != "float32" for layer in plain._flatten_layers()):
        # What it is compared with was computed in half precision.
        tolerance = max(tolerance, _TOLERANCE["float16"])
    plain, changes = prepare(plain, unroll=representative is not None)
    notes += changes
    settings = _converter_settings(plain, quantize, representative)

    def answers(file):
        return run(file, inputs, _names(plain), keys=isinstance(answer, dict))

    def attempt(file, settings):
        _convert(plain, file, settings)
        return largest_difference(expected, answers(file))

    with _folder_beside(path) as folder:
        dense, sparse = pathlib.Path(folder, "dense.tflite"), pathlib.Path(folder, "sparse.tflite")
        # Calibrating a network that does not run, or that has a loop, would bring the process down.
        first = {} if representative is not None else settings
        try:
            try:
                difference = attempt(dense, first)
            except (RuntimeError, ValueError):
                # Recurrent layers need a batch whose size is known.
                one = {"input_signature": _batch_of_one(plain)}
                first, settings = first | one, settings | one
                difference = attempt(dense, first)
                notes.append("Takes one sample at a time: the runtime does not run this network with a batch of any size.")
            if representative is not None:
                _check_loops(model, dense)
                difference = attempt(dense, settings)
        except RuntimeError as error:
            raise RuntimeError(
                f"The runtime does not run what the converter made of model '{model.name}', so '{path}' was not written: "
                f"{error}"
            ) from error
        if difference > tolerance * output_range:
            raise RuntimeError(
                f"The outputs of the converted model differ from those of model '{model.name}' by {difference:.2g}, where the "
                f"largest is {output_range:.2g}, so '{path}' was not written. An operation may be converted wrongly: export "
                "parts of the model to find it, or pass typical inputs as `samples`."
            )
        storage = Storage(with_written_margins(dense.read_bytes()), smallest)
        errors: list[str] = []
        differences: list[float] = []

        def works(tensors):
            sparse.write_bytes(storage.write(tensors, metadata))
            try:
                differences.append(largest_difference(expected, answers(sparse)))
            except (RuntimeError, ValueError) as error:
                errors.append(_first_line(error))
                return False
            if differences[-1] > 2 * difference + 1e-3 * output_range:
                errors.append(f"outputs differ by {differences[-1]:.2g}")
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
        difference=differences[-1],
        output_range=output_range,
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
        raise OSError(f"Argument `path` cannot be written: {error}. Received: path={str(path)!r}.") from error


def _check_loops(model: keras.Model, path: pathlib.Path) -> None:
    if has_loops(path.read_bytes()):
        raise ValueError(
            f"Model '{model.name}' has a loop, such as a recurrent layer over any number of steps, and TensorFlow's converter "
            "crashes where it calibrates one. Give its inputs a fixed number of steps, or leave `representative_data` out."
        )


def _names(model: keras.Model) -> list[str]:
    return [tensor.name for tensor in keras.tree.flatten(getattr(model, "inputs", None) or [])]


def _specs(model: keras.Model) -> list:
    inputs = getattr(model, "inputs", None)
    if not inputs:
        raise ValueError(
            f"Model '{model.name}' is a subclassed model and does not tell the shape of its inputs, which export needs. Wrap "
            "it: `x = keras.Input(shape); model = keras.Model(x, model(x))`."
        )
    return keras.tree.flatten(inputs)


def _as_inputs(model: keras.Model, data: Any, argument: str) -> list[np.ndarray]:
    """Arrays in the order of the model's inputs, checked against their shapes."""
    specs = _specs(model)
    if isinstance(data, dict):
        missing = [spec.name for spec in specs if spec.name not in data]
        if missing:
            raise ValueError(
                f"Argument `{argument}` has no entry for inputs {missing} of model '{model.name}'. Received: keys "
                f"{sorted(data)}."
            )
        arrays = [np.asarray(data[spec.name]) for spec in specs]
    elif callable(data) or hasattr(data, "element_spec"):
        raise ValueError(
            f"Argument `{argument}` must hold arrays: one, or a list or dict of them for several inputs. Received: {data!r}. "
            "Collect a few hundred samples first, such as `np.concatenate(list(batches))`."
        )
    else:
        arrays = [np.asarray(array) for array in (data if isinstance(data, (list, tuple)) else [data])]
    wanted = [tuple(spec.shape) for spec in specs]
    received = [array.shape for array in arrays]
    fits = len(wanted) == len(received) and all(
        len(have) == len(want) and have[0] > 0 and all(b in (None, a) for a, b in zip(have[1:], want[1:]))
        for have, want in zip(received, wanted)
    )
    if not fits or len({shape[0] for shape in received}) > 1:
        raise ValueError(
            f"Argument `{argument}` must hold arrays of shapes {wanted} (the first axis is the batch), one for each input of "
            f"model '{model.name}'. Received: shapes {received}."
        )
    for array, spec in zip(arrays, specs):
        if np.issubdtype(array.dtype, np.inexact) and not np.isfinite(array).all():
            raise ValueError(f"Argument `{argument}` holds NaN or infinity for input '{spec.name}' of model '{model.name}'.")
    return [array.astype(spec.dtype) for array, spec in zip(arrays, specs)]


def _range_notes(model: keras.Model, representative: list[np.ndarray], inputs: list[np.ndarray]) -> list[str]:
    """What to tell of inputs that integers cannot stand for."""
    notes = []
    for spec, seen, given in zip(_specs(model), representative, inputs):
        low, high = float(seen.min()), float(seen.max())
        margin = 0.1 * (high - low)
        if float(given.min()) < low - margin or float(given.max()) > high + margin:
            notes.append(
                f"`representative_data` for input '{spec.name}' lies between {low:.3g} and {high:.3g}, but `samples` between "
                f"{given.min():.3g} and {given.max():.3g}: what is outside of its range is cut off."
            )
    return notes


def _random_inputs(model: keras.Model) -> list[np.ndarray]:
    generator = np.random.default_rng(0)
    inputs = []
    for spec in _specs(model):
        shape = [spec.shape[0] or _SAMPLES] + [side or _FREE_SIDE for side in spec.shape[1:]]
        if keras.backend.is_float_dtype(spec.dtype):
            inputs.append(generator.standard_normal(shape).astype(spec.dtype))
        else:
            # Indices that every vocabulary has.
            inputs.append(generator.integers(0, 2, shape).astype(spec.dtype))
    return inputs


def _structured(model: keras.Model, inputs: list[np.ndarray]) -> Any:
    """Flat inputs in the structure that the model takes."""
    structure = getattr(model, "_inputs_struct", None)
    return keras.tree.pack_sequence_as(structure, inputs) if structure is not None else inputs[0]


def _converter_settings(model: keras.Model, quantize: str | None, representative: list[np.ndarray] | None) -> dict:
    import tensorflow as tf

    if quantize is None:
        return {}
    settings: dict = {"optimizations": [tf.lite.Optimize.DEFAULT]}
    if quantize == "float16":
        settings["target_spec"] = {"supported_types": [tf.float16]}
    if representative is not None:
        names = _names(model)

        def batches():
            for index in range(len(representative[0])):
                yield {name: array[index : index + 1] for name, array in zip(names, representative)}

        settings["representative_dataset"] = batches
    return settings


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


def _batch_of_one(model: keras.Model) -> list:
    def fix(tensor):
        return keras.layers.InputSpec(shape=(1, *tensor.shape[1:]), dtype=tensor.dtype, name=tensor.name)

    structure = getattr(model, "_inputs_struct", None)
    return [keras.tree.map_structure(fix, model.inputs[0] if structure is None else structure)]


def _convert(model: keras.Model, path: pathlib.Path, settings: dict) -> None:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model.export(str(path), format="litert", verbose=False, **settings)
    except Exception as error:
        raise RuntimeError(f"TensorFlow could not convert model '{model.name}': {_unknown_operations(error)}") from error


def _unknown_operations(error: Exception) -> str:
    """Which operations the converter does not know, and where they are, if that is what an error is about."""
    names = re.findall(r"^(?:Custom|Flex) ops: (.+)$", str(error), re.MULTILINE)
    if not names:
        return _first_line(error)
    places = dict.fromkeys(place for place in re.findall(r'"([^"@]+/[^"@]+)@', str(error)))
    return (
        f"TFLite has no operation {', '.join(names)} (in {', '.join(places) or 'the model'}). Write that layer with operations "
        "that it has, or export the part of the model before it."
    )


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0][:200] if str(error).strip() else type(error).__name__
