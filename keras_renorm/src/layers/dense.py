"""The prunable dense layer."""

from __future__ import annotations

import keras
from keras import ops

from keras_renorm.src.core import registry
from keras_renorm.src.layers.plain import PlainSubclass
from keras_renorm.src.layers.prunable import PrunableLayer, drop_in


@drop_in
@registry.register
class PrunableDense(PlainSubclass, PrunableLayer, keras.layers.Dense):
    """`keras.layers.Dense` with a mask over its kernel and a renormalizing scale for each unit.

    Computes `activation(dot(inputs, kernel * mask) * scale + bias)`. Takes every argument of `keras.layers.Dense` in its
    order, and the pruning arguments below by keyword.

    Args:
        pruning_schedule: when to prune and how much: a schedule of `keras_renorm.schedules` or of tfmot, or `None` for the
            schedule of the callback. Defaults to `None`.
        criterion: what scores the weights: a name or an instance of `keras_renorm.criteria`, or a callable. Defaults to
            `"magnitude"`.
        pattern: which weights are removed together: a name or an instance of `keras_renorm.patterns`. Defaults to
            `"unstructured"`.
        group: which weights compete with each other: `"layer"` or `"unit"`. Defaults to `"layer"`.
        renormalize: how the kept weights are rescaled at each event: `"auto"`, `"l1"`, `"l2"`, an instance of
            `keras_renorm.renorm.L1` or `L2`, or `None`. Defaults to `"auto"`.
        regrow: whether a later event may bring a removed weight back. Defaults to `False`.

    Attributes:
        mask: bool variable of shape `(inputs, units)`; `True` for weights that are kept.
        scale: float variable of shape `(units,)`.

    Example:

    >>> import keras_renorm as kr
    >>> layer = kr.layers.PrunableDense(2)
    >>> layer.build((None, 4))
    >>> layer.update_masks(sparsity=0.75)
    >>> layer.sparsity
    0.75
    """

    plain_class = keras.layers.Dense
    can_settle = True

    def build(self, input_shape):
        super().build(input_shape)
        self._add_masks(self)

    def call(self, inputs, training=None):
        if len(inputs.shape) > 2 or self._masked_kernel().is_effective:
            return self._call_masked(self, super().call, inputs, training=training)
        # One row a sample: kernels are larger than what they give, so the pass over the kernel that scales it is saved.
        kernel = self._masked_kernel()
        outputs = kernel.product(inputs, training)
        outputs = ops.multiply(outputs, ops.cast(kernel.scale, outputs.dtype))
        if self.bias is not None:
            outputs = ops.add(outputs, self.bias)
        return outputs if self.activation is None else self.activation(outputs)
