"""Callbacks for `model.fit`: when pruning events happen, and what TensorBoard shows of them."""

from keras_renorm.src.training.callbacks.pruning_summaries import PruningSummaries
from keras_renorm.src.training.callbacks.update_pruning import UpdatePruning

__all__ = ["PruningSummaries", "UpdatePruning"]
