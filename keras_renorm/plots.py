"""Pictures of pruned models, drawn with matplotlib."""

from keras_renorm.src.reports.plots import accuracy, history, kernels, mask, scales, scores, sparsity

__all__ = ["accuracy", "history", "kernels", "mask", "scales", "scores", "sparsity"]
