"""Whether calibration samples look like the data that the model was trained on."""

from __future__ import annotations

import warnings
from typing import Any

import keras
import numpy as np
from keras import ops

from keras_renorm.src.calibration.observing import observe
from keras_renorm.src.calibration.samples import Samples
from keras_renorm.src.core.keras_internals import flatten_layers

# How many times larger or smaller than recorded a deviation has to be to say that samples are scaled in another way: data of
# another kind do not reach it, pixels in 0..255 instead of 0..1 or -1..1 do.
_UNLIKE = 30


def warn_of_odd_samples(model: keras.Model, samples: Samples, stacklevel: int = 2) -> None:
    """Warn if all samples are the same, or if they are scaled in another way than the training data."""
    constant = _constant_inputs(samples)
    if constant:
        warnings.warn(
            f"The samples of argument `calibration` are all the same for input {constant}, so nothing can be fitted. Pass "
            "typical inputs of the model.",
            stacklevel=stacklevel + 1,
        )
    elif (unlike := _what_is_unlike(model, next(iter(samples)))) is not None:
        warnings.warn(
            f"The samples of argument `calibration` are not scaled like the inputs that model '{model.name}' was trained "
            f"on: {unlike}. Pass them in the model's own scaling, such as pixels in 0..1 or 0..255.",
            stacklevel=stacklevel + 1,
        )


def _constant_inputs(samples: Samples) -> list[str]:
    """The names of float inputs (of all inputs, if none varies) that are the same in several samples."""
    first, varies, count = None, None, 0
    for batch in samples:
        leaves = keras.tree.flatten(batch)
        first = first or [leaf[:1] for leaf in leaves]
        varies = np.array([bool((leaf != one).any()) for leaf, one in zip(leaves, first)]) | (varies if count else False)
        count += len(leaves[0])
        if varies.all():
            return []
    names = samples.names or [str(index) for index in range(len(first))]
    # Masks and types of tokens may well be the same for all.
    suspicious = [not varies.any() or leaf.dtype.kind == "f" for leaf in first]
    return [name for name, varied, odd in zip(names, varies, suspicious) if odd and not varied and count > 1]


def _what_is_unlike(model: keras.Model, batch: Any) -> str | None:
    """A sentence on a batch by the first layer that knows how its inputs are scaled."""
    kinds = (keras.layers.BatchNormalization, keras.layers.Normalization, keras.layers.Rescaling)
    layers = [layer for layer in flatten_layers(model) if isinstance(layer, kinds)]
    with np.errstate(all="ignore"):
        for call in observe(lambda: model(batch, training=False), layers) if layers else []:
            inputs = ops.convert_to_numpy(call.inputs)
            if isinstance(call.layer, keras.layers.Rescaling):
                is_fed = any(np.array_equal(inputs, leaf) for leaf in keras.tree.flatten(batch))
                reach = np.ptp(ops.convert_to_numpy(call.outputs))
                if is_fed and 0 < reach < 1 / _UNLIKE:
                    return f"layer '{call.layer.name}' makes numbers of them that differ by {reach:.2g} at most"
                continue
            known = _standardized(call.layer, inputs.astype(np.float64))
            # What is not finite is refused later, by the name of the layer that makes it.
            if known is None or len(known) < 16 or not np.isfinite(known).all():
                continue
            deviation, offset = np.median(known.std(axis=0)), np.median(np.abs(known.mean(axis=0)))
            if 1 / _UNLIKE < deviation < _UNLIKE and offset < _UNLIKE:
                return None
            return (
                f"at layer '{call.layer.name}' they deviate {deviation:.2g} times as much as it has recorded, and their mean "
                f"is {offset:.2g} deviations away"
            )
    return None


def _standardized(layer: keras.Layer, inputs: np.ndarray) -> np.ndarray | None:
    """Inputs less the recorded mean, over the recorded deviation, of shape `(rows, features)`; `None` if none is recorded."""
    if isinstance(layer, keras.layers.Normalization):
        if layer.invert or layer.axis not in ((-1,), (len(inputs.shape) - 1,)):
            return None
        mean, variance = (ops.convert_to_numpy(part).reshape(-1) for part in (layer.mean, layer.variance))
    else:
        inputs = np.moveaxis(inputs, layer.axis, -1)
        mean, variance = (ops.convert_to_numpy(part) for part in (layer.moving_mean, layer.moving_variance))
        if not mean.any() and (variance == 1).all():
            # It was never trained.
            return None
    varies = variance > 0
    if not varies.any():
        return None
    return ((inputs - mean) / np.sqrt(np.where(varies, variance, 1))).reshape(-1, len(mean))[:, varies]
