"""From a plain model to one with prunable layers, and back."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import keras
from keras import ops
from keras.src.models import Functional

from keras_renorm import criteria, validation
from keras_renorm.arrays import for_another
from keras_renorm.layers import PrunableConv2D, PrunableDense, RenormalizedPruning
from keras_renorm.layers.kernels import find_kernels
from keras_renorm.layers.masked import PRUNING_ARGUMENTS, MaskedLayer, masked_layers, plain_values, plain_variables
from keras_renorm.targets import choose_patterns, is_named, names_of

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
    pruning = dict(
        pruning_schedule=pruning_schedule,
        criterion=criteria.get(criterion),
        group=group,
        renormalize=renormalize,
        regrow=regrow,
    )
    chosen = choose_layers(model, layers)
    patterns_of = choose_patterns(pattern, target, model, list(chosen.values()))
    chosen = {key: layer for key, layer in chosen.items() if patterns_of[key] is not None}
    # Checks every argument before any work is done.
    for one in patterns_of.values():
        probe = keras.layers.Dense(1, name="checks_arguments")
        RenormalizedPruning(probe, pattern=one or "unstructured", name="checks_arguments", **pruning)

    def convert(layer):
        if id(layer) not in chosen:
            return None
        arguments = dict(pruning, pattern=patterns_of[id(layer)])
        if type(layer) in _DROP_IN:
            return copy_layer(layer, _DROP_IN[type(layer)], **arguments)
        return RenormalizedPruning(copy_layer(layer), name=layer.name, trainable=layer.trainable, **arguments)

    converted, _ = rebuild(model, convert)
    if from_zeros:
        _masks_from_zeros(converted)
    return converted


def _masks_from_zeros(model: keras.Model) -> None:
    empty = []
    for layer in masked_layers(model):
        for kernel in layer.masked_kernels:
            # Layers that were prunable before have masks to keep.
            kept = ops.convert_to_numpy(kernel.mask) & (ops.convert_to_numpy(kernel.variable) != 0)
            kernel.mask.assign(kept)
            if not kept.any():
                empty.append(kernel.variable.path)
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
    message = never_pruned(model)
    if message:
        warnings.warn(message, stacklevel=2)
    return plain_copy(model)[0]


def plain_copy(model: keras.Model) -> tuple[keras.Model, dict[int, keras.Variable]]:
    """What `strip` returns, and its variable for the `id` of each variable of `model` that is no mask, scale or step."""
    stripped, counterparts = rebuild(model, _plain_counterpart)
    left = [layer.name for layer in masked_layers(stripped)]
    if left:
        raise ValueError(
            f"Model '{model.name}' has prunable layers inside a layer or model of your own, which cannot be taken out from "
            f"outside: {left}. Give your class an argument that chooses between the plain and the prunable layer, or wrap "
            "the whole layer in `keras_renorm.layers.RenormalizedPruning` instead of the layers in it."
        )
    variables = {
        id(old): new
        for layer in outermost_layers(model)
        if id(layer) in counterparts
        for old, new in zip(plain_variables(layer), counterparts[id(layer)].variables)
    }
    return stripped, variables


def _plain_counterpart(layer: keras.Layer) -> keras.Layer | None:
    """A new layer without masks; `None` if there are none. Keras' own wrappers (TimeDistributed) are looked into."""
    if isinstance(layer, RenormalizedPruning):
        return copy_layer(layer.layer)
    if isinstance(layer, MaskedLayer):
        return copy_layer(layer, layer.plain_class, without=PRUNING_ARGUMENTS)
    if isinstance(layer, keras.layers.Wrapper) and (inner := _plain_counterpart(layer.layer)) is not None:
        return copy_layer(layer, layer=keras.saving.serialize_keras_object(inner))
    return None


def never_pruned(model: keras.Model) -> str | None:
    """What to tell the user if layers have a schedule but no event ever removed a weight, or `None`."""
    idle = [layer for layer in masked_layers(model) if layer.pruning_schedule is not None and layer.sparsity == 0]
    if not idle:
        return None
    names = [layer.name for layer in idle]
    trained = max(int(ops.convert_to_numpy(layer.pruning_step)) for layer in idle)
    if trained <= 0:
        remedy = "Pass the callback when training: `model.fit(..., callbacks=[keras_renorm.callbacks.UpdatePruning()])`."
    else:
        remedy = f"Training stopped after {trained} steps: train longer, or let the schedule begin earlier."
    return f"No pruning event ever ran: layers {names} have a schedule, but all their weights are still there. {remedy}"


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
    for layer in candidates:
        if isinstance(layer, MaskedLayer) or not any(_selects(selector, layer, names[id(layer)]) for selector in selectors):
            continue
        try:
            kernels = find_kernels(layer)
            if kernels and (layers is not None or not kernels[0].added):
                chosen[id(layer)] = layer
            elif layers is not None:
                refused.append(f"layer '{layer.name}' has no kernel")
        except ValueError as error:
            refused.append(str(error))
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


def rebuild(
    model: keras.Model, convert: Callable[[keras.Layer], keras.Layer | None]
) -> tuple[keras.Model, dict[int, keras.Layer]]:
    """Build a model anew, layer by layer, with the weights copied.

    Args:
        model: a built model. A subclassed one is copied by its config, which `convert` cannot change.
        convert: gives the new layer for a layer, or `None` for a copy of it.

    Returns:
        The new model, and its layer for the `id` of each layer of `model`.

    Raises:
        ValueError: if the model is a subclassed one and `convert` would change a layer of it.
    """
    if not isinstance(model, _REBUILT):
        return _copy_subclassed(model, convert)
    counterparts = {}
    initializers = []

    def clone(operation):
        new = convert(operation) if isinstance(operation, keras.Layer) else None
        new = copy_layer(operation) if new is None else new
        counterparts[id(operation)] = new
        if isinstance(new, keras.Layer):
            initializers.extend(_start_from_zeros(new))
        return new

    compiled = model.compiled
    try:
        # Keras would compile the clone from a config, and fail for losses and metrics that have none.
        model.compiled = False
        rebuilt = keras.models.clone_model(model, clone_function=clone, recursive=True)
    finally:
        model.compiled = compiled
        for part, name, initializer in initializers:
            setattr(part, name, initializer)
    if type(rebuilt) is not type(model):
        warnings.warn(
            f"Model '{model.name}' is a {type(model).__name__}, the new one a plain {type(rebuilt).__name__}: what the class "
            "adds (such as its own `train_step`) is not carried over.",
            stacklevel=4,
        )
    if compiled:
        compile_like(rebuilt, model)
    for layer in outermost_layers(model):
        if not isinstance(layer, keras.layers.InputLayer):
            _copy_weights(layer, counterparts[id(layer)])
    return rebuilt, counterparts


def _start_from_zeros(layer: keras.Layer) -> list[tuple[keras.Layer, str, keras.initializers.Initializer]]:
    """Let a layer that is not built yet begin with zeros, as it will get other values; answers what it had instead.

    To draw random values takes longer than to prune.
    """
    found = [
        (part, name, value)
        for part in layer._flatten_layers()
        for name, value in vars(part).items()
        if isinstance(value, keras.initializers.Initializer)
    ]
    for part, name, _ in found:
        setattr(part, name, keras.initializers.Zeros())
    return found


def compile_like(rebuilt: keras.Model, model: keras.Model) -> None:
    """Compile a model as another one is, with a fresh optimizer."""
    try:
        rebuilt.compile_from_config(model.get_compile_config())
    except Exception as error:
        warnings.warn(
            f"The new model '{rebuilt.name}' is not compiled: the arguments of `compile` of the old one cannot be copied "
            f"({error}). Call `compile` on it before training.",
            stacklevel=5,
        )


def _copy_subclassed(model, convert):
    changed = [layer.name for layer in outermost_layers(model) if convert(layer) is not None]
    if changed and masked_layers(model):
        raise ValueError(
            f"Model '{model.name}' is a subclass of `keras.Model` ({type(model).__name__}), whose prunable layers {changed} "
            "cannot be taken out from outside. Give your class an argument that chooses between `keras.layers.Dense` and "
            "`keras_renorm.layers.PrunableDense`, or build the model with the functional API."
        )
    if changed:
        raise ValueError(
            f"Model '{model.name}' is a subclass of `keras.Model` ({type(model).__name__}), whose layers {changed} cannot be "
            "exchanged from outside. In your class, write `keras_renorm.layers.PrunableDense(...)` for "
            "`keras.layers.Dense(...)` (and `PrunableConv2D` for `Conv2D`), or wrap a layer: "
            "`keras_renorm.layers.RenormalizedPruning(layer)`. For a model that is trained already, "
            "`keras_renorm.prune(model, sparsity)` works as it is."
        )
    try:
        copy = keras.models.clone_model(model)
        if not copy.built:
            copy.build_from_config(model.get_build_config())
        _copy_weights(model, copy)
    except Exception as error:
        raise ValueError(
            f"Model '{model.name}' is a subclass of `keras.Model` ({type(model).__name__}) and could not be copied by its "
            f"config: {error}. Give the class `get_config()` with all arguments of its constructor, and a `build()` that "
            "builds its layers."
        ) from error
    counterparts = {
        id(old): new for old, new in zip(model._flatten_layers(include_self=False), copy._flatten_layers(include_self=False))
    }
    return copy, counterparts


def copy_layer(operation: Any, cls: type | None = None, without: tuple[str, ...] = (), **changes) -> Any:
    """A new layer (or operation) of the same config, or of another class, without or with other arguments."""
    cls = cls or type(operation)
    parts = operation._flatten_layers() if isinstance(operation, keras.Layer) else [operation]
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="The object being serialized includes a `lambda`")
            config = {key: value for key, value in operation.get_config().items() if key not in without}
        # Functions and classes that are not registered are at hand here, also lambdas.
        functions = {key: getattr(operation, key, None) for key in config}
        config.update({key: value for key, value in functions.items() if inspect.isfunction(value)})
        if cls is keras.layers.Lambda:
            config["output_shape"] = operation._output_shape
            return cls(**config)
        with keras.saving.custom_object_scope({type(part).__name__: type(part) for part in parts}):
            return cls.from_config({**config, **changes})
    except Exception as error:
        raise ValueError(
            f"Layer '{operation.name}' (of type {type(operation).__name__}) cannot be made anew from its config: {error} "
            "Give it a `get_config()` with all arguments of its constructor, and register what it uses with "
            "`@keras.saving.register_keras_serializable()`."
        ) from error


def _copy_weights(source: keras.Layer, target: keras.Layer) -> None:
    if len(source.variables) == len(target.variables):
        values, variables = source.variables, target.variables
    else:
        values, variables = plain_values(source), plain_variables(target)
    if [value.shape for value in values] != [variable.shape for variable in variables]:
        raise ValueError(
            f"Layer '{source.name}' (of type {type(source).__name__}) does not get its weights back when it is made from its "
            f"config: it has {[tuple(value.shape) for value in values]}, its copy has "
            f"{[tuple(variable.shape) for variable in variables]}. Check its `get_config()` and `build()`."
        )
    for value, variable in zip(values, variables):
        variable.assign(for_another(value))
