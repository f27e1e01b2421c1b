"""What a criterion can know of a kernel from samples."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np


class Statistics:
    """Base class of what a criterion knows of a kernel; `CalibratedCriterion.statistics` names a subclass.

    `of` says what it is gathered from: `"inputs"` of the kernel's layer, in forward passes; or `"gradients"` of the loss with
    respect to the kernel, for which the samples need labels and the model needs to be compiled with its loss.
    """

    of = "inputs"

    @classmethod
    def accumulator(cls, product: Any) -> Any:
        """What adds up the statistics of one kernel.

        Args:
            product: the kernel as a matrix product, with `kernel`, `bias`, `view` and `taps` (a `LinearPart`).

        Returns:
            An object with a method `result()`, which gives an instance of this class, and a method `update`, which is called
            once for every batch: `update(inputs)` with a tensor of the product's inputs, samples first; or
            `update(gradient, samples)` with the gradient of the batch's mean loss, an array shaped like the kernel, and the
            number of samples in the batch.
        """
        raise NotImplementedError


@dataclasses.dataclass(frozen=True)
class Gradients(Statistics):
    """The gradient of the loss with respect to a kernel.

    Args:
        mean: over the samples, shape `(groups, inputs, units)`.
        square: mean over the batches of the square of the batch's gradient, of the same shape.
    """

    mean: np.ndarray
    square: np.ndarray

    of = "gradients"

    @classmethod
    def accumulator(cls, product):
        return GradientAccumulator(product)


class GradientAccumulator:
    """Adds up gradients batch by batch."""

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
