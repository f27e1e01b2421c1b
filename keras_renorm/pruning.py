"""One-shot pruning of a trained model."""

from __future__ import annotations

import fnmatch
from typing import Any

import keras
import numpy as np
from keras import ops

from keras_renorm import criteria, masks, patterns, renorm, validation
from keras_renorm.conversion import choose_layers, rebuild, strip
from keras_renorm.events import prune_kernel
from keras_renorm.graph import walk_back
from keras_renorm.layers.kernels import find_kernels
from keras_renorm.layers.masked import masked_layers


def prune(
    model: keras.Model,
    sparsity: float | dict[str, float],
    criterion: Any = "magnitude",
    pattern: Any = "unstructured",
    group: str = "layer",
    renormalize: Any = "auto",
    layers: Any = None,
) -> keras.Model:
    """Prune a trained model in one shot and renormalize what is left, without training.

    Every kernel of the chosen layers loses the same fraction of its weights. The model passed in stays as it is.

    Args:
        model: a built model: Sequential, Functional, or a subclassed one with a `get_config()`.
        sparsity: fraction of the weights to remove, in [0, 1); or a dict of layer name (or glob) to sparsity, to prune
            those layers alone; a name goes before a glob, an earlier glob before a later one.
        criterion: what scores the weights: `"magnitude"`, `"random"`, or a callable `kernel -> scores`.
        pattern: which weights live and die together: `"unstructured"`, `"unit"`, `"block"`, `"n_of_m"`, or an instance.
        group: `"layer"` or `"unit"`: which weights compete with each other.
        renormalize: `"auto"`, `"l1"`, `"l2"`, a renormalizer, or `None` for plain pruning. `"auto"` is the data-free one
            that measures best: `L2()` with `group="unit"`, `L2(max_scale=2)` with `group="layer"`.
        layers: which layers, as in `keras_renorm.to_prunable`.

    Returns:
        A new model of plain Keras layers, whose kernels hold zeros. It is compiled if `model` was, with a fresh optimizer.

    Raises:
        ValueError: if the sparsity is outside [0, 1), the model is not built or has nothing to prune, a name is unknown, or
            a kernel holds NaN or infinity.
        TypeError: if it is not a Keras 3 model.

    Example:

    >>> import keras, numpy as np, keras_renorm as kr
    >>> model = keras.Sequential([keras.Input((8,)), keras.layers.Dense(4)])
    >>> pruned = kr.prune(model, sparsity=0.75)
    >>> int(np.count_nonzero(pruned.layers[0].kernel))
    8
    """
    validation.check_model(model)
    criterion, pattern = criteria.get(criterion), patterns.get(pattern)
    validation.check_choice(group, masks.GROUPS, "group")
    renormalize = renorm.get(renormalize, group)
    if isinstance(sparsity, dict):
        if layers is not None:
            raise ValueError("Pass either a dict as `sparsity` or `layers`, not both: the dict names the layers.")
        layers = list(sparsity)
    by_name = sparsity if isinstance(sparsity, dict) else {"*": sparsity}
    for value in by_name.values():
        pattern.check(validation.check_sparsity(value), group)
    if masked_layers(model):
        model = strip(model)
    chosen = choose_layers(model, layers)
    for layer in chosen.values():
        for kernel in find_kernels(layer):
            validation.check_finite(ops.convert_to_numpy(kernel.variable), _describe(kernel, layer))

    pruned, counterparts = rebuild(model, lambda layer: None)
    wanted = {
        id(counterparts[key]): by_name.get(
            layer.name, next(v for n, v in by_name.items() if fnmatch.fnmatchcase(layer.name, n))
        )
        for key, layer in chosen.items()
    }
    done = set()

    def prune_layer(layer, read=None):
        if id(layer) not in wanted:
            return ops.convert_to_numpy(layer.kernel) != 0
        done.add(id(layer))
        for kernel in find_kernels(layer):
            values = ops.convert_to_numpy(kernel.variable)
            mask, scale = prune_kernel(
                values,
                wanted[id(layer)],
                criterion,
                pattern,
                group,
                renormalize,
                kernel.input_axes,
                read=read,
                description=_describe(kernel, layer),
            )
            kernel.variable.assign(np.where(mask, values * scale, 0))
        return mask

    walk_back(pruned, prune_layer)
    for key in chosen:
        if id(counterparts[key]) not in done:
            prune_layer(counterparts[key])
    return pruned


def _describe(kernel, layer):
    return f"Kernel '{kernel.variable.path}' of layer '{layer.name}'"
