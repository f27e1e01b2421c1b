"""Gradual pruning in `fit`, beside tfmot in the same run.

LeNet-300-100, Adam, batch 128, PolynomialDecay over every Dense layer. tfmot trains the same network on `tf_keras`; both
get the same data, epochs, schedule and seeds. Writes the table as JSON and a picture.

    python benchmarks/gradual.py --dataset mnist fashion_mnist --data-dir DIR
"""

from __future__ import annotations

import os
import pathlib
import sys

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
sys.path.insert(0, str(pathlib.Path(__file__).parents[1] / "examples"))

import keras
import numpy as np

import keras_renorm as kr

BATCH = 128


def network(library):
    """LeNet-300-100 of Keras 3 or of tf_keras."""
    layers = library.layers
    model = library.Sequential(
        [
            layers.InputLayer(shape=(784,)) if library is keras else layers.InputLayer(input_shape=(784,)),
            layers.Dense(300, activation="relu"),
            layers.Dense(100, activation="relu"),
            layers.Dense(10),
        ]
    )
    return model


def compile_(model, library):
    loss = library.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(optimizer=library.optimizers.Adam(), loss=loss, metrics=["accuracy"])


def train_dense(data, schedule, epochs, **_):
    model = network(keras)
    compile_(model, keras)
    model.fit(*data[0], batch_size=BATCH, epochs=epochs, verbose=0)
    return model.evaluate(*data[1], verbose=0)[1], 0.0


def train_ours(data, schedule, epochs, **pruning):
    model = kr.to_prunable(network(keras), pruning_schedule=kr.schedules.PolynomialDecay(**schedule), **pruning)
    compile_(model, keras)
    model.fit(*data[0], batch_size=BATCH, epochs=epochs, verbose=0, callbacks=[kr.callbacks.UpdatePruning()])
    plain = kr.strip(model)
    compile_(plain, keras)
    return plain.evaluate(*data[1], verbose=0)[1], kr.summary(plain).sparsity


def train_tfmot(data, schedule, epochs, **_):
    import tensorflow_model_optimization as tfmot
    import tf_keras

    sparsity = tfmot.sparsity.keras
    tf_keras.utils.set_random_seed(keras.utils.get_random_seed() if hasattr(keras.utils, "get_random_seed") else 0)
    model = sparsity.prune_low_magnitude(network(tf_keras), pruning_schedule=sparsity.PolynomialDecay(**schedule))
    compile_(model, tf_keras)
    model.fit(*data[0], batch_size=BATCH, epochs=epochs, verbose=0, callbacks=[sparsity.UpdatePruningStep()])
    plain = sparsity.strip_pruning(model)
    compile_(plain, tf_keras)
    kernels = [layer.kernel.numpy() for layer in plain.layers if hasattr(layer, "kernel")]
    zeros = sum(np.count_nonzero(kernel == 0) for kernel in kernels) / sum(kernel.size for kernel in kernels)
    return plain.evaluate(*data[1], verbose=0)[1], zeros
