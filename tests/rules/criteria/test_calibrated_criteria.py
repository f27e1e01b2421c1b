import numpy as np
import pytest

import keras_renorm as kr
from keras_renorm import criteria
from keras_renorm.src.core import least_squares, names
from keras_renorm.src.core.moments import InputSizes, Moments
from keras_renorm.src.core.statistics import Gradients
from keras_renorm.src.kernels.masks import compute_mask
from keras_renorm.src.rules.criteria.activity import keep_share
from tests.core.test_moments import moments_of

KNOWN = names.resolve(names.CALIBRATED_CRITERIA | names.LABELLED_CRITERIA)


def with_gram(gram, units=2):
    gram = np.array(gram, float)[None]
    inputs = gram.shape[-1]
    return Moments(9, gram, np.zeros((1, inputs, units)), np.ones((1, units)), np.zeros((1, inputs)), np.zeros((1, units)))


def test_activation_by_hand():
    scores = criteria.Activation()(np.array([[[-2.0, 1.0], [3.0, 0.5]]]), with_gram([[4, 1], [1, 9]]))
    np.testing.assert_allclose(scores, [[[4, 2], [9, 1.5]]])


def test_obs_by_hand():
    # The inverse of [[2, 1], [1, 2]] has 2/3 on its diagonal.
    scores = criteria.OBS(ridge=1e-9)(np.array([[[-2.0, 1.0], [3.0, 0.5]]]), with_gram([[2, 1], [1, 2]]))
    np.testing.assert_allclose(scores, [[[6, 1.5], [13.5, 0.375]]], rtol=1e-6)


def test_activity_by_hand():
    """Two inputs at two positions; the norm over positions of |x| |w|."""
    sizes = InputSizes(np.array([[[3.0, 1.0], [4.0, 0.0]]]), taps=1, bias=np.zeros((1, 2)))
    scores = criteria.Activity()(np.array([[[-2.0, 1.0], [3.0, 0.5]]]), sizes)
    np.testing.assert_allclose(scores, [[[10, 5], [3, 0.5]]])


def test_activity_of_slices_by_hand():
    """One channel, two taps, two positions that read sizes (1, 2) and (2, 0): 3*1 + 1*2 = 5 and 3*2 = 6."""
    sizes = InputSizes(np.array([[[1.0, 2.0], [2.0, 0.0]]]), taps=2, bias=np.zeros((1, 1)))
    scores = criteria.Activity()(np.array([[[3.0], [-1.0]]]), sizes)
    np.testing.assert_allclose(scores, np.full((1, 2, 1), np.sqrt(61)))


def test_taylor_by_hand():
    gradients = Gradients(np.zeros((1, 2, 2)), np.array([[[4.0, 1.0], [0.0, 16.0]]]))
    scores = criteria.Taylor()(np.array([[[-2.0, 1.0], [3.0, 0.5]]]), gradients)
    np.testing.assert_allclose(scores, [[[4, 1], [0, 2]]])


@pytest.mark.parametrize(
    ("share", "kept"),
    [(0.5, [1, 0, 0, 0]), (0.51, [1, 1, 0, 0]), (0.8, [1, 1, 0, 0]), (0.81, [1, 1, 1, 0]), (1.0, [1, 1, 1, 0])],
)
def test_the_smallest_set_that_reaches_the_share(share, kept):
    scores = np.array([[0.5], [0.3], [0.2], [0.0]])
    np.testing.assert_array_equal(keep_share(scores, share)[:, 0], np.array(kept, bool))
    order = [2, 3, 0, 1]
    np.testing.assert_array_equal(keep_share(scores[order], share)[:, 0], np.array(kept, bool)[order])


def test_the_bias_is_one_more_connection():
    """The unit's total is 1 + 1 + 2 = 4; the bias and the first connection reach three quarters of it."""
    sizes = InputSizes(np.array([[[1.0, 1.0]]]), taps=1, bias=np.array([[2.0]]))
    matrix = np.ones((1, 2, 1))
    select = lambda share: criteria.Activity(share).select(matrix, sizes, None)[0, :, 0].tolist()  # noqa: E731
    assert select(0.5) == [False, False]
    assert select(0.75) == [True, False]
    assert select(0.8) == [True, True]


@pytest.mark.parametrize("share", [0, -0.1, 1.1, True, "half"])
def test_wrong_share(share):
    with pytest.raises(ValueError, match=r"`share` must be `None` or a number|`share` must be a number in \(0, 1\]"):
        criteria.Activity(share)


def statistics(name, x, matrix):
    """What a criterion is called with, for rows `x` of shape `(groups, rows, inputs)`."""
    if KNOWN[name].statistics is InputSizes:
        return InputSizes(np.abs(x).mean(axis=1, keepdims=True), taps=1, bias=np.zeros((len(x), matrix.shape[-1])))
    if KNOWN[name].statistics is Gradients:
        # Of the mean squared output.
        gradient = x.swapaxes(1, 2) @ x @ matrix / x.shape[1]
        return Gradients(gradient, np.square(gradient))
    return moments_of(x, x @ matrix)


def correlated(generator, groups=1, inputs=40, units=12):
    mixing = generator.standard_normal((inputs, inputs)) * (generator.random((inputs, inputs)) < 0.2) + np.eye(inputs)
    x = generator.standard_normal((groups, 2000, inputs)) @ mixing
    return generator.standard_normal((groups, inputs, units)), x


def fitted_error(matrix, mask, moments):
    left, right = least_squares.regularized(moments, matrix, 0.01)
    fitted = least_squares.solve_masked(left, right, mask, matrix)
    return moments.error(fitted, moments.intercept(fitted))


@pytest.mark.parametrize("name", list(KNOWN))
@pytest.mark.parametrize("sparsity", [0.5, 0.8, 0.95])
@pytest.mark.parametrize("groups", [1, 3])
def test_masks_have_the_count_and_are_the_same_every_time(name, sparsity, groups, generator):
    matrix, x = correlated(generator, groups)
    known = statistics(name, x, matrix)
    before = matrix.copy()

    def mask_of(scores):
        assert scores.shape == matrix.shape
        assert np.isfinite(scores).all()
        return compute_mask(scores, sparsity)

    mask = KNOWN[name]().select(matrix, known, mask_of)
    assert np.count_nonzero(~mask) == round(sparsity * matrix.size)
    np.testing.assert_array_equal(mask, KNOWN[name]().select(matrix, known, mask_of))
    np.testing.assert_array_equal(matrix, before)


@pytest.mark.parametrize("sparsity", [0.5, 0.8, 0.9])
def test_admm_finds_better_masks_than_scores(sparsity, generator):
    matrix, x = correlated(generator)
    moments = moments_of(x, x @ matrix)

    def mask_of(scores):
        return compute_mask(scores, sparsity)

    admm = fitted_error(matrix, criteria.ADMM().select(matrix, moments, mask_of), moments)
    others = [mask_of(np.abs(matrix)), *(cls().select(matrix, moments, mask_of) for cls in (criteria.Activation, criteria.OBS))]
    assert all(admm < 0.9 * fitted_error(matrix, mask, moments) for mask in others)


@pytest.mark.parametrize("name", list(KNOWN))
def test_what_is_constant_or_all_zero_gives_no_nan(name, generator):
    x = generator.standard_normal((1, 100, 6))
    x[:, :, 2] = 3
    x[:, :, 4] = 0
    matrix = generator.standard_normal((1, 6, 4))
    for rows in (x, np.zeros_like(x)):
        known = statistics(name, rows, matrix)
        mask = KNOWN[name]().select(matrix, known, lambda scores: compute_mask(scores, 0.25))
        assert np.count_nonzero(mask) == 18


@pytest.mark.parametrize("name", list(KNOWN))
def test_without_samples_there_is_a_clear_error(name):
    message = r"needs calibration samples.*prune\(model, sparsity, criterion=..., calibration=samples\)"
    for use in (
        lambda: criteria.get(name),
        lambda: kr.layers.PrunableDense(3, criterion=name),
        lambda: criteria.get(KNOWN[name]()),
    ):
        with pytest.raises(ValueError, match=message):
            use()


def test_wrong_iterations():
    with pytest.raises(ValueError, match="`iterations` must be an integer of at least 4"):
        criteria.ADMM(iterations=1)
