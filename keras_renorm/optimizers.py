"""Wrappers around a Keras optimizer."""

from keras_renorm.src.training.optimizers.irrelevance_decay import IrrelevanceDecay
from keras_renorm.src.training.optimizers.recorder import Recorder

__all__ = ["IrrelevanceDecay", "Recorder"]
