from __future__ import annotations

import numpy as np

from keras_renorm import least_squares, serialization
from keras_renorm.criteria.base import CalibratedCriterion


@serialization.register
class ADMM(CalibratedCriterion):
    """The weights that a least-squares fit keeps when it may choose them: alternating directions method of multipliers.

    Weights and mask are found together: the weights solve a penalized least-squares problem, the mask keeps the largest of
    them, a dual variable pulls the two together, and the penalty grows. Needs calibration samples; each iteration costs one
    product of the inputs' moments with the kernel.

    Source: X. Meng and others, ALPS: improved optimization for highly sparse one-shot pruning for large language models,
    arXiv 2406.07831. Here the penalty grows by a fixed factor, whatever happens to the mask.

    Args:
        iterations: how many times weights and mask are exchanged.
        penalty: weight of the pull between them at first, as a share of an input's second moment.
        growth: what the penalty is multiplied by every third iteration.
        ridge: strength of the pull toward the dense weights, as a share of the inputs' mean second moment.
    """

    def __init__(self, iterations: int = 30, penalty: float = 0.1, growth: float = 1.3, ridge: float = 0.01):
        self.iterations = iterations
        self.penalty = penalty
        self.growth = growth
        self.ridge = ridge

    def __call__(self, matrix, moments):
        raise NotImplementedError("ADMM chooses a mask as a whole; it has no score for a single weight.")

    def select(self, matrix, moments, mask_of):
        left, right = least_squares.regularized(moments, matrix, self.ridge)
        # With inputs of equal power, the largest weight is the one that matters most.
        scale = np.sqrt(np.diagonal(left, axis1=1, axis2=2))[:, :, None]
        left = (left / scale / scale.swapaxes(1, 2)).astype(np.float32)
        right, sparse = (right / scale).astype(np.float32), (matrix * scale).astype(np.float32)
        dual, penalty, mask = np.zeros_like(sparse), np.float32(self.penalty), None
        for iteration in range(self.iterations):
            if iteration % 3 == 0:
                penalty *= np.float32(self.growth if iteration else 1)
                inverse = np.linalg.inv(left + penalty * np.eye(left.shape[-1], dtype=np.float32))
            weights = inverse @ (right - dual + penalty * sparse)
            wanted = weights + dual / penalty
            mask = mask_of(np.square(wanted))
            sparse = np.where(mask, wanted, 0)
            dual += penalty * (weights - sparse)
        return mask
