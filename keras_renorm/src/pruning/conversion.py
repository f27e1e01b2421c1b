"""`to_prunable` and `strip`: from a plain model to a model with prunable layers, and back."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Iterator
from typing import Any

import keras

from keras_renorm.src.core import validation
from keras_renorm.src.core.arrays import as_array, for_another
from keras_renorm.src.core.keras_internals import flatten_layers
from keras_renorm.src.layers.arguments import PRUNING_ARGUMENTS, PruningArguments
from keras_renorm.src.layers.conv2d import PrunableConv2D
from keras_renorm.src.layers.dense import PrunableDense
from keras_renorm.src.layers.plain_variables import plain_values, plain_variables
from keras_renorm.src.layers.prunable import PrunableLayer, prunable_layers
from keras_renorm.src.layers.wrapper import RenormalizedPruning
from keras_renorm.src.models.copying import Copier
from keras_renorm.src.models.graph import users_of
from keras_renorm.src.models.model_copies import copy_model
from keras_renorm.src.models.rebuilding import exchange_variable, with_config
from keras_renorm.src.pruning.delivery import shortfall
from keras_renorm.src.pruning.selection import REBUILT, choose_with_patterns, kernels_by_layer, outermost_layers

_DROP_IN = {cls.plain_class: cls for cls in (PrunableDense, PrunableConv2D)}


def to_prunable(
    model: keras.Model,
    layers: Any = None,
    pruning_schedule: Any = None,
    criterion: Any = "magnitude",
    pattern: Any = "unstructured",
    group: str = "layer",
    renormalize: Any = "auto",
    regrow: bool = False,
    from_zeros: bool = False,
    target: str | None = None,
) -> keras.Model:
    """Copy a model with prunable layers in place of plain ones: same names, same weights, same outputs.

    Dense and Conv2D become `PrunableDense` and `PrunableConv2D`. Other layers with kernels are wrapped by
    `RenormalizedPruning`. The model that is passed in is not changed. If it is compiled, the new model is compiled too, with a
    fresh optimizer.

    Args:
        model: a built Sequential or Functional model. Models inside it are converted, too.
        layers: the layers to make prunable: a name (or glob, such as `"block_*"`; `"user/fc1"` is layer `"fc1"` of the inner
            model `"user"`), a layer class, a predicate `layer -> bool`, or a list of these. A layer that cannot be pruned stays
            plain, and a warning names it. Defaults to `None`: all layers with kernels, except position embeddings and class
            tokens.
        pruning_schedule: when to prune and how much; `None` for the schedule of `keras_renorm.callbacks.UpdatePruning`.
            Defaults to `None`.
        criterion: what scores the weights. Defaults to `"magnitude"`.
        pattern: which weights are removed together, or a dict of layer name (or glob) to pattern. Defaults to `"unstructured"`.
        group: which weights compete with each other: `"layer"` or `"unit"`. Defaults to `"layer"`.
        renormalize: how the kept weights are rescaled at each event: `"auto"`, `"l1"`, `"l2"`, a renormalizer, or `None`.
            Defaults to `"auto"`.
        regrow: whether a later event may bring a removed weight back. Defaults to `False`.
        from_zeros: whether zeros of the kernels become the masks, to fine-tune a sparse model at its sparsity. Defaults to
            `False`.
        target: the runtime for which patterns are chosen, as in `keras_renorm.prune`. Defaults to `None`.

    Returns:
        A new model.

    Raises:
        ValueError: if the model is not built, is a subclassed model, or has nothing to prune.
        TypeError: if it is not a Keras 3 model.

    Example:

    >>> import keras, keras_renorm as kr
    >>> model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(2, name="fc")])
    >>> type(kr.to_prunable(model).get_layer("fc")).__name__
    'PrunableDense'
    """
    validation.check_model(model)
    _check_exchangeable(model)
    chosen, patterns_of = choose_with_patterns(model, layers, pattern, target)
    rules = PruningArguments(pruning_schedule, criterion, "unstructured", group, renormalize, regrow).resolve()
    # Every argument is checked before any work is done.
    rules_of = {key: dataclasses.replace(rules, pattern=one).resolve() for key, one in patterns_of.items()}
    chosen, readers = _without_used_elsewhere(model, chosen)

    def convert(layer, copier):
        if id(layer) not in chosen and id(layer) not in readers:
            return None
        # What only reads another layer's kernel has no masks of its own.
        arguments = rules_of.get(id(layer), rules)
        if type(layer) in _DROP_IN and id(layer) in chosen:
            return copier.copy_as(layer, _DROP_IN[type(layer)], lambda new: new.become_prunable(arguments))
        wrapper = keras.Layer.__new__(RenormalizedPruning)

        def wrap(inner):
            wrapper.__init__(inner, name=layer.name, trainable=layer.trainable, **vars(arguments))

        def build(inner):
            wrapper.build_from_config(layer.get_build_config())

        copier.copy_as(layer, type(layer), wrap, build)
        return wrapper

    converted, _ = copy_model(model, convert)
    _tell_what_does_not_load(converted)
    if from_zeros:
        _masks_from_zeros(converted)
    return converted


def _without_used_elsewhere(model: keras.Model, chosen: dict[int, keras.Layer]) -> tuple[dict[int, keras.Layer], set[int]]:
    """The layers whose masks apply wherever their kernels are used, and the `id` of other layers that read these kernels.

    A layer that holds another layer can be wrapped, so that it reads the masked kernel. An operation cannot, nor can a function
    that captures the kernel, or a layer that holds the variable alone.
    """
    users, kernels = users_of(model), kernels_by_layer(model)
    kept, readers, refused = {}, set(), []
    for key, layer in chosen.items():
        variables = [kernel.variable for kernel in kernels[key]]
        others = {id(user): user for one in variables for user in users.get(id(one), ()) if user is not layer}
        holding = [user for user in others.values() if isinstance(user, keras.Layer) and layer in flatten_layers(user)]
        if len(holding) == len(others):
            kept[key] = layer
            readers.update(map(id, holding))
        else:
            names = [user.name for user in others.values() if user not in holding]
            refused.append(f"layer '{layer.name}', whose weights {names} use as well, where a mask cannot be applied")
    if refused and not kept:
        raise ValueError(
            f"Model '{model.name}' has nothing to make prunable. Left as they are: {'; '.join(refused)}. "
            "`keras_renorm.prune(model, sparsity)` prunes it in one shot."
        )
    if refused:
        warnings.warn(f"Left as they are: {'; '.join(refused)}.", stacklevel=3)
    return kept, readers - kept.keys()


def _tell_what_does_not_load(model: keras.Model) -> None:
    names = [
        f"'{part.name}' ({type(part).__name__})"
        for part in flatten_layers(model)
        if type(part) not in REBUILT
        and isinstance(part, REBUILT)
        and prunable_layers(part)
        and "layers" not in part.get_config()
    ]
    if names:
        warnings.warn(
            f"A `.keras` file of the prunable model will not load: of {', '.join(names)} it has the arguments of the "
            "constructor, which makes plain layers. Save with `save_weights` while it is prunable; after `keras_renorm.strip`, "
            "`save` works as before.",
            stacklevel=3,
        )


def _check_exchangeable(model: keras.Model) -> None:
    if not isinstance(model, REBUILT):
        raise ValueError(
            f"Model '{model.name}' is a subclass of `keras.Model` ({type(model).__name__}), whose layers cannot be exchanged "
            "from outside. In your class, write `keras_renorm.layers.PrunableDense(...)` for `keras.layers.Dense(...)` (and "
            "`PrunableConv2D` for `Conv2D`), or wrap a layer: `keras_renorm.layers.RenormalizedPruning(layer)`. For a model "
            "that is trained already, `keras_renorm.prune(model, sparsity)` works as it is."
        )


def _masks_from_zeros(model: keras.Model) -> None:
    empty = []
    for layer in prunable_layers(model):
        # Layers that were prunable before have masks to keep.
        layer.mask_zeros()
        empty += [kernel.variable.path for kernel in layer.masked_kernels if not as_array(kernel.mask).any()]
    if empty:
        warnings.warn(
            f"All weights of {empty} are zero, so with `from_zeros=True` they are masked for good. If a layer was only "
            "initialized with zeros, leave it out with `layers=`.",
            stacklevel=3,
        )


def strip(model: keras.Model) -> keras.Model:
    """Copy a model with plain Keras layers in place of prunable ones. Pruned weights are zero in their kernels.

    Masks and scales are multiplied into the kernels, so outputs are equal. The layers get their original names, and the new
    model loads without keras_renorm. The model that is passed in is not changed; a model without prunable layers is copied.

    Args:
        model: a built Sequential or Functional model.

    Returns:
        A new model. It is compiled if `model` is, with a fresh optimizer.

    Raises:
        ValueError: if the model is not built, or is a subclassed model with prunable layers.

    Example:

    >>> import keras, keras_renorm as kr
    >>> model = keras.Sequential([keras.Input((4,)), kr.layers.PrunableDense(2)])
    >>> type(kr.strip(model).layers[0]).__name__
    'Dense'
    """
    validation.check_model(model)
    message = shortfall(model)
    if message:
        warnings.warn(message, stacklevel=2)
    return plain_copy(model)[0]


def plain_copy(model: keras.Model) -> tuple[keras.Model, dict[int, Any]]:
    """Copy a model as `strip` does, and map the `id` of each layer and variable of `model` to its copy."""
    within = {id(layer) for outer in outermost_layers(model) for layer in _through_wrappers(outer)}
    left = [layer.name for layer in prunable_layers(model) if id(layer) not in within]
    if left:
        raise ValueError(
            f"Model '{model.name}' has prunable layers inside a layer or model of your own, which cannot be replaced from "
            f"outside: {left}. Give your class an argument that chooses between the plain and the prunable layer, or wrap "
            "the whole layer in `keras_renorm.layers.RenormalizedPruning` instead of the layers in it."
        )
    if prunable_layers(model) and not isinstance(model, REBUILT):
        raise ValueError(
            f"Model '{model.name}' is a subclass of `keras.Model` ({type(model).__name__}), whose prunable layers "
            f"{[layer.name for layer in prunable_layers(model)]} cannot be replaced from outside. Give your class an argument "
            "that chooses between `keras.layers.Dense` and `keras_renorm.layers.PrunableDense`, or build the model with the "
            "functional API."
        )
    return copy_model(model, _plain_counterpart)


def _through_wrappers(layer: keras.Layer) -> Iterator[keras.Layer]:
    """A layer, and the layers inside Keras' own wrappers (TimeDistributed), which are saved with it."""
    yield layer
    if isinstance(layer, keras.layers.Wrapper) and not isinstance(layer, PrunableLayer):
        yield from _through_wrappers(layer.layer)


def _plain_counterpart(layer: keras.Layer, copier: Copier) -> keras.Layer | None:
    """A copy of a prunable layer without masks; `None` for other layers."""
    if not isinstance(layer, PrunableLayer) or not layer.built:
        return None
    if not isinstance(layer, RenormalizedPruning):
        return rebuilt_layer(copier, layer, with_config(layer, layer.plain_class, without=PRUNING_ARGUMENTS))

    def fill_in(inner):
        for kernel in layer.masked_kernels:
            variable = copier.copies[id(kernel.variable)]
            variable.assign(kernel.effective())
            if kernel.variable.regularizer is not None:
                variable.regularizer = kernel.variable.regularizer.regularizer

    return copier.copy_as(layer.layer, type(layer.layer), fill_in)


def rebuilt_layer(copier: Copier, layer: keras.Layer, new: keras.Layer) -> keras.Layer:
    """Build a layer from another config, and give it the variables of a layer with their effective values."""
    begun_otherwise = _start_from_zeros(new)
    new.build_from_config(layer.get_build_config())
    for part, name, initializer in begun_otherwise:
        setattr(part, name, initializer)
    for old, value, variable in zip(plain_variables(layer), plain_values(layer), plain_variables(new), strict=True):
        shared = copier.copies.get(id(old))
        if shared is None:
            copier.replace(old, variable)
            variable.trainable = old.trainable
        else:
            exchange_variable(new, variable, shared)
            variable = shared
        variable.assign(for_another(value))
    return new


def _start_from_zeros(layer: keras.Layer) -> list[tuple[keras.Layer, str, keras.initializers.Initializer]]:
    """Let a layer that is not built begin with zeros, and return its own initializers.

    The layer gets other values, and drawing random values takes longer than pruning.
    """
    found = [
        (part, name, value)
        for part in flatten_layers(layer)
        for name, value in vars(part).items()
        if isinstance(value, keras.initializers.Initializer)
    ]
    for part, name, _ in found:
        setattr(part, name, keras.initializers.Zeros())
    return found
