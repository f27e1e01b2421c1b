import keras
import numpy as np
import pytest
from keras import ops

from keras_renorm.src.layers.linear import linear_view

L = keras.layers

CASES = [
    (lambda: L.Dense(5), (3, 7)),
    (lambda: L.Dense(5), (3, 2, 7)),
    (lambda: L.EinsumDense("abc,cde->abde", (5, 2, 3), bias_axes="de"), (4, 5, 8)),
    (lambda: L.EinsumDense("abcd,cde->abe", (5, 6), bias_axes="e"), (4, 5, 2, 8)),
    (lambda: L.EinsumDense("abc,bcd->abd", (5, 6), bias_axes="bd"), (4, 5, 8)),
    (lambda: L.EinsumDense("...x,xy->...y", 6, bias_axes="y"), (4, 5, 8)),
    (lambda: L.EinsumDense("abc,cde->abed", (5, 3, 2)), (4, 5, 8)),
    (lambda: L.Conv1D(6, 3, padding="causal", dilation_rate=2), (4, 9, 4)),
    (lambda: L.Conv1D(6, 3, strides=2, padding="same", groups=2), (4, 9, 4)),
    (lambda: L.Conv2D(6, 3, dilation_rate=2, padding="same"), (2, 9, 9, 4)),
    (lambda: L.Conv2D(6, 3, dilation_rate=2), (2, 9, 9, 4)),
    (lambda: L.Conv2DTranspose(6, 3, strides=2, output_padding=1, padding="same"), (2, 5, 5, 4)),
    (lambda: L.Conv3D(4, 2, strides=2, padding="same"), (2, 5, 5, 5, 3)),
    (lambda: L.Conv1DTranspose(4, 3, strides=2), (2, 5, 3)),
    (lambda: L.Conv3DTranspose(4, 2, strides=2), (2, 3, 3, 3, 2)),
    (lambda: L.DepthwiseConv1D(3, depth_multiplier=2), (2, 9, 4)),
    (lambda: L.DepthwiseConv2D(3, dilation_rate=2, padding="same"), (2, 9, 9, 4)),
]
for strides in (1, 2, 3):
    for padding in ("same", "valid"):
        for size in (9, 10):
            how, shape = dict(strides=strides, padding=padding), (2, size, size + 1, 4)
            CASES += [
                (lambda how=how: L.Conv2D(6, (3, 2), **how), shape),
                (lambda how=how: L.Conv2D(6, 3, groups=2, **how), shape),
                (lambda how=how: L.Conv2DTranspose(6, (3, 2), **how), shape),
                (lambda how=how: L.DepthwiseConv2D(3, depth_multiplier=2, **how), (2, size, size, 4)),
            ]


@pytest.mark.parametrize(("make", "shape"), CASES)
def test_rows_times_matrix_is_what_the_layer_computes(make, shape, generator):
    layer, inputs = make(), generator.standard_normal(shape).astype("float32")
    layer(inputs)
    if layer.bias is not None:
        layer.bias.assign(generator.standard_normal(layer.bias.shape))
    outputs, view = layer(inputs), linear_view(layer)
    kernel = ops.convert_to_numpy(layer.kernel)
    matrix = view.to_matrix(kernel)
    np.testing.assert_array_equal(view.to_kernel(matrix, kernel.shape), kernel)
    rows, targets = ops.convert_to_numpy(view.rows(inputs)), ops.convert_to_numpy(view.targets(outputs))
    assert (rows.shape[0], rows.shape[2], targets.shape[2]) == view.sizes
    bias = 0 if layer.bias is None else ops.convert_to_numpy(layer.bias).reshape(len(matrix), 1, -1)
    np.testing.assert_allclose(rows @ matrix + bias, targets, atol=1e-4)


def test_samples_that_are_not_along_the_first_axis_are_no_rows(generator):
    layer = L.EinsumDense("ab,bc->ca", (4,))
    layer.build((4, 3))
    assert linear_view(layer) is None


def test_channels_first():
    if keras.backend.backend() == "tensorflow":
        pytest.skip("TensorFlow has no such convolutions on CPUs")
    layer = L.Conv2D(6, 3, data_format="channels_first", strides=2, padding="same")
    inputs = np.random.default_rng(0).standard_normal((2, 4, 9, 9)).astype("float32")
    outputs, view = layer(inputs), linear_view(layer)
    rows, targets = ops.convert_to_numpy(view.rows(inputs)), ops.convert_to_numpy(view.targets(outputs))
    np.testing.assert_allclose(rows @ view.to_matrix(ops.convert_to_numpy(layer.kernel)), targets, atol=1e-4)


def test_what_is_no_matrix_product():
    for layer, shape in [(L.LayerNormalization(), (2, 4)), (L.LSTM(3), (2, 5, 4)), (L.Embedding(5, 3), (2, 4))]:
        layer(np.ones(shape, "float32"))
        assert linear_view(layer) is None
    assert linear_view(L.Dense(3)) is None  # not built
    over_positions = L.EinsumDense("abc,cd->abd", (5, 6), bias_axes="bd")
    over_positions(np.ones((4, 5, 8), "float32"))
    assert linear_view(over_positions) is None
