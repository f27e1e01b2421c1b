"""Least squares with a mask: the kept weights of each unit are fitted to the outputs of the dense unit."""

from __future__ import annotations

import numpy as np

from keras_renorm.src.core.moments import Moments


def regularized(moments: Moments, matrix: np.ndarray, ridge: float) -> tuple[np.ndarray, np.ndarray]:
    """The left and right sides of the normal equations, with a ridge penalty on the distance from `matrix`.

    Args:
        moments: second moments of the layer.
        matrix: the dense weights, of shape `(groups, inputs, units)`.
        ridge: strength of the penalty, as a share of the mean second moment of the inputs.

    Returns:
        `gram + p I` and `cross + p matrix`, where `p` is `ridge` times the mean of the diagonal of `gram`.
    """
    pull = ridge * np.trace(moments.gram, axis1=1, axis2=2)[:, None, None] / moments.gram.shape[-1]
    # Inputs that never vary leave nothing to solve for: they keep their weights, however strong the pull is.
    pull = np.where(pull > 0, pull, 1)
    return moments.gram + pull * np.eye(moments.gram.shape[-1]), moments.cross + pull * matrix


def solve_masked(left: np.ndarray, right: np.ndarray, mask: np.ndarray, start: np.ndarray) -> np.ndarray:
    """Solve `left @ x = right` for every unit on its kept inputs; other weights are zero.

    Units with the same kept inputs are solved together. Otherwise each unit has a direct solution, or conjugate gradients solve
    all units together, whichever is less work: the work of a direct solution grows with the cube of the number of kept inputs.

    Args:
        left: symmetric positive definite array of shape `(groups, inputs, inputs)`.
        right: array of shape `(groups, inputs, units)`.
        mask: bool array of shape `(groups, inputs, units)`.
        start: first guess of the same shape, for conjugate gradients.
    """
    solution = np.zeros(right.shape)
    for group in range(len(left)):
        one_mask, one_left, one_right = mask[group], left[group], right[group]
        inputs, units = one_mask.shape
        kept = np.count_nonzero(one_mask, axis=0).astype(float)
        if np.array_equal(one_mask, np.broadcast_to(one_mask[:, :1], one_mask.shape)):
            rows = np.flatnonzero(one_mask[:, 0])
            solution[group, rows] = np.linalg.solve(one_left[np.ix_(rows, rows)], one_right[rows])
        elif np.sum(kept**3) < _CONJUGATE_GRADIENTS_COST * inputs**2 * units:
            for unit in range(units):
                rows = np.flatnonzero(one_mask[:, unit])
                solution[group, rows, unit] = np.linalg.solve(one_left[np.ix_(rows, rows)], one_right[rows, unit])
        else:
            solution[group] = _conjugate_gradients(one_left, one_right, one_mask, start[group])
    return solution


# Multiplications of conjugate gradients in units of `inputs ** 2 * units`, weighed by how much faster they run.
_CONJUGATE_GRADIENTS_COST = 4


def _conjugate_gradients(left, right, mask, start, tolerance=3e-3, most_iterations=200):
    """Solve all units together, with the diagonal as preconditioner. Units that have converged are left out."""
    scale = np.sqrt(np.diag(left))[:, None]
    left = (left / scale / scale.T).astype(np.float32)
    right = np.where(mask, right / scale, 0)
    # In units of the norm, no square leaves the range of float32.
    norm = np.sqrt(np.sum(right**2, axis=0))
    norm[norm == 0] = 1
    right = (right / norm).astype(np.float32)
    solution = np.where(mask, start * scale / norm, 0).astype(np.float32)
    residual = np.where(mask, right - left @ solution, 0)
    enough = np.full(len(norm), tolerance**2)
    squares = np.sum(residual**2, axis=0)
    active = np.flatnonzero(squares > enough)
    x, r, m, squares = solution[:, active], residual[:, active], mask[:, active], squares[active]
    direction = r.copy()
    for _ in range(most_iterations):
        if not len(active):
            break
        product = np.where(m, left @ direction, 0)
        step = squares / np.maximum(np.sum(direction * product, axis=0), np.finfo(np.float32).tiny)
        x += step * direction
        r -= step * product
        # A unit that is solved exactly, such as one with a single input, has nothing left to divide by.
        before, squares = np.maximum(squares, np.finfo(np.float32).tiny), np.sum(r**2, axis=0)
        direction = r + squares / before * direction
        going = squares > enough[active]
        if np.count_nonzero(going) < 0.8 * len(active):
            solution[:, active[~going]] = x[:, ~going]
            active, x, r, m, direction, squares = (
                active[going],
                x[:, going],
                r[:, going],
                m[:, going],
                direction[:, going],
                squares[going],
            )
    solution[:, active] = x
    return solution * norm / scale
