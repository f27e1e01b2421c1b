"""The matrix product of a training step on TensorFlow, with which a prunable layer is as fast as a plain one."""

from __future__ import annotations

import tensorflow as tf


def masked_product(inputs: tf.Tensor, kernel: tf.Tensor, mask: tf.Tensor, settled: tf.Tensor | None) -> tf.Tensor:
    """`inputs @ where(mask, kernel, 0)`, without a gradient for masked weights.

    Args:
        inputs: tensor of shape `(batch, inputs)` and the dtype of the kernel.
        kernel: tensor of shape `(inputs, units)`.
        mask: bool tensor of the shape of the kernel.
        settled: bool scalar: whether masked values are zero, so that the forward pass need not apply the mask; `None` to apply
            it always.
    """

    def masked(values):
        # Not a product: a masked value may have become infinite and still must not count.
        return tf.where(mask, values, tf.zeros((), values.dtype))

    @tf.custom_gradient
    def mask_kernel(kernel):
        return masked(kernel) if settled is None else tf.cond(settled, lambda: kernel, lambda: masked(kernel)), masked

    return _product(inputs, mask_kernel(kernel))


def masked_rows(kernel: tf.Tensor, mask: tf.Tensor) -> tf.Tensor:
    """`where(mask, kernel, 0)` for sparse inputs, which read some rows of the kernel. Only these rows have a gradient.

    Args:
        kernel: tensor of shape `(inputs, units)`.
        mask: bool tensor of the shape of the kernel.
    """

    @tf.custom_gradient
    def mask_kernel(kernel):
        zero = tf.zeros((), kernel.dtype)

        def gradient(upstream):
            if not isinstance(upstream, tf.IndexedSlices):
                return tf.where(mask, upstream, zero)
            values = tf.where(tf.gather(mask, upstream.indices), upstream.values, zero)
            return tf.IndexedSlices(values, upstream.indices, upstream.dense_shape)

        return tf.where(mask, kernel, zero), gradient

    return mask_kernel(kernel)


@tf.custom_gradient
def _product(inputs: tf.Tensor, kernel: tf.Tensor) -> tf.Tensor:
    def gradients(upstream):
        to_inputs = tf.cond(
            is_much_larger(tf.shape(upstream)[0], *kernel.shape),
            lambda: by_transposed(upstream, kernel),
            lambda: tf.matmul(upstream, kernel, transpose_b=True),
        )
        return to_inputs, tf.matmul(inputs, upstream, transpose_a=True)

    return tf.matmul(inputs, kernel), gradients


def is_much_larger(batch: int | tf.Tensor, inputs: int, units: int) -> bool | tf.Tensor:
    """Whether a kernel is so much larger than the batch that `by_transposed` is faster (`benchmarks/product.py`)."""
    return 4 * batch <= min(inputs, units)


def by_transposed(upstream: tf.Tensor, kernel: tf.Tensor) -> tf.Tensor:
    """`upstream @ kernel.T` for kernels much larger than the batch. TensorFlow's own product takes up to four times as long on
    CPUs.
    """
    return tf.transpose(tf.matmul(kernel, upstream, transpose_b=True))
