"""Scores of all kernels of a model by one pass of samples through it as it is."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import keras
import numpy as np
from keras import ops

from keras_renorm.src.calibration.observing import observe
from keras_renorm.src.calibration.samples import Samples
from keras_renorm.src.core.moments import Accumulator, InputSizes, SizeAccumulator
from keras_renorm.src.layers.linear import LinearPart, linear_parts


@dataclasses.dataclass(frozen=True)
class Seen:
    """A kernel that samples reached: the matrix product that it belongs to, and what is known of its inputs."""

    part: LinearPart
    statistics: Any

    @property
    def matrix(self) -> np.ndarray:
        """The kernel, shape `(groups, inputs, units)`."""
        return self.part.view.to_matrix(ops.convert_to_numpy(self.part.kernel).astype(np.float64))

    def to_kernel(self, matrix: np.ndarray) -> np.ndarray:
        """Back from that shape to the kernel's."""
        return self.part.view.to_kernel(matrix, tuple(self.part.kernel.shape))


def see(model: keras.Model, samples: Samples, statistics: type) -> dict[int, Seen]:
    """Run samples through a plain model, once.

    Args:
        model: a built model without prunable layers.
        samples: the batches.
        statistics: what to gather: `Moments` (about the model as it is: its outputs are the targets) or `InputSizes`.

    Returns:
        What is known of each kernel, by the `id` of its variable. Kernels that the samples do not reach, and those of layers
        that are not known as matrix products (recurrent, embeddings, your own), are not there.
    """
    parts = {id(layer): found for layer in model._flatten_layers() if (found := linear_parts(layer))}
    layers = [layer for layer in model._flatten_layers() if id(layer) in parts]
    gather = _Sizes if statistics is InputSizes else _Moments
    gathered: dict[int, tuple[LinearPart, Any]] = {}
    for batch in samples:
        for call in observe(lambda batch=batch: model(batch, training=False), layers):
            for part in parts[id(call.layer)]:
                _, gatherer = gathered.setdefault(id(part.kernel), (part, gather(part)))
                gatherer.add(part.feed(call.inputs))
    return {key: Seen(part, gatherer.result()) for key, (part, gatherer) in gathered.items()}


class _Sizes:
    def __init__(self, part: LinearPart):
        self.part, self.accumulator = part, SizeAccumulator()

    def add(self, inputs):
        self.accumulator.add(inputs)

    def result(self) -> InputSizes:
        return input_sizes(self.accumulator, self.part)


class _Moments:
    def __init__(self, part: LinearPart):
        self.part, self.accumulator = part, Accumulator()
        matrix = part.view.to_matrix(ops.convert_to_numpy(part.kernel).astype(np.float32))
        self.matrix = ops.convert_to_tensor(matrix)

    def add(self, inputs):
        rows = ops.cast(self.part.view.rows(inputs), "float32")
        self.accumulator.add(rows, ops.matmul(rows, self.matrix))

    def result(self):
        return self.accumulator.moments(intercept=self.part.bias is not None)


def input_sizes(accumulator: SizeAccumulator, part: LinearPart) -> InputSizes:
    """What a `SizeAccumulator` gathered for a part of a layer."""
    groups, _, units = part.view.sizes
    bias = np.zeros((groups, units))
    if part.bias is not None:
        bias = np.abs(ops.convert_to_numpy(part.bias).astype(np.float64)).reshape(groups, units)
    return InputSizes(accumulator.sizes(part.view.rows), part.taps, bias)


def scores_of(seen: Mapping[int, Seen], criterion: Any) -> dict[int, np.ndarray]:
    """The score of each weight, by the `id` of the kernel's variable, shaped like the kernel."""
    return {key: one.to_kernel(np.asarray(criterion(one.matrix, one.statistics))) for key, one in seen.items()}


def masks_of(seen: Mapping[int, Seen], criterion: Any) -> dict[int, np.ndarray]:
    """The masks that a criterion which chooses the count itself gives, by the `id` of the kernel's variable."""
    return {key: one.to_kernel(criterion.select(one.matrix, one.statistics, None)) for key, one in seen.items()}
