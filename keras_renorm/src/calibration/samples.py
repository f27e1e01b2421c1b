"""Calibration samples as a stream of batches, and what the layers of a model are called with while one runs through it."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import inspect
import operator
import tempfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import keras
import numpy as np
from keras import ops

from keras_renorm.src.core.keras_internals import (
    Functional,
    flatten_layers,
    functional_in,
    inputs_structure,
    nodes_of,
    standardize_inputs,
)

# More than this is taken for a generator that never ends.
MOST_SAMPLES = 1_000_000


class Samples:
    """Calibration samples that can be run through again and again, one checked batch at a time.

    Args:
        data: an array, a list or dict of arrays (one an input of the model), a `tf.data.Dataset`, a `keras.utils.PyDataset`, a
            generator, or any other iterable of batches. Of a batch that is a tuple `(x, y)` or `(x, y, weights)`, `x` is taken.
            What a generator yields is kept in a temporary file, as it is needed more than once.
        model: the model that they are for.
        batch_size: how many samples of arrays to run at once; other data come in batches of their own.

    Raises:
        ValueError: for samples that the model cannot take: none at all, of the wrong shape or type, or NaN.
    """

    def __init__(self, data: Any, model: keras.Model, batch_size: int):
        self._inputs = keras.tree.flatten(getattr(model, "inputs", None) or [])
        self._structure = inputs_structure(model)
        self._name = model.name
        self._spool = None
        if isinstance(batch_size, bool) or not isinstance(batch_size, (int, np.integer)) or batch_size < 1:
            raise ValueError(f"Argument `batch_size` must be a positive integer. Received: batch_size={batch_size!r}.")
        leaves = keras.tree.flatten(data) if isinstance(data, (list, tuple, dict)) else [data]
        endless = isinstance(data, keras.utils.PyDataset) and data.num_batches is None
        if hasattr(data, "cardinality"):
            endless = int(data.cardinality()) == -1
        if endless:
            raise ValueError(
                "Argument `calibration` is a dataset without an end. Take a part of it, such as `dataset.take(10)`. "
                f"Received: calibration={data!r}."
            )
        if leaves and all(hasattr(leaf, "shape") and hasattr(leaf, "__getitem__") for leaf in leaves):
            arrays = self._check(keras.tree.map_structure(_to_numpy, data))
            self._read = lambda: _slices(arrays, batch_size)
        elif isinstance(data, keras.utils.PyDataset):
            self._read = lambda: map(self._x, (data[index] for index in range(data.num_batches)))
        elif hasattr(data, "__iter__") and leaves and not isinstance(data, (str, bytes, list, tuple, dict)):
            if iter(data) is data:
                self._spool = _Spool(map(self._x, data))
            self._read = lambda: iter(self._spool) if self._spool else map(self._x, data)
        else:
            raise ValueError(
                "Argument `calibration` must be an array, a list or a dict of arrays (one an input of the model), a "
                "`tf.data.Dataset`, a `keras.utils.PyDataset`, or a generator of batches. "
                f"Received: calibration={data!r} (of type {type(data)})."
            )

    @property
    def names(self) -> list[str]:
        """The names of the model's inputs, as far as it has some."""
        return [tensor.name for tensor in self._inputs]

    def __iter__(self) -> Iterator[Any]:
        count = 0
        for batch in self._read():
            batch = self._check(batch)
            size = len(keras.tree.flatten(batch)[0])
            count += size
            if count > MOST_SAMPLES:
                raise ValueError(
                    f"Argument `calibration` gave more than {MOST_SAMPLES:,} samples. If it never ends, take a part of it, "
                    "such as `itertools.islice(generator, 10)`; a few thousand samples are enough."
                )
            if size:
                yield batch
        if not count:
            raise ValueError(
                "Argument `calibration` gave no samples. A generator gives its samples once: make a new one for each call."
            )

    def __enter__(self) -> Samples:
        return self

    def __exit__(self, *error) -> None:
        """Remove the temporary file."""
        if self._spool is not None:
            self._spool.file.close()

    def _x(self, batch):
        """The inputs in a batch, which may be a pair `(x, y)` or, as data loaders have it, a list of these."""
        if isinstance(batch, (list, tuple)):
            is_inputs = len(batch) == len(self._inputs) > 1 and not any(map(keras.tree.is_nested, batch))
            batch = batch if is_inputs else batch[0]
        return keras.tree.map_structure(_to_numpy, batch)

    def _check(self, batch):
        leaves = keras.tree.flatten(batch)
        if len({len(leaf) if leaf.ndim else None for leaf in leaves}) != 1 or leaves[0].ndim == 0:
            raise ValueError(
                "Argument `calibration` must have the same number of samples for every input. Received arrays of shapes "
                f"{[leaf.shape for leaf in leaves]}."
            )
        if self._inputs and len(leaves) != len(self._inputs):
            raise ValueError(
                f"Argument `calibration` must have one array for each input of model '{self._name}', which has "
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
                    f"Argument `calibration` has samples of the wrong shape for input '{wanted.name}' of model "
                    f"'{self._name}', which takes {tuple(wanted.shape)}. Received: an array of shape {leaf.shape}."
                )
            if leaf.dtype.kind not in "biuf" and wanted.dtype != "string" and leaf.dtype.name != "bfloat16":
                raise ValueError(
                    f"Argument `calibration` must hold numbers for input '{wanted.name}' of model '{self._name}'. Received: an "
                    f"array of dtype {leaf.dtype}."
                )
        for leaf in leaves:
            if leaf.dtype.kind == "f" and not np.isfinite(leaf).all():
                bad = np.flatnonzero(~np.isfinite(leaf.reshape(len(leaf), -1)).all(axis=1))
                raise ValueError(
                    f"Argument `calibration` holds NaN or infinity in {len(bad)} of {len(leaf)} samples of a batch, the "
                    f"first of them sample {bad[0]}. Leave them out. Nothing was changed."
                )
        return batch


def _to_numpy(leaf):
    return leaf if isinstance(leaf, np.ndarray) else np.asarray(ops.convert_to_numpy(leaf))


def _slices(arrays, batch_size):
    length = len(keras.tree.flatten(arrays)[0])
    for start in range(0, length, batch_size):
        part = slice(start, start + batch_size)
        yield keras.tree.map_structure(operator.itemgetter(part), arrays)


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
            # All went well: the file stays open until the samples are done with.
            stack.pop_all()

    def __iter__(self):
        self.file.seek(0)
        for structure in self._structures:
            leaves = [np.load(self.file) for _ in keras.tree.flatten(structure)]
            yield keras.tree.pack_sequence_as(structure, leaves)


# How many times larger or smaller than recorded a deviation has to be to say that samples are scaled in another way: data of
# another kind do not reach it, pixels in 0..255 instead of 0..1 or -1..1 do.
_UNLIKE = 30


def warn_of_odd_samples(model: keras.Model, samples: Samples, stacklevel: int = 2) -> None:
    """Warn if the samples are all the same, or scaled in another way than what the model was fed with, where it shows that."""
    constant = _constant_inputs(samples)
    if constant:
        warnings.warn(
            f"The samples of argument `calibration` are all the same for input {constant}, so there is nothing to fit to. Pass "
            "samples of what the model will see.",
            stacklevel=stacklevel + 1,
        )
    elif (unlike := _what_is_unlike(model, next(iter(samples)))) is not None:
        warnings.warn(
            f"The samples of argument `calibration` are not scaled like what model '{model.name}' was fed with: {unlike}. Pass "
            "them in the model's own scaling, such as pixels in 0..1 or 0..255.",
            stacklevel=stacklevel + 1,
        )


def _constant_inputs(samples: Samples) -> list[str]:
    """The names of inputs of floats (of any, if no input varies) that are the same in all samples, if there are several."""
    first, varies, count = None, None, 0
    for batch in samples:
        leaves = keras.tree.flatten(batch)
        first = first or [leaf[:1] for leaf in leaves]
        varies = np.array([bool((leaf != one).any()) for leaf, one in zip(leaves, first)]) | (varies if count else False)
        count += len(leaves[0])
        if varies.all():
            return []
    names = samples.names or [str(index) for index in range(len(first))]
    # Masks and types of tokens may well be the same for all.
    suspicious = [not varies.any() or leaf.dtype.kind == "f" for leaf in first]
    return [name for name, varied, odd in zip(names, varies, suspicious) if odd and not varied and count > 1]


def _what_is_unlike(model: keras.Model, batch: Any) -> str | None:
    """What the first layer that knows how its inputs are scaled says of a batch."""
    kinds = (keras.layers.BatchNormalization, keras.layers.Normalization, keras.layers.Rescaling)
    layers = [layer for layer in flatten_layers(model) if isinstance(layer, kinds)]
    with np.errstate(all="ignore"):
        for call in observe(lambda: model(batch, training=False), layers) if layers else []:
            inputs = ops.convert_to_numpy(call.inputs)
            if isinstance(call.layer, keras.layers.Rescaling):
                is_fed = any(np.array_equal(inputs, leaf) for leaf in keras.tree.flatten(batch))
                reach = np.ptp(ops.convert_to_numpy(call.outputs))
                if is_fed and 0 < reach < 1 / _UNLIKE:
                    return f"layer '{call.layer.name}' makes numbers of them that differ by {reach:.2g} at most"
                continue
            known = _standardized(call.layer, inputs.astype(np.float64))
            # What is not finite is refused later, by the name of the layer that makes it.
            if known is None or len(known) < 16 or not np.isfinite(known).all():
                continue
            deviation, offset = np.median(known.std(axis=0)), np.median(np.abs(known.mean(axis=0)))
            if 1 / _UNLIKE < deviation < _UNLIKE and offset < _UNLIKE:
                return None
            return (
                f"at layer '{call.layer.name}' they deviate {deviation:.2g} times as much as it has recorded, and their mean "
                f"is {offset:.2g} deviations away"
            )
    return None


def _standardized(layer: keras.Layer, inputs: np.ndarray) -> np.ndarray | None:
    """Inputs less the recorded mean over the recorded deviation, shape `(rows, features)`; `None` where none is recorded."""
    if isinstance(layer, keras.layers.Normalization):
        if layer.invert or layer.axis not in ((-1,), (len(inputs.shape) - 1,)):
            return None
        mean, variance = (ops.convert_to_numpy(part).reshape(-1) for part in (layer.mean, layer.variance))
    else:
        inputs = np.moveaxis(inputs, layer.axis, -1)
        mean, variance = (ops.convert_to_numpy(part) for part in (layer.moving_mean, layer.moving_variance))
        if not mean.any() and (variance == 1).all():
            # It was never trained.
            return None
    varies = variance > 0
    if not varies.any():
        return None
    return ((inputs - mean) / np.sqrt(np.where(varies, variance, 1))).reshape(-1, len(mean))[:, varies]


class OutputError:
    """How far the outputs of other models are from those of a model: mean squared distance as a share of their variance.

    In the mean over the outputs; those that never vary, or are no floats, do not count.

    Args:
        model: the model to compare with.
        samples: what to run.
        memory: bytes to keep its outputs in; where they need more, it runs again.
    """

    def __init__(self, model: keras.Model, samples: Samples, memory: int = 2**28):
        self._model, self._samples, self._free = model, samples, memory
        self._kept: dict[int, list] = {}

    def __call__(self, other: keras.Model) -> float:
        sums: dict[int, np.ndarray] = {}
        for index, batch in enumerate(self._samples):
            for place, (wanted, given) in enumerate(zip(self._wanted(index, batch), _float_outputs(other, batch))):
                with np.errstate(over="ignore", invalid="ignore"):
                    distance, square = np.square(wanted - given).sum(), np.square(wanted).sum()
                sums[place] = sums.get(place, 0) + np.array([distance, square, wanted.sum(), wanted.size])
        errors = []
        for distance, square, total, count in sums.values():
            variance = square / count - (total / count) ** 2
            if variance > 1e-12 * square / count:
                errors.append(distance / count / variance)
        return float(np.mean(errors)) if errors else 0.0

    def _wanted(self, index, batch):
        if index in self._kept:
            return self._kept[index]
        outputs = _float_outputs(self._model, batch)
        size = sum(one.nbytes for one in outputs)
        if size <= self._free:
            self._free -= size
            self._kept[index] = outputs
        return outputs


def _float_outputs(model, batch) -> list[np.ndarray]:
    with _without_gradients():
        outputs = [one for one in keras.tree.flatten(model(batch, training=False)) if one is not None]
    outputs = [one for one in outputs if keras.backend.is_float_dtype(keras.backend.standardize_dtype(one.dtype))]
    return [ops.convert_to_numpy(ops.cast(one, "float32")).astype(np.float64) for one in outputs]


@dataclasses.dataclass(frozen=True)
class Call:
    """One call of a layer: its first argument, and its outputs before the activation."""

    layer: keras.Layer
    inputs: Any
    outputs: Any


class _Enough(BaseException):
    """Ends a forward pass that has shown all that was asked for; not an `Exception`, which Keras would rewrite."""


def observe(
    run: Callable[[], Any], layers: Sequence[keras.Layer], calls: int | None = None, outputs: bool = True
) -> list[Call]:
    """Run something and return the calls of some layers in it.

    Works for whatever runs eagerly, subclassed models too. What is put in the place of the layers' `call` is gone when it
    returns or raises.

    Args:
        run: what calls the layers, such as a forward pass.
        layers: the layers to watch, at any depth.
        calls: stop after so many calls; `None` to run to the end.
        outputs: whether the outputs are needed; the last call is not carried out otherwise.

    Returns:
        The calls in their order.
    """
    seen = []

    def watch(layer):
        original = layer.call

        def call(*args, **kwargs):
            inputs = args[0] if args else next(iter(kwargs.values()))
            if not outputs and len(seen) + 1 == calls:
                seen.append(Call(layer, inputs, None))
                raise _Enough
            # Its own: a wrapper answers with that of the layer in it.
            activation = vars(layer).get("activation")
            try:
                if activation is not None:
                    object.__setattr__(layer, "activation", None)
                result = original(*args, **kwargs)
            finally:
                if activation is not None:
                    object.__setattr__(layer, "activation", activation)
            seen.append(Call(layer, inputs, result))
            if len(seen) == calls:
                raise _Enough
            return result if activation is None else activation(result)

        object.__setattr__(layer, "call", call)

    # A layer may be named twice, and may have a `call` of its own, beside that of its class.
    layers = list({id(layer): layer for layer in layers}.values())
    own = [layer.__dict__.get("call") for layer in layers]
    try:
        for layer in layers:
            watch(layer)
        with contextlib.suppress(_Enough), _without_gradients():
            run()
    finally:
        for layer, before in zip(layers, own):
            if before is not None:
                object.__setattr__(layer, "call", before)
            else:
                layer.__dict__.pop("call", None)
    return seen


class Passes:
    """Forward passes of models over the same samples, each of which starts where what changes next is called.

    What comes before that layer need not run again, if the tensors that are still needed behind it are kept. They are, for as
    many batches as fit into a fixed amount of memory; the other batches run from their beginning, and so do subclassed models.

    Args:
        models: built models that take the same inputs.
        samples: the batches.
        memory: bytes to keep tensors in.
    """

    def __init__(self, models: Sequence[keras.Model], samples: Samples, memory: int = 2**30):
        self._graphs = [_Graph(model) for model in models]
        self._samples = samples
        self._memory = memory
        self._kept: dict[int, list[dict]] = {}
        self._position = 0

    def runs(self, layers: Sequence[Sequence[keras.Layer]]) -> Iterator[list[Callable[[], Any]]]:
        """For each batch, the functions that run it through each of the models.

        Args:
            layers: for each model, layers that the run has to show. No layer that is called before them may change any more.
        """
        start = min(graph.position(of_model) for graph, of_model in zip(self._graphs, layers))
        free = self._memory
        for index, batch in enumerate(self._samples):
            values = self._kept.pop(index, None)
            position = self._position if values else 0
            if values is None:
                values = [graph.start(batch) for graph in self._graphs]
            with _without_gradients():
                values = [graph.run(one, position, start) for graph, one in zip(self._graphs, values)]
            size = sum(_bytes(tensor) for one in values for tensor in one.values())
            if start and size <= free:
                free -= size
                self._kept[index] = values
            yield [functools.partial(graph.run, one, start) for graph, one in zip(self._graphs, values)]
        self._position = start


class _Graph:
    """The operations of a model in the order in which Keras runs them; a subclassed model is a single one."""

    def __init__(self, model):
        self._model = model
        graph = functional_in(model) or model
        self._graph = graph if isinstance(graph, Functional) else None
        self._nodes = []
        if self._graph is not None:
            self._nodes = [node for node in nodes_of(self._graph) if not node.is_input]
        self._last_use = {id(tensor): index for index, node in enumerate(self._nodes) for tensor in node.input_tensors}
        self._training = {
            id(node.operation): {"training": False} if "training" in inspect.signature(node.operation.call).parameters else {}
            for node in self._nodes
        }

    def position(self, layers) -> int:
        wanted = set(map(id, layers))
        for index, node in enumerate(self._nodes):
            parts = flatten_layers(node.operation) if isinstance(node.operation, keras.Layer) else []
            if any(id(part) in wanted for part in parts):
                return index
        return 0

    def start(self, batch) -> dict:
        if self._graph is None:
            return {None: batch}
        return {id(key): value for key, value in zip(self._graph.inputs, standardize_inputs(self._graph, batch))}

    def run(self, values: dict, start: int, stop: int | None = None) -> dict:
        """Run the operations from `start` up to `stop`; returns the tensors that those behind need."""
        if self._graph is None:
            if stop is None:
                self._model(values[None], training=False)
            return values
        values = dict(values)
        for node in self._nodes[start:stop]:
            args, kwargs = node.arguments.fill_in(values)
            outputs = node.operation(*args, **{**kwargs, **self._training[id(node.operation)]})
            values.update((id(key), value) for key, value in zip(node.outputs, keras.tree.flatten(outputs)))
        needed = start if stop is None else stop
        return {key: value for key, value in values.items() if self._last_use.get(key, -1) >= needed}


def _bytes(tensor) -> int:
    # Nothing that layers hand on takes more than four bytes a number, but for float64 models.
    return 4 * int(np.prod(tensor.shape))


def _without_gradients():
    if keras.backend.backend() == "torch":
        import torch

        return torch.no_grad()
    return contextlib.nullcontext()
