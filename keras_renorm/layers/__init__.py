"""Layers that carry masks and renormalizing scales."""

from keras_renorm.layers.conv2d import PrunableConv2D
from keras_renorm.layers.dense import PrunableDense
from keras_renorm.layers.plain_weights import accept_plain_weights
from keras_renorm.layers.wrapper import RenormalizedPruning

accept_plain_weights()

__all__ = ["PrunableConv2D", "PrunableDense", "RenormalizedPruning"]
