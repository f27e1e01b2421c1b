"""The inputs and outputs of layers while a model runs."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import keras


@dataclasses.dataclass(frozen=True)
class LayerCall:
    """One call of a layer or an operation.

    Args:
        layer: the layer or operation.
        inputs: the first argument of a layer; all arguments of an operation.
        outputs: its outputs before the activation.
    """

    layer: keras.Operation
    inputs: Any
    outputs: Any


class _Enough(BaseException):
    """Ends a forward pass that has shown everything that was asked for. It is no `Exception`, which Keras rewrites."""


def observe(
    run: Callable[[], Any], layers: Sequence[keras.Operation], calls: int | None = None, outputs: bool = True
) -> list[LayerCall]:
    """Run a function and return the calls of some layers in it.

    It works for everything that runs eagerly, also for subclassed models. The layers' own `call` is restored at the end.

    Args:
        run: calls the layers, such as a forward pass.
        layers: the layers and operations to observe, at any depth.
        calls: number of calls after which to stop. Defaults to `None`: run to the end.
        outputs: whether the outputs are needed. If not, the last call is not executed. Defaults to `True`.

    Returns:
        The calls in order.
    """
    seen = []

    def watch(layer):
        original = layer.call

        def call(*args, **kwargs):
            inputs = (*args, *kwargs.values())
            inputs = inputs[0] if isinstance(layer, keras.Layer) else inputs
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
    """A context in which PyTorch records nothing for a backward pass, as the other backends do by themselves."""
    if keras.backend.backend() == "torch":
        import torch

        return torch.no_grad()
    return contextlib.nullcontext()
