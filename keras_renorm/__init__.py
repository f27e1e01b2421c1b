"""Prune Keras models and give them their accuracy back."""

from keras_renorm import callbacks, criteria, export, layers, methods, optimizers, patterns, plots, renorm, schedules
from keras_renorm.compaction import compact
from keras_renorm.conversion import strip, to_prunable
from keras_renorm.export import export_tflite
from keras_renorm.pruning import prune
from keras_renorm.summary import summary
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
