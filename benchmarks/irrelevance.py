"""What irrelevant-weight regularization costs a training step, beside the same optimizer without it.

Trains in turns, epoch by epoch; prints the median time of a step and the ratio to the plain optimizer's.

    python benchmarks/irrelevance.py
"""

from __future__ import annotations

import argparse
import os
import pathlib
import sys

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
sys.path.insert(0, str(pathlib.Path(__file__).parents[1] / "examples"))

import keras
import networks
import numpy as np
from step_times import step_times

import keras_renorm as kr


def wide(shape, classes):
    layers = [keras.layers.Dense(2048, "relu"), keras.layers.Dense(2048, "relu"), keras.layers.Dense(classes)]
    return keras.Sequential([keras.Input(shape), keras.layers.Flatten(), *layers])


NETWORKS = {"LeNet-300-100": networks.lenet_300_100, "784-2048-2048-10": wide, "LeNet-5": networks.lenet_5}
WAYS = {
    "plain": lambda optimizer: optimizer,
    "relative (default)": kr.optimizers.IrrelevanceDecay,
    "raw gradients": lambda optimizer: kr.optimizers.IrrelevanceDecay(optimizer, relative=False),
}


def training(network, way, samples):
    """A function that trains for an epoch and returns the median seconds of a step."""
    x = np.random.default_rng(0).random((samples, 28, 28, 1), np.float32)
    y = np.arange(samples, dtype="int32") % 10
    keras.utils.set_random_seed(0)
    model = NETWORKS[network](x.shape[1:], 10)
    model.compile(WAYS[way](keras.optimizers.Adam(1e-3)), keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    times = step_times()

    def train():
        model.fit(x, y, batch_size=128, verbose=0, callbacks=[times])
        return float(np.median(times.seconds))

    return train


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=12_800)
    parser.add_argument("--epochs", type=int, default=7, help="epochs of each training after the first, which compiles")
    parser.add_argument("--network", nargs="*", choices=NETWORKS, default=list(NETWORKS))
    arguments = parser.parse_args()
    for network in arguments.network:
        runs = {way: training(network, way, arguments.samples) for way in WAYS}
        seconds = {way: [] for way in runs}
        for _ in range(arguments.epochs + 1):
            for way, train in runs.items():
                seconds[way].append(train())
        medians = {way: float(np.median(values[1:])) for way, values in seconds.items()}
        print(f"\n{network}, Adam, batch 128: a plain step takes {1000 * medians['plain']:.2f} ms", flush=True)
        for way, one in medians.items():
            print(f"{way:20} {one / medians['plain']:5.2f}x", flush=True)


if __name__ == "__main__":
    main()
