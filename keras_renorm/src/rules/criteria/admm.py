from __future__ import annotations

import numpy as np

from keras_renorm.src.core import least_squares, registry
from keras_renorm.src.rules.criteria.base import CalibratedCriterion


@registry.register
class ADMM(CalibratedCriterion):
    """The weights that a least-squares fit keeps when it may choose them: alternating directions method of multipliers.

    Weights and mask are found together: the weights solve a penalized least-squares problem, the mask keeps the largest of
    them, a dual variable pulls the two together, and the penalty grows. Needs calibration samples; each iteration costs one
    product of the inputs' moments with the kernel.

    Source: X. Meng and others, ALPS: improved optimization for highly sparse one-shot pruning for large language models,
    arXiv 2406.07831. Here the penalty doubles after each quarter of the iterations, whatever happens to the mask.

    Args:
        iterations: how many times weights and mask are exchanged. Half as many fit a little less well in half the time.
        penalty: weight of the pull between them at first, as a share of an input's second moment.
        ridge: strength of the pull toward the dense weights, as a share of the inputs' mean second moment.
    """

    def __init__(self, iterations: int = 60, penalty: float = 0.1, ridge: float = 0.01):
        if isinstance(iterations, bool) or not isinstance(iterations, (int, np.integer)) or iterations < 4:
            raise ValueError(f"Argument `iterations` must be an integer of at least 4. Received: iterations={iterations!r}.")
        self.iterations = iterations
        self.penalty = penalty
        self.ridge = ridge

    def __call__(self, matrix, moments):
        raise NotImplementedError("ADMM chooses a mask as a whole; it has no score for a single weight.")

    def select(self, matrix, moments, mask_of):
        left, right = least_squares.regularized(moments, matrix, self.ridge)
        # With inputs of equal power, the largest weight is the one that matters most.
        scale = np.sqrt(np.diagonal(left, axis1=1, axis2=2))[:, :, None]
        left = (left / scale / scale.swapaxes(1, 2)).astype(np.float32)
        # In units of the largest weight, no square leaves the range of float32.
        largest = np.abs(matrix * scale).max(initial=0) or 1
        right, sparse = ((part / largest).astype(np.float32) for part in (right / scale, matrix * scale))
        dual, identity = np.zeros_like(sparse), np.eye(left.shape[-1], dtype=np.float32)
        for penalty in self.penalty * np.array([1, 2, 4, 8], np.float32):
            inverse = np.linalg.inv(left + penalty * identity)
            for _ in range(self.iterations // 4):
                weights = inverse @ (right - dual + penalty * sparse)
                wanted = weights + dual / penalty
                mask = mask_of(np.square(wanted))
                sparse = np.where(mask, wanted, 0)
                dual += penalty * (weights - sparse)
        return mask
