"""From a plain model to one with prunable layers, and back."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from typing import Any

import keras

from keras_renorm.src.core import validation
from keras_renorm.src.core.arrays import as_array, for_another
from keras_renorm.src.core.keras_internals import Functional, flatten_layers
from keras_renorm.src.layers.conv2d import PrunableConv2D
from keras_renorm.src.layers.dense import PrunableDense
from keras_renorm.src.layers.kernels import Kernel, find_kernels
from keras_renorm.src.layers.prunable import PRUNING_ARGUMENTS, PrunableLayer, plain_values, plain_variables, prunable_layers
from keras_renorm.src.layers.wrapper import RenormalizedPruning
from keras_renorm.src.models.comparing import check_same
from keras_renorm.src.models.copying import Copier, exchange_variable, with_config
from keras_renorm.src.models.graph import users_of
from keras_renorm.src.pruning.delivery import shortfall
from keras_renorm.src.rules import criteria
from keras_renorm.src.runtimes.targets import choose_patterns, is_named, names_of

_DROP_IN = {cls.plain_class: cls for cls in (PrunableDense, PrunableConv2D)}
_REBUILT = (keras.Sequential, Functional)


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
    """The same model with prunable layers: same names, same weights, same outputs.

    Dense and Conv2D become `PrunableDense` and `PrunableConv2D`, other layers with kernels are wrapped by
    `RenormalizedPruning`. The model passed in stays as it is. If it was compiled, the new one is too, with a fresh optimizer.

    Args:
        model: a built Sequential or Functional model; models inside it are converted too.
        layers: which layers: a name (or glob, such as `"block_*"`; `"user/fc1"` is layer `"fc1"` of the model `"user"` in
            it), a layer class, a predicate `layer -> bool`, or a list of these; `None` for all that have something to prune,
            but not for position embeddings and class tokens. A chosen layer that cannot be pruned stays as it is, and a
            warning lists it.
        pruning_schedule: when to prune and how much; `None` leaves it to `keras_renorm.callbacks.UpdatePruning`.
        criterion: what scores the weights.
        pattern: which weights live and die together; or a dict of layer name (or glob) to pattern.
        group: `"layer"` or `"unit"`: which weights compete with each other.
        renormalize: `"auto"`, `"l1"`, `"l2"`, a renormalizer, or `None`.
        regrow: whether a removed weight may come back at a later event.
        from_zeros: take the zeros of the kernels as the masks, to fine-tune a sparse model without losing its sparsity.
        target: the runtime that is to be fast, which chooses patterns, as in `keras_renorm.prune`.

    Returns:
        A new model.

    Raises:
        ValueError: if the model is not built, is a subclassed one, or has nothing to prune.
        TypeError: if it is not a Keras 3 model.

    Example:

    >>> import keras, keras_renorm as kr
    >>> model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(2, name="fc")])
    >>> type(kr.to_prunable(model).get_layer("fc")).__name__
    'PrunableDense'
    """
    validation.check_model(model)
    _check_exchangeable(model)
    pruning = dict(
        pruning_schedule=pruning_schedule,
        criterion=criteria.get(criterion),
        group=group,
        renormalize=renormalize,
        regrow=regrow,
    )
    chosen, readers = _without_used_elsewhere(model, choose_layers(model, layers))
    patterns_of = choose_patterns(pattern, target, model, list(chosen.values()))
    chosen = {key: layer for key, layer in chosen.items() if patterns_of[key] is not None}
    # Checks every argument before any work is done.
    for one in patterns_of.values():
        probe = keras.layers.Dense(1, name="checks_arguments")
        RenormalizedPruning(probe, pattern=one or "unstructured", name="checks_arguments", **pruning)

    def convert(layer, copier):
        if id(layer) not in chosen and id(layer) not in readers:
            return None
        # What only reads another layer's kernel has no masks of its own.
        arguments = dict(pruning, pattern=patterns_of.get(id(layer), "unstructured"))
        if type(layer) in _DROP_IN and id(layer) in chosen:
            return copier.copy_as(layer, _DROP_IN[type(layer)], lambda new: new.become_prunable(**arguments))
        wrapper = keras.Layer.__new__(RenormalizedPruning)

        def wrap(inner):
            wrapper.__init__(inner, name=layer.name, trainable=layer.trainable, **arguments)

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
    """The layers whose masks can hold wherever their kernels are used, and the `id` of layers that read such kernels.

    A layer that holds another one can be wrapped, so that it reads the masked kernel. An operation cannot, nor can a function
    that reads the kernel from outside of it, or a layer that has the variable alone.
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
        if type(part) not in _REBUILT
        and isinstance(part, _REBUILT)
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
    if not isinstance(model, _REBUILT):
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
    """The same model with plain Keras layers, whose kernels hold zeros where weights were pruned.

    Masks and scales are multiplied into the kernels, so outputs stay the same. The layers get their original names, and the
    result loads without keras_renorm. The model passed in stays as it is; one without prunable layers is copied.

    Args:
        model: a built Sequential or Functional model.

    Returns:
        A new model. It is compiled if `model` was, with a fresh optimizer.

    Raises:
        ValueError: if the model is not built, or is a subclassed one with prunable layers.

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
    """What `strip` returns, and its layer or variable for the `id` of each layer and variable of `model` that has one."""
    within = {id(layer) for outer in outermost_layers(model) for layer in _through_wrappers(outer)}
    left = [layer.name for layer in prunable_layers(model) if id(layer) not in within]
    if left:
        raise ValueError(
            f"Model '{model.name}' has prunable layers inside a layer or model of your own, which cannot be taken out from "
            f"outside: {left}. Give your class an argument that chooses between the plain and the prunable layer, or wrap "
            "the whole layer in `keras_renorm.layers.RenormalizedPruning` instead of the layers in it."
        )
    if prunable_layers(model) and not isinstance(model, _REBUILT):
        raise ValueError(
            f"Model '{model.name}' is a subclass of `keras.Model` ({type(model).__name__}), whose prunable layers "
            f"{[layer.name for layer in prunable_layers(model)]} cannot be taken out from outside. Give your class an argument "
            "that chooses between `keras.layers.Dense` and `keras_renorm.layers.PrunableDense`, or build the model with the "
            "functional API."
        )
    return copy_model(model, _plain_counterpart)


def _through_wrappers(layer: keras.Layer) -> Iterator[keras.Layer]:
    """A layer, and what Keras' own wrappers (TimeDistributed) hold, as they are saved with it."""
    yield layer
    if isinstance(layer, keras.layers.Wrapper) and not isinstance(layer, PrunableLayer):
        yield from _through_wrappers(layer.layer)


def _plain_counterpart(layer: keras.Layer, copier: Copier) -> keras.Layer | None:
    """A copy without masks of a prunable layer; `None` for others."""
    if not isinstance(layer, PrunableLayer) or not layer.built:
        return None
    if not isinstance(layer, RenormalizedPruning):
        return remade(copier, layer, with_config(layer, layer.plain_class, without=PRUNING_ARGUMENTS))

    def fill_in(inner):
        for kernel in layer.masked_kernels:
            variable = copier.copies[id(kernel.variable)]
            variable.assign(kernel.effective())
            if kernel.variable.regularizer is not None:
                variable.regularizer = kernel.variable.regularizer.regularizer

    return copier.copy_as(layer.layer, type(layer.layer), fill_in)


def remade(copier: Copier, layer: keras.Layer, new: keras.Layer) -> keras.Layer:
    """Build a layer that another config gave, and let it have the variables of a layer, with what it computes with."""
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


def choose_layers(model: keras.Model, layers: Any, argument: str = "layers") -> dict[int, keras.Layer]:
    """The layers of a plain model that are to be pruned, by `id`.

    Args:
        model: a built model.
        layers: as in `to_prunable`.
        argument: what they were passed as, for the error message.

    Raises:
        ValueError: if a name matches no layer, or nothing is left to prune.
    """
    selectors = list(layers) if isinstance(layers, (list, tuple, set)) else [layers]
    candidates = list(outermost_layers(model))
    names = names_of(model)
    for selector in selectors:
        if isinstance(selector, str) and not any(is_named(names[id(layer)], selector) for layer in candidates):
            raise ValueError(
                f"Argument `{argument}` names no layer of model '{model.name}'. Received: {selector!r}. Its layers are: "
                f"{[layer.name for layer in candidates]}."
            )
    chosen, refused = {}, []
    kernels = kernels_by_layer(model)
    for layer in candidates:
        if isinstance(layer, PrunableLayer) or not any(_selects(selector, layer, names[id(layer)]) for selector in selectors):
            continue
        found = kernels[id(layer)]
        if isinstance(found, ValueError):
            refused.append(str(found))
        elif found and (layers is not None or not found[0].added):
            chosen[id(layer)] = layer
        elif layers is not None:
            refused.append(f"layer '{layer.name}' has no kernel")
    if not chosen:
        reason = f"Left as they are: {'; '.join(refused)}." if refused else "None of its layers has a kernel."
        if layers is not None and not refused:
            reason = f"No layer was chosen. Its layers are: {[layer.name for layer in candidates]}."
        raise ValueError(f"Model '{model.name}' has nothing to prune. Received: {argument}={layers!r}. {reason}")
    if refused:
        warnings.warn(f"Left as they are: {'; '.join(refused)}.", stacklevel=3)
    return chosen


def _selects(selector: Any, layer: keras.Layer, names: list[str]) -> bool:
    if selector is None:
        return True
    if isinstance(selector, str):
        return is_named(names, selector)
    if isinstance(selector, type):
        return isinstance(layer, selector)
    if isinstance(selector, keras.Layer):
        return layer is selector
    if callable(selector):
        return bool(selector(layer))
    raise ValueError(
        "Argument `layers` must be a name, a layer class, a predicate `layer -> bool`, or a list of these. "
        f"Received: {selector!r}."
    )


def outermost_layers(model: keras.Model) -> Iterator[keras.Layer]:
    """The layers of a model and of the Sequential and Functional models in it, each once."""
    seen = set()

    def walk(container):
        for layer in container.layers:
            if id(layer) in seen:
                continue
            seen.add(id(layer))
            if isinstance(layer, _REBUILT):
                yield from walk(layer)
            else:
                yield layer

    return walk(model)


def kernels_by_layer(model: keras.Model) -> dict[int, list[Kernel] | ValueError]:
    """The prunable weights of each layer that `outermost_layers` gives, by its `id`; each counts for one layer alone.

    A layer that holds another one of these layers reads the other's weights. Where a layer cannot be pruned as it is, there is
    an error that says why.
    """
    layers = list(outermost_layers(model))
    ids = set(map(id, layers))
    readers = [layer for layer in layers if any(id(part) in ids for part in flatten_layers(layer, include_self=False))]
    found: dict[int, list[Kernel] | ValueError] = {}
    taken: set[int] = set()
    for layer in [layer for layer in layers if layer not in readers] + readers:
        try:
            kernels = [kernel for kernel in find_kernels(layer) if id(kernel.variable) not in taken]
        except ValueError as error:
            found[id(layer)] = error
            continue
        found[id(layer)] = kernels
        taken.update(id(kernel.variable) for kernel in kernels)
    return found


def copy_model(
    model: keras.Model,
    convert: Callable[[keras.Layer, Copier], keras.Layer | None] | None = None,
    inputs: Any = None,
) -> tuple[keras.Model, dict[int, Any]]:
    """A model that computes what another one does, with weights of its own.

    Args:
        model: a built model.
        convert: gives for a layer what comes into its place, or `None` for a copy of it.
        inputs: samples to compare the two on, in the structure that the model takes; made up if `None`.

    Returns:
        The new model, and its object for the `id` of each object of `model`, such as a layer or a variable.

    Raises:
        ValueError: if the model cannot be copied, or its copy does not compute the same.
    """
    copier = Copier(model, convert)
    new = copier.copy(model)
    for kernel in (kernel for layer in prunable_layers(new) for kernel in layer.masked_kernels if kernel.settled is not None):
        kernel.settled.assign(False)
    check_same(model, new, copier.copies, inputs=inputs)
    if model.compiled:
        compile_like(new, model)
    return new, copier.copies


def _start_from_zeros(layer: keras.Layer) -> list[tuple[keras.Layer, str, keras.initializers.Initializer]]:
    """Let a layer that is not built yet begin with zeros, as it will get other values; answers what it had instead.

    To draw random values takes longer than to prune.
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


def compile_like(rebuilt: keras.Model, model: keras.Model) -> None:
    """Compile a model as another one is, with a fresh optimizer."""
    try:
        if type(model).compile is not keras.Model.compile:
            raise ValueError(f"{type(model).__name__} has a `compile` of its own")
        rebuilt.compile_from_config(model.get_compile_config())
    except Exception as error:
        warnings.warn(
            f"The new model '{rebuilt.name}' is not compiled: the arguments of `compile` of the old one cannot be copied "
            f"({error}). Call `compile` on it before training.",
            stacklevel=5,
        )
