"""Criterion `"random"`: the baseline."""

from __future__ import annotations

import numpy as np

from keras_renorm.src.core import registry
from keras_renorm.src.rules.criteria.base import Criterion


@registry.register
class Random(Criterion):
    """A random score for every weight: the baseline for other criteria.

    Args:
        seed: integer. Instances with the same seed give the same sequence of scores. Defaults to 0.

    Example:

    >>> import numpy as np
    >>> from keras_renorm.criteria import Random
    >>> Random(seed=1)(np.ones((2, 3))).shape
    (2, 3)
    """

    def __init__(self, seed: int = 0):
        self.seed = seed
        self._generator = np.random.default_rng(seed)

    def __call__(self, kernel):
        return self._generator.random(kernel.shape, np.float32)
