"""Layers that carry masks and renormalizing scales."""

from keras_renorm.layers.conv2d import PrunableConv2D
from keras_renorm.layers.dense import PrunableDense
from keras_renorm.layers.wrapper import RenormalizedPruning

__all__ = ["PrunableConv2D", "PrunableDense", "RenormalizedPruning"]
