"""Criterion `"magnitude"`: absolute values."""

from __future__ import annotations

import numpy as np

from keras_renorm.src.core import registry
from keras_renorm.src.rules.criteria.base import Criterion


@registry.register
class Magnitude(Criterion):
    """Magnitude pruning: the score is the absolute value of the weight, `|w|`.

    Example:

    >>> import numpy as np
    >>> from keras_renorm.criteria import Magnitude
    >>> Magnitude()(np.array([[-2.0, 1.0]]))
    array([[2., 1.]])
    """

    elementwise = True

    def __call__(self, kernel):
        return np.abs(kernel)
