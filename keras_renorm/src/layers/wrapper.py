"""`RenormalizedPruning`: makes any layer prunable."""

from __future__ import annotations

import functools
import inspect

import keras

from keras_renorm.src.core import registry, validation
from keras_renorm.src.core.keras_internals import flatten_layers, turn_remat_off
from keras_renorm.src.layers.prunable import PrunableLayer


@registry.register
class RenormalizedPruning(PrunableLayer, keras.layers.Wrapper):
    """Prunes and renormalizes the kernels of any layer.

    The wrapped layer may be a Dense, EinsumDense, Embedding, MultiHeadAttention or convolutional layer, a recurrent layer (also
    inside Bidirectional and TimeDistributed), or a layer of your own. Of your own layers, the trainable weights of rank two or
    more are pruned, or the weights that the method `get_prunable_weights()` of the layer returns.

    Args:
        layer: the layer to prune.
        pruning_schedule: when to prune and how much: a schedule of `keras_renorm.schedules` or of tfmot, or `None` for the
            schedule of the callback. Defaults to `None`.
        criterion: what scores the weights: a name or an instance of `keras_renorm.criteria`, or a callable. Defaults to
            `"magnitude"`.
        pattern: which weights are removed together: a name or an instance of `keras_renorm.patterns`. Defaults to
            `"unstructured"`.
        group: which weights compete with each other: `"layer"` or `"unit"`. Defaults to `"layer"`.
        renormalize: how the kept weights are rescaled at each event: `"auto"`, `"l1"`, `"l2"`, an instance of
            `keras_renorm.renorm.L1` or `L2`, or `None`. Defaults to `"auto"`.
        regrow: whether a later event may bring a removed weight back. Defaults to `False`.
        **kwargs: `name`, `dtype` and `trainable`.

    Attributes:
        masked_kernels: tuple with one entry for each kernel, which has a `variable`, a `mask` and a `scale`.

    Raises:
        TypeError: if `layer` is not a Keras layer.
        ValueError: if `layer` is prunable already, or an argument is not known.

    Example:

    >>> import keras, keras_renorm as kr
    >>> layer = kr.layers.RenormalizedPruning(keras.layers.LSTM(4))
    >>> layer.build((None, 5, 3))
    >>> [tuple(kernel.mask.shape) for kernel in layer.masked_kernels]
    [(3, 16), (4, 16)]
    """

    def __init__(
        self,
        layer,
        pruning_schedule=None,
        criterion="magnitude",
        pattern="unstructured",
        group="layer",
        renormalize="auto",
        regrow=False,
        **kwargs,
    ):
        validation.refuse_legacy_keras(layer, "layer")
        if not isinstance(layer, keras.Layer):
            raise TypeError(f"Argument `layer` must be a `keras.Layer`. Received: layer={layer} (of type {type(layer)}).")
        if isinstance(layer, PrunableLayer):
            raise ValueError(f"Argument `layer` is prunable already. Received: layer={layer}. Use it as it is.")
        # Keras reads the arguments of `call` and `build` from their signatures: show it the inner layer's.
        self.call = functools.wraps(layer.call)(lambda *args, **kwargs: self._call_inner(*args, **kwargs))
        self.build.__signature__ = inspect.signature(layer.build)
        super().__init__(
            layer,
            pruning_schedule=pruning_schedule,
            criterion=criterion,
            pattern=pattern,
            group=group,
            renormalize=renormalize,
            regrow=regrow,
            **{"dtype": layer.dtype_policy, **kwargs},
        )
        self.supports_masking = layer.supports_masking

    def __getattr__(self, name):
        # Only for names that the wrapper does not have. PyTorch finds layers by a `__getattr__` of its own.
        inherited = getattr(super(), "__getattr__", None)
        if inherited is not None:
            try:
                return inherited(name)
            except AttributeError:
                pass
        # Private names tell Keras about the wrapper itself.
        if name == "layer" or name.startswith("_"):
            raise AttributeError(f"'{type(self).__name__}' object has no attribute '{name}'")
        return getattr(self.layer, name)

    def build(self, *args, **kwargs):
        if not self.layer.built:
            build = self._call_symbolically if self._builds_by_call() else self.layer.build
            build(*args, **kwargs)
        # What an inner layer would compute anew in the backward pass would miss the masks, so only the wrapper as a whole does.
        for part in flatten_layers(self.layer):
            turn_remat_off(part)
        self._add_masks(self.layer)

    def _call_inner(self, *args, **kwargs):
        return self._call_masked(self.layer, self.layer, *args, **kwargs)

    def _builds_by_call(self):
        """Whether the layer has no `build` of its own, so that its inner layers are built when it is called."""
        return type(self.layer).build is keras.Layer.build

    def _call_symbolically(self, input_shape):
        try:
            self.layer(keras.tree.map_shape_structure(keras.KerasTensor, input_shape))
        except Exception as error:
            raise ValueError(
                f"Layer '{self.layer.name}' (of type {type(self.layer).__name__}) has no `build()` method, and could not be "
                f"built by calling it on an input of shape {input_shape}: {error} Give it a `build()` that builds its layers."
            ) from error

    @property
    def stateful(self):
        return getattr(self.layer, "stateful", False)

    def reset_state(self):
        self.layer.reset_state()

    def compute_mask(self, *args, **kwargs):
        return self.layer.compute_mask(*args, **kwargs)

    def compute_output_shape(self, *args, **kwargs):
        return self.layer.compute_output_shape(*args, **kwargs)

    def compute_output_spec(self, *args, **kwargs):
        return self.layer.compute_output_spec(*args, **kwargs)

    def get_build_config(self):
        return self.layer.get_build_config()

    def build_from_config(self, config):
        if self._builds_by_call() and not self.layer.built:
            self.build(config["input_shape"])
            return
        if not self.layer.built:
            self.layer.build_from_config(config)
        self.build()
