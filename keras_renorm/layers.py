"""Layers that carry masks and renormalizing scales."""

from keras_renorm.src.layers.conv2d import PrunableConv2D
from keras_renorm.src.layers.dense import PrunableDense
from keras_renorm.src.layers.wrapper import RenormalizedPruning

__all__ = ["PrunableConv2D", "PrunableDense", "RenormalizedPruning"]
