"""Export to `.tflite`, the format of phones and small boards."""

from keras_renorm.src.export.benchmark import Benchmark, Latency, benchmark
from keras_renorm.src.export.explain import Explanation, Weights, explain
from keras_renorm.src.export.repair import repair
from keras_renorm.src.export.report import ExportReport, TensorReport
from keras_renorm.src.export.tflite import export_tflite

__all__ = [
    "Benchmark",
    "Explanation",
    "ExportReport",
    "Latency",
    "TensorReport",
    "Weights",
    "benchmark",
    "explain",
    "export_tflite",
    "repair",
]
