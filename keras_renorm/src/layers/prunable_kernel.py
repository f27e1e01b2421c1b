"""A kernel with its mask and its scale, and how it is used in a call."""

from __future__ import annotations

import contextlib
import dataclasses
import threading
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any

import keras
from keras import ops

from keras_renorm.src.layers.kernels import Kernel

# Of each thread. `effective`: the `id` of the variables that hold effective kernels in the call that is under way.
# `flags`: by the `id` of its variable, a bool scalar that says whether a kernel is settled (`training/settling.py`).
_calls = threading.local()


@dataclasses.dataclass(frozen=True)
class PrunableKernel(Kernel):
    """A kernel with its mask (bool, shaped like it) and its scale (float, broadcasts against it)."""

    mask: keras.Variable
    scale: keras.Variable

    @property
    def is_effective(self) -> bool:
        """Whether the variable holds the effective kernel, during a call of a layer around the prunable one."""
        return id(self.variable) in getattr(_calls, "effective", ())

    def masked(self) -> Any:
        """The kernel with zeros for masked weights, which get no gradient."""
        kernel = _tensor(self.variable)
        # `where`, not a product: a masked value may have become infinite and still must not count.
        return ops.where(_tensor(self.mask), kernel, 0.0)

    def product(self, inputs: Any, training: bool | None) -> Any:
        """`inputs @ masked()`, for one row for each sample."""
        is_sparse = hasattr(inputs, "dense_shape")
        # JAX has a gradient as fast as this one, and PyTorch cannot compile gradients of one's own.
        if keras.backend.backend() != "tensorflow" or not (training or is_sparse):
            return ops.matmul(inputs, self.masked())
        from keras_renorm.src.layers.product import masked_product, masked_rows

        kernel, mask = _tensor(self.variable), _tensor(self.mask)
        if is_sparse:
            return ops.matmul(inputs, masked_rows(kernel, mask))
        flag = flag_of(self)
        return masked_product(ops.cast(inputs, kernel.dtype), kernel, mask, None if flag is None else _tensor(flag))

    def effective(self) -> Any:
        """The effective kernel: the masked kernel times the scale."""
        if self.is_effective:
            return _tensor(self.variable)
        kernel = self.masked()
        return kernel * ops.cast(self.scale, kernel.dtype)


@contextlib.contextmanager
def holding_effective(variables: Collection[int]) -> Iterator[None]:
    """Say that the variables with these `id` hold effective kernels in this thread."""
    outer = getattr(_calls, "effective", ())
    _calls.effective = {*outer, *variables}
    try:
        yield
    finally:
        _calls.effective = outer


@contextlib.contextmanager
def asking_flags(flags: Mapping[int, keras.Variable]) -> Iterator[None]:
    """Let what is traced in this thread ask a flag whether a kernel is settled, and use it without its mask if it is.

    Args:
        flags: bool scalars by the `id` of the variables of the kernels.
    """
    before, _calls.flags = getattr(_calls, "flags", {}), flags
    try:
        yield
    finally:
        _calls.flags = before


def flag_of(kernel: PrunableKernel) -> keras.Variable | None:
    """The flag that says whether a kernel is settled; `None` if its mask must be applied."""
    return getattr(_calls, "flags", {}).get(id(kernel.variable))


def scale_shape(kernel: Kernel) -> list[int]:
    """The shortest shape that broadcasts against the kernel with one number for each unit: `(units,)` for a Dense kernel."""
    shape = [1 if axis in kernel.input_axes else side for axis, side in enumerate(kernel.variable.shape)]
    while len(shape) > 1 and shape[0] == 1:
        shape.pop(0)
    return shape


class OfEffectiveKernel(keras.regularizers.Regularizer):
    """The regularizer of the effective kernel, so that masked weights are neither penalized nor changed."""

    def __init__(self, regularizer: Callable, kernel: PrunableKernel):
        self.regularizer, self.kernel = regularizer, kernel

    def __call__(self, variable):
        return self.regularizer(self.kernel.effective())


def _tensor(variable: keras.Variable) -> Any:
    """The value of a variable in the dtype of the computation. (`convert_to_tensor` may return the variable itself.)"""
    return ops.cast(variable, variable.dtype)
