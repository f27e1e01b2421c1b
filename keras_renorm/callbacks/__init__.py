"""Callbacks for `model.fit`: when pruning events happen."""

from keras_renorm.callbacks.update_pruning import UpdatePruning

__all__ = ["UpdatePruning"]
