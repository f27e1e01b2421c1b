"""Criterion `"admm"`: the mask of a sparse least-squares fit."""

from __future__ import annotations

import numpy as np

from keras_renorm.src.core import least_squares, registry
from keras_renorm.src.rules.criteria.base import CalibratedCriterion


@registry.register
class ADMM(CalibratedCriterion):
    """The mask of a sparse least-squares fit, found by the alternating direction method of multipliers.

    Weights and mask are found together. In each iteration the weights solve a penalized least-squares problem, the mask keeps
    the largest of them, and a dual variable pulls the two together; the penalty grows. Needs calibration samples. Each
    iteration costs one product of the second moments of the inputs with the kernel.

    Source: X. Meng and others, ALPS: improved optimization for highly sparse one-shot pruning for large language models,
    arXiv 2406.07831. Deviation: the penalty doubles after each quarter of the iterations, whether or not the mask still
    changes.

    Args:
        iterations: number of iterations, at least 4. Half as many give a slightly worse fit in half the time. Defaults to 60.
        penalty: the first penalty on the distance between weights and mask, as a share of the second moment of an input.
            Defaults to 0.1.
        ridge: strength of the ridge penalty on the change of the weights, as a share of the mean second moment of the inputs.
            Defaults to 0.01.

    Raises:
        ValueError: if `iterations` is not an integer of at least 4.

    Example:

    >>> import keras, numpy as np, keras_renorm as kr
    >>> model = keras.Sequential([keras.Input((8,)), keras.layers.Dense(4)])
    >>> samples = np.random.default_rng(0).standard_normal((64, 8))
    >>> pruned = kr.prune(model, sparsity=0.5, criterion="admm", calibration=samples, verbose=0)
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
        # If all inputs have the same second moment, the largest weights matter most.
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
