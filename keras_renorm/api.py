"""Everything that `import keras_renorm` shows. Importing it registers every class that a saved model may hold."""

from keras_renorm import callbacks, criteria, export, layers, methods, optimizers, patterns, plots, renorm, schedules
from keras_renorm.export import export_tflite
from keras_renorm.src.pruning.compaction import compact
from keras_renorm.src.pruning.conversion import strip, to_prunable
from keras_renorm.src.pruning.one_shot import prune
from keras_renorm.src.pruning.recovery.recover import recover
from keras_renorm.src.reports.summary import summary
from keras_renorm.version import __version__

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
    "recover",
    "renorm",
    "schedules",
    "strip",
    "summary",
    "to_prunable",
]
