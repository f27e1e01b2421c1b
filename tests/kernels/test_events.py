"""One event on one kernel: the ways that make no array of the kernel's size give what those with arrays give."""

import numpy as np
import pytest

from keras_renorm import criteria
from keras_renorm.src.core.arrays import masked
from keras_renorm.src.kernels import events
from keras_renorm.src.rules import patterns, renorm

SHAPES = {"matrix": (30, 20), "convolution": (3, 3, 4, 8), "one unit": (50, 1), "one input": (1, 40), "large": (900, 600)}


class WithArrays(renorm.L2):
    """The same by a subclass, which is not known to do the same."""


def prune(kernel, sparsity, criterion, renormalize, **arguments):
    axes = tuple(range(kernel.ndim - 1))
    return events.prune_kernel(
        kernel, sparsity, criterion, patterns.get("unstructured"), "layer", renormalize, axes, **arguments
    )


def state_of(kind, shape, generator):
    """A kernel, the mask until now and the scales."""
    kernel = generator.standard_normal(shape).astype("float32")
    mask, scale = None, 1.0
    if kind != "dense":
        mask = generator.random(shape) < 0.6
        scale = generator.uniform(0.5, 2.0, shape[-1:]).astype("float32")
    if kind == "ties":
        kernel, scale = np.round(kernel, 1), 1.0
    if kind == "hidden":
        kernel[~mask] = np.resize([np.inf, np.nan, 3.0], np.count_nonzero(~mask))
    if kind == "half precision":
        kernel = kernel.astype("float16")
    return kernel, mask, scale


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("kind", ["dense", "pruned", "ties", "hidden", "half precision"])
@pytest.mark.parametrize("sparsity", [0.0, 0.45, 0.9, 0.999])
@pytest.mark.parametrize("some_unread", [False, True])
def test_streamed_scores_and_norms_give_what_arrays_give(shape, kind, sparsity, some_unread, generator):
    kernel, mask, scale = state_of(kind, shape, generator)
    read = generator.random(shape[-1]) < 0.7 if some_unread else None
    arguments = dict(mask=mask, scale=scale, read=read)
    before = None if mask is None else mask.copy()
    new_mask, new_scale = prune(kernel, sparsity, criteria.Magnitude(), renorm.L2(max_scale=3.0), **arguments)
    expected_mask, expected_scale = prune(
        kernel, sparsity, lambda kernel: np.abs(kernel), WithArrays(max_scale=3.0), **arguments
    )
    np.testing.assert_array_equal(new_mask, expected_mask)
    np.testing.assert_allclose(np.broadcast_to(new_scale, shape), np.broadcast_to(expected_scale, shape), rtol=1e-5)
    if mask is not None:
        np.testing.assert_array_equal(mask, before)


@pytest.mark.parametrize("renormalizer", [renorm.L1(), renorm.L2(), renorm.L1("layer"), renorm.L2("layer", 1.5)], ids=repr)
@pytest.mark.parametrize(("shape", "axes"), [((200, 900), (0,)), ((3, 3, 5, 7), (0, 1, 2)), ((3, 3, 7, 5), (0, 1, 3))])
def test_norms_under_masks_are_those_of_masked_kernels(renormalizer, shape, axes, generator):
    kernel = generator.standard_normal(shape).astype("float32")
    old = generator.random(shape) < 0.7
    new = old & (generator.random(shape) < 0.5)
    scale = generator.uniform(0.5, 2, [1 if axis in axes else side for axis, side in enumerate(shape)]).astype("float32")
    received = renormalizer.of_masks(kernel, old, new, scale, axes)
    expected = renormalizer(masked(kernel, old) * scale, masked(kernel, new), axes)
    assert received.shape == expected.shape
    np.testing.assert_allclose(received, expected, rtol=1e-5)


@pytest.mark.parametrize("criterion", [criteria.Magnitude(), np.abs], ids=["streamed", "array"])
@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("sparsity", [0.0, 1e-4, 0.9])
def test_a_weight_that_is_not_finite_is_refused(criterion, value, sparsity, generator):
    kernel = generator.standard_normal((30, 20)).astype("float32")
    kernel[3, 4] = value
    with pytest.raises(ValueError, match=r"Kernel 'k' holds 1 values that are NaN or infinite"):
        prune(kernel, sparsity, criterion, renorm.L2(), description="Kernel 'k'")


class SquareRoot(criteria.Criterion):
    """NaN for negative weights."""

    def __init__(self, elementwise):
        self.elementwise = elementwise

    def __call__(self, kernel):
        with np.errstate(invalid="ignore"):
            return np.sqrt(kernel)


@pytest.mark.parametrize("elementwise", [True, False], ids=["streamed", "array"])
def test_scores_that_are_nan_are_refused_but_for_weights_that_are_gone(elementwise, generator):
    kernel = generator.standard_normal((30, 20)).astype("float32")
    with pytest.raises(ValueError, match="scores that are NaN"):
        prune(kernel, 0.9, SquareRoot(elementwise), renorm.L2())
    mask, _ = prune(kernel, 0.9, SquareRoot(elementwise), renorm.L2(), mask=kernel >= 0)
    assert np.count_nonzero(mask) == 60
    assert kernel[mask].min() > np.sort(kernel, axis=None)[-100]


@pytest.mark.parametrize("criterion", [criteria.Magnitude(), np.abs], ids=["streamed", "array"])
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_kept_weight_that_is_not_finite_is_refused(criterion, value, generator):
    kernel, mask, _ = state_of("pruned", (30, 20), generator)
    kernel[tuple(np.argwhere(mask)[3])] = value
    kernel[tuple(np.argwhere(~mask)[3])] = value
    with pytest.raises(ValueError, match=r"Kernel 'k' holds 1 values that are NaN or infinite"):
        prune(kernel, 0.9, criterion, renorm.L2(), mask=mask, description="Kernel 'k'")
