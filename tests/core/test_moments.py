import numpy as np
import pytest

from keras_renorm.src.core.moments import Accumulator


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


@pytest.mark.parametrize("intercept", [True, False])
@pytest.mark.parametrize("of_rows", [1e20, 1e-25])
@pytest.mark.parametrize("of_targets", [1e20, 1e-25])
def test_what_is_very_large_or_very_small_has_moments_too(of_rows, of_targets, intercept, generator):
    rows = generator.standard_normal((2, 50, 3)).astype("float32")
    targets = generator.standard_normal((2, 50, 2)).astype("float32")
    rows[:, :, 0] *= 1e-10
    plain = moments_of(rows, targets, 2, intercept)
    sized = moments_of(rows * np.float32(of_rows), targets * np.float32(of_targets), 2, intercept)
    np.testing.assert_allclose(sized.gram, plain.gram * of_rows**2, rtol=1e-5)
    np.testing.assert_allclose(sized.cross, plain.cross * of_rows * of_targets, rtol=1e-4)
    np.testing.assert_allclose(sized.power, plain.power * of_targets**2, rtol=1e-5)
    matrix, bias = generator.standard_normal((2, 3, 2)), np.zeros((2, 2))
    ratio = of_targets / of_rows
    assert sized.error(matrix * ratio, bias) == pytest.approx(plain.error(matrix, bias), rel=1e-3)


def test_what_varies_by_rounding_alone_is_constant(generator):
    rows = generator.standard_normal((1, 1000, 3)).astype("float32")
    rows[:, :, 1] = np.float32(1.1) + np.float32(1e-7) * (rows[:, :, 0] > 0)
    targets = np.float32(3.3) + np.float32(3e-7) * (rows[:, :, :1] > 0)
    moments = moments_of(rows, targets, 3)
    assert not moments.gram[0, 1].any()
    assert not moments.gram[0, :, 1].any()
    assert (moments.gram[0, 0, 0] > 0.5, moments.gram[0, 2, 2] > 0.5) == (True, True)
    assert not moments.cross.any()
    assert not moments.power.any()
    np.testing.assert_allclose(moments.intercept(np.array([[[0.0], [2.0], [0.0]]])), [[1.1]], rtol=1e-5)
