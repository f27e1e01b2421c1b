"""Statistics of all kernels of a model, from passes of calibration samples through it."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

import keras
import numpy as np
from keras import ops

from keras_renorm.src.calibration.gradients import loss_gradients
from keras_renorm.src.calibration.observing import observe
from keras_renorm.src.calibration.samples import Samples, count_samples
from keras_renorm.src.core.keras_internals import flatten_layers
from keras_renorm.src.core.statistics import Statistics
from keras_renorm.src.layers.kernels import Kernel, find_kernels
from keras_renorm.src.layers.linear import LinearPart, LinearView, linear_parts


@dataclasses.dataclass(frozen=True)
class KernelStatistics:
    """The statistics of a kernel, and the matrix product that it belongs to.

    Args:
        part: the matrix product.
        statistics: an instance of a subclass of `Statistics`.
    """

    part: LinearPart
    statistics: Any

    @property
    def matrix(self) -> np.ndarray:
        """The kernel as a float64 array of shape `(groups, inputs, units)`."""
        return self.part.view.to_matrix(ops.convert_to_numpy(self.part.kernel).astype(np.float64))

    def to_kernel(self, matrix: np.ndarray) -> np.ndarray:
        """Map an array of the shape of `matrix` to an array of the shape of the kernel."""
        return self.part.view.to_kernel(matrix, tuple(self.part.kernel.shape))


def gather_statistics(model: keras.Model, samples: Samples, statistics: type[Statistics]) -> dict[int, KernelStatistics]:
    """Gather statistics in one pass of samples through a model.

    Args:
        model: a built model. Without prunable layers for statistics of inputs; compiled with its loss for statistics of
            gradients, which are gradients with respect to the effective kernels (see `loss_gradients`).
        samples: the batches, with labels for statistics of gradients.
        statistics: class of the statistics, such as `Moments` (with the outputs of the model itself as targets) or `Gradients`.

    Returns:
        The statistics of each kernel, by the `id` of its variable. Statistics of inputs are missing for kernels that the
        samples do not reach, and for kernels of layers that are not known as matrix products (recurrent layers, embeddings,
        your own layers).
    """
    accumulators: dict[int, tuple[LinearPart, Any]] = {}
    for part, *seen in _SOURCES[statistics.of](model, samples):
        if id(part.kernel) not in accumulators:
            accumulators[id(part.kernel)] = (part, statistics.accumulator(part))
        accumulators[id(part.kernel)][1].update(*seen)
    return {key: KernelStatistics(part, accumulator.result()) for key, (part, accumulator) in accumulators.items()}


def _inputs(model: keras.Model, samples: Samples) -> Iterator[tuple[LinearPart, Any]]:
    parts = {id(layer): found for layer in flatten_layers(model) if (found := linear_parts(layer))}
    layers = [layer for layer in flatten_layers(model) if id(layer) in parts]
    for batch in samples:
        for call in observe(lambda batch=batch: model(batch, training=False), layers):
            for part in parts[id(call.layer)]:
                yield part, part.feed(call.inputs)


def _gradients(model: keras.Model, samples: Samples) -> Iterator[tuple[LinearPart, np.ndarray, int]]:
    parts = _kernels_as_products(model)
    for batch in samples.labelled():
        count = count_samples(batch[0])
        for part, gradient in zip(parts, loss_gradients(model, batch, [part.kernel for part in parts])):
            if not np.isfinite(gradient).all():
                raise ValueError(
                    f"The gradient of the loss with respect to kernel '{part.kernel.path}' holds NaN or infinity for the "
                    "samples of argument `calibration`. Check the samples, their labels and the loss. Nothing was changed."
                )
            yield part, gradient, count


# What a pass of the samples offers to the accumulators, by `Statistics.of`.
_SOURCES = {"inputs": _inputs, "gradients": _gradients}


def _kernels_as_products(model: keras.Model) -> list[LinearPart]:
    """Every prunable kernel of a model as a matrix product, or with the shape of one."""
    layers = flatten_layers(model, include_self=False)
    parts = {id(part.kernel): part for layer in layers for part in linear_parts(layer)}
    for layer in layers:
        with contextlib.suppress(ValueError):
            for kernel in find_kernels(layer):
                parts.setdefault(id(kernel.variable), _by_shape(layer, kernel))
    return list(parts.values())


def _by_shape(layer: keras.Layer, kernel: Kernel) -> LinearPart:
    """A kernel of a layer that does not compute a matrix product, in the shape of one."""
    shape = tuple(kernel.variable.shape)
    units = tuple(axis for axis in range(len(shape)) if axis not in kernel.input_axes)
    view = LinearView(None, None, shape, ((), kernel.input_axes, units))
    return LinearPart(layer, kernel.variable, None, view, 1, None)


def scores_of(gathered: Mapping[int, KernelStatistics], criterion: Any) -> dict[int, np.ndarray]:
    """The scores of the weights, by the `id` of the variable of the kernel, of its shape."""
    return {key: one.to_kernel(np.asarray(criterion(one.matrix, one.statistics))) for key, one in gathered.items()}


def masks_of(gathered: Mapping[int, KernelStatistics], criterion: Any) -> dict[int, np.ndarray]:
    """The masks of a criterion that chooses the sparsity itself, by the `id` of the variable of the kernel."""
    return {key: one.to_kernel(criterion.select(one.matrix, one.statistics, None)) for key, one in gathered.items()}
