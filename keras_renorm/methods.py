"""Whole methods, one paper each: callbacks for `model.fit`, and loops around it."""

from keras_renorm.src.methods.at_initialization.dissipating_gradients import DissipatingGradients
from keras_renorm.src.methods.at_initialization.k_starts import KStarts
from keras_renorm.src.methods.iterative import prune_iteratively
from keras_renorm.src.methods.neural_relief import neural_relief

__all__ = ["DissipatingGradients", "KStarts", "neural_relief", "prune_iteratively"]
