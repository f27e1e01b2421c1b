"""Criterion `"activation"`: weights times the norms of their inputs."""

from __future__ import annotations

import numpy as np

from keras_renorm.src.core import registry
from keras_renorm.src.rules.criteria.base import CalibratedCriterion


@registry.register
class Activation(CalibratedCriterion):
    """The absolute value of the weight times the norm of its input: `|w_ij| ||x_i||`.

    Needs calibration samples. If the layer has a bias, the norm is that of the input less its mean, since the bias can take
    over the mean.

    Source: M. Sun and others, A simple and effective pruning approach for large language models (Wanda), arXiv 2306.11695.

    Example:

    >>> import keras, numpy as np, keras_renorm as kr
    >>> model = keras.Sequential([keras.Input((8,)), keras.layers.Dense(4)])
    >>> samples = np.random.default_rng(0).standard_normal((64, 8))
    >>> pruned = kr.prune(model, sparsity=0.5, criterion="activation", calibration=samples, verbose=0)
    """

    def __call__(self, matrix, moments):
        return np.abs(matrix) * np.sqrt(np.diagonal(moments.gram, axis1=1, axis2=2))[:, :, None]
