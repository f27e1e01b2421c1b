"""The inputs and outputs of layers while a model runs."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import keras


@dataclasses.dataclass(frozen=True)
class LayerCall:
    """One call of a layer: its first argument, and its outputs before the activation."""

    layer: keras.Layer
    inputs: Any
    outputs: Any


class _Enough(BaseException):
    """Ends a forward pass that has shown all that was asked for; not an `Exception`, which Keras would rewrite."""


def observe(
    run: Callable[[], Any], layers: Sequence[keras.Layer], calls: int | None = None, outputs: bool = True
) -> list[LayerCall]:
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
                seen.append(LayerCall(layer, inputs, None))
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
            seen.append(LayerCall(layer, inputs, result))
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
        with contextlib.suppress(_Enough), without_gradients():
            run()
    finally:
        for layer, before in zip(layers, own):
            if before is not None:
                object.__setattr__(layer, "call", before)
            else:
                layer.__dict__.pop("call", None)
    return seen


def without_gradients() -> contextlib.AbstractContextManager:
    """A context in which PyTorch records nothing for a backward pass; the other backends record nothing by themselves."""
    if keras.backend.backend() == "torch":
        import torch

        return torch.no_grad()
    return contextlib.nullcontext()
