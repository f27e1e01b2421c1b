"""Prune Keras models and give them their accuracy back."""

from keras_renorm.src import export, layers, methods
from keras_renorm.src.export import export_tflite
from keras_renorm.src.pruning.compaction import compact
from keras_renorm.src.pruning.conversion import strip, to_prunable
from keras_renorm.src.pruning.one_shot import prune
from keras_renorm.src.reports import plots
from keras_renorm.src.reports.summary import summary
from keras_renorm.src.rules import criteria, patterns, renorm, schedules
from keras_renorm.src.training import callbacks, optimizers
from keras_renorm.version import __version__

schedules.keep_tf_keras()

__all__ = [
    "__version__",
    "callbacks",
    "compact",
    "criteria",
    "export",
    "export_tflite",
    "layers",
    "methods",
    "optimizers",
    "patterns",
    "plots",
    "prune",
    "renorm",
    "schedules",
    "strip",
    "summary",
    "to_prunable",
]
