import types

import numpy as np
import pytest

from keras_renorm.src.core.moments import InputSizes, Moments
from keras_renorm.src.core.statistics import Gradients, Statistics

# A kernel of two inputs and one unit, seen as a matrix in one group.
PRODUCT = types.SimpleNamespace(view=types.SimpleNamespace(to_matrix=lambda kernel: kernel[None]))


def test_gradients_by_hand():
    """A batch of three samples and one of a single sample: means count every sample once."""
    accumulator = Gradients.accumulator(PRODUCT)
    accumulator.update(np.array([[2.0], [0.0]], "float32"), 3)
    accumulator.update(np.array([[-2.0], [4.0]], "float32"), 1)
    gradients = accumulator.result()
    np.testing.assert_array_equal(gradients.mean, [[[1.0], [1.0]]])
    np.testing.assert_array_equal(gradients.square, [[[4.0], [4.0]]])


def test_what_statistics_are_gathered_from():
    assert [cls.of for cls in (Moments, InputSizes, Gradients)] == ["inputs", "inputs", "gradients"]
    with pytest.raises(NotImplementedError):
        Statistics.accumulator(PRODUCT)
