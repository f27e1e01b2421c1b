"""The product of a training step gives what a product with the masked kernel gives, and so do its gradients."""

import keras
import numpy as np
import pytest

import keras_renorm as kr

if keras.backend.backend() != "tensorflow":
    pytest.skip("other backends multiply plainly", allow_module_level=True)

import tensorflow as tf

from keras_renorm.src.layers.product import masked_product

# The way back differs where kernels are much larger than the batch.
SHAPES = {"large kernel": (2, 24, 16), "large batch": (40, 8, 3)}


def operands(shape, seed=0):
    batch, inputs, units = shape
    generator = np.random.default_rng(seed)
    mask = generator.random((inputs, units)) < 0.5
    kernel = generator.standard_normal((inputs, units))
    x = generator.standard_normal((batch, inputs))
    return [tf.constant(array, "float32") for array in (x, kernel)] + [tf.constant(mask)]


def plain_product(x, kernel, mask, settled):
    return x @ tf.where(mask, kernel, 0.0)


def gradients(product, x, kernel, mask, settled):
    with tf.GradientTape() as outer:
        outer.watch((x, kernel))
        with tf.GradientTape() as tape:
            tape.watch((x, kernel))
            outputs = product(x, kernel, mask, settled)
            loss = tf.reduce_sum(tf.sin(outputs))
        first = tape.gradient(loss, (x, kernel))
        penalty = tf.add_n([tf.reduce_sum(gradient**2) for gradient in first])
    return [outputs, *first, *outer.gradient(penalty, (x, kernel))]


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("settled", [False, True])
@pytest.mark.parametrize("how", ["eager", "graph", "xla"])
def test_values_and_gradients_of_both_orders(name, settled, how):
    x, kernel, mask = operands(SHAPES[name])
    if settled:
        kernel = tf.where(mask, kernel, 0.0)
    run = gradients if how == "eager" else tf.function(gradients, jit_compile=how == "xla")
    for received, expected in zip(
        run(masked_product, x, kernel, mask, tf.constant(settled)), gradients(plain_product, x, kernel, mask, None)
    ):
        np.testing.assert_allclose(received, expected, rtol=2e-4, atol=1e-4)


@pytest.mark.parametrize("name", SHAPES)
def test_masked_infinity_does_not_count(name):
    x, kernel, mask = operands(SHAPES[name])
    broken = tf.where(mask, kernel, np.inf)
    for received, expected in zip(
        gradients(masked_product, x, broken, mask, tf.constant(False)), gradients(plain_product, x, kernel, mask, None)
    ):
        np.testing.assert_allclose(received, expected, rtol=2e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["sparse", "integer"])
def test_inputs_that_dense_takes(kind):
    """Tensors of one entry in two, and integers, which the layer multiplies as `Dense` does, in training and without."""
    x = np.random.default_rng(0).integers(0, 2, (8, 6))
    fed = tf.sparse.from_dense(x.astype("float32")) if kind == "sparse" else x
    layer = kr.layers.PrunableDense(3)
    layer.build((None, 6))
    layer.update_masks(0.5)
    expected = x @ (layer.kernel.numpy() * layer.mask.numpy()) * layer.scale.numpy()
    for training in (False, True):
        np.testing.assert_allclose(layer(fed, training=training), expected, rtol=1e-5, atol=1e-6)
