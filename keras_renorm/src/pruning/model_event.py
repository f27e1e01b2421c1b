"""One pruning event over a whole model: either all its masks change, or none."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import keras
import numpy as np

from keras_renorm.src.core import arrays
from keras_renorm.src.core.arrays import as_array
from keras_renorm.src.core.validation import check_finite
from keras_renorm.src.kernels.events import in_float, new_scale
from keras_renorm.src.layers.prunable import PrunableLayer, prunable_layers
from keras_renorm.src.models.channels.walks import walk_back


def update_masks(
    model: keras.Model,
    sparsities: Mapping[int, float | Sequence[float]],
    scores: Mapping[int, np.ndarray] | None = None,
) -> bool:
    """Prune and renormalize layers from the outputs to the inputs, so that units that no layer reads any more lose their
    weights first.

    Args:
        model: a built model with prunable layers.
        sparsities: by the `id` of a layer, the sparsity of its kernels, or a list with one sparsity for each.
        scores: scores of the weights by the `id` of the variable of a kernel, of its shape. Defaults to `None`: the layers
            score them by their criteria.

    Returns:
        Whether a mask or a scale changed.

    Raises:
        ValueError: if a kernel holds NaN or infinity. Then no layer is changed.
    """
    updates = {}

    def visit(layer, read):
        if id(layer) in sparsities:
            updates[id(layer)] = layer.compute_pruning_masks(sparsities[id(layer)], read, scores)
            masks[id(layer.masked_kernels[0].variable)] = updates[id(layer)][0][0]

    masks = _masks_of(model)
    walk_back(model, visit, lambda variable: masks.get(id(variable), np.ones(variable.shape, bool)))
    layers = [layer for layer in prunable_layers(model) if id(layer) in sparsities]
    for layer in layers:
        if id(layer) not in updates:
            updates[id(layer)] = layer.compute_pruning_masks(sparsities[id(layer)], scores=scores)
    # Only now is anything changed.
    return any([layer.assign_masks(updates[id(layer)]) for layer in layers])


def assign_masks(model: keras.Model, masks: Mapping[int, np.ndarray]) -> None:
    """Remove weights that are chosen already, and renormalize the kept weights as the layers do. Removed weights stay removed.

    Args:
        model: a built model with prunable layers.
        masks: masks by the `id` of the variable of a kernel. Kernels without a mask here are not changed.

    Raises:
        ValueError: if a kernel holds NaN or infinity. Then no layer is changed.
    """
    updates: dict[int, list] = {}
    for layer in prunable_layers(model):
        for masked in layer.masked_kernels:
            kernel, mask, scale = (as_array(v) for v in (masked.variable, masked.mask, masked.scale))
            new_mask = mask & masks.get(id(masked.variable), mask)
            if not np.array_equal(new_mask, mask):
                kernel = in_float(kernel)
                check_finite(arrays.masked(kernel, mask), f"Kernel '{masked.variable.path}'")
                scale = new_scale(kernel, mask, new_mask, scale, layer.renormalize, masked.input_axes)
            updates.setdefault(id(layer), []).append((new_mask, scale))
    # Only now is anything changed.
    for layer in prunable_layers(model):
        layer.assign_masks(updates[id(layer)])


def remove_unread_units(model: keras.Model) -> None:
    """Remove all weights of units that no layer reads, from the outputs to the inputs."""
    masks = _masks_of(model)

    def visit(layer, read):
        if isinstance(layer, PrunableLayer):
            (masked,) = layer.masked_kernels
            units = [1 if axis in masked.input_axes else side for axis, side in enumerate(masked.variable.shape)]
            masks[id(masked.variable)] = masks[id(masked.variable)] & read.reshape(units)

    walk_back(model, visit, lambda variable: masks.get(id(variable), np.ones(variable.shape, bool)))
    assign_masks(model, masks)


def _masks_of(model: keras.Model) -> dict[int, np.ndarray]:
    """The masks by the `id` of the variables of their kernels. A kept weight that is zero may still change."""
    kernels = [kernel for layer in prunable_layers(model) for kernel in layer.masked_kernels]
    return {id(kernel.variable): as_array(kernel.mask) for kernel in kernels}
