import numpy as np
import pytest

from keras_renorm import patterns
from keras_renorm.masks import GROUPS, compute_mask

ALL_PATTERNS = ["unstructured", patterns.Block((4, 1)), patterns.Block((3, 2)), patterns.NOfM(2, 4), "unit"]
SHAPES = [(1, 1), (7, 1), (1, 5), (8, 6), (13, 9), (3, 3, 5, 7)]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("sparsity", [0, 0.1, 0.5, 0.66, 0.9, 0.999])
@pytest.mark.parametrize("equal", [False, True], ids=["random", "all equal"])
def test_unstructured_removes_the_exact_count(shape, sparsity, equal, generator):
    scores = np.ones(shape) if equal else generator.random(shape)
    mask = compute_mask(scores, sparsity)
    assert mask.shape == shape
    assert mask.dtype == bool
    assert np.count_nonzero(~mask) == round(sparsity * mask.size)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("sparsity", [0, 0.3, 0.5, 0.9])
def test_within_units_every_unit_loses_the_same(shape, sparsity, generator):
    scores = np.round(generator.random(shape), 1)  # with ties
    mask = compute_mask(scores, sparsity, group="unit")
    removed = (~mask).reshape(-1, shape[-1]).sum(axis=0)
    assert set(removed) == {round(sparsity * (mask.size // shape[-1]))}


@pytest.mark.parametrize("pattern", ALL_PATTERNS, ids=str)
@pytest.mark.parametrize("shape", SHAPES)
def test_no_sparsity_keeps_everything(pattern, shape, generator):
    assert compute_mask(generator.random(shape), 0, pattern).all()


@pytest.mark.parametrize("pattern", ALL_PATTERNS, ids=str)
@pytest.mark.parametrize("group", GROUPS)
def test_pruning_again_to_more_keeps_zeros_zero(pattern, group, generator):
    if pattern == "unit" and group == "unit":
        pytest.skip("refused: see test_patterns")
    scores = generator.random((24, 10))
    first = compute_mask(scores, 0.25, pattern, group)
    second = compute_mask(scores * first, 0.5, pattern, group)
    assert not np.any(second & ~first)


@pytest.mark.parametrize("pattern", ALL_PATTERNS, ids=str)
def test_the_same_scores_give_the_same_mask(pattern, generator):
    scores = np.round(generator.random((24, 10)), 1)
    np.testing.assert_array_equal(compute_mask(scores, 0.5, pattern), compute_mask(scores.copy(), 0.5, pattern))


def test_unstructured_by_hand():
    scores = np.array([[5.0, 1.0, 4.0], [2.0, 6.0, 3.0]])
    np.testing.assert_array_equal(compute_mask(scores, 0.5), [[True, False, True], [False, True, False]])


def test_of_equal_scores_the_first_stay():
    np.testing.assert_array_equal(compute_mask(np.array([[1.0], [1.0], [2.0], [1.0]]), 0.5)[:, 0], [True, False, True, False])


def test_ties_within_units_by_hand():
    scores = np.array([[1.0, 3.0], [1.0, 1.0], [1.0, 1.0], [2.0, 1.0]])
    mask = compute_mask(scores, 0.5, group="unit")
    np.testing.assert_array_equal(mask, [[True, True], [False, True], [False, False], [True, False]])


def test_input_axes_say_what_a_unit_is(generator):
    # A transposed convolution: (height, width, units, inputs).
    scores = generator.random((3, 3, 6, 4))
    mask = compute_mask(scores, 0.5, group="unit", input_axes=(0, 1, 3))
    assert set((~mask).sum(axis=(0, 1, 3))) == {18}
    swapped = compute_mask(scores.transpose(0, 1, 3, 2), 0.5, group="unit")
    np.testing.assert_array_equal(mask, swapped.transpose(0, 1, 3, 2))


@pytest.mark.parametrize("sparsity", [-0.1, 1, 1.5, float("nan"), "0.5", None, True])
def test_sparsity_is_a_number_from_0_to_below_1(sparsity):
    with pytest.raises(ValueError, match=r"`sparsity` must be a number in \[0, 1\)"):
        compute_mask(np.ones((2, 2)), sparsity)


def test_unknown_group():
    with pytest.raises(ValueError, match="`group` must be one of"):
        compute_mask(np.ones((2, 2)), 0.5, group="filter")


@pytest.mark.parametrize("group", GROUPS)
def test_scores_that_are_nan(group):
    with pytest.raises(ValueError, match="scores that are NaN"):
        compute_mask(np.array([[1.0, np.nan], [2.0, 3.0]]), 0.5, group=group)


@pytest.mark.parametrize("pattern", ALL_PATTERNS, ids=str)
@pytest.mark.parametrize("place", [0, 3])
def test_scores_that_are_nan_are_seen_with_every_pattern(pattern, place):
    scores = np.ones((8, 3))
    scores[place, 1] = np.nan
    with pytest.raises(ValueError, match="scores that are NaN"):
        compute_mask(scores, 0.5, pattern)


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64", "int32"])
def test_scores_of_any_dtype(dtype):
    np.testing.assert_array_equal(compute_mask(np.array([[1, 2, 3, 4]], dtype), 0.5), [[False, False, True, True]])


@pytest.mark.parametrize("pattern", ALL_PATTERNS, ids=str)
@pytest.mark.parametrize("group", GROUPS)
def test_what_is_gone_stays_gone_and_the_count_is_exact(pattern, group, generator):
    if pattern == "unit" and group == "unit":
        pytest.skip("refused: see test_patterns")
    before = compute_mask(generator.random((24, 12)), 0.25, pattern, group)
    read = generator.random(12) < 0.6
    after = compute_mask(generator.random((24, 12)), 0.5, pattern, group, mask=before, read=read)
    assert not (after & ~before).any()
    fresh = compute_mask(generator.random((24, 12)), 0.5, pattern, group)
    assert np.count_nonzero(after) == np.count_nonzero(fresh)


def test_cells_of_units_that_nothing_reads_go_first():
    scores = np.array([[9.0, 1.0], [8.0, 2.0], [7.0, 3.0]])
    mask = compute_mask(scores, 0.5, read=np.array([False, True]))
    np.testing.assert_array_equal(mask, [[False, True], [False, True], [False, True]])
    mask = compute_mask(scores, 2 / 3, read=np.array([False, True]))
    np.testing.assert_array_equal(mask, [[False, False], [False, True], [False, True]])


def test_no_unit_loses_its_last_weight_while_there_are_enough():
    scores = np.array([[9.0, 0.1, 5.0], [8.0, 0.2, 4.0], [7.0, 0.3, 3.0]])
    np.testing.assert_array_equal(
        compute_mask(scores, 6 / 9), [[True, False, True], [False, False, False], [False, True, False]]
    )
    np.testing.assert_array_equal(compute_mask(scores, 7 / 9), [[True, False, False], [True, False, False], [False] * 3])
    np.testing.assert_array_equal(
        compute_mask(scores, 7 / 9, read=np.array([True, True, False])),
        [[True, False, False], [False] * 3, [False, True, False]],
    )


def test_units_of_zeros_are_not_spared():
    scores = np.array([[0.0, 1.0, 5.0], [0.0, 2.0, 4.0]])
    np.testing.assert_array_equal(compute_mask(scores, 0.5), [[False, False, True], [False, True, True]])


@pytest.mark.parametrize("kind", ["spread", "ties", "sorted", "columns", "infinite"])
@pytest.mark.parametrize("sparsity", [0.001, 0.5, 0.9, 0.999])
def test_large_kernels_are_cut_exactly_where_a_sort_would(kind, sparsity, generator):
    scores = np.abs(generator.standard_normal((700, 1000), np.float32))
    if kind == "ties":
        scores = np.round(scores, 1)
    elif kind == "sorted":
        scores = np.sort(scores, axis=None).reshape(700, 1000)
    elif kind == "columns":  # in step with a sample of every n-th weight
        scores[:, ::14] *= 100
    elif kind == "infinite":
        scores[:, ::3] = -np.inf
    mask = compute_mask(scores, sparsity, read=np.ones(1000, bool))
    order = np.argsort(-scores, axis=None, kind="stable")
    expected = np.zeros(scores.size, bool)
    expected[order[: scores.size - round(sparsity * scores.size)]] = True
    if sparsity < 0.99:  # beyond, units would lose their last weight
        np.testing.assert_array_equal(mask.reshape(-1), expected)
    assert np.count_nonzero(mask) == np.count_nonzero(expected)


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("pruned_before", [False, True])
@pytest.mark.parametrize("sparsity", [0.2, 0.5, 0.9])
def test_large_kernels_are_cut_within_units_where_a_sort_would(ties, pruned_before, sparsity, generator):
    scores = np.abs(generator.standard_normal((700, 1000), np.float32))
    scores = np.round(scores, 1) if ties else scores
    left = generator.random(scores.shape) < 0.6 if pruned_before else np.ones(scores.shape, bool)
    mask = compute_mask(scores, sparsity, group="unit", mask=left if pruned_before else None)
    order = np.argsort(np.where(left, -scores, np.inf), axis=0, kind="stable")
    expected = np.zeros(scores.shape, bool)
    np.put_along_axis(expected, order[: 700 - round(sparsity * 700)], True, axis=0)
    np.testing.assert_array_equal(mask, expected & left)


@pytest.mark.parametrize("group", GROUPS)
@pytest.mark.parametrize("side", [4, 600])
def test_scores_of_infinity_stay_whatever_the_sparsity(group, side, generator):
    scores = generator.random((side, side), np.float32)
    scores[::2] = np.inf
    np.testing.assert_array_equal(compute_mask(scores, 0.7, group=group), scores == np.inf)
