from __future__ import annotations

import numpy as np

from keras_renorm.src.core import least_squares, registry
from keras_renorm.src.rules.criteria.base import CalibratedCriterion


@registry.register
class OBS(CalibratedCriterion):
    """What removing the weight costs after all others have made up for it: `w_ij^2 / [H^-1]_ii`, `H` the inputs' moments.

    Needs calibration samples.

    Source: B. Hassibi and D. Stork, Second order derivatives for network pruning: Optimal Brain Surgeon, NIPS 1992; E. Frantar
    and D. Alistarh, SparseGPT, arXiv 2301.00774.

    Args:
        ridge: share of the inputs' mean second moment that is added to each input's own before inverting.
    """

    def __init__(self, ridge: float = 0.01):
        self.ridge = ridge

    def __call__(self, matrix, moments):
        left, _ = least_squares.regularized(moments, matrix, self.ridge)
        return matrix**2 / np.diagonal(np.linalg.inv(left), axis1=1, axis2=2)[:, :, None]
