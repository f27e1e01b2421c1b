"""One kernel of a model during a search, as arrays."""

from __future__ import annotations

import numpy as np
from keras import ops

from keras_renorm.src.core import validation
from keras_renorm.src.kernels import masks
from keras_renorm.src.kernels.events import effective, in_float, new_scale
from keras_renorm.src.layers.prunable import PrunableLayer
from keras_renorm.src.layers.prunable_kernel import PrunableKernel
from keras_renorm.src.training.optimizers.recorder import Recorder


class SearchedKernel:
    """One kernel of a model during a search, as arrays."""

    def __init__(self, layer: PrunableLayer, masked: PrunableKernel, index: int, recorder: Recorder | None):
        self.layer, self.masked, self.index, self._recorder = layer, masked, index, recorder
        self.path = masked.variable.path
        self.name = f"kernel '{self.path}' of layer '{layer.name}'"
        self.mask, self.scale = (ops.convert_to_numpy(variable) for variable in (masked.mask, masked.scale))
        values = ops.convert_to_numpy(masked.variable)
        self.kernel = in_float(values)
        self.current = effective(self.kernel, self.mask, self.scale, f"K{self.name[1:]}")

    @property
    def start(self) -> np.ndarray:
        """The values that the weights had when training began."""
        return self._recorded("start")

    @property
    def gradient(self) -> np.ndarray:
        """The sum of gradient magnitudes over the last epoch."""
        gradient = self._recorded("gradient")
        if not gradient.any():
            raise ValueError(
                f"The optimizer recorded no gradient for {self.name}. Does the model's own `train_step` use another optimizer "
                "than `model.optimizer`, or is the layer not connected to the loss?"
            )
        validation.check_finite(gradient, f"The gradient of {self.name}")
        return gradient

    def _recorded(self, what: str) -> np.ndarray:
        return getattr(self._recorder, what)(self.masked.variable)

    def best(self, scores: np.ndarray, sparsity: float, group: str | None = None, among: np.ndarray | None = None):
        """The mask that keeps the highest scores among the kept weights (or among those of `among`)."""
        return masks.compute_mask(
            scores,
            sparsity,
            self.layer.pattern,
            group or self.layer.group,
            self.masked.input_axes,
            mask=self.mask if among is None else among,
        )

    def update(self, mask: np.ndarray) -> tuple[PrunableKernel, np.ndarray, np.ndarray]:
        """The kernel, the mask and the scales to assign."""
        if mask is self.mask:
            return self.masked, mask, self.scale
        scale = new_scale(self.kernel, self.mask, mask, self.scale, self.layer.renormalize, self.masked.input_axes)
        return self.masked, mask, scale
