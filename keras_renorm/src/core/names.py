"""Every name that an argument takes, and where its object is.

Nothing is imported here, as the command line reads the names before it imports Keras.
"""

from __future__ import annotations

import pkgutil
from collections.abc import Mapping
from typing import Any

_RULES = "keras_renorm.src.rules"

CRITERIA = {
    "magnitude": f"{_RULES}.criteria.magnitude:Magnitude",
    "random": f"{_RULES}.criteria.random:Random",
}
CALIBRATED_CRITERIA = {
    "activation": f"{_RULES}.criteria.activation:Activation",
    "activity": f"{_RULES}.criteria.activity:Activity",
    "obs": f"{_RULES}.criteria.obs:OBS",
    "admm": f"{_RULES}.criteria.admm:ADMM",
}
LABELLED_CRITERIA = {
    "taylor": f"{_RULES}.criteria.taylor:Taylor",
}
PATTERNS = {
    "unstructured": f"{_RULES}.patterns:Unstructured",
    "block": f"{_RULES}.patterns:Block",
    "n_of_m": f"{_RULES}.patterns:NOfM",
    "unit": f"{_RULES}.patterns:Unit",
}
RENORMALIZERS = {
    "l1": f"{_RULES}.renorm:L1",
    "l2": f"{_RULES}.renorm:L2",
}
CALIBRATED_RENORMALIZERS = {
    "moments": f"{_RULES}.renorm:MatchMoments",
    "lstsq": f"{_RULES}.renorm:LeastSquares",
}
ALLOCATIONS = {
    "uniform": f"{_RULES}.allocation:uniform",
    "global": f"{_RULES}.allocation:global_",
    "erk": f"{_RULES}.allocation:erk",
    "balanced": f"{_RULES}.allocation:balanced",
    "lamp": f"{_RULES}.allocation:lamp",
}
AUGMENTATIONS = {
    "flip": "keras_renorm.src.pruning.recovery.augmentation:flip",
    "shift": "keras_renorm.src.pruning.recovery.augmentation:shift",
}
GROUPS = ("layer", "unit")
TARGETS = ("litert", "litert-int8")
QUANTIZE = ("float16", "int8")
STORAGE = ("auto", "sparse", "full")


def resolve(places: Mapping[str, str]) -> dict[str, Any]:
    """Import the object of each name."""
    return {name: pkgutil.resolve_name(place) for name, place in places.items()}
