import numpy as np
import pytest

from keras_renorm.src.core import arrays, names
from keras_renorm.src.kernels.masks import best_cells, compute_mask, removes_enough
from keras_renorm.src.rules import patterns

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
@pytest.mark.parametrize("group", names.GROUPS)
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


@pytest.mark.parametrize("group", names.GROUPS)
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
@pytest.mark.parametrize("group", names.GROUPS)
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


def by_sorting(scores, sparsity, left, read):
    """What `best_cells` promises, cell by cell."""
    places = list(np.ndindex(scores.shape))
    count = round(sparsity * scores.size) - np.count_nonzero(~left)
    lowest = min(scores[place] if left[place] else 0 for place in places)

    def remove(spared):
        candidates = [place for place in places if left[place] and scores[place] < np.inf and place not in spared]
        # First units that nothing reads, then the lowest scores, of equal ones the last.
        candidates.sort(key=lambda place: (read[place[1]], scores[place], -place[0], -place[1]))
        kept = left.copy()
        for place in candidates[: max(0, count)]:
            kept[place] = False
        return kept

    kept = remove([])
    columns = [[place for place in places if left[place] and place[1] == unit] for unit in np.flatnonzero(read)]
    best = [max(column, key=lambda place: (scores[place], -place[0])) for column in columns if column]
    best = [place for place in best if scores[place] > lowest]
    return remove(best) if len(best) <= np.count_nonzero(kept) else kept


def test_small_kernels_are_cut_where_a_sort_would(generator):
    for number in range(300):
        scores = generator.integers(0, 5, generator.integers(1, 6, 2)).astype("float32")
        scores[generator.random(scores.shape) < (0.2 if number % 4 == 0 else 0)] = np.inf
        left = generator.random(scores.shape) < (1 if number % 3 == 0 else 0.7)
        read = generator.random(scores.shape[1]) < (1 if number % 2 == 0 else 0.6)
        sparsity = generator.integers(scores.size) / scores.size
        expected = by_sorting(scores, sparsity, left, read)
        message = f"{scores} {sparsity} {left} {read}"
        np.testing.assert_array_equal(best_cells(scores, sparsity, left, read), expected, message)
        if left.all() and read.all():
            np.testing.assert_array_equal(best_cells(scores, sparsity), expected, message)


def test_small_kernels_are_cut_within_units_where_a_sort_would(generator):
    for number in range(300):
        scores = generator.integers(0, 4, generator.integers(1, 7, 2)).astype("float32")
        scores[generator.random(scores.shape) < (0.2 if number % 3 == 0 else 0)] = np.inf
        left = generator.random(scores.shape) < 0.7
        count = generator.integers(len(scores))
        expected = np.zeros(scores.shape, bool)
        for unit, column in enumerate(scores.T):
            # First what was gone before, then the lowest scores, of equal ones the last.
            order = sorted(range(len(column)), key=lambda row: (left[row, unit], column[row], -row))
            expected[[row for row in order if row in order[count:] or column[row] == np.inf], unit] = True
        mask = compute_mask(scores, count / len(scores), group="unit", mask=left)
        np.testing.assert_array_equal(mask, expected & left, f"{scores} {count} {left}")


def test_the_last_weight_of_a_unit_that_is_read_stays():
    scores = np.array([[9.0, 0.3, 5.0], [8.0, 0.2, 4.0], [7.0, 0.1, 3.0]])
    # The best of what is left of it, and the lowest of the others goes for it.
    left = np.array([[True, False, True], [True, True, True], [True, True, True]])
    np.testing.assert_array_equal(
        compute_mask(scores, 6 / 9, mask=left), [[True, False, True], [False, True, False], [False, False, False]]
    )
    # Nothing is left of the unit, or nothing reads it.
    left[:, 1] = False
    expected = [[True, False, True], [True, False, False], [False, False, False]]
    np.testing.assert_array_equal(compute_mask(scores, 6 / 9, mask=left), expected)
    np.testing.assert_array_equal(compute_mask(scores, 6 / 9, read=np.array([True, False, True])), expected)
    # Two weights cannot be in three units.
    np.testing.assert_array_equal(compute_mask(scores, 7 / 9), [[True, False, False], [True, False, False], [False] * 3])


def test_the_last_weight_of_a_unit_stays_if_any_weight_is_worse():
    scores = np.array([[1.0, 5.0], [1.0, 5.0]])
    np.testing.assert_array_equal(compute_mask(scores, 0.5), [[False, True], [False, True]])
    # What was gone before counts as zero.
    left = np.array([[True, True], [False, True]])
    np.testing.assert_array_equal(compute_mask(scores, 0.5, mask=left), [[True, True], [False, False]])


def test_masks_with_ties_keep_the_first_of_what_is_left():
    left = np.array([[False], [True], [True], [True], [True]])
    for group in names.GROUPS:
        mask = compute_mask(np.ones((5, 1)), 0.6, group=group, mask=left)
        np.testing.assert_array_equal(mask[:, 0], [False, True, True, False, False])


def test_less_than_is_gone_already_removes_nothing():
    left = np.array([[False, True], [False, False], [True, True]])
    for group in names.GROUPS:
        np.testing.assert_array_equal(compute_mask(np.ones((3, 2)), 1 / 3, group=group, mask=left), left)


def test_within_units_what_is_gone_counts_where_it_is_gone():
    scores = np.array([[4.0, 1.0], [3.0, 2.0], [2.0, 3.0], [1.0, 4.0]])
    left = np.array([[False, True], [False, True], [True, True], [True, True]])
    mask = compute_mask(scores, 0.5, group="unit", mask=left)
    np.testing.assert_array_equal(mask, [[False, False], [False, False], [True, True], [True, True]])


@pytest.mark.parametrize("dtype", ["int32", "float16"])
def test_masks_with_scores_of_other_dtypes(dtype):
    scores = np.array([[1], [3], [2], [4]], dtype)
    left = np.array([[True], [False], [True], [True]])
    for group in names.GROUPS:
        mask = compute_mask(scores, 0.5, group=group, mask=left)
        np.testing.assert_array_equal(mask[:, 0], [False, False, True, True])


@pytest.mark.parametrize("left", [None, np.arange(12).reshape(4, 3) % 5 > 0], ids=["all", "pruned before"])
@pytest.mark.parametrize("infinite", [False, True])
def test_a_sample_that_misleads_changes_nothing(left, infinite, monkeypatch):
    """Whatever is guessed of the threshold from a sample of the scores."""
    scores = np.array([[3.0, 1.0, 4.0], [1.0, 5.0, 9.0], [2.0, 6.0, 5.0], [3.0, 5.0, 8.0]])
    if infinite:
        scores[scores > 5] = np.inf
    for count in range(12):
        expected = best_cells(scores, count / 12, left)
        for low in (-np.inf, 0.0, 1.0, 2.5, 3.0, 5.0, 8.0, 10.0):
            for high in (0.0, 1.0, 2.5, 3.0, 5.0, 8.0, 10.0, np.inf):
                if low <= high:
                    monkeypatch.setattr(arrays, "bracket", lambda sample, share, pair=(low, high): pair)
                    np.testing.assert_array_equal(best_cells(scores, count / 12, left), expected, f"{count} {low} {high}")
        monkeypatch.undo()


def test_units_that_nothing_reads_keep_what_always_stays():
    scores = np.array([[np.inf, 1.0], [2.0, 3.0]])
    np.testing.assert_array_equal(compute_mask(scores, 0.5, read=np.array([False, True])), [[True, False], [False, True]])


@pytest.mark.parametrize(
    ("pattern", "read"), [(patterns.Block((1, 2)), [False, False, False, True]), ("unit", [False, False, True, True])], ids=str
)
def test_a_cell_is_read_if_any_of_its_units_is(pattern, read):
    scores = np.array([[9.0, 10.0, 1.0, 0.0], [9.0, 10.0, 8.0, 7.0]])
    np.testing.assert_array_equal(compute_mask(scores, 0.5, pattern, read=np.array(read)), [[False, False, True, True]] * 2)


def test_a_pattern_is_asked_about_units_in_the_shape_it_is_promised():
    shapes = []

    class Own(patterns.Pattern):
        def any(self, flags):
            shapes.append(flags.shape)
            return super().any(flags)

    scores = np.arange(24.0).reshape(2, 3, 4)
    mask = compute_mask(scores, 0.5, Own(), read=np.array([True, True, True, False]))
    assert shapes == [(1, 1, 4)]
    # All six of the last unit, and six more: 0, 1, 2, 4, 5, 6.
    assert np.flatnonzero(~mask).tolist() == [0, 1, 2, 3, 4, 5, 6, 7, 11, 15, 19, 23]


def test_axes_of_inputs_and_units():
    scores = np.arange(24.0).reshape(2, 3, 4)
    # Of two axes of units, each pair of indices is a unit.
    mask = compute_mask(scores, 0.5, group="unit", input_axes=(0,))
    np.testing.assert_array_equal(mask, scores >= 12)
    mask = compute_mask(scores, 1 / 3, group="unit", input_axes=(-2,))
    np.testing.assert_array_equal(mask, np.broadcast_to([[False], [True], [True]], scores.shape))
    # Without an axis of inputs each weight is a unit.
    np.testing.assert_array_equal(compute_mask(np.array([3.0, 1.0, 2.0, 4.0]), 0.5, input_axes=()), [True, False, False, True])
    assert compute_mask(scores, 0.5, input_axes=(0, 2)).flags.c_contiguous


def test_what_a_mask_removes_by_hand():
    mask = np.array([[1, 0, 1], [0, 1, 1], [0, 1, 0], [1, 1, 1]], bool)
    plain = patterns.get("unstructured")
    # 4 of 12 in all; 2, 1 and 1 of 4 a unit.
    assert removes_enough(mask, 4 / 12, plain)
    assert not removes_enough(mask, 5 / 12, plain)
    assert removes_enough(mask, 0.25, plain, "unit")
    assert not removes_enough(mask, 0.5, plain, "unit")
    # 1 in a row at least, if rows are units.
    assert removes_enough(mask[:3], 1 / 3, plain, "unit", input_axes=(1,))
    assert not removes_enough(mask, 1 / 3, plain, "unit", input_axes=(1,))
    # Blocks of two rows are gone where both are: of 6 one, in the first column of the middle.
    assert removes_enough(np.roll(mask, 1, axis=0), 1 / 6, patterns.Block((2, 1)))
    assert not removes_enough(mask, 1 / 6, patterns.Block((2, 1)))
    result = removes_enough(mask, 0.25, plain, "unit")
    assert type(result) is bool


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


@pytest.mark.parametrize("group", names.GROUPS)
@pytest.mark.parametrize("side", [4, 600])
def test_scores_of_infinity_stay_whatever_the_sparsity(group, side, generator):
    scores = generator.random((side, side), np.float32)
    scores[::2] = np.inf
    np.testing.assert_array_equal(compute_mask(scores, 0.7, group=group), scores == np.inf)
