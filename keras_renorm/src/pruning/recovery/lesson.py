"""A model that is trained to compute what another model computes, at its outputs and where its branches meet."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import keras
import numpy as np
from keras import ops

from keras_renorm.src.core.keras_internals import flatten_layers, inputs_structure, nodes_of
from keras_renorm.src.models.channels.table import is_sum
from keras_renorm.src.models.graph import functional_of

Loss = Callable[[Any, Any], Any]
# Chosen by two networks (docs/recovery.md): at a share of 0.06 following gains, at 0.24 it gains nothing, at 0.77 it loses.
_MUCH_NEARER = 0.3


class Lesson(keras.Model):
    """A student and its teacher. `fit` trains the student, without labels.

    `fit` and `evaluate` take a dict: `inputs`, and `wanted` if it is known what the teacher computes for them (`answers`).

    Args:
        student: the model to train; or a model that returns its intermediate values and then its outputs.
        teacher: the model that computes what the student should compute, in the same structure. It is not trained.
        losses: a function `(wanted, given) -> loss` for each float that the two return, in their order. The loss is the sum of
            those of the outputs, and the mean of the others: a deep model has more of them.
        choices: for each of these, at the end, that is an output of the model, whether its largest number is a choice.
        augment: maps a batch of inputs to the inputs to learn from. Defaults to `None`.
    """

    def __init__(
        self,
        student: keras.Model,
        teacher: keras.Model,
        losses: Sequence[Loss],
        choices: Sequence[bool],
        augment: Callable[[Any], Any] | None = None,
    ):
        super().__init__(name="lesson")
        self.student, self.teacher = student, teacher
        self._of_student, self._of_teacher = (_normalizations(model) for model in (student, teacher))
        teacher.trainable = False
        self._loss_of, self._choices, self._augment = list(losses), list(choices), augment
        # Whether batch normalization of the student follows the batches, while it is trained.
        self.follows = False
        self.distances = [keras.metrics.Mean(f"distance_{index}") for index in range(len(losses))]
        self.agreement = keras.metrics.Mean("agreement")

    @property
    def compares_choices(self) -> bool:
        """Whether `agreement` says something."""
        return any(self._choices)

    def answers(self, inputs: Any, batch_size: int) -> list[np.ndarray]:
        """What the teacher computes for all samples."""
        return [ops.convert_to_numpy(one) for one in float_values(self.teacher.predict(inputs, batch_size, verbose=0))]

    def can_follow(self, inputs: Any) -> bool:
        """Whether the teacher, normalized by the statistics of these inputs, is much nearer to itself than the student is.

        It is not if there are few inputs, or if it was not trained on such inputs.
        """
        if not self._of_student:
            return False
        wanted, given = (float_values(model(inputs, training=False)) for model in (self.teacher, self.student))
        with keras.StatelessScope(), batch_statistics(self._of_teacher):
            followed = float_values(self.teacher(inputs, training=False))
        by_itself, by_pruning = (float(self._sum_of(self._losses_of(wanted, one))) for one in (followed, given))
        return by_itself < _MUCH_NEARER * by_pruning

    def call(self, samples, training=None):
        inputs = samples["inputs"]
        if training and self._augment is not None:
            inputs = self._augment(inputs)
        with batch_statistics(self._of_student) if training and self.follows else contextlib.nullcontext():
            given = self.student(inputs, training=False)
        wanted = samples["wanted"] if "wanted" in samples else self.teacher(inputs, training=False)
        return float_values(wanted), float_values(given)

    def compute_loss(self, x=None, y=None, y_pred=None, sample_weight=None, training=True):
        wanted, given = y_pred
        losses = self._losses_of(wanted, given)
        for metric, loss in zip(self.distances, losses):
            metric.update_state(loss)
        outputs = [list(values)[-len(self._choices) :] for values in (wanted, given)]
        for one, other, chooses in zip(*outputs, self._choices):
            if chooses:
                self.agreement.update_state(ops.equal(ops.argmax(one, axis=-1), ops.argmax(other, axis=-1)))
        return self._sum_of(losses)

    def _losses_of(self, wanted: Sequence[Any], given: Sequence[Any]) -> list:
        return [loss(*pair) for loss, *pair in zip(self._loss_of, wanted, given)]

    def _sum_of(self, losses: Sequence[Any]) -> Any:
        inside, at_outputs = losses[: -len(self._choices)], losses[-len(self._choices) :]
        return sum(at_outputs) + sum(inside) / max(1, len(inside))


def _normalizations(model: keras.Model) -> list[keras.Layer]:
    """Batch normalization that is not frozen. Classes with a `call` of their own may not take `training`."""
    layers = flatten_layers(model)
    return [layer for layer in layers if type(layer).call is keras.layers.BatchNormalization.call and layer.trainable]


@contextlib.contextmanager
def batch_statistics(layers: Sequence[keras.Layer]) -> Iterator[None]:
    """While the context is open, these layers compute as in training, whatever the others do."""
    trainable = [layer.trainable for layer in layers]
    try:
        for layer in layers:
            layer.call = functools.partial(_in_training, layer.call)
            layer.trainable = True
        yield
    finally:
        for layer, before in zip(layers, trainable):
            del layer.call
            layer.trainable = before


def _in_training(call: Callable, *args: Any, training: bool | None = None, **kwargs: Any) -> Any:
    return call(*args, training=True, **kwargs)


def is_choice(outputs: Any) -> bool:
    """Whether outputs have several numbers, of which one is the largest."""
    return len(outputs.shape) > 1 and outputs.shape[-1] > 1


def with_places(model: keras.Model) -> tuple[keras.Model, list[str]]:
    """A model that returns the sums inside a model, where branches meet, and then its outputs; and the names of the sums.

    Sums inside models that are layers are not seen, nor are those of subclassed models.
    """
    functional = functional_of(model)
    if functional is None:
        return model, []
    nodes = [node for node in nodes_of(functional) if not node.is_input and is_sum(node.operation)]
    outputs = [*(node.outputs[0] for node in nodes), *keras.tree.flatten(functional.outputs)]
    return keras.Model(inputs_structure(functional), outputs), [node.operation.name for node in nodes]


def relative_error(wanted: Any, given: Any) -> Any:
    """The squared error as a share of the variance of what is wanted over the batch."""
    variance = ops.mean(ops.square(wanted - ops.mean(wanted, axis=0, keepdims=True)))
    return ops.mean(ops.square(wanted - given)) / (variance + keras.config.epsilon())


def divergence(temperature: float, from_logits: bool) -> Loss:
    """The Kullback-Leibler divergence of class probabilities, both softened by a temperature, times its square.

    Source: G. Hinton and others, Distilling the knowledge in a neural network, arXiv 1503.02531.
    """

    def loss(wanted, given):
        if not from_logits:
            wanted, given = (ops.log(ops.maximum(one, keras.config.epsilon())) for one in (wanted, given))
        wanted, given = (ops.log_softmax(one / temperature) for one in (wanted, given))
        return temperature**2 * ops.mean(ops.sum(ops.exp(wanted) * (wanted - given), axis=-1))

    return loss


def float_values(outputs: Any) -> list:
    """The floats among nested outputs, in single precision: losses overflow in half precision."""
    leaves = [one for one in keras.tree.flatten(outputs) if one is not None]
    floats = [one for one in leaves if keras.backend.is_float_dtype(keras.backend.standardize_dtype(one.dtype))]
    return [ops.cast(one, "float32") for one in floats]
