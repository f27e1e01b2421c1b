import numpy as np
import pytest

from keras_renorm.src.core import least_squares
from keras_renorm.src.core.moments import Moments
from tests.core.test_moments import moments_of


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


def test_the_ridge_is_a_share_of_the_mean_over_inputs():
    """Of each group of its own: 0.1 of (1 + 3) / 2, of (10 + 50) / 2 and of (0 + 0) / 2."""
    gram = np.array([[[1.0, 0.5], [0.5, 3.0]], [[10.0, 2.0], [2.0, 50.0]], [[0.0, 0.0], [0.0, 0.0]]])
    cross = np.array([[[1.0], [2.0]], [[3.0], [4.0]], [[0.0], [0.0]]])
    matrix = np.array([[[10.0], [20.0]], [[30.0], [40.0]], [[50.0], [60.0]]])
    left, right = least_squares.regularized(Moments(1, gram, cross, *[None] * 3), matrix, ridge=0.1)
    np.testing.assert_allclose(left[:2], [[[1.2, 0.5], [0.5, 3.2]], [[13, 2], [2, 53]]])
    np.testing.assert_allclose(right[:2], [[[1 + 2], [2 + 4]], [[3 + 90], [4 + 120]]])
    np.testing.assert_allclose(np.linalg.solve(left[2], right[2]), matrix[2])


def test_with_inputs_of_zeros_the_weights_are_what_they_were():
    moments = Moments(1, np.zeros((1, 2, 2)), np.zeros((1, 2, 1)), *[None] * 3)
    left, right = least_squares.regularized(moments, np.array([[[5.0], [7.0]]]), ridge=0.1)
    solution = least_squares.solve_masked(left, right, np.ones((1, 2, 1), bool), np.zeros((1, 2, 1)))
    np.testing.assert_allclose(solution, [[[5], [7]]])


@pytest.mark.parametrize(
    ("inputs", "kept", "together"),
    [
        (8, (8, 0), True),  # 8 ** 3 is 4 * 8 ** 2 * 2
        (8, (7, 5), False),  # 343 + 125 is less
        (6, (6, 5), True),  # 216 + 125 is more than 4 * 6 ** 2 * 2
        (9, (9, 9), False),  # the same for both units
        (9, (5, 0), False),
    ],
)
def test_whichever_is_less_work(inputs, kept, together, monkeypatch):
    called = []
    monkeypatch.setattr(least_squares, "_conjugate_gradients", lambda *arguments: called.append(arguments) or arguments[1])
    mask = np.array([np.arange(inputs) < count for count in kept]).T[None]
    left, right = 2 * np.eye(inputs)[None], np.arange(2.0 * inputs).reshape(1, inputs, 2)
    solution = least_squares.solve_masked(left, right, mask, np.zeros_like(right))
    assert bool(called) == together
    if not together:
        np.testing.assert_allclose(solution, np.where(mask, right / 2, 0))


def test_the_same_inputs_of_all_units_are_solved_at_once(monkeypatch):
    monkeypatch.setattr(least_squares, "_conjugate_gradients", None)
    monkeypatch.setattr(least_squares, "_CONJUGATE_GRADIENTS_COST", 0)
    left = np.array([[[2.0, 1.0, 0.0], [1.0, 2.0, 5.0], [0.0, 5.0, 9.0]]])
    right = np.array([[[4.0, 3.0], [5.0, 3.0], [7.0, 7.0]]])
    mask = np.array([[[True, True], [True, True], [False, False]]])
    solution = least_squares.solve_masked(left, right, mask, np.zeros_like(right))
    np.testing.assert_allclose(solution, [[[1, 1], [2, 1], [0, 0]]])


def solve_together(left, right, start=0.0, mask=True, **arguments):
    left, right = np.array(left, float), np.array(right, float)
    mask, start = np.broadcast_to(mask, right.shape), np.broadcast_to(start, right.shape)
    return least_squares._conjugate_gradients(left, right, mask, start, **arguments)


def test_conjugate_gradients_step_by_step():
    # The first step goes along the residual (1, 0), the second ends at the solution.
    left, right = [[1.0, 0.5], [0.5, 1.0]], [[1.0], [0.0]]
    np.testing.assert_allclose(solve_together(left, right, most_iterations=1), [[1], [0]])
    np.testing.assert_allclose(solve_together(left, right, most_iterations=2), [[4 / 3], [-2 / 3]], rtol=1e-5)
    # The same with inputs that are 2 and 10 times as large: the diagonal is divided out.
    left, right = [[4.0, 10.0], [10.0, 100.0]], [[2.0], [0.0]]
    np.testing.assert_allclose(solve_together(left, right, most_iterations=1), [[1 / 2], [0]])
    np.testing.assert_allclose(solve_together(left, right), [[4 / 3 / 2], [-2 / 3 / 10]], rtol=1e-5)


def test_conjugate_gradients_start_from_the_guess_and_stop_within_three_thousandths():
    left, right = np.diag([4.0, 4.0, 4.0]), np.array([[4.0, 4.0], [8.0, 8.0], [9.0, 9.0]])
    mask = np.array([[True], [True], [False]])
    start = right / 4 * (1 - np.array([2.95e-3, 3.05e-3]))
    solution = solve_together(left, right, start, mask)
    np.testing.assert_allclose(solution[:, 0], np.where(mask[:, 0], start[:, 0], 0), rtol=1e-6)
    np.testing.assert_allclose(solution[:, 1], [1, 2, 0], rtol=1e-6)
    np.testing.assert_allclose(solve_together(left, right, start, mask, tolerance=1e-3), [[1, 1], [2, 2], [0, 0]], rtol=1e-6)


def test_conjugate_gradients_stop_after_two_hundred_iterations():
    """Along a chain each takes one more of its members in: it would take 333."""
    left = 2 * np.eye(300) - np.eye(300, k=1) - np.eye(300, k=-1)
    solution = solve_together(left, np.eye(300)[:, :1])
    assert np.flatnonzero(solution).tolist() == list(range(200))
    np.testing.assert_allclose(solution[:200, 0], (200 - np.arange(200)) / 201, rtol=0.05, atol=1e-3)


def test_conjugate_gradients_leave_masked_weights_out():
    left = np.array([[2.0, 1.0, 0.5], [1.0, 2.0, 0.5], [0.5, 0.5, 3.0]])
    mask = np.array([[True, True, False], [False, True, True], [True, False, False]])
    right = np.arange(1.0, 10).reshape(3, 3)
    solution = solve_together(left, right, 9.0, mask, tolerance=1e-6)
    for unit in range(3):
        rows = np.flatnonzero(mask[:, unit])
        wanted = np.zeros(3)
        wanted[rows] = np.linalg.solve(left[np.ix_(rows, rows)], right[rows, unit])
        np.testing.assert_allclose(solution[:, unit], wanted, rtol=1e-4)


def test_conjugate_gradients_take_out_units_that_are_solved(generator):
    """Units of one input are solved by the first iteration; the others go on."""
    left = generator.standard_normal((12, 12))
    left = left @ left.T + np.eye(12)
    mask = generator.random((12, 10)) < np.repeat([0.0, 0.8], 5)
    mask[[0, 1, 2, 3, 4], np.arange(5)] = True
    right = generator.standard_normal((12, 10))
    solution = solve_together(left, right, 0.0, mask, tolerance=1e-5)
    direct = np.zeros_like(right)
    for unit in range(10):
        rows = np.flatnonzero(mask[:, unit])
        direct[rows, unit] = np.linalg.solve(left[np.ix_(rows, rows)], right[rows, unit])
    np.testing.assert_allclose(solution, direct, rtol=1e-3, atol=1e-4)


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
