"""Whole methods, one paper a file: callbacks for `model.fit`, and loops around it."""

from keras_renorm.methods.at_initialization import DissipatingGradients, KStarts
from keras_renorm.methods.iterative import prune_iteratively
from keras_renorm.methods.neural_relief import neural_relief

__all__ = ["DissipatingGradients", "KStarts", "neural_relief", "prune_iteratively"]
