"""Arrays of NumPy: values of variables, masks, blocks and thresholds, without needless copies."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import keras
import numpy as np

# Number of weights of a block, whose intermediate results fit into the cache of the processor.
_BLOCK = 131_072


def as_array(value: Any) -> np.ndarray:
    """The present values of a variable or a tensor, if possible without a copy. Do not write to them."""
    if keras.backend.backend() != "tensorflow":
        return keras.ops.convert_to_numpy(value)
    # Keras would copy twice. A tensor that was read shares memory with its variable until that gets other values.
    return np.asarray(value.value.value() if isinstance(value, keras.Variable) else value)


def copied(variable: keras.Variable) -> np.ndarray:
    """The value of a variable, in memory of its own: on PyTorch an array may share the memory of the variable.

    Half-precision values are returned as float32, which every file format knows.
    """
    value = keras.ops.convert_to_numpy(variable)
    return np.array(value, "float32" if value.dtype.kind == "V" else value.dtype)


def for_another(value: Any) -> Any:
    """The values of a variable or a tensor, to be assigned to a variable of another model; without a copy if that is safe."""
    # TensorFlow copies when one of the two is written to. On JAX they would share arrays, which training frees.
    return value if keras.backend.backend() == "tensorflow" else keras.ops.convert_to_numpy(value)


def is_finite(array: np.ndarray) -> bool:
    """Whether no value is NaN or infinite."""
    # If there is NaN, the maximum and the minimum are NaN. Two passes, without a temporary array.
    return bool(np.isfinite(array.max(initial=0)) and np.isfinite(array.min(initial=0)))


def masked(array: np.ndarray, mask: np.ndarray, other: float = 0.0) -> np.ndarray:
    """The float array, with `other` where the mask is `False`."""
    # `True` becomes -1, all of whose bits are set: faster than `where`, and what a product makes of infinity is not right.
    bits, every_bit = array.view(f"i{array.itemsize}"), -mask.view(np.int8)
    if other == 0:
        return (bits & every_bit).view(array.dtype)
    others = np.array(other, array.dtype).view(bits.dtype)
    selected = bits ^ others
    selected &= every_bit
    selected ^= others
    return selected.view(array.dtype)


def row_blocks(rows: int, columns: int) -> Iterator[slice]:
    """Slices of the rows of a matrix, of about as many weights as the cache of a processor holds."""
    step = max(1, _BLOCK // max(1, columns))
    return (slice(start, start + step) for start in range(0, rows, step))


def bracket(sample: np.ndarray, share: float) -> tuple[float, float]:
    """Two values that most likely enclose a quantile (Floyd and Rivest, SELECT, 1975).

    Only the values between them must be partitioned: this takes a few passes over memory, where introselect takes tens.

    Args:
        sample: random sample of the values.
        share: the quantile, in [0, 1].
    """
    if len(sample) < 1000:
        return -np.inf, np.inf
    sample = np.sort(sample)
    margin = 4 * np.sqrt(share * (1 - share) / len(sample)) + 2 / len(sample)
    low, high = share - margin, share + margin
    return (
        sample[int(low * len(sample))] if low > 0 else -np.inf,
        sample[int(high * len(sample))] if high < 1 else np.inf,
    )
