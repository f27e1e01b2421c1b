"""What gives every weight a score shaped like its kernel; larger = keep.

A new criterion is one file beside this one and one row of `core/names.py`.
"""

from __future__ import annotations

from typing import Any

from keras_renorm.src.core import names, registry
from keras_renorm.src.rules.criteria.base import CalibratedCriterion, Criterion

KNOWN = names.resolve(names.CRITERIA | names.CALIBRATED_CRITERIA)


def get(identifier: Any, calibrated: bool = False) -> Any:
    """The criterion that a name, an instance, a config or a callable `kernel -> scores` stands for.

    Args:
        identifier: what the user passed; `"auto"` is `"admm"` with calibration samples, else `"magnitude"`.
        calibrated: whether there are calibration samples.

    Raises:
        ValueError: if it is not known, or needs samples that are not there.
    """
    if isinstance(identifier, str) and identifier == "auto":
        identifier = "admm" if calibrated else "magnitude"
    criterion = registry.get(identifier, KNOWN, Criterion, "criterion")
    if isinstance(criterion, CalibratedCriterion) and not calibrated:
        raise ValueError(
            f"Criterion {criterion!r} needs samples to see what each input carries. Call "
            "`keras_renorm.prune(model, sparsity, criterion=..., calibration=samples)`, or take `criterion='magnitude'`."
        )
    return criterion
