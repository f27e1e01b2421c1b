"""Callbacks for `model.fit`: pruning events, and what TensorBoard shows of them."""

from keras_renorm.src.training.callbacks.pruning_summaries import PruningSummaries
from keras_renorm.src.training.callbacks.update_pruning import UpdatePruning

__all__ = ["PruningSummaries", "UpdatePruning"]
