"""Whole methods, one paper a file: callbacks for `model.fit`, and loops around it."""

from keras_renorm.methods.at_initialization import DissipatingGradients, KStarts

__all__ = ["DissipatingGradients", "KStarts"]
