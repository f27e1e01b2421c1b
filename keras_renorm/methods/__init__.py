"""Whole methods, one paper a file: callbacks for `model.fit`, and loops around it."""

from keras_renorm.methods.at_initialization import DissipatingGradients, KStarts
from keras_renorm.methods.iterative import prune_iteratively

__all__ = ["DissipatingGradients", "KStarts", "prune_iteratively"]
