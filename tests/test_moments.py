import numpy as np
import pytest

from keras_renorm.moments import Accumulator


def moments_of(rows, targets, pieces=1, intercept=True):
    accumulator = Accumulator()
    for one, other in zip(np.array_split(rows, pieces, axis=1), np.array_split(targets, pieces, axis=1)):
        accumulator.add(one, other)
    return accumulator.moments(intercept)


def test_by_hand():
    rows, targets = np.array([[[1.0, 0.0], [3.0, 2.0]]]), np.array([[[5.0], [1.0]]])
    moments = moments_of(rows, targets)
    assert moments.rows == 2
    np.testing.assert_allclose(moments.input_mean, [[2, 1]])
    np.testing.assert_allclose(moments.target_mean, [[3]])
    np.testing.assert_allclose(moments.gram, [[[1, 1], [1, 1]]])
    np.testing.assert_allclose(moments.cross, [[[-2], [-2]]])
    np.testing.assert_allclose(moments.power, [[4]])
    about_zero = moments_of(rows, targets, intercept=False)
    np.testing.assert_allclose(about_zero.gram, [[[5, 3], [3, 2]]])
    np.testing.assert_allclose(about_zero.cross, [[[4], [1]]])
    np.testing.assert_allclose(about_zero.power, [[13]])
    np.testing.assert_array_equal(about_zero.input_mean, 0)


@pytest.mark.parametrize("intercept", [True, False])
@pytest.mark.parametrize("pieces", [1, 3, 20])
def test_any_pieces_and_large_means(pieces, intercept, generator):
    rows = (1000 + generator.standard_normal((3, 200, 5))).astype("float32")
    targets = (-500 + generator.standard_normal((3, 200, 2))).astype("float32")
    moments = moments_of(rows, targets, pieces, intercept)
    x, y = rows.astype(float), targets.astype(float)
    if intercept:
        x, y = x - x.mean(axis=1, keepdims=True), y - y.mean(axis=1, keepdims=True)
    tolerance = dict(rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(moments.gram, x.swapaxes(1, 2) @ x / 200, **tolerance)
    np.testing.assert_allclose(moments.cross, x.swapaxes(1, 2) @ y / 200, **tolerance)
    np.testing.assert_allclose(moments.power, (y**2).mean(axis=1), **tolerance)


@pytest.mark.parametrize("intercept", [True, False])
def test_error_is_that_of_the_outputs(intercept, generator):
    rows, targets = generator.standard_normal((2, 100, 4)) + 1, generator.standard_normal((2, 100, 3)) - 2
    moments = moments_of(rows, targets, intercept=intercept)
    matrix, bias = generator.standard_normal((2, 4, 3)), generator.standard_normal((2, 3)) * intercept
    squares = ((rows @ matrix + bias[:, None] - targets) ** 2).mean(axis=1).sum()
    power = ((targets - targets.mean(axis=1, keepdims=True) * intercept) ** 2).mean(axis=1).sum()
    assert moments.error(matrix, bias) == pytest.approx(squares / power, rel=1e-4)
    if intercept:
        best = moments.intercept(matrix)
        np.testing.assert_allclose(best, (targets - rows @ matrix).mean(axis=1), atol=1e-5)
