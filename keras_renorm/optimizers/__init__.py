"""Wrappers around a Keras optimizer."""

from keras_renorm.optimizers.recorder import Recorder

__all__ = ["Recorder"]
