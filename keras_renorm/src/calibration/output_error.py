"""The distance between the outputs of two models."""

from __future__ import annotations

import keras
import numpy as np
from keras import ops

from keras_renorm.src.calibration.observing import without_gradients
from keras_renorm.src.calibration.samples import Samples


class OutputError:
    """The mean squared error of the outputs of other models from those of a model, as a share of their variance.

    It is the mean over the outputs. Outputs that are constant or not floats are left out.

    Args:
        model: the model to compare with.
        samples: the samples to run.
        memory: bytes in which to keep its outputs. If they need more, the model runs again.
    """

    def __init__(self, model: keras.Model, samples: Samples, memory: int = 2**28):
        self._model, self._samples, self._free = model, samples, memory
        self._kept: dict[int, list] = {}

    def __call__(self, other: keras.Model) -> float:
        sums: dict[int, np.ndarray] = {}
        for index, batch in enumerate(self._samples):
            for place, (wanted, given) in enumerate(zip(self._wanted(index, batch), _float_outputs(other, batch))):
                with np.errstate(over="ignore", invalid="ignore"):
                    distance, square = np.square(wanted - given).sum(), np.square(wanted).sum()
                sums[place] = sums.get(place, 0) + np.array([distance, square, wanted.sum(), wanted.size])
        errors = []
        for distance, square, total, count in sums.values():
            variance = square / count - (total / count) ** 2
            if variance > 1e-12 * square / count:
                errors.append(distance / count / variance)
        return float(np.mean(errors)) if errors else 0.0

    def _wanted(self, index, batch):
        if index in self._kept:
            return self._kept[index]
        outputs = _float_outputs(self._model, batch)
        size = sum(one.nbytes for one in outputs)
        if size <= self._free:
            self._free -= size
            self._kept[index] = outputs
        return outputs


def _float_outputs(model, batch) -> list[np.ndarray]:
    with without_gradients():
        outputs = [one for one in keras.tree.flatten(model(batch, training=False)) if one is not None]
    outputs = [one for one in outputs if keras.backend.is_float_dtype(keras.backend.standardize_dtype(one.dtype))]
    return [ops.convert_to_numpy(ops.cast(one, "float32")).astype(np.float64) for one in outputs]
