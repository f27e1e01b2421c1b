"""The statistics that a criterion can use of a kernel on calibration samples."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np


class Statistics:
    """Base class of the statistics of a kernel. `CalibratedCriterion.statistics` names a subclass.

    Attributes:
        of: what the statistics are gathered from: `"inputs"` of the layer of the kernel, in forward passes; or `"gradients"` of
            the loss with respect to the kernel, for which the samples need labels and the model must be compiled with its loss.
    """

    of = "inputs"

    @classmethod
    def accumulator(cls, product: Any) -> Any:
        """The accumulator of the statistics of one kernel.

        Args:
            product: the kernel as a matrix product, with `kernel`, `bias`, `view` and `taps` (a `LinearPart`).

        Returns:
            An object with a method `result()`, which returns an instance of this class, and a method `update`, which is called
            once for every batch: `update(inputs)` with the tensor of the inputs of the product, samples first; or
            `update(gradient, samples)` with the gradient of the mean loss of the batch, an array of the shape of the kernel,
            and the number of samples in the batch.
        """
        raise NotImplementedError


@dataclasses.dataclass(frozen=True)
class Gradients(Statistics):
    """The gradient of the loss with respect to a kernel.

    Args:
        mean: mean over the samples, of shape `(groups, inputs, units)`.
        square: mean over the batches of the square of the gradient of a batch, of the same shape.
    """

    mean: np.ndarray
    square: np.ndarray

    of = "gradients"

    @classmethod
    def accumulator(cls, product):
        return GradientAccumulator(product)


class GradientAccumulator:
    """Accumulates gradients batch by batch."""

    def __init__(self, product: Any):
        self._view = product.view
        self._samples, self._mean, self._square = 0, np.float64(0), np.float64(0)

    def update(self, gradient: np.ndarray, samples: int) -> None:
        gradient = self._view.to_matrix(gradient).astype(np.float64)
        self._samples += samples
        self._mean = self._mean + samples * gradient
        self._square = self._square + samples * np.square(gradient)

    def result(self) -> Gradients:
        return Gradients(self._mean / self._samples, self._square / self._samples)
