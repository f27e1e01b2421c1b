import numpy as np
import pytest

from keras_renorm.src.core import arrays
from keras_renorm.src.kernels.masks import compute_mask
from keras_renorm.src.rules import allocation
from keras_renorm.src.rules.allocation import allocate

SHAPES = [(3, 3, 3, 16), (40, 30), (64, 10), (8,), (300, 100)]


def kernels(generator):
    return [generator.standard_normal(shape) * (index + 1) for index, shape in enumerate(SHAPES)]


@pytest.mark.parametrize("name", [*allocation.KNOWN, lambda kernels, keep: np.full(len(kernels), keep / len(kernels))])
@pytest.mark.parametrize("sparsity", [0, 0.3, 0.5, 0.9, 0.99, 0.9995])
@pytest.mark.parametrize("most", [1.0, 0.5])
def test_the_total_is_exact(name, sparsity, most, generator):
    if sparsity > most:
        pytest.skip("not possible")
    arrays = kernels(generator)
    sparsities = allocate(arrays, sparsity, name, most)
    assert all(0 <= one < 1 for one in sparsities)
    assert max(sparsities) <= most + 1e-9
    total = sum(array.size for array in arrays)
    assert sum(np.count_nonzero(~compute_mask(np.abs(a), s)) for a, s in zip(arrays, sparsities)) == round(sparsity * total)
    if total - round(sparsity * total) >= len(arrays):
        assert all(compute_mask(np.abs(a), s).any() for a, s in zip(arrays, sparsities))


def test_uniform_by_hand():
    assert allocate([np.ones((4, 5)), np.ones((4, 10))], 0.5, "uniform") == [0.5, 0.5]


def test_erk_by_hand():
    # Sides 80 and 50 share 200 weights to keep: 123 and 77.
    assert allocate([np.ones((40, 40)), np.ones((40, 10))], 0.9, "erk") == [1 - 123 / 1600, 1 - 77 / 400]
    # Sides 12, 200: 50 weights are less than the small one's share, so it stays whole.
    assert allocate([np.ones((2, 10)), np.ones((100, 100))], 0.5, "erk") == [0.0, 1 - (5010 - 20) / 10000]
    # Sides 7, 80, 50: more than the 10 weights of the first, so 390 are left for the others, 240 and 150.
    some = [np.ones((2, 5)), np.ones((40, 40)), np.ones((40, 10))]
    assert allocate(some, 1 - 400 / 2010, "erk") == [0, 1 - 240 / 1600, 1 - 150 / 400]


def test_balanced_by_hand():
    # The mean of 160 and 40 (uniform) with 123.08 and 76.92 (erk).
    assert allocate([np.ones((40, 40)), np.ones((40, 10))], 0.9, "balanced") == [1 - 142 / 1600, 1 - 58 / 400]


def test_global_by_hand():
    one, two = np.array([[9.0, -8.0, 1.0, 2.0]]), np.array([[3.0, 0.5, 0.1, 7.0]])
    assert allocate([one, two], 0.5, "global") == [0.5, 0.5]
    assert allocate([one, two * 0.01], 0.75, "global") == [0.75, 0.75]  # one weight stays in each
    assert allocate([one, two], 0.625, "global") == [0.5, 0.75]


def test_lamp_by_hand():
    # Squares over the sum of those not smaller: 1/14, 4/13, 1 and 1/3, 1/2, 1.
    one, two = np.array([[1.0, 2.0, 3.0]]), np.array([[5.0, 5.0, 5.0]])
    assert allocate([one, two], 1 / 3, "lamp") == pytest.approx([2 / 3, 0])
    assert allocate([one, two], 1 / 2, "lamp") == pytest.approx([2 / 3, 1 / 3])


def counts_of(sizes, keep, asked, most=1.0):
    """How many weights stay, given `{number of kernels that are not settled: what is asked for them}`."""
    kernels = [np.ones(size) for size in sizes]
    sparsity = 1 - keep / sum(sizes)
    sparsities = allocate(kernels, sparsity, lambda some, left: asked[len(some)], most)
    return [round((1 - sparsity) * size, 6) for size, sparsity in zip(sizes, sparsities)]


@pytest.mark.parametrize(
    ("sizes", "asked", "most", "expected"),
    [
        # More than there is is divided among the others.
        ((10, 100, 100), {3: [20, 10, 30], 2: [15, 35]}, 1.0, [10, 15, 35]),
        # Less than the pattern leaves is taken from the others.
        ((10, 100, 100), {3: [5, 4, 51], 2: [6, 24]}, (1.0, 0.7, 1.0), [6, 30, 24]),
        # Over by 30 and under by 2: what is freed lifts the second above its least.
        ((10, 100, 100), {3: [40, 8, 12], 2: [20, 30]}, (1.0, 0.9, 1.0), [10, 20, 30]),
        # Over by 1 and under by 20: what is taken lowers the first below its size.
        ((10, 100, 100), {3: [11, 10, 39], 2: [6, 24]}, (1.0, 0.7, 1.0), [6, 30, 24]),
        # By 2 both: over first.
        ((10, 100, 100), {3: [12, 8, 40], 2: [26, 24]}, (1.0, 0.9, 1.0), [10, 26, 24]),
        # One after the other: 10, then 20, then the rest.
        ((10, 20, 100), {3: [30, 15, 15], 2: [21, 29], 1: [30]}, 1.0, [10, 20, 30]),
        # Everything is at its limits.
        ((10, 50), {2: [20, 40], 1: [50]}, 1.0, [10, 50]),
        # Every kernel keeps one weight, whatever is asked.
        ((10, 100, 100), {3: [0, 0, 60], 2: [60], 1: [58]}, 1.0, [1, 1, 58]),
    ],
)
def test_what_is_over_and_under_by_hand(sizes, asked, most, expected):
    assert counts_of(sizes, 60, asked, most) == expected


@pytest.mark.parametrize(
    ("sizes", "keep", "asked", "expected"),
    [
        ((9, 9, 9), 10, [3.3, 3.3, 3.4], [3, 3, 4]),
        ((9, 9, 9), 10, [2.5, 4.9, 2.6], [2, 5, 3]),
        ((9, 9, 9), 4, [4 / 3] * 3, [2, 1, 1]),  # of equal remainders the first
        ((4,) * 40, 100, [2.5] * 40, [3] * 20 + [2] * 20),
        ((9, 9, 9), 4, [1.5, 1 - 1e-12, 1.5], [2, 1, 1]),  # 1 but for rounding
        ((9, 9, 9), 9, [1, 1, 1], [3, 3, 3]),
        ((9, 9), 5, [1.1, 1.9], [2, 3]),
        ((2, 9), 6, [1.9, 1.1], [2, 4]),  # no more than there is
        ((9, 9), 9, [5.4, 5.7], [4, 5]),  # too many: those with the smallest remainders lose one
        ((9, 9, 9), 8, [5.9, 3.2, 2.4], [5, 2, 1]),
        ((9, 9, 9), 5, [1.2, 4.0, 1.3], [1, 3, 1]),  # none loses its last
    ],
)
def test_remainders_by_hand(sizes, keep, asked, expected):
    assert counts_of(sizes, keep, {len(sizes): asked}) == expected


def test_where_the_limits_leave_no_choice():
    # Patterns that remove a half of each cannot remove four fifths.
    with pytest.raises(ValueError, match=r"remove 0.5 of all weights at most. Received: sparsity=0.8"):
        allocate([np.ones(10), np.ones(10)], 0.8, "uniform", most=0.5)
    assert allocate([np.ones(10), np.ones(10)], 0.6, "uniform", most=[0.5, 1.0]) == [0.5, 0.7]
    with pytest.raises(ValueError, match=r"remove 0.75 of all weights at most. Received: sparsity=0.8"):
        allocate([np.ones(10), np.ones(10)], 0.8, "uniform", most=[0.5, 1.0])
    # One weight for two kernels: a sparsity is below 1 all the same.
    assert allocate([np.ones(4), np.ones(4)], 0.9) == [0.75, np.nextafter(1, 0)]
    assert allocate([np.ones(4), np.ones(4)], 0.99) == [np.nextafter(1, 0)] * 2


def test_defaults_by_hand():
    # Half of what uniform gives (6, 2) and half of what sides of 12 and 8 give (4.8, 3.2): 5.4 and 2.6.
    one, two = np.ones((2, 10)), np.ones((2, 6))
    assert allocate([np.ones((3, 9)), np.ones((3, 3))], 0.5) == allocate([np.ones((3, 9)), np.ones((3, 3))], 0.5, "balanced")
    np.testing.assert_allclose(allocation.uniform([one, two], 8), [5, 3])
    np.testing.assert_allclose(allocation.erk([one, two], 8), [4.8, 3.2])
    np.testing.assert_allclose(allocation.balanced([one, two], 8), [4.9, 3.1])
    # A convolution's sides are all of them.
    np.testing.assert_allclose(allocation.erk([np.ones((3, 3, 2, 8)), np.ones((2, 6))], 12), [8, 4])


def test_ties_at_the_threshold_are_shared():
    one, two = np.array([1.0, -1, 1, 1, 5]), np.array([1.0, 1, 0])
    # Above is one; of the six that are equal three stay, in proportion.
    np.testing.assert_allclose(allocation.global_([one, two], 4), [1 + 4 * 3 / 6, 2 * 3 / 6])
    np.testing.assert_allclose(allocation.global_([one, two], 1), [1, 0])
    np.testing.assert_allclose(allocation.global_([one, two], 8), [5, 3])
    np.testing.assert_allclose(allocation.global_([one, two], 0), [0, 0])


def test_lamp_divides_by_what_is_not_smaller():
    # 1 / 11, 1 / 10, 1; 16 / 41, 1; 1 / 2, 1: the largest of each first.
    kernels = [np.array([1.0, 1.0, 3.0]), np.array([5.0, 4.0]), np.array([6.0, 6.0])]
    for keep, expected in ((3, [1, 1, 1]), (4, [1, 1, 2]), (5, [1, 2, 2]), (6, [2, 2, 2])):
        np.testing.assert_allclose(allocation.lamp(kernels, keep), expected)


def test_lamp_with_zeros():
    # 1 / 2, 1 and 0 / 25, 9 / 25, 16 / 16: two of the ones, then 9 / 25 after 1 / 2.
    np.testing.assert_allclose(allocation.lamp([np.array([1.0, -1.0]), np.array([4.0, 3, 0])], 3), [2, 1])
    np.testing.assert_allclose(allocation.lamp([np.array([1.0, -1.0]), np.array([4.0, 3, 0])], 4), [2, 2])
    np.testing.assert_allclose(allocation.lamp([np.zeros(2), np.array([[4.0], [3]])], 2), [0, 2])


def test_a_sample_that_misleads_changes_nothing(monkeypatch):
    one, two = np.array([3.0, 1, 4, 1, 5]), np.array([9.0, 2, 6, 5])
    for keep in range(10):
        expected = allocation.global_([one, two], keep)
        for low in (-np.inf, 1.0, 3.0, 4.5, 9.0, 10.0):
            for high in (0.0, 1.0, 3.0, 5.0, 9.0, np.inf):
                if low <= high:
                    monkeypatch.setattr(arrays, "bracket", lambda sample, share, pair=(low, high): pair)
                    np.testing.assert_array_equal(allocation.global_([one, two], keep), expected, f"{keep} {low} {high}")
        monkeypatch.undo()


def test_a_limit_belongs_to_its_kernel():
    # Of 80 weights 16 stay: 10 of the first, which may lose no more than half, and 6 of the second.
    sparsities = allocate([np.ones((4, 5)), np.ones((6, 10))], 0.8, "uniform", most=[0.5, 1.0])
    assert sparsities == pytest.approx([0.5, 0.9])


def test_more_than_the_limits_allow():
    kernels = [np.ones((4, 5)), np.ones((6, 10))]
    assert allocate(kernels, 0.875, "uniform", most=[0.5, 1.0])[0] == 0.5
    with pytest.raises(ValueError, match=r"remove 0.875 of all weights at most. Received: sparsity=0.9. Pass `sparsity=0.875`"):
        allocate(kernels, 0.9, "uniform", most=[0.5, 1.0])
    # An odd count is rounded, and no error.
    assert allocate([np.ones((1, 11))], 0.5, "uniform", most=0.5) == pytest.approx([5 / 11])


def test_wrong_input():
    with pytest.raises(ValueError, match="`allocation` must be one of.*uniform.*global.*erk.*lamp.*Received: allocation='er'"):
        allocate([np.ones(4)], 0.5, "er")
    with pytest.raises(ValueError, match="`allocation` must return one number of kept weights for each kernel"):
        allocate([np.ones(4), np.ones(4)], 0.5, lambda kernels, keep: [keep])
    for counts in ([np.nan, 2.0], [np.inf, 2.0], [-1.0, 5.0]):
        with pytest.raises(ValueError, match="`allocation` must return one number of kept weights for.*for 2 kernels"):
            allocate([np.ones(4), np.ones(4)], 0.5, lambda kernels, keep, counts=counts: counts)
    with pytest.raises(ValueError, match="`sparsity` must be a number in"):
        allocate([np.ones(4)], 1.0)


@pytest.mark.parametrize("kind", ["spread", "ties", "one kernel larger"])
@pytest.mark.parametrize("sparsity", [0.001, 0.5, 0.9, 0.9999])
def test_large_models_get_the_threshold_of_all_their_weights(kind, sparsity, generator):
    kernels = [generator.standard_normal(shape, np.float32) for shape in [(500, 400), (300, 100), (700, 900)]]
    if kind == "ties":
        kernels = [np.round(kernel, 1) for kernel in kernels]
    elif kind == "one kernel larger":
        kernels[1] *= 100
    every = np.sort(np.concatenate([np.abs(kernel).reshape(-1) for kernel in kernels]))
    threshold = every[round(sparsity * every.size)]
    for one, kernel in zip(allocate(kernels, sparsity, "global"), kernels):
        above, equal = np.count_nonzero(np.abs(kernel) > threshold), np.count_nonzero(np.abs(kernel) == threshold)
        # Kernels without a weight above the threshold keep one, which others lose.
        assert above - 2 <= (1 - one) * kernel.size <= above + equal + 1.5
