"""Patterns say which weights of a kernel are removed together."""

from keras_renorm.src.rules.patterns import Block, NOfM, Pattern, Unit, Unstructured, get

__all__ = ["Block", "NOfM", "Pattern", "Unit", "Unstructured", "get"]
