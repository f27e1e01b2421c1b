"""Variables as arrays of NumPy, and masks over them, without needless copies."""

from __future__ import annotations

from typing import Any

import keras
import numpy as np


def as_array(value: Any) -> np.ndarray:
    """The values of a variable or a tensor, now: not to be written to, and not copied where that can be helped."""
    if keras.backend.backend() != "tensorflow":
        return keras.ops.convert_to_numpy(value)
    # Keras would copy twice. A tensor that was read shares memory with its variable until that gets other values.
    return np.asarray((value.value if isinstance(value, keras.Variable) else value)[...])


def for_another(value: Any) -> Any:
    """The values of a variable or a tensor to assign to a variable of another model, without a copy where that is safe."""
    # TensorFlow copies when one of the two is written to. On JAX they would share arrays, which training frees.
    return value if keras.backend.backend() == "tensorflow" else keras.ops.convert_to_numpy(value)


def is_finite(array: np.ndarray) -> bool:
    """Whether no value is NaN or infinite."""
    # One pass without a temporary array: the sum is finite unless a value is not, or the sum itself overflows.
    with np.errstate(over="ignore", invalid="ignore"):
        return bool(np.isfinite(np.sum(array)) or np.isfinite(array).all())


def masked(array: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """The array with zeros where the mask is `False`, whatever was there."""
    with np.errstate(over="ignore", invalid="ignore"):
        # Faster than `where`, but not right for what is masked and infinite.
        product = array * mask
        return np.where(mask, array, 0) if np.isnan(np.sum(product)) else product
