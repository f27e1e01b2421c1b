"""Allocations divide one sparsity among the kernels of a model."""

from keras_renorm.src.rules.allocation import allocate, balanced, erk, get, global_, lamp, uniform

__all__ = ["allocate", "balanced", "erk", "get", "global_", "lamp", "uniform"]
