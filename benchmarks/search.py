"""What the search epochs of pruning at initialization cost, beside plain training of the same prunable network.

Trains in turns, epoch by epoch, without a method and with each; prints the median time of a training step as a ratio, and
the ratio of whole epochs, in which masks are chosen too. Then the time and the memory that a choice takes as kernels grow.

    python benchmarks/search.py
"""

from __future__ import annotations

import argparse
import os
import pathlib
import sys
import time
import tracemalloc

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
sys.path.insert(0, str(pathlib.Path(__file__).parents[1] / "examples"))

import keras
import numpy as np
import prune_at_initialization as example
from step_times import step_times

import keras_renorm as kr

METHODS = {
    "plain training": None,
    "K-starts, magnitude": lambda: kr.methods.KStarts(0.9, search_epochs=1000),
    "K-starts, combined": lambda: kr.methods.KStarts(0.9, search_epochs=1000, fitness="combined"),
    "dissipating": lambda: kr.methods.DissipatingGradients(0.9, search_epochs=1000),
}
SHAPES = {"dense": (28, 28, 1), "conv": (32, 32, 3)}


def trainings(network, samples):
    """One training a method, as a function that trains for an epoch and returns the seconds of a step and of the epoch."""
    x = np.random.default_rng(0).random((samples, *SHAPES[network]), np.float32)
    y = np.arange(samples, dtype="int32") % 10

    def start(method):
        keras.utils.set_random_seed(0)
        model = kr.to_prunable(example.NETWORKS[network](x.shape[1:], 10), layers=example.prunable)
        model.compile("adam", keras.losses.SparseCategoricalCrossentropy(from_logits=True))
        times = step_times()
        callbacks = [method()] if method else []
        epoch = 0

        def train():
            nonlocal epoch
            started = time.perf_counter()
            model.fit(x, y, batch_size=128, initial_epoch=epoch, epochs=epoch + 1, verbose=0, callbacks=[*callbacks, times])
            epoch += 1
            return float(np.median(times.seconds)), time.perf_counter() - started

        for callback in callbacks:
            callback.set_model(model)
            callback.set_params(dict(epochs=1000))
            callback.on_train_begin()
            # Each `fit` below is one epoch of one long training, which neither begins nor ends with it.
            callback.on_train_begin = callback.on_train_end = lambda logs=None: None
        return train

    return {name: start(method) for name, method in METHODS.items()}


def steps(network, samples, epochs):
    runs = trainings(network, samples)
    seconds = {name: [] for name in runs}
    for _ in range(epochs + 1):
        for name, train in runs.items():
            seconds[name].append(train())
    medians = {name: np.median(values[1:], axis=0) for name, values in seconds.items()}
    step, epoch = medians["plain training"]
    print(f"\n{network}: a plain step takes {1000 * step:.2f} ms, an epoch of {samples} samples {epoch:.2f} s")
    for name, (one_step, one_epoch) in medians.items():
        print(f"{name:22} step {one_step / step:5.2f}x   epoch {one_epoch / epoch:5.2f}x")


def choose(model, candidates):
    """Seconds that the choice takes."""
    pruning = kr.methods.KStarts(0.9, k=candidates, search_epochs=1)
    pruning.set_model(model)
    pruning.set_params(dict(epochs=2))
    pruning.on_train_begin()
    pruning.on_epoch_begin(0)
    started = time.perf_counter()
    pruning.on_epoch_end(0)
    return time.perf_counter() - started


def peak(model, candidates):
    """Bytes that the choice takes at most."""
    tracemalloc.start()
    choose(model, candidates)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return peak


def choices(sizes, k=64):
    print(f"\nK-starts, choice among {k} candidates for one kernel")
    for inputs, units in sizes:
        keras.utils.clear_session()
        model = keras.Sequential([keras.Input((inputs,)), kr.layers.PrunableDense(units)])
        model.compile("sgd", "mse")

        weights = inputs * units
        seconds, extra = choose(model, k), (peak(model, k) - peak(model, 1)) / (4 * weights)
        print(
            f"{weights / 1e6:6.1f} million weights: {seconds:6.2f} s, {1e9 * seconds / weights / k:.1f} ns a candidate and "
            f"weight; memory beyond that of one candidate: {extra:.3f} copies of the weights"
        )


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=20_000)
    parser.add_argument("--epochs", type=int, default=7, help="epochs of each training after the first, which compiles")
    parser.add_argument("--network", nargs="*", choices=SHAPES, default=list(SHAPES))
    arguments = parser.parse_args()
    for network in arguments.network:
        steps(network, arguments.samples, arguments.epochs)
    choices([(1000, 1000), (2000, 2000), (3200, 3200)])


if __name__ == "__main__":
    main()
