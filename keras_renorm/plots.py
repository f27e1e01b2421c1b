"""Pictures of pruned models and of runs of pruning, drawn with matplotlib (`pip install 'keras-renorm[plot]'`)."""

from keras_renorm.src.reports.plots import kernels, mask, scales, scores, sparsity
from keras_renorm.src.reports.run_plots import accuracy, history

__all__ = ["accuracy", "history", "kernels", "mask", "scales", "scores", "sparsity"]
