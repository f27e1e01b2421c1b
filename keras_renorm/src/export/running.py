"""Files that the runtime can run: conversion and sparse storage, each tried in the runtime."""

from __future__ import annotations

import pathlib

import keras
import numpy as np

from keras_renorm.src.export import failures
from keras_renorm.src.export.converter import convert, layer_names
from keras_renorm.src.export.inputs import FREE_SIDES, SAMPLES, fixed_batch_of, has_free_sides, random_inputs
from keras_renorm.src.export.operations import foreign_operations, has_loops
from keras_renorm.src.export.storage import Storage, largest_working
from keras_renorm.src.export.verification import Reference


def reference_of(model: keras.Model, samples: list[np.ndarray] | None, representative: list[np.ndarray] | None) -> Reference:
    """The outputs of a model on samples, else on the first of its representative data, else on random inputs."""
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


def convert_to_run(
    model: keras.Model,
    path: pathlib.Path,
    quantize: str | None,
    representative: list[np.ndarray] | None,
    reference: Reference,
    integer_io: bool,
) -> tuple[float, list[str]]:
    """Write a file that the runtime can run.

    Returns:
        The largest difference from the outputs of the Keras model, and notes.
    """
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
    """The difference between the outputs of a converted file and of the Keras model."""
    try:
        return reference.difference(path)
    except (RuntimeError, ValueError) as error:
        foreign, places = foreign_operations(path.read_bytes(), layer_names(model))
        why = failures.unknown_operations(foreign, places) if foreign else failures.first_line(error)
        raise RuntimeError(
            f"Nothing was written: the runtime does not run the file that the converter made from model '{model.name}': {why}"
        ) from error


def store_to_run(
    file: Storage, candidates: tuple, path: pathlib.Path, metadata: dict, reference: Reference, difference: float
) -> tuple[list, float, list[str]]:
    """Write a file with as many sparse tensors as the runtime can run.

    Args:
        file: the tensors that can be stored sparse.
        candidates: the tensors to store sparse.
        path: path of the file.
        metadata: metadata of the file.
        reference: the outputs of the Keras model.
        difference: the difference of the file with every tensor in full from these outputs.

    Returns:
        The tensors that are stored sparse, the difference from the outputs of the Keras model, and the errors of other
        attempts.
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
