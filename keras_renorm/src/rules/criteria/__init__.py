"""Criteria: a criterion gives every weight a score (its saliency), and the highest scores are kept.

A new criterion is one file beside this one and one row of `core/names.py`.
"""

from __future__ import annotations

from typing import Any

from keras_renorm.src.core import names, registry
from keras_renorm.src.rules.criteria.base import CalibratedCriterion, Criterion

KNOWN = names.resolve(names.CRITERIA | names.CALIBRATED_CRITERIA | names.LABELLED_CRITERIA)


def get(identifier: Any, calibrated: bool = False) -> Any:
    """Get a criterion by its name, from an instance, a config, or a callable `kernel -> scores`.

    Args:
        identifier: the name of a criterion, a `Criterion`, its config, or a callable. `"auto"` is `"admm"` with calibration
            samples, else `"magnitude"`.
        calibrated: whether there are calibration samples. Defaults to `False`.

    Returns:
        A `Criterion`, or the callable.

    Raises:
        ValueError: if `identifier` is not known, or needs calibration samples and there are none.

    Example:

    >>> import keras_renorm as kr
    >>> kr.criteria.get("magnitude")
    Magnitude()
    """
    if isinstance(identifier, str) and identifier == "auto":
        identifier = "admm" if calibrated else "magnitude"
    criterion = registry.get(identifier, KNOWN, Criterion, "criterion")
    if isinstance(criterion, CalibratedCriterion) and not calibrated:
        raise ValueError(
            f"Criterion {criterion!r} needs calibration samples. Call "
            "`keras_renorm.prune(model, sparsity, criterion=..., calibration=samples)`, or take `criterion='magnitude'`."
        )
    return criterion
