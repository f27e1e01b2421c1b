import numpy as np
import pytest

from keras_renorm import least_squares
from tests.test_moments import moments_of


def problem(generator, groups=2, rows=300, inputs=12, units=5):
    x = generator.standard_normal((groups, rows, inputs)) @ generator.standard_normal((inputs, inputs))
    matrix = generator.standard_normal((groups, inputs, units))
    return x, matrix, moments_of(x, x @ matrix)


@pytest.mark.parametrize("kind", ["all", "same for all units", "any", "nothing of a unit"])
def test_it_is_the_least_squares_solution(kind, generator):
    x, matrix, moments = problem(generator)
    mask = generator.random(matrix.shape) < 0.5
    if kind == "all":
        mask[:] = True
    if kind == "same for all units":
        mask[:] = mask[:, :, :1]
    if kind == "nothing of a unit":
        mask[0, :, 2] = False
    left, right = least_squares.regularized(moments, matrix, ridge=1e-9)
    solution = least_squares.solve_masked(left, right, mask, matrix)
    np.testing.assert_array_equal(solution[~mask], 0)
    x = x - x.mean(axis=1, keepdims=True)
    for group in range(2):
        for unit in range(5):
            rows = mask[group, :, unit]
            wanted = np.linalg.lstsq(x[group][:, rows], x[group] @ matrix[group, :, unit], rcond=None)[0]
            np.testing.assert_allclose(solution[group, rows, unit], wanted, atol=1e-2 * np.abs(matrix).max())


@pytest.mark.parametrize("ridge", [1e-2, 1e-1])
def test_conjugate_gradients_agree_with_direct_solves(ridge, generator, monkeypatch):
    _, matrix, moments = problem(generator, inputs=60, units=20)
    mask = generator.random(matrix.shape) < 0.4
    left, right = least_squares.regularized(moments, matrix, ridge)
    monkeypatch.setattr(least_squares, "_CONJUGATE_GRADIENTS_COST", np.inf)
    direct = least_squares.solve_masked(left, right, mask, matrix)
    monkeypatch.setattr(least_squares, "_CONJUGATE_GRADIENTS_COST", 0)
    together = least_squares.solve_masked(left, right, mask, matrix)
    bias = np.zeros((2, 20))
    assert moments.error(together, bias) == pytest.approx(moments.error(direct, bias), rel=1e-2)
    np.testing.assert_array_equal(together[~mask], 0)


def test_conjugate_gradients_with_units_that_are_solved_at_once(generator, monkeypatch):
    _, matrix, moments = problem(generator, groups=1, inputs=60, units=20)
    mask = generator.random(matrix.shape) < 0.4
    mask[:, :, ::10] = False
    mask[:, 7, ::10] = True
    left, right = least_squares.regularized(moments, matrix, 0.01)
    monkeypatch.setattr(least_squares, "_CONJUGATE_GRADIENTS_COST", 0)
    together = least_squares.solve_masked(left, right, mask, matrix)
    np.testing.assert_allclose(together[0, 7, ::10], right[0, 7, ::10] / left[0, 7, 7], rtol=1e-4)
    assert np.isfinite(together).all()


def test_the_ridge_pulls_toward_the_old_weights(generator):
    _, matrix, moments = problem(generator)
    full = np.ones(matrix.shape, bool)
    for ridge in (1e-6, 1e6):
        # The dense weights themselves are the best fit without a mask, whatever the ridge.
        left, right = least_squares.regularized(moments, matrix, ridge)
        np.testing.assert_allclose(least_squares.solve_masked(left, right, full, matrix), matrix, rtol=1e-3, atol=1e-3)
    half = full.copy()
    half[:, ::2] = False
    left, right = least_squares.regularized(moments, matrix, 1e6)
    np.testing.assert_allclose(least_squares.solve_masked(left, right, half, matrix), np.where(half, matrix, 0), atol=1e-3)


def test_inputs_that_never_vary_keep_their_weights(generator):
    x = generator.standard_normal((1, 50, 6))
    x[:, :, 3] = 2.0
    matrix = generator.standard_normal((1, 6, 4))
    moments = moments_of(x, x @ matrix)
    left, right = least_squares.regularized(moments, matrix, 0.01)
    solution = least_squares.solve_masked(left, right, np.ones(matrix.shape, bool), matrix)
    np.testing.assert_allclose(solution, matrix, rtol=1e-3, atol=1e-4)
    nothing = moments_of(np.zeros((1, 50, 6)), np.zeros((1, 50, 4)))
    left, right = least_squares.regularized(nothing, matrix, 0.01)
    assert np.isfinite(least_squares.solve_masked(left, right, np.ones(matrix.shape, bool), matrix)).all()


@pytest.mark.parametrize("cost", [0, np.inf], ids=["conjugate gradients", "direct"])
@pytest.mark.parametrize("of_inputs", [1e20, 1e-25])
@pytest.mark.parametrize("of_weights", [1e15, 1e-12])
def test_the_sizes_of_inputs_and_weights_change_nothing(cost, of_inputs, of_weights, generator, monkeypatch):
    monkeypatch.setattr(least_squares, "_CONJUGATE_GRADIENTS_COST", cost)
    x, matrix, moments = problem(generator, inputs=30)
    mask = generator.random(matrix.shape) < 0.5
    plain = least_squares.solve_masked(*least_squares.regularized(moments, matrix, 0.01), mask, matrix)
    sized = moments_of(x * of_inputs, x @ matrix * of_inputs * of_weights)
    start = matrix * of_weights
    solution = least_squares.solve_masked(*least_squares.regularized(sized, start, 0.01), mask, start)
    np.testing.assert_allclose(solution / of_weights, plain, atol=2e-3 * np.abs(plain).max())
