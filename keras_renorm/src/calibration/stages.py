"""Which layers calibration fits, in which order, and how they depend on each other.

The order is observed while the model runs, so that it is known for nested and for subclassed models, too.
"""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Sequence
from typing import Any

import keras
import numpy as np
from keras import ops

from keras_renorm.src.calibration.observing import LayerCall, observe
from keras_renorm.src.layers.kernel_plan import KernelPlan
from keras_renorm.src.layers.linear import LinearPart, LinearView, linear_parts
from keras_renorm.src.models.channels.table import is_sum

L = keras.layers


@dataclasses.dataclass(frozen=True)
class Sum:
    """A sum (a layer or an operation) whose operand number `operand` is the output of a part."""

    dense: keras.Operation
    pruned: keras.Operation
    operand: int


@dataclasses.dataclass
class FittedPart:
    """A part of a layer that is fitted to its twin in the dense model: a matrix product, or a BatchNormalization.

    Args:
        dense: the layer in the dense model.
        pruned: its twin in the model that is being pruned.
        view: the part as a matrix product.
        products: the matrix product (dense, pruned); `None` for a BatchNormalization.
        following: the matrix product of the dense layer that takes the output of this one; `None` if it is the output of the
            layer.
        plan: how to prune it; `None` if it is only fitted.
        first_call: number of the first call of the layer.
        inputs: `id` of the tensor that the layer is called with, and which of its products this is; `None` if the layer is
            called several times.
        calls: number of calls in one forward pass.
        normalization: the BatchNormalization (dense, pruned) that takes exactly its output.
        sum: the sum that takes its output, or that of its normalization, if this is the operand that is fitted last.
    """

    dense: keras.Layer
    pruned: keras.Layer
    view: LinearView
    products: tuple[LinearPart, LinearPart] | None
    following: LinearPart | None
    plan: KernelPlan | None
    first_call: int
    inputs: tuple[int, int] | None
    calls: int = 1
    normalization: tuple[keras.Layer, keras.Layer] | None = None
    sum: Sum | None = None

    @property
    def is_normalization(self) -> bool:
        return isinstance(self.dense, L.BatchNormalization)

    @property
    def has_intercept(self) -> bool:
        return self.is_normalization or self.normalization is not None or self.products[0].bias is not None

    @property
    def matrix(self) -> np.ndarray:
        """The dense kernel, of shape `(groups, inputs, units)`."""
        return self.view.to_matrix(ops.convert_to_numpy(self.products[0].kernel).astype(np.float64))

    @property
    def bias(self) -> np.ndarray:
        """The dense bias or zeros, of shape `(groups, units)`."""
        groups, _, units = self.view.sizes
        if self.products[0].bias is None:
            return np.zeros((groups, units))
        return ops.convert_to_numpy(self.products[0].bias).astype(np.float64).reshape(groups, units)

    def inputs_in(self, call: LayerCall) -> Any:
        """The inputs of the part in a call of either layer."""
        if self.is_normalization:
            return call.inputs
        return self.products[0 if call.layer is self.dense else 1].feed(call.inputs)

    def outputs_in(self, call: LayerCall) -> Any:
        """The target outputs of the part in a call of the dense layer."""
        if self.is_normalization:
            return call.inputs
        return call.outputs if self.following is None else self.following.feed(call.inputs)


def find_stages(
    dense: keras.Model,
    twins: Sequence[tuple[keras.Operation, keras.Operation]],
    plans: dict[int, KernelPlan],
    batch: Any,
    refit: bool,
) -> list[list[FittedPart]]:
    """Find the parts to fit, in the order in which the dense model calls them.

    Parts that are called with the same tensor, such as query, key and value, share a stage, since one pass over the samples is
    enough for all of them.

    Args:
        dense: the dense model.
        twins: the layers of both models, at any depth, in pairs, and the operations that are sums.
        plans: the kernels to prune, by the `id` of their variable in the pruned model.
        batch: samples to run.
        refit: whether layers behind the first pruned layer are fitted, too.
    """
    candidates, sums = {}, {}
    for old, new in twins:
        if is_sum(old):
            sums.update({id(old): (old, new)} if refit else {})
            continue
        products = _products(old, new, plans, refit)
        if products:
            candidates[id(old)] = (old, new, products)
    calls = observe(lambda: dense(batch, training=False), [old for old, *_ in [*candidates.values(), *sums.values()]])
    of_layers: dict[int, list[FittedPart]] = {}
    for index, call in enumerate(calls):
        if id(call.layer) in sums:
            continue
        old, new, products = candidates[id(call.layer)]
        if id(old) in of_layers:
            for part in of_layers[id(old)]:
                part.calls += 1
                part.inputs = None
            continue
        made = [FittedPart(old, new, *product, index, (id(call.inputs), place)) for place, product in enumerate(products)]
        of_layers[id(old)] = made if all(_is_linear(call, part) for part in made) else []
    silent = [
        new.name
        for key, (_, new, products) in candidates.items()
        if key not in of_layers and any(plan is not None for *_, plan in products)
    ]
    if silent:
        warnings.warn(
            f"The samples of argument `calibration` never reach layers {silent}: they are pruned without data.", stacklevel=4
        )
    parts = [part for made in of_layers.values() for part in made]
    pruned = [part for part in parts if part.plan is not None]
    # What comes before all that is pruned is left alone; a kernel to prune outside of these parts may be anywhere.
    first = 0 if len(pruned) < len(plans) else pruned[0].first_call
    usable = [part for part in parts if part.first_call >= first]
    makers = _join_normalizations(usable, calls)
    joined = {id(part.normalization[0]) for part in usable if part.normalization}
    stages: dict[Any, list[FittedPart]] = {}
    for part in usable:
        if id(part.dense) not in joined:
            stages.setdefault(part.inputs or -id(part), []).append(part)
    _join_sums([part for stage in stages.values() for part in stage], sums, makers, calls)
    return list(stages.values())


def _products(old: keras.Layer, new: keras.Layer, plans: dict[int, KernelPlan], refit: bool) -> list[tuple]:
    """The views, products, following products and plans of a layer, in the order in which they are computed."""
    if getattr(old, "lora_enabled", False) or getattr(old, "quantization_mode", None) is not None or not old.built:
        return []
    if isinstance(old, L.BatchNormalization):
        return [(_by_feature(old), None, None, None)] if refit else []
    parts = list(zip(linear_parts(old), linear_parts(new)))
    following = [part for part, _ in parts[1:]] + [None]
    products = [(part.view, (part, twin), after, plans.get(id(twin.kernel))) for (part, twin), after in zip(parts, following)]
    return [product for product in products if refit or product[-1] is not None]


def _by_feature(layer: keras.layers.BatchNormalization) -> LinearView:
    features = layer.moving_mean.shape[0]

    def by_feature(inputs):
        return ops.reshape(ops.moveaxis(inputs, layer.axis, 0), (features, -1, 1))

    return LinearView(by_feature, by_feature, (features,), ((0,), (), ()))


def _is_linear(call: LayerCall, part: FittedPart) -> bool:
    """Whether the layer computes the product of its view in a call. In `vmap` and in some subclasses it does not."""
    try:
        tensors = (part.inputs_in(call), part.outputs_in(call))
        inputs, outputs = (ops.convert_to_tensor(ops.convert_to_numpy(tensor)[:1], "float32") for tensor in tensors)
    except Exception:
        return False
    if part.is_normalization:
        return True
    rows, targets = (ops.convert_to_numpy(one)[:, :256] for one in (part.view.rows(inputs), part.view.targets(outputs)))
    if not (np.isfinite(rows).all() and np.isfinite(targets).all()):
        # Nothing can be compared; the layer is refused by its name when its moments are taken.
        return True
    here = rows @ part.matrix + part.bias[:, None]
    # Half precision rounds to 2 ** -8.
    return here.shape == targets.shape and np.allclose(here, targets, rtol=0.02, atol=0.02 * np.abs(targets).max(initial=0))


def _join_normalizations(parts: list[FittedPart], calls: list[LayerCall]) -> dict[int, FittedPart]:
    """Join each BatchNormalization that takes exactly the output of a layer to that layer: it is adjusted without a pass of its
    own.

    Returns the part that makes each tensor, by the `id` of the tensor. The output of a joined normalization counts as the
    layer's.
    """
    # Of the products of a layer the last one makes its outputs.
    by_layer = {id(part.dense): part for part in parts}
    makers = {id(call.outputs): by_layer[id(call.layer)] for call in calls if id(call.layer) in by_layer}
    makers = {key: part for key, part in makers.items() if _output_is_linear(part.dense)}
    for call in calls:
        before, here = makers.get(id(call.inputs)), by_layer.get(id(call.layer))
        if before is None or here is None or before.is_normalization or not here.is_normalization:
            continue
        if before.calls == here.calls == 1 and _numbers_units(before.view, call.inputs.shape, here.dense.axis):
            before.normalization = (here.dense, here.pruned)
            makers[id(call.outputs)] = before
    return makers


def _numbers_units(view: LinearView, shape: Sequence[int | None], axis: int) -> bool:
    """Whether an axis of the outputs of a layer numbers its units, group by group."""
    groups, _, units = view.sizes
    if shape[axis] != groups * units:
        return False
    numbers = np.arange(groups * units, dtype="float32")
    marked = np.moveaxis(np.broadcast_to(numbers, [1, *np.delete(shape[1:], axis - (axis > 0)), groups * units]), -1, axis)
    seen = ops.convert_to_numpy(view.targets(ops.convert_to_tensor(marked)))
    return bool(np.all(seen == numbers.reshape(groups, 1, units)))


def _output_is_linear(layer) -> bool:
    return getattr(layer, "activation", None) in (None, keras.activations.linear)


def _join_sums(parts: list[FittedPart], sums: dict, makers: dict[int, FittedPart], calls: list[LayerCall]) -> None:
    """Let the operand of a sum that is fitted last correct the errors of the other operands."""
    order = {id(part): index for index, part in enumerate(parts)}
    for call in calls:
        if id(call.layer) not in sums:
            continue
        made = [makers.get(id(tensor)) for tensor in call.inputs]
        broadcast = len({tuple(np.shape(tensor)) for tensor in call.inputs}) > 1
        if broadcast or sum(other.layer is call.layer for other in calls) > 1:
            continue
        last = max((part for part in made if id(part) in order), key=lambda part: order[id(part)], default=None)
        if last is not None and last.calls == 1 and made.count(last) == 1 and last.sum is None and not last.is_normalization:
            last.sum = Sum(*sums[id(call.layer)], made.index(last))
