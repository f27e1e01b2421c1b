"""What gives every weight a score shaped like its kernel; larger = keep.

A new criterion is one file beside this one and one row of `KNOWN`.
"""

from __future__ import annotations

from typing import Any

from keras_renorm import serialization
from keras_renorm.criteria.base import Criterion
from keras_renorm.criteria.magnitude import Magnitude
from keras_renorm.criteria.random import Random

KNOWN = {"magnitude": Magnitude, "random": Random}

__all__ = ["KNOWN", "Criterion", "Magnitude", "Random", "get"]


def get(identifier: Any) -> Any:
    """The criterion that a name, an instance, a config or a callable `kernel -> scores` stands for."""
    return serialization.get(identifier, KNOWN, Criterion, "criterion")
