import numpy as np
import pytest

from keras_renorm import allocation
from keras_renorm.allocation import allocate
from keras_renorm.masks import compute_mask

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
    with pytest.raises(ValueError, match="`allocation` must give one count of kept weights a kernel"):
        allocate([np.ones(4), np.ones(4)], 0.5, lambda kernels, keep: [keep])
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
