"""Pruning schedules: at which step how much is pruned."""

from keras_renorm.src.rules.schedules import ConstantSparsity, PolynomialDecay, PruningSchedule, get

__all__ = ["ConstantSparsity", "PolynomialDecay", "PruningSchedule", "get"]
