"""Forward passes that resume where the last passes stopped."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import keras
import numpy as np

from keras_renorm.src.calibration.observing import without_gradients
from keras_renorm.src.calibration.samples import Samples
from keras_renorm.src.core.keras_internals import Functional, flatten_layers, functional_in, nodes_of, standardize_inputs


class Passes:
    """Forward passes of models over the same samples. Each pass starts at the first layer that has changed.

    The layers before it need not run again, if the tensors that later layers still need are kept. They are kept for as many
    batches as fit into a fixed amount of memory. Other batches, and subclassed models, run from the beginning.

    Args:
        models: built models that take the same inputs.
        samples: the batches.
        memory: bytes in which to keep tensors.
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
            layers: for each model, the layers that the pass must reach. Layers that are called before them must not change any
                more.
        """
        start = min(graph.position(of_model) for graph, of_model in zip(self._graphs, layers))
        free = self._memory
        for index, batch in enumerate(self._samples):
            values = self._kept.pop(index, None)
            position = self._position if values else 0
            if values is None:
                values = [graph.start(batch) for graph in self._graphs]
            with without_gradients():
                values = [graph.run(one, position, start) for graph, one in zip(self._graphs, values)]
            size = sum(_bytes(tensor) for one in values for tensor in one.values())
            if start and size <= free:
                free -= size
                self._kept[index] = values
            yield [functools.partial(graph.run, one, start) for graph, one in zip(self._graphs, values)]
        self._position = start


class _Graph:
    """The operations of a model in the order in which Keras runs them. A subclassed model is a single operation."""

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
        """Run the operations from `start` up to `stop`, and return the tensors that later operations need."""
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
