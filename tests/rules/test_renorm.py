import numpy as np
import pytest

from keras_renorm.src.core import arrays
from keras_renorm.src.core.moments import Moments
from keras_renorm.src.kernels.masks import compute_mask
from keras_renorm.src.rules import renorm
from tests.core.test_moments import moments_of

ALL = [renorm.L1(), renorm.L2(), renorm.L1("layer"), renorm.L2("layer"), renorm.L1(max_scale=1.5)]


@pytest.mark.parametrize("renormalizer", ALL, ids=repr)
@pytest.mark.parametrize(("shape", "input_axes"), [((6, 4), (0,)), ((3, 3, 2, 4), (0, 1, 2)), ((3, 3, 4, 2), (0, 1, 3))])
def test_nothing_pruned_changes_nothing(renormalizer, shape, input_axes, generator):
    kernel = generator.standard_normal(shape)
    scale = renormalizer(kernel, kernel, input_axes)
    assert scale.shape == tuple(1 if axis in input_axes else size for axis, size in enumerate(shape))
    np.testing.assert_allclose(scale, 1)


@pytest.mark.parametrize("renormalizer", ALL, ids=repr)
@pytest.mark.parametrize("sparsity", [0.5, 0.9, 0.99])
def test_scales_are_finite_and_dead_units_get_one(renormalizer, sparsity, generator):
    kernel = generator.standard_normal((40, 30))
    kernel[:, 0] = 0
    after = np.where(compute_mask(np.abs(kernel), sparsity), kernel, 0)
    after[:, 1] = 0
    scale = renormalizer(kernel, after, (0,))
    assert np.isfinite(scale).all()
    assert (scale > 0).all()
    if renormalizer.granularity == "unit":
        np.testing.assert_array_equal(scale[0, :2], 1)


@pytest.mark.parametrize(("renormalizer", "order"), [(renorm.L1(), 1), (renorm.L2(), 2)])
def test_each_unit_keeps_its_norm(renormalizer, order, generator):
    kernel = generator.standard_normal((50, 8))
    after = np.where(compute_mask(np.abs(kernel), 0.8, group="unit"), kernel, 0)
    scaled = after * renormalizer(kernel, after, (0,))
    np.testing.assert_allclose(np.linalg.norm(scaled, order, axis=0), np.linalg.norm(kernel, order, axis=0), rtol=1e-6)


@pytest.mark.parametrize("renormalizer", ALL, ids=repr)
@pytest.mark.parametrize("size", [1e20, 1e-25])
def test_the_size_of_the_weights_changes_nothing(renormalizer, size, generator):
    kernel = generator.standard_normal((50, 8)).astype("float32")
    mask = compute_mask(np.abs(kernel), 0.8)
    wanted = renormalizer(kernel, kernel * mask, (0,))
    sized = kernel * np.float32(size)
    np.testing.assert_allclose(renormalizer(sized, sized * mask, (0,)), wanted, rtol=1e-5)
    np.testing.assert_allclose(renormalizer.of_masks(sized, None, mask, 1.0, (0,)), wanted, rtol=1e-5)
    if renormalizer.granularity == "unit":
        sized = kernel * np.float32([1, size] * 4)
        np.testing.assert_allclose(renormalizer(sized, sized * mask, (0,)), wanted, rtol=1e-5)


def test_by_hand():
    before, after = np.array([[3.0, 4.0], [1.0, 3.0]]), np.array([[3.0, 4.0], [0.0, 0.0]])
    np.testing.assert_allclose(renorm.L1()(before, after, (0,)), [[4 / 3, 7 / 4]], rtol=1e-6)
    np.testing.assert_allclose(renorm.L2()(before, after, (0,)), [[np.sqrt(10) / 3, 5 / 4]], rtol=1e-6)
    np.testing.assert_allclose(renorm.L1("layer")(before, after, (0,)), [[11 / 7, 11 / 7]], rtol=1e-6)
    np.testing.assert_allclose(renorm.L1(max_scale=1.5)(before, after, (0,)), [[4 / 3, 1.5]], rtol=1e-6)


def test_defaults_by_hand():
    assert [(one.granularity, one.max_scale) for one in (renorm.L1(), renorm.L2())] == [("unit", None)] * 2
    assert renorm.MatchMoments().max_scale is None
    assert renorm.LeastSquares().ridge == 0.01
    assert renorm.L1(max_scale=1).max_scale == 1
    assert [renorm.get(name) for name in ("l1", "l2")] == [renorm.L1(), renorm.L2()]
    assert renorm.get("lstsq", calibrated=True) == renorm.LeastSquares()
    assert renorm.get("auto") == renorm.L2(max_scale=2.0)
    # Which can make up for what others lack.
    assert [cls.compensates for cls in (renorm.CalibratedRenormalizer, renorm.MatchMoments, renorm.LeastSquares)] == [
        False,
        False,
        True,
    ]
    for base in (renorm.Renormalizer(), renorm.CalibratedRenormalizer()):
        with pytest.raises(NotImplementedError):
            base(None, None, None)


@pytest.mark.parametrize("block", [1, 3, 4, 1000])
def test_blocks_of_rows_make_no_difference(block, monkeypatch):
    """Kernels are read a few rows at a time, here of 2 to 12 weights; inputs may be along the first axis or not."""
    monkeypatch.setattr(arrays, "_BLOCK", block)
    before = np.array([[3.0, -4.0], [1.0, 3.0], [-2.0, 0.0], [2.0, 0.0], [0.0, 5.0]])
    after = np.where(np.abs(before) > 2, before, 0)
    np.testing.assert_allclose(renorm.L1()(before, after, (0,)), [[8 / 3, 12 / 12]], rtol=1e-6)
    np.testing.assert_allclose(renorm.L2()(before, after, (0,)), [[np.sqrt(18) / 3, 1]], rtol=1e-6)
    np.testing.assert_allclose(renorm.L1()(before, after, (1,)), [[1], [4 / 3], [1], [1], [1]], rtol=1e-6)
    np.testing.assert_allclose(renorm.L1("layer")(before, after, (1,)), np.full((5, 1), 20 / 15), rtol=1e-6)
    convolution = before.reshape(5, 1, 2, 1), after.reshape(5, 1, 2, 1)
    np.testing.assert_allclose(renorm.L1()(*convolution, (0, 1, 3)), [[[[8 / 3], [1]]]], rtol=1e-6)
    np.testing.assert_allclose(renorm.L1()(*convolution, (0, 1, 2)), [[[[20 / 15]]]], rtol=1e-6)
    # The shape follows from the kernel, the dtype is that of scales.
    assert renorm.L1()(*convolution, (1, 3)).shape == (5, 1, 2, 1)
    assert renorm.L1()(*convolution, (1, 3)).dtype == np.float32


@pytest.mark.parametrize("block", [3, 1000])
def test_scales_from_masks_by_hand(block, monkeypatch):
    monkeypatch.setattr(arrays, "_BLOCK", block)
    kernel = np.array([[3.0, -4.0], [1.0, 3.0], [-2.0, 1.0]])
    mask = np.array([[True, True], [True, True], [False, True]])
    new_mask = np.array([[True, True], [False, True], [False, False]])
    scale = np.array([0.5, -2.0])
    # 4 * 0.5 were, 3 are left; 8 * 2 were, 7 are left. Without the mask 6 * 0.5 were.
    np.testing.assert_allclose(renorm.L1().of_masks(kernel, mask, new_mask, scale, (0,)), [[2 / 3, 16 / 7]], rtol=1e-6)
    np.testing.assert_allclose(renorm.L1().of_masks(kernel, None, new_mask, scale, (0,)), [[3 / 3, 16 / 7]], rtol=1e-6)
    expected = [[np.sqrt(10) * 0.5 / 3, np.sqrt(26) * 2 / 5]]
    np.testing.assert_allclose(renorm.L2().of_masks(kernel, mask, new_mask, scale, (0,)), expected, rtol=1e-6)
    layer = renorm.L1("layer", max_scale=1.75).of_masks(kernel, mask, new_mask, scale, (0,))
    np.testing.assert_allclose(layer, [[1.75, 1.75]])  # 18 / 10, but for the limit


def test_units_that_were_dead_or_are_get_one():
    before, after = np.array([[0.0, 2.0, 3.0]]), np.array([[1.0, 0.0, 1.5]])
    np.testing.assert_array_equal(renorm.L1()(before, after, (0,)), [[1, 1, 2]])


def moments_by_hand(gram, cross, power):
    """About zero, so that there is no intercept."""
    gram, cross, power = (np.array(value, float)[None] for value in (gram, cross, power))
    return Moments(1, gram, cross, power, np.zeros(gram.shape[:2]), np.zeros(power.shape))


def test_least_squares_by_hand():
    # Two inputs, the second twice the first, and a unit of weights 3 and 4: output moments 1 * 3 + 2 * 4 and 2 * 3 + 4 * 4.
    moments = moments_by_hand([[1, 2], [2, 4]], [[11], [22]], [121])
    matrix, mask = np.array([[[3.0], [4.0]]]), np.array([[[True], [False]]])
    # The mean second moment is 2.5: `(1 + 2.5 r) w = 11 + 2.5 r * 3`.
    np.testing.assert_allclose(renorm.LeastSquares()(matrix, mask, moments), [[[11.075 / 1.025], [0]]])
    np.testing.assert_allclose(renorm.LeastSquares(0.2)(matrix, mask, moments), [[[12.5 / 1.5], [0]]])
    np.testing.assert_allclose(renorm.LeastSquares(0.2)(matrix, ~mask, moments), [[[0], [24 / 4.5]]])


def test_match_moments_where_survivors_carry_next_to_nothing():
    """The survivors of the first unit have 4e-9 of its power, those of the second .5e-9."""
    moments = moments_by_hand([[1.0]], [[1.0, 1.0]], [1.0, 1.0])
    matrix = np.array([[[np.sqrt(4e-9), np.sqrt(0.5e-9)]]])
    fitted = renorm.MatchMoments()(matrix, np.ones((1, 1, 2), bool), moments)
    np.testing.assert_allclose(fitted, [[[1, np.sqrt(0.5e-9)]]])
    fitted = renorm.MatchMoments(max_scale=3)(matrix, np.ones((1, 1, 2), bool), moments)
    np.testing.assert_allclose(fitted, [[[3 * np.sqrt(4e-9), np.sqrt(0.5e-9)]]])


def test_the_theorem(generator):
    """Weights `c + eps xi`, inputs `m + eps eta`: the renormalized error goes to zero linearly, the plain one does not."""
    xi, eta = generator.standard_normal((400, 20)), generator.standard_normal((64, 400))
    epsilons = np.array([0.1, 0.01, 0.001, 0.0001])
    plain, renormalized = [], []
    for epsilon in epsilons:
        kernel, inputs = 0.7 + epsilon * xi, 2.0 + epsilon * eta
        after = np.where(compute_mask(np.abs(kernel), 0.9, group="unit"), kernel, 0)
        scale = renorm.L1()(kernel, after, (0,))
        wanted = inputs @ kernel
        plain.append(np.abs(inputs @ after - wanted).max() / np.abs(wanted).max())
        renormalized.append(np.abs(inputs @ (after * scale) - wanted).max() / np.abs(wanted).max())
    assert min(plain) > 0.8
    slopes = np.diff(np.log(renormalized)) / np.diff(np.log(epsilons))
    np.testing.assert_allclose(slopes[:2], 1, atol=0.1)
    assert renormalized[-1] < 1e-4


def test_auto_is_what_measures_best():
    assert renorm.get("auto", "unit") == renorm.L2()
    assert renorm.get("auto", "layer") == renorm.L2(max_scale=2.0)
    assert renorm.get(None) is None


def test_a_callable_is_taken_as_it_is():
    def halve(before, after, input_axes):
        return np.full((1, before.shape[-1]), 0.5)

    assert renorm.get(halve) is halve


@pytest.mark.parametrize("max_scale", [0.5, 0, float("inf"), float("nan"), 2j])
def test_max_scale_is_at_least_one(max_scale):
    with pytest.raises(ValueError, match="`max_scale` must be"):
        renorm.L1(max_scale=max_scale)


def test_unknown_names():
    with pytest.raises(ValueError, match=r"`renormalize` is not known.*auto.*l1.*l2"):
        renorm.get("l3")
    with pytest.raises(ValueError, match="`granularity` must be one of"):
        renorm.L2(granularity="filter")


CALIBRATED = [renorm.MatchMoments(), renorm.MatchMoments(max_scale=2.0), renorm.LeastSquares(), renorm.LeastSquares(0.1)]


def problem(generator, groups=2):
    x = generator.standard_normal((groups, 500, 10)) @ generator.standard_normal((10, 10)) + 1
    matrix = generator.standard_normal((groups, 10, 6))
    return x, matrix, moments_of(x, x @ matrix + 2)


@pytest.mark.parametrize("renormalizer", CALIBRATED, ids=repr)
def test_with_samples_nothing_pruned_changes_nothing(renormalizer, generator):
    _, matrix, moments = problem(generator)
    fitted = renormalizer(matrix, np.ones(matrix.shape, bool), moments)
    np.testing.assert_allclose(fitted, matrix, rtol=1e-3, atol=1e-4)
    np.testing.assert_allclose(moments.intercept(fitted), 2, atol=1e-3)


@pytest.mark.parametrize("renormalizer", CALIBRATED, ids=repr)
@pytest.mark.parametrize("sparsity", [0.3, 0.7, 0.95])
def test_with_samples_the_error_shrinks_and_zeros_stay(renormalizer, sparsity, generator):
    _, matrix, moments = problem(generator)
    mask = compute_mask(np.abs(matrix), sparsity)
    mask[0, :, 0] = False
    fitted = renormalizer(matrix, mask, moments)
    assert np.isfinite(fitted).all()
    np.testing.assert_array_equal(fitted[~mask], 0)
    plain = moments.error(np.where(mask, matrix, 0), np.full((2, 6), 2.0))
    assert moments.error(fitted, moments.intercept(fitted)) < plain


def test_match_moments_matches_mean_and_deviation(generator):
    x, matrix, moments = problem(generator)
    mask = compute_mask(np.abs(matrix), 0.5)
    fitted = renorm.MatchMoments()(matrix, mask, moments)
    outputs, wanted = x @ fitted + moments.intercept(fitted)[:, None], x @ matrix + 2
    alive = mask.any(axis=1)
    np.testing.assert_allclose(outputs.mean(axis=1), wanted.mean(axis=1), atol=1e-4)
    np.testing.assert_allclose(outputs.std(axis=1)[alive], wanted.std(axis=1)[alive], rtol=1e-4)
    kept = np.where(mask, matrix, 0)
    capped = renorm.MatchMoments(max_scale=1.2)(matrix, mask, moments)
    assert np.all(np.abs(capped) <= 1.2 * np.abs(kept) + 1e-9)


def test_match_moments_by_hand():
    rows = np.array([[[1.0, 1.0], [-1.0, 1.0], [1.0, -1.0], [-1.0, -1.0]]])
    matrix = np.array([[[3.0], [4.0]]])
    fitted = renorm.MatchMoments()(matrix, np.array([[[False], [True]]]), moments_of(rows, rows @ matrix))
    np.testing.assert_allclose(fitted, [[[0], [5]]])


def test_names_need_samples():
    assert renorm.get("auto", calibrated=True) == renorm.LeastSquares()
    assert renorm.get("moments", calibrated=True) == renorm.MatchMoments()
    for name in ("moments", "lstsq", renorm.LeastSquares()):
        with pytest.raises(ValueError, match=r"needs calibration samples.*calibration=samples"):
            renorm.get(name)
    for ridge in (0, -0.1, float("inf"), float("nan"), 1j):
        with pytest.raises(ValueError, match="`ridge` must be a positive number"):
            renorm.LeastSquares(ridge)
