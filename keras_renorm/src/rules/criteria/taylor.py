"""Criterion `"taylor"`: the first-order change of the loss."""

from __future__ import annotations

import numpy as np

from keras_renorm.src.core import registry
from keras_renorm.src.core.statistics import Gradients
from keras_renorm.src.rules.criteria.base import CalibratedCriterion


@registry.register
class Taylor(CalibratedCriterion):
    """How much the loss changes without the weight, to first order: `|w g|`, where `g` is the gradient of the loss.

    `g` is the root of the mean square of the gradients of the batches. (The mean gradient of a trained network is near zero, so
    that scores by it are mostly noise, and measure worse.)

    Needs calibration samples with labels, `calibration=(x, y)` or batches of this kind, and a model that is compiled with its
    loss. Where samples come as arrays, `batch_size` is the size of the batches.

    Source: P. Molchanov and others, Importance estimation for neural network pruning, arXiv 1906.10771; for networks that are
    not trained yet N. Lee and others, SNIP, arXiv 1810.02340.

    Example:

    >>> import keras, numpy as np, keras_renorm as kr
    >>> model = keras.Sequential([keras.Input((8,)), keras.layers.Dense(4)])
    >>> model.compile(loss="mse")
    >>> x = np.random.default_rng(0).standard_normal((64, 8)).astype("float32")
    >>> pruned = kr.prune(model, sparsity=0.5, criterion="taylor", calibration=(x, x[:, :4]), verbose=0)
    """

    statistics = Gradients

    def __call__(self, matrix, gradients):
        return np.abs(matrix) * np.sqrt(gradients.square)
