"""Criterion `"obs"`: the optimal brain surgeon."""

from __future__ import annotations

import numpy as np

from keras_renorm.src.core import least_squares, registry
from keras_renorm.src.rules.criteria.base import CalibratedCriterion


@registry.register
class OBS(CalibratedCriterion):
    """Optimal Brain Surgeon: the error of removing a weight if all others adapt, `w_ij^2 / [H^-1]_ii`.

    `H` is the matrix of second moments of the inputs. Needs calibration samples.

    Source: B. Hassibi and D. Stork, Second order derivatives for network pruning: Optimal Brain Surgeon, NIPS 1992; E. Frantar
    and D. Alistarh, SparseGPT, arXiv 2301.00774.

    Args:
        ridge: what is added to the diagonal of `H` before it is inverted, as a share of its mean. Defaults to 0.01.

    Example:

    >>> import keras, numpy as np, keras_renorm as kr
    >>> model = keras.Sequential([keras.Input((8,)), keras.layers.Dense(4)])
    >>> samples = np.random.default_rng(0).standard_normal((64, 8))
    >>> pruned = kr.prune(model, sparsity=0.5, criterion="obs", calibration=samples, verbose=0)
    """

    def __init__(self, ridge: float = 0.01):
        self.ridge = ridge

    def __call__(self, matrix, moments):
        left, _ = least_squares.regularized(moments, matrix, self.ridge)
        return matrix**2 / np.diagonal(np.linalg.inv(left), axis1=1, axis2=2)[:, :, None]
