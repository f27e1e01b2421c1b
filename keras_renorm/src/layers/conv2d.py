"""The prunable 2D convolution."""

from __future__ import annotations

import keras

from keras_renorm.src.core import registry
from keras_renorm.src.layers.plain import PlainSubclass
from keras_renorm.src.layers.prunable import PrunableLayer, drop_in


@drop_in
@registry.register
class PrunableConv2D(PlainSubclass, PrunableLayer, keras.layers.Conv2D):
    """`keras.layers.Conv2D` with a mask over its kernel and a renormalizing scale for each filter.

    Takes every argument of `keras.layers.Conv2D` in its order, and the pruning arguments of
    `keras_renorm.layers.PrunableDense` by keyword.

    Attributes:
        mask: bool variable of shape `(height, width, channels // groups, filters)`; `True` for weights that are kept.
        scale: float variable of shape `(filters,)`.

    Example:

    >>> import keras_renorm as kr
    >>> layer = kr.layers.PrunableConv2D(8, 3, padding="same")
    >>> layer.build((None, 16, 16, 4))
    >>> tuple(layer.mask.shape)
    (3, 3, 4, 8)
    """

    plain_class = keras.layers.Conv2D

    def build(self, input_shape):
        super().build(input_shape)
        self._add_masks(self)

    def call(self, inputs):
        return self._call_masked(self, super().call, inputs)
