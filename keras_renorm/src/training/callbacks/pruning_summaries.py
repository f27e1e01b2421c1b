"""The callback that writes sparsity to TensorBoard."""

from __future__ import annotations

import keras
import numpy as np
from keras import ops

from keras_renorm.src.layers.prunable import PrunableLayer, prunable_layers, sparsity_of


class PruningSummaries(keras.callbacks.TensorBoard):
    """`keras.callbacks.TensorBoard` that also shows the sparsity and the scales of every prunable layer.

    It takes the arguments of `keras.callbacks.TensorBoard` and replaces it. At the end of every epoch it writes, beside
    `epoch_loss` and the metrics:

    - `epoch_sparsity`: the sparsity of the whole model;
    - `epoch_sparsity/LAYER`: the sparsity of a layer;
    - `epoch_scale_mean/LAYER`, `epoch_scale_max/LAYER`: the mean and the maximum of the scales of its units.

    With `histogram_freq=1` TensorBoard draws histograms of all scales and weights. The callback works on every backend of
    Keras; TensorFlow writes the files.

    Raises:
        ValueError: when training begins, if the model has no prunable layers.

    Example:

    >>> import os, tempfile, keras, numpy as np, keras_renorm as kr
    >>> model = keras.Sequential([keras.Input((4,)), kr.layers.PrunableDense(1)])
    >>> model.compile("sgd", "mse")
    >>> logs = os.path.join(tempfile.mkdtemp(), "logs")
    >>> callbacks = [kr.callbacks.UpdatePruning(kr.schedules.ConstantSparsity(0.5, 0)), kr.callbacks.PruningSummaries(logs)]
    >>> history = model.fit(np.ones((8, 4)), np.ones((8, 1)), verbose=0, callbacks=callbacks)
    >>> os.listdir(logs)
    ['train']

    Show the logs with `tensorboard --logdir logs`.
    """

    def on_train_begin(self, logs=None):
        if not prunable_layers(self.model):
            raise ValueError(
                f"Model '{self.model.name}' has no prunable layers, so `PruningSummaries` has nothing to show. Convert it "
                "first: `model = keras_renorm.to_prunable(model)`; or pass `keras.callbacks.TensorBoard`."
            )
        super().on_train_begin(logs)

    def on_epoch_end(self, epoch, logs=None):
        # In a copy: other callbacks, such as `History`, keep what the training gave them.
        super().on_epoch_end(epoch, {**(logs or {}), **_summaries(self.model)})


def _summaries(model: keras.Model) -> dict[str, float]:
    values = {"sparsity": sparsity_of(model)}
    for layer in prunable_layers(model):
        scales = _scales(layer)
        values[f"sparsity/{layer.path}"] = layer.sparsity
        values[f"scale_mean/{layer.path}"] = float(scales.mean())
        values[f"scale_max/{layer.path}"] = float(scales.max())
    return values


def _scales(layer: PrunableLayer) -> np.ndarray:
    return np.concatenate([np.ravel(ops.convert_to_numpy(kernel.scale)) for kernel in layer.masked_kernels])
