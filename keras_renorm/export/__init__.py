"""To `.tflite`, the format of phones and small boards."""

from keras_renorm.export.benchmark import Benchmark, Latency, benchmark
from keras_renorm.export.report import ExportReport, TensorReport
from keras_renorm.export.tflite import export_tflite

__all__ = ["Benchmark", "ExportReport", "Latency", "TensorReport", "benchmark", "export_tflite"]
