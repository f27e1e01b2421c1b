"""What the gradient of a weight says of it: why irrelevant-weight regularization does little more than L2 decay.

Trains LeNet-300-100 as `examples/irrelevant_weights.py` does, without regularization. Then, of each layer's kernel, with `|g|`
the size of the gradient of the mean loss of a batch:

- next batch: correlation of `|g|` with that of the next batch, the mean over all pairs;
- weight: correlation of `|g|` with the size of the weight, the mean over the batches;
- mean batch: `|g|` of all batches together over the mean `|g|` of one (1 if all agree, one over the square root of their number
  if gradients are noise without a direction);
- factor: the mean of `exp(-|g| / alpha)`, with which the regularization multiplies L2 decay, for an alpha as in the paper.

    python benchmarks/relevance.py
    python benchmarks/relevance.py --dataset mnist --data-dir DIR
"""

from __future__ import annotations

import argparse
import itertools
import os
import pathlib
import sys

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
sys.path.insert(0, str(pathlib.Path(__file__).parents[1] / "examples"))

import datasets
import irrelevant_weights as example
import keras
import networks
import numpy as np

import keras_renorm as kr


def gradient_sizes(model, kernels, x, y):
    """`|g|` of each kernel for one batch; the model stays as it is."""
    model.optimizer.reset_gradients()
    model.train_on_batch(x, y)
    return [model.optimizer.gradient(kernel).ravel() for kernel in kernels]


def correlation(one, other):
    return float(np.corrcoef(one, other)[0, 1])


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    datasets.add_arguments(parser)
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--batches", type=int, default=40)
    parser.add_argument("--alpha", type=float, default=0.1)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    train, _ = datasets.load(arguments.dataset, arguments.data_dir)
    (x, y), validation = example.split(train)
    keras.utils.set_random_seed(arguments.seed)
    model = networks.lenet_300_100(x.shape[1:], int(y.max()) + 1)
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(keras.optimizers.Adam(1e-3), loss, metrics=["accuracy"])
    batch = arguments.batch if len(x) > 10_000 else 16
    model.fit(x, y, batch_size=batch, epochs=arguments.epochs, verbose=0, callbacks=[example.annealed(arguments.epochs)])
    print(f"{arguments.dataset}: validation accuracy {model.evaluate(*validation, verbose=0)[1]:.4f}")
    # A learning rate of zero: gradients are recorded and nothing moves.
    model.compile(kr.optimizers.Recorder(keras.optimizers.SGD(0.0), start=False), loss)
    model.optimizer.build(model.trainable_variables)
    kernels = [layer.kernel for layer in model.layers if hasattr(layer, "kernel")]
    count = min(arguments.batches, len(x) // arguments.batch) * arguments.batch
    batches = [slice(start, start + arguments.batch) for start in range(0, count, arguments.batch)]
    sizes = [gradient_sizes(model, kernels, x[rows], y[rows]) for rows in batches]
    together = gradient_sizes(model, kernels, x[:count], y[:count])
    print(f"{len(batches)} batches of {arguments.batch}\n")
    print(f"{'kernel':14}  next batch  weight  mean batch  factor")
    for index, kernel in enumerate(kernels):
        here = [size[index] for size in sizes]
        weights = np.abs(keras.ops.convert_to_numpy(kernel)).ravel()
        columns = (
            np.mean([correlation(one, other) for one, other in itertools.pairwise(here)]),
            np.mean([correlation(one, weights) for one in here]),
            np.mean(together[index]) / np.mean(here),
            np.mean(np.exp(-np.array(here) / arguments.alpha)),
        )
        shape = "x".join(map(str, kernel.shape))
        print(f"{shape:14}  {columns[0]:10.3f}  {columns[1]:6.3f}  {columns[2]:10.3f}  {columns[3]:6.4f}", flush=True)


if __name__ == "__main__":
    main()
