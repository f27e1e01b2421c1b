"""What masks cost: selecting one, and applying one in a training step.

Selection of a mask for a square kernel, beside numpy's introselect alone and the full sort that tfmot does
(`tf.math.top_k` of all weights); forward and backward pass of a Dense kernel with a bool mask (what the layers do), with a
float mask, and without one. Medians of alternating runs.

    python benchmarks/masks.py
"""

from __future__ import annotations

import argparse
import os
import time

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras
import numpy as np
import tensorflow as tf

from keras_renorm import patterns
from keras_renorm.masks import compute_mask


def medians(functions: dict, runs: int) -> dict:
    """Seconds of each function, called in turns."""
    times = {name: [] for name in functions}
    for _ in range(runs + 2):
        for name, function in functions.items():
            started = time.perf_counter()
            function()
            times[name].append(time.perf_counter() - started)
    return {name: float(np.median(values[2:])) for name, values in times.items()}


def selection(side, sparsity):
    scores = np.abs(np.random.default_rng(0).standard_normal((side, side), np.float32))
    tensor = tf.constant(scores.reshape(-1))
    return {
        "unstructured": lambda: compute_mask(scores, sparsity),
        "unstructured, group='unit'": lambda: compute_mask(scores, sparsity, group="unit"),
        "Block((4, 1))": lambda: compute_mask(scores, sparsity, patterns.Block((4, 1))),
        "NOfM(2, 4) at 50%": lambda: compute_mask(scores, 0.5, patterns.NOfM(2, 4)),
        "unit": lambda: compute_mask(scores, sparsity, "unit"),
        "numpy.partition alone": lambda: np.partition(scores.reshape(-1), int(sparsity * scores.size)),
        "tf.math.top_k of all (tfmot)": lambda: tf.math.top_k(tensor, scores.size)[0].numpy(),
    }


def step(side, batch):
    generator = np.random.default_rng(0)
    kernel = keras.Variable(generator.standard_normal((side, side)).astype("float32"))
    kept = generator.random((side, side)) < 0.1
    mask = keras.Variable(kept, dtype="bool", trainable=False)
    float_mask = keras.Variable(kept.astype("float32"), trainable=False)
    scale = keras.Variable(np.ones(side, "float32"), trainable=False)
    x = tf.constant(generator.standard_normal((batch, side)).astype("float32"))

    def gradient(effective):
        @tf.function
        def run():
            with tf.GradientTape() as tape:
                loss = tf.reduce_sum(tf.matmul(x, effective()) ** 2)
            return tape.gradient(loss, kernel.value)

        return run

    return {
        "dense": gradient(lambda: kernel.value + 0.0),
        "bool mask and scale (the layers)": gradient(lambda: tf.where(mask.value, kernel.value * scale.value, 0.0)),
        "bool mask, cast": gradient(lambda: kernel.value * tf.cast(mask.value, "float32") * scale.value),
        "float mask and scale": gradient(lambda: kernel.value * float_mask.value * scale.value),
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--side", type=int, default=2408, help="of the kernel; 2408 squared is 5.8 million")
    parser.add_argument("--sparsity", type=float, default=0.9)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--runs", type=int, default=11)
    arguments = parser.parse_args()
    weights = arguments.side**2
    print(f"selecting a mask for {weights / 1e6:.1f} million weights at {arguments.sparsity:.0%}")
    times = medians(selection(arguments.side, arguments.sparsity), arguments.runs)
    for name, seconds in times.items():
        ratio = seconds / times["numpy.partition alone"]
        print(f"  {name:34} {seconds * 1e3:8.1f} ms  {seconds / weights * 1e9:6.2f} ns a weight  {ratio:6.1f}x numpy.partition")
    print(f"forward and backward of a {arguments.side}x{arguments.side} kernel, batch {arguments.batch}")
    times = medians(step(arguments.side, arguments.batch), arguments.runs * 3)
    for name, seconds in times.items():
        print(f"  {name:34} {seconds * 1e3:8.1f} ms  {seconds / times['dense']:6.2f}x dense")


if __name__ == "__main__":
    main()
