"""Calibration samples as a stream of checked batches."""

from __future__ import annotations

import contextlib
import operator
import tempfile
from collections.abc import Iterator
from typing import Any

import keras
import numpy as np
from keras import ops

from keras_renorm.src.core.keras_internals import inputs_structure

# More than this is taken for a generator that never ends.
MOST_SAMPLES = 1_000_000


class Samples:
    """Calibration samples that can be read several times, one checked batch at a time.

    Args:
        data: an array, a list or dict of arrays (one for each input of the model), a `tf.data.Dataset`, a
            `keras.utils.PyDataset`, a generator, or any other iterable of batches. Of a batch that is a tuple `(x, y)` or `(x,
            y, weights)`, `x` is used, and the rest with `labels`; then arrays are such a tuple, too. The batches of a generator
            are kept in a temporary file.
        model: the model that takes the samples.
        batch_size: batch size for arrays. Other data have batches of their own.
        labels: whether labels are needed, so that `labelled()` returns them. Defaults to `False`.
        argument: name of the argument in error messages. Defaults to `"calibration"`.

    Raises:
        ValueError: if the model cannot take the samples: if there are none, if they have a wrong shape or type or hold NaN, or
            if they have no labels and labels are needed.
    """

    def __init__(self, data: Any, model: keras.Model, batch_size: int, labels: bool = False, argument: str = "calibration"):
        self._argument = argument
        self._inputs = keras.tree.flatten(getattr(model, "inputs", None) or [])
        self._structure = inputs_structure(model)
        self._name = model.name
        self._labels = labels
        self._spool = None
        if isinstance(batch_size, bool) or not isinstance(batch_size, (int, np.integer)) or batch_size < 1:
            raise ValueError(f"Argument `batch_size` must be a positive integer. Received: batch_size={batch_size!r}.")
        leaves = keras.tree.flatten(data) if isinstance(data, (list, tuple, dict)) else [data]
        endless = isinstance(data, keras.utils.PyDataset) and data.num_batches is None
        if hasattr(data, "cardinality"):
            endless = int(data.cardinality()) == -1
        if endless:
            raise ValueError(
                f"Argument `{self._argument}` is an infinite dataset. Take a part of it, such as `dataset.take(10)`. "
                f"Received: {self._argument}={data!r}."
            )
        if leaves and all(hasattr(leaf, "shape") and hasattr(leaf, "__getitem__") for leaf in leaves):
            x, *rest = self._split(data) if labels else (keras.tree.map_structure(_to_numpy, data),)
            arrays = (self._check(x), *rest)
            self._read = lambda: _slices(arrays, batch_size)
        elif isinstance(data, keras.utils.PyDataset):
            self._read = lambda: map(self._split, (data[index] for index in range(data.num_batches)))
        elif hasattr(data, "__iter__") and leaves and not isinstance(data, (str, bytes, list, tuple, dict)):
            if iter(data) is data:
                self._spool = _Spool(map(self._split, data))
            self._read = lambda: iter(self._spool) if self._spool else map(self._split, data)
        else:
            raise ValueError(
                f"Argument `{self._argument}` must be an array, a list or a dict of arrays (one an input of the model), a "
                "`tf.data.Dataset`, a `keras.utils.PyDataset`, or a generator of batches. "
                f"Received: {self._argument}={data!r} (of type {type(data)})."
            )

    @property
    def names(self) -> list[str]:
        """The names of the inputs of the model, if it has any."""
        return [tensor.name for tensor in self._inputs]

    def __iter__(self) -> Iterator[Any]:
        """The inputs of each batch."""
        for batch, *_ in self.labelled():
            yield batch

    def labelled(self) -> Iterator[tuple]:
        """Each batch as `(x,)`, or with labels as `(x, y)` or `(x, y, weights)`."""
        count = 0
        for batch, *rest in self._read():
            batch = self._check(batch)
            size = count_samples(batch)
            count += size
            if count > MOST_SAMPLES:
                raise ValueError(
                    f"Argument `{self._argument}` gave more than {MOST_SAMPLES:,} samples. If it never ends, take a part of "
                    "it, such as `itertools.islice(generator, 10)`; a few thousand samples are enough."
                )
            if size:
                yield batch, *rest
        if not count:
            raise ValueError(
                f"Argument `{self._argument}` contains no samples. A generator can be read only once: create a new one for "
                "each call."
            )

    def __enter__(self) -> Samples:
        return self

    def __exit__(self, *error) -> None:
        """Remove the temporary file."""
        if self._spool is not None:
            self._spool.file.close()

    def _split(self, batch) -> tuple:
        """The inputs of a batch, and its labels. A batch may be a pair `(x, y)` or, from data loaders, a list of these."""
        if self._labels:
            return self._with_labels(batch)
        if isinstance(batch, (list, tuple)):
            is_inputs = len(batch) == len(self._inputs) > 1 and not any(map(keras.tree.is_nested, batch))
            batch = batch if is_inputs else batch[0]
        return (keras.tree.map_structure(_to_numpy, batch),)

    def _with_labels(self, batch) -> tuple:
        if not isinstance(batch, (list, tuple)) or len(batch) not in (2, 3) or batch[1] is None:
            raise ValueError(
                f"Argument `{self._argument}` must have labels for this criterion, which asks for gradients of the loss: pass "
                "`calibration=(x, y)`, or a dataset or generator of such batches. Received: "
                f"{type(batch).__name__}{f' of length {len(batch)}' if isinstance(batch, (list, tuple)) else ''}."
            )
        batch = tuple(keras.tree.map_structure(_to_numpy, part) for part in batch if part is not None)
        lengths = [leaf.shape[:1] for leaf in keras.tree.flatten(batch)]
        if len(set(lengths)) != 1:
            raise ValueError(
                f"Argument `{self._argument}` must have as many labels as samples. Received arrays of shapes "
                f"{[leaf.shape for leaf in keras.tree.flatten(batch)]}."
            )
        return batch

    def _check(self, batch):
        leaves = keras.tree.flatten(batch)
        if len({len(leaf) if leaf.ndim else None for leaf in leaves}) != 1 or leaves[0].ndim == 0:
            raise ValueError(
                f"Argument `{self._argument}` must have the same number of samples for every input. Received arrays of shapes "
                f"{[leaf.shape for leaf in leaves]}."
            )
        if self._inputs and len(leaves) != len(self._inputs):
            raise ValueError(
                f"Argument `{self._argument}` must have one array for each input of model '{self._name}', which has "
                f"{len(self._inputs)}. Received {len(leaves)} arrays, of shapes {[leaf.shape for leaf in leaves]}. (Batches "
                "of one input are put together with `np.concatenate`, or come as a generator.)"
            )
        if (
            self._structure is not None
            and len(leaves) == len(self._inputs)
            and (len(leaves) == 1 or not isinstance(batch, dict))
        ):
            batch = keras.tree.pack_sequence_as(self._structure, leaves)
        elif len(leaves) == 1:
            batch = leaves[0]
        for leaf, wanted in zip(leaves, self._inputs):
            if not _fits(leaf.shape, tuple(wanted.shape)):
                raise ValueError(
                    f"Argument `{self._argument}` has samples of the wrong shape for input '{wanted.name}' of model "
                    f"'{self._name}', which takes {tuple(wanted.shape)}. Received: an array of shape {leaf.shape}."
                )
            if leaf.dtype.kind not in "biuf" and wanted.dtype != "string" and leaf.dtype.name != "bfloat16":
                raise ValueError(
                    f"Argument `{self._argument}` must hold numbers for input '{wanted.name}' of model '{self._name}'. "
                    f"Received: an array of dtype {leaf.dtype}."
                )
        for leaf in leaves:
            if leaf.dtype.kind == "f" and not np.isfinite(leaf).all():
                bad = np.flatnonzero(~np.isfinite(leaf.reshape(len(leaf), -1)).all(axis=1))
                raise ValueError(
                    f"Argument `{self._argument}` holds NaN or infinity in {len(bad)} of {len(leaf)} samples of a batch, the "
                    f"first of them sample {bad[0]}. Leave them out. Nothing was changed."
                )
        return batch


def count_samples(samples: Any) -> int:
    """The number of samples in nested arrays."""
    return len(keras.tree.flatten(samples)[0])


def take_samples(samples: Any, chosen: slice | np.ndarray) -> Any:
    """Some of the samples, by a slice or by their numbers."""
    return keras.tree.map_structure(operator.itemgetter(chosen), samples)


def _to_numpy(leaf):
    return leaf if isinstance(leaf, np.ndarray) else np.asarray(ops.convert_to_numpy(leaf))


def _slices(arrays, batch_size):
    for start in range(0, count_samples(arrays), batch_size):
        yield take_samples(arrays, slice(start, start + batch_size))


def _fits(shape, wanted) -> bool:
    # Keras itself adds or drops a last axis of length one.
    if len(shape) == len(wanted) - 1 and wanted[-1] == 1:
        shape = (*shape, 1)
    elif len(shape) == len(wanted) + 1 and shape[-1] == 1:
        shape = shape[:-1]
    return len(shape) == len(wanted) and all(b in (None, a) for a, b in zip(shape[1:], wanted[1:]))


class _Spool:
    """The batches of a generator, in a temporary file."""

    def __init__(self, batches):
        self._structures = []
        count = 0
        with contextlib.ExitStack() as stack:
            self.file = stack.enter_context(tempfile.TemporaryFile())
            for batch in batches:
                leaves = keras.tree.flatten(batch)
                count += len(leaves[0]) if leaves and leaves[0].ndim else 1
                self._structures.append(keras.tree.map_structure(lambda leaf: 0, batch))
                for leaf in leaves:
                    np.save(self.file, leaf)
                if count > MOST_SAMPLES:
                    break
            # The file remains open until the samples are no longer needed.
            stack.pop_all()

    def __iter__(self):
        self.file.seek(0)
        for structure in self._structures:
            leaves = [np.load(self.file) for _ in keras.tree.flatten(structure)]
            yield keras.tree.pack_sequence_as(structure, leaves)
