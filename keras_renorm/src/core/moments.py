"""Statistics of a layer on calibration samples: second moments of inputs and targets, and sizes of inputs."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
from keras import ops

from keras_renorm.src.core.statistics import Statistics


@dataclasses.dataclass(frozen=True)
class Moments(Statistics):
    """Second moments of a layer that is viewed as `targets = rows @ matrix + bias`, for each of its groups.

    Args:
        rows: number of rows.
        gram: second moments of the inputs, of shape `(groups, inputs, inputs)`.
        cross: second moments of the inputs with the targets, of shape `(groups, inputs, units)`.
        power: second moments of the targets, of shape `(groups, units)`.
        input_mean: means of the inputs, of shape `(groups, inputs)`. The moments are about the means, so that the intercept is
            free. For a layer that cannot have an intercept they are about zero, and the means are zeros.
        target_mean: means of the targets, of shape `(groups, units)`.
    """

    rows: int
    gram: np.ndarray
    cross: np.ndarray
    power: np.ndarray
    input_mean: np.ndarray
    target_mean: np.ndarray

    @classmethod
    def accumulator(cls, product):
        return OwnMoments(product)

    def intercept(self, matrix: np.ndarray) -> np.ndarray:
        """The bias for which `matrix` has the means of the targets, of shape `(groups, units)`."""
        return self.target_mean - np.einsum("gi,giu->gu", self.input_mean, matrix)

    def output_power(self, matrix: np.ndarray) -> np.ndarray:
        """Second moments of `rows @ matrix`, of shape `(groups, units)`."""
        return np.einsum("giu,giu->gu", matrix, self.gram @ matrix)

    def error(self, matrix: np.ndarray, bias: np.ndarray) -> float:
        """Mean squared error of `rows @ matrix + bias`, as a share of the power of the targets."""
        return float(np.sum(self.squares(matrix, bias)) / max(np.sum(self.power), np.finfo(np.float64).tiny))

    def squares(self, matrix: np.ndarray, bias: np.ndarray) -> np.ndarray:
        """Mean squared error of `rows @ matrix + bias` for each unit, of shape `(groups, units)`."""
        about_means = self.power - 2 * np.einsum("giu,giu->gu", matrix, self.cross) + self.output_power(matrix)
        return np.maximum(about_means, 0) + (bias - self.intercept(matrix)) ** 2


# Deviation, as a share of the mean, up to which an input or a target is constant: float32 cannot tell it from rounding.
_ROUNDING = 1e-6


class Accumulator:
    """Accumulates moments batch by batch, in memory that does not depend on the number of batches."""

    def __init__(self):
        self._rows = 0

    def add(self, rows, targets) -> None:
        """Add tensors of shape `(groups, rows, inputs)` and `(groups, rows, units)`."""
        rows, targets = ops.cast(rows, "float32"), ops.cast(targets, "float32")
        if not self._rows:
            # Sums are taken about the first batch's means: about zero, large means would drown the rest.
            self._origin = ops.mean(rows, axis=1, keepdims=True), ops.mean(targets, axis=1, keepdims=True)
            # In units of which squares of what is very large or very small are numbers of float32, too.
            self._units = tuple(_size(part - origin) for part, origin in zip((rows, targets), self._origin))
            self._sums = [np.float64(0)] * 5
        rows, targets = ((part - origin) / unit for part, origin, unit in zip((rows, targets), self._origin, self._units))
        transposed = ops.transpose(rows, (0, 2, 1))
        batch = (
            ops.sum(rows, axis=1),
            ops.sum(targets, axis=1),
            ops.matmul(transposed, rows),
            ops.matmul(transposed, targets),
            ops.sum(ops.square(targets), axis=1),
        )
        self._rows += int(rows.shape[1])
        self._sums = [total + ops.convert_to_numpy(part) for total, part in zip(self._sums, batch)]

    def moments(self, intercept: bool = True) -> Moments:
        """The accumulated moments, about the means or, for a layer without an intercept, about zero."""
        with np.errstate(over="ignore", invalid="ignore"):
            # What is not finite is for the caller to see in the moments.
            return self._moments(intercept)

    def _moments(self, intercept):
        row_unit, target_unit = (ops.convert_to_numpy(unit)[:, 0].astype(np.float64) for unit in self._units)
        row_sum, target_sum, gram, cross, power = (total / self._rows for total in self._sums)
        row_sum, target_sum, power = row_sum * row_unit, target_sum * target_unit, power * target_unit**2
        for part, unit in ((gram, row_unit), (cross, target_unit)):
            part *= row_unit[:, :, None]
            part *= unit[:, None, :]
        row_origin, target_origin = (ops.convert_to_numpy(origin)[:, 0].astype(np.float64) for origin in self._origin)
        gram = gram - row_sum[:, :, None] * row_sum[:, None, :]
        cross = cross - row_sum[:, :, None] * target_sum[:, None, :]
        power = power - target_sum**2
        power = np.maximum(power, 0)
        row_mean, target_mean = row_origin + row_sum, target_origin + target_sum
        varies = np.diagonal(gram, axis1=1, axis2=2) > (_ROUNDING * row_mean) ** 2
        wanted = power > (_ROUNDING * target_mean) ** 2
        # (Products, as what is not finite has to be seen.)
        power *= wanted
        for part, columns in ((gram, varies), (cross, wanted)):
            if not (varies.all() and columns.all()):
                part *= varies[:, :, None]
                part *= columns[:, None, :]
        if not intercept:
            gram = gram + row_mean[:, :, None] * row_mean[:, None, :]
            cross = cross + row_mean[:, :, None] * target_mean[:, None, :]
            power = power + target_mean**2
            row_mean, target_mean = np.zeros_like(row_mean), np.zeros_like(target_mean)
        return Moments(self._rows, gram, cross, power, row_mean, target_mean)


class OwnMoments:
    """Accumulates the moments of a layer as it is: its own outputs are the targets."""

    def __init__(self, product: Any):
        self._product, self._accumulator = product, Accumulator()
        matrix = product.view.to_matrix(ops.convert_to_numpy(product.kernel).astype(np.float32))
        self._matrix = ops.convert_to_tensor(matrix)

    def update(self, inputs: Any) -> None:
        rows = ops.cast(self._product.view.rows(inputs), "float32")
        self._accumulator.add(rows, ops.matmul(rows, self._matrix))

    def result(self) -> Moments:
        return self._accumulator.moments(intercept=self._product.bias is not None)


def _size(tensor: Any) -> Any:
    """The power of two above the largest number along the rows; 1 if all are zero."""
    largest = ops.convert_to_numpy(ops.max(ops.abs(tensor), axis=1, keepdims=True))
    exponents = np.frexp(np.where(np.isfinite(largest), largest, 0))[1]
    return ops.convert_to_tensor(np.ldexp(np.float32(1), np.clip(exponents, -125, 125)), "float32")


@dataclasses.dataclass(frozen=True)
class InputSizes(Statistics):
    """The mean magnitudes of the inputs of a layer over the samples, at each of its output positions.

    Args:
        sizes: means of `|x|`, of shape `(groups, positions, inputs)`. A Dense layer that is called with a matrix has one
            position.
        taps: number of weights of a slice, which joins an input channel with a unit. The inputs are `(taps, channels)`.
        bias: magnitudes of the biases, of shape `(groups, units)`.
    """

    sizes: np.ndarray
    taps: int
    bias: np.ndarray

    @classmethod
    def accumulator(cls, product):
        return SizeAccumulator(product)


class SizeAccumulator:
    """Accumulates magnitudes of inputs batch by batch, in the memory of one sample of each shape."""

    def __init__(self, product: Any):
        self._product = product
        self._sums: dict[tuple, list] = {}

    def update(self, inputs: Any) -> None:
        size = ops.sum(ops.abs(ops.cast(inputs, "float32")), axis=0)
        entry = self._sums.setdefault(tuple(size.shape), [np.float64(0), 0])
        entry[0] = entry[0] + ops.convert_to_numpy(size)
        entry[1] += int(inputs.shape[0])

    def result(self) -> InputSizes:
        view, bias = self._product.view, self._product.bias
        groups, _, units = view.sizes
        of_bias = np.zeros((groups, units))
        if bias is not None:
            of_bias = np.abs(ops.convert_to_numpy(bias).astype(np.float64)).reshape(groups, units)
        means = [ops.convert_to_tensor((total / count)[None], "float32") for total, count in self._sums.values()]
        sizes = np.concatenate([ops.convert_to_numpy(view.rows(mean)).astype(np.float64) for mean in means], axis=1)
        return InputSizes(sizes, self._product.taps, of_bias)
