import keras
import numpy as np
import pytest
from keras import ops

import keras_renorm as kr
from keras_renorm import criteria
from keras_renorm.src.calibration.gathering import gather_statistics, masks_of, scores_of
from keras_renorm.src.calibration.gradients import loss_gradients
from keras_renorm.src.calibration.samples import Samples
from keras_renorm.src.core.moments import InputSizes, Moments
from keras_renorm.src.core.statistics import Gradients
from keras_renorm.src.kernels.masks import compute_mask

L = keras.layers

# name: layer and the shape of a sample.
CASES = {
    "dense": (lambda **k: L.Dense(3, **k), (5,)),
    "dense of a sequence": (lambda **k: L.Dense(3, **k), (4, 5)),
    "einsum": (lambda **k: L.EinsumDense("abc,cde->abde", (None, 2, 3), bias_axes="de" if k["use_bias"] else None), (4, 5)),
    "conv1d": (lambda **k: L.Conv1D(3, 3, **k), (7, 2)),
    "conv1d causal": (lambda **k: L.Conv1D(3, 3, padding="causal", dilation_rate=2, **k), (7, 2)),
    "conv2d": (lambda **k: L.Conv2D(3, 3, **k), (6, 6, 2)),
    "conv2d same strides": (lambda **k: L.Conv2D(3, (3, 2), strides=2, padding="same", **k), (6, 5, 2)),
    "conv2d groups": (lambda **k: L.Conv2D(4, 3, groups=2, **k), (5, 5, 4)),
    "conv3d": (lambda **k: L.Conv3D(2, 2, **k), (3, 3, 3, 2)),
    "depthwise": (lambda **k: L.DepthwiseConv2D(3, depth_multiplier=2, strides=2, padding="same", **k), (6, 6, 3)),
    "transposed": (lambda **k: L.Conv2DTranspose(3, 3, strides=2, **k), (4, 4, 2)),
}


def built(make, shape, bias):
    keras.utils.set_random_seed(0)
    model = keras.Sequential([keras.Input(shape), make(use_bias=bias)])
    for variable in model.trainable_variables:
        variable.assign(np.random.default_rng(1).standard_normal(variable.shape))
    return model, np.random.default_rng(2).standard_normal((6, *shape)).astype("float32")


def slow_scores(layer, kernel, x):
    """Every slice alone, by the layer's own operation: the norm of the mean over samples of |w| applied to |x|."""
    weights, scores = ops.convert_to_numpy(kernel), np.zeros(kernel.shape)
    if getattr(layer, "bias", None) is not None:
        layer.bias.assign(ops.zeros_like(layer.bias))
    taps = len(getattr(layer, "kernel_size", ()))
    for index in np.ndindex(weights.shape[taps:]):
        alone = np.zeros_like(weights)
        alone[(..., *index)] = np.abs(weights[(..., *index)])
        kernel.assign(alone)
        mean = ops.convert_to_numpy(layer(np.abs(x))).mean(axis=0)
        scores[(..., *index)] = np.linalg.norm(mean)
    kernel.assign(weights)
    return scores


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("name", list(CASES))
def test_activity_is_what_a_direct_computation_gives(name, bias):
    model, x = built(*CASES[name], bias)
    layer = model.layers[-1]
    scores = scores_of(gather_statistics(model, Samples(x, model, batch_size=4), InputSizes), criteria.Activity())
    assert list(scores) == [id(layer.kernel)]
    np.testing.assert_allclose(scores[id(layer.kernel)], slow_scores(layer, layer.kernel, x), rtol=2e-5, atol=1e-6)


@pytest.mark.parametrize("strides", [1, 2])
def test_activity_of_a_separable_convolution(strides):
    make = lambda use_bias: L.SeparableConv2D(4, 3, strides=strides, depth_multiplier=2, use_bias=use_bias)  # noqa: E731
    model, x = built(make, (6, 6, 3), True)
    layer = model.layers[-1]
    scores = scores_of(gather_statistics(model, Samples(x, model, batch_size=4), InputSizes), criteria.Activity())
    depthwise = L.DepthwiseConv2D(3, strides=strides, depth_multiplier=2, use_bias=False)
    pointwise = L.Conv2D(4, 1, use_bias=False)
    between = depthwise(x)
    depthwise.kernel.assign(layer.depthwise_kernel)
    between = ops.convert_to_numpy(depthwise(x))
    pointwise(between)
    pointwise.kernel.assign(layer.pointwise_kernel)
    for kernel, alone, inputs in (
        (layer.depthwise_kernel, depthwise, x),
        (layer.pointwise_kernel, pointwise, between),
    ):
        np.testing.assert_allclose(scores[id(kernel)], slow_scores(alone, alone.kernel, inputs), rtol=2e-5, atol=1e-6)


def test_moments_of_a_whole_model_at_once():
    model, x = built(*CASES["dense"], True)
    seen = gather_statistics(model, Samples(x, model, batch_size=4), Moments)[id(model.layers[-1].kernel)]
    centred = x - x.mean(axis=0)
    np.testing.assert_allclose(seen.statistics.gram[0], centred.T @ centred / len(x), rtol=1e-4, atol=1e-6)
    scores = scores_of({0: seen}, criteria.Activation())[0]
    np.testing.assert_allclose(scores, np.abs(seen.matrix[0]) * centred.std(axis=0)[:, None], rtol=1e-4)


def test_memory_does_not_grow_with_the_samples():
    """Only sums of the shape of one sample are kept, whatever comes."""
    model, x = built(*CASES["conv2d"], True)
    many = np.repeat(x, 40, axis=0)
    once, often = (
        gather_statistics(model, Samples(data, model, batch_size=5), InputSizes)[id(model.layers[-1].kernel)].statistics.sizes
        for data in (x, many)
    )
    np.testing.assert_allclose(once, often, rtol=1e-5)
    assert once.shape == (1, 16, 18)


def test_a_share_keeps_whole_slices_and_needs_no_sparsity():
    model, x = built(lambda **k: L.Conv2D(3, 3, **k), (8, 8, 6), True)
    pruned = kr.prune(model, criterion=criteria.Activity(0.7), renormalize=None, calibration=x, verbose=0)
    kept = ops.convert_to_numpy(pruned.layers[-1].kernel) != 0
    slices = kept.reshape(-1, *kept.shape[-2:])
    assert (slices.all(axis=0) | ~slices.any(axis=0)).all()
    assert not kept.all()
    assert kept.any()
    masks = masks_of(gather_statistics(model, Samples(x, model, batch_size=4), InputSizes), criteria.Activity(0.7))
    np.testing.assert_array_equal(kept, masks[id(model.layers[-1].kernel)])


@pytest.mark.parametrize("renormalize", [None, "lstsq"])
def test_prunes_separable_convolutions_by_activity(renormalize):
    keras.utils.set_random_seed(0)
    model = keras.Sequential([keras.Input((8, 8, 3)), L.SeparableConv2D(6, 3), L.GlobalAveragePooling2D(), L.Dense(4)])
    x = np.random.default_rng(0).standard_normal((32, 8, 8, 3)).astype("float32")
    scores = scores_of(gather_statistics(model, Samples(x, model, batch_size=32), InputSizes), criteria.Activity())
    scores = scores[id(model.layers[0].pointwise_kernel)]
    pruned = kr.prune(model, {"separable*": 0.5}, criterion="activity", calibration=x, renormalize=renormalize, verbose=0)
    kept = ops.convert_to_numpy(pruned.layers[0].pointwise_kernel) != 0
    np.testing.assert_array_equal(kept, compute_mask(scores, 0.5))


def test_the_share_and_a_sparsity_exclude_each_other():
    model, x = built(*CASES["dense"], True)
    with pytest.raises(ValueError, match=r"chooses how many weights to keep. Received: sparsity=0.5"):
        kr.prune(model, 0.5, criterion=criteria.Activity(0.9), calibration=x)
    with pytest.raises(ValueError, match=r"chooses which weights are removed together. Received: pattern='unit'"):
        kr.prune(model, criterion=criteria.Activity(0.9), pattern="unit", calibration=x)
    with pytest.raises(ValueError, match=r"Argument `sparsity` must be a number.*Received: sparsity=None"):
        kr.prune(model)
    recurrent = keras.Sequential([keras.Input((4, 3)), L.LSTM(2, name="lstm"), L.Dense(3)])
    samples = np.random.default_rng(0).standard_normal((8, 4, 3)).astype("float32")
    with pytest.raises(ValueError, match=r"cannot choose how many weights to keep. Kernel .*lstm.*`layers=`"):
        kr.prune(recurrent, criterion=criteria.Activity(0.9), calibration=samples, verbose=0)


@pytest.mark.parametrize("name", list(CASES))
def test_gradients_are_the_same_however_large_the_batches_are(name):
    model, x = built(*CASES[name], True)
    model.compile(loss="mse")
    y = np.zeros((len(x), *model(x).shape[1:]), "float32")
    kernel = model.layers[-1].kernel
    whole, pieces = (
        gather_statistics(model, Samples((x, y), model, batch_size, labels=True), Gradients)[id(kernel)]
        for batch_size in (6, 4)
    )
    np.testing.assert_allclose(pieces.statistics.mean, whole.statistics.mean, rtol=1e-4, atol=1e-5)
    assert whole.statistics.mean.shape == whole.matrix.shape
    np.testing.assert_allclose(whole.statistics.square, whole.statistics.mean**2, rtol=1e-4, atol=1e-9)
    (gradient,) = loss_gradients(model, (x, y), [kernel])
    np.testing.assert_allclose(whole.to_kernel(whole.statistics.mean), gradient, rtol=1e-5)


def test_gradients_of_kernels_that_are_no_matrix_products():
    model = keras.Sequential([keras.Input((6,), dtype="int32"), L.Embedding(10, 4), L.LSTM(5), L.Dense(3)])
    model.compile(loss="mse")
    x, y = np.arange(24).reshape(4, 6) % 10, np.zeros((4, 3), "float32")
    gathered = gather_statistics(model, Samples((x, y), model, 4, labels=True), Gradients)
    kernels = [variable for variable in model.trainable_variables if len(variable.shape) > 1]
    assert list(gathered) == [id(model.layers[-1].kernel), *(id(kernel) for kernel in kernels[:-1])]
    (gradient,) = loss_gradients(model, (x, y), [kernels[0]])
    one = gathered[id(kernels[0])]
    np.testing.assert_allclose(one.to_kernel(one.statistics.mean), gradient, rtol=1e-5, atol=1e-8)


def test_gradients_that_are_not_finite():
    model, x = built(*CASES["dense"], True)
    model.compile(loss=lambda y, outputs: outputs / 0.0)
    with pytest.raises(ValueError, match="gradient of the loss .*kernel.* NaN or infinity.*Nothing was changed"):
        gather_statistics(model, Samples((x, np.zeros((6, 3))), model, 4, labels=True), Gradients)
