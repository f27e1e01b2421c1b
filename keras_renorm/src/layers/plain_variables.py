"""The variables of prunable layers as those of their plain counterparts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import keras

from keras_renorm.src.layers.prunable import prunable_layers, without_added


def plain_variables(layer: keras.Layer) -> list[keras.Variable]:
    """The variables of a layer without masks, scales and steps: those of its plain counterpart, in its order."""
    return without_added(layer.variables, prunable_layers(layer))


def plain_weights(layer: keras.Layer) -> list[keras.Variable]:
    """The weights of a layer without masks, scales and steps: what `set_weights` of its plain counterpart takes."""
    return without_added(layer.weights, prunable_layers(layer))


def reset_masks(layer: keras.Layer, variables: Sequence[keras.Variable]) -> None:
    """Keep all weights of the kernels of a layer that are among `variables`, which were given plain values."""
    loaded = {id(variable) for variable in variables}
    for part in prunable_layers(layer):
        kernels = [kernel for kernel in part.masked_kernels if id(kernel.variable) in loaded]
        if kernels:
            part.keep_all(kernels)


def plain_values(layer: keras.Layer) -> list[Any]:
    """The values of `plain_variables` with which the plain counterpart computes the same as `layer`."""
    effective = {id(kernel.variable): kernel for part in prunable_layers(layer) for kernel in part.masked_kernels}
    return [effective[id(v)].effective() if id(v) in effective else v for v in plain_variables(layer)]
