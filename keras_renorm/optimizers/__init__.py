"""Wrappers around a Keras optimizer."""

from keras_renorm.optimizers.irrelevance_decay import IrrelevanceDecay
from keras_renorm.optimizers.recorder import Recorder

__all__ = ["IrrelevanceDecay", "Recorder"]
