import numpy as np
import pytest

from keras_renorm import renorm
from keras_renorm.masks import compute_mask

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


def test_by_hand():
    before, after = np.array([[3.0, 4.0], [1.0, 3.0]]), np.array([[3.0, 4.0], [0.0, 0.0]])
    np.testing.assert_allclose(renorm.L1()(before, after, (0,)), [[4 / 3, 7 / 4]], rtol=1e-6)
    np.testing.assert_allclose(renorm.L2()(before, after, (0,)), [[np.sqrt(10) / 3, 5 / 4]], rtol=1e-6)
    np.testing.assert_allclose(renorm.L1("layer")(before, after, (0,)), [[11 / 7, 11 / 7]], rtol=1e-6)
    np.testing.assert_allclose(renorm.L1(max_scale=1.5)(before, after, (0,)), [[4 / 3, 1.5]], rtol=1e-6)


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


@pytest.mark.parametrize("max_scale", [0.5, 0, float("inf"), float("nan")])
def test_max_scale_is_at_least_one(max_scale):
    with pytest.raises(ValueError, match="`max_scale` must be"):
        renorm.L1(max_scale=max_scale)


def test_unknown_names():
    with pytest.raises(ValueError, match=r"`renormalize` is not known.*auto.*l1.*l2"):
        renorm.get("l3")
    with pytest.raises(ValueError, match="`granularity` must be one of"):
        renorm.L2(granularity="filter")
