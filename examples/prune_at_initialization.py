"""The experiment of M. Haroon's pruning at initialization (arXiv 2209.02201): sparse within the one training run.

Trains a fully connected network (LeNet-300-100) and a convolutional one, whole or sparse from the first epochs on: with a
random mask, with K-starts (each fitness; and the plain reading, the fittest of k whole random masks), with dissipating
gradients (by movement, and by the paper's relative movement), and with both after each other. All train for the same epochs,
all kernels but the last layer's are pruned, the masks are final after two epochs. Prints tables of test accuracies, writes
pictures and the data into saved_models/. A run that was stopped goes on where it was.

    python examples/prune_at_initialization.py
    python examples/prune_at_initialization.py --dataset mnist fashion_mnist --network dense --seeds 3
    python examples/prune_at_initialization.py --dataset cifar10 --network conv --seeds 3
"""

from __future__ import annotations

import argparse
import json
import os
import pathlib

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import curves
import datasets
import keras

import keras_renorm as kr

OUT = pathlib.Path(__file__).parents[1] / "saved_models"
SPARSITIES = (0.8, 0.9, 0.95, 0.98)
KStarts, DissipatingGradients = kr.methods.KStarts, kr.methods.DissipatingGradients
WAYS = {
    "random mask": None,
    "K-starts, plain": lambda sparsity, seed: KStarts(sparsity, recombine=None, seed=seed),
    "K-starts, magnitude": lambda sparsity, seed: KStarts(sparsity, seed=seed),
    "K-starts, gradient": lambda sparsity, seed: KStarts(sparsity, fitness="gradient", seed=seed),
    "K-starts, combined": lambda sparsity, seed: KStarts(sparsity, fitness="combined", seed=seed),
    "dissipating, relative": lambda sparsity, seed: DissipatingGradients(sparsity, movement="relative"),
    "dissipating": lambda sparsity, seed: DissipatingGradients(sparsity),
    "dissipating, K-starts": lambda sparsity, seed: KStarts(
        sparsity, search_epochs=1, after="dissipating_gradients", seed=seed
    ),
}


def dense(shape, classes):
    return keras.Sequential(
        [
            keras.Input(shape),
            keras.layers.Flatten(),
            keras.layers.Dense(300, "relu"),
            keras.layers.Dense(100, "relu"),
            keras.layers.Dense(classes, name="logits"),
        ]
    )


def conv(shape, classes):
    layers = [keras.Input(shape)]
    for filters in (16, 32, 64):
        layers += [
            keras.layers.Conv2D(filters, 3, strides=2 if filters > 16 or shape[0] > 16 else 1, padding="same", use_bias=False),
            keras.layers.BatchNormalization(),
            keras.layers.ReLU(),
        ]
    return keras.Sequential([*layers, keras.layers.Flatten(), keras.layers.Dense(classes, name="logits")])


NETWORKS = {"dense": dense, "conv": conv}


def prunable(layer):
    """All layers with a kernel but the last."""
    return isinstance(layer, (keras.layers.Dense, keras.layers.Conv2D)) and layer.name != "logits"


def run(network, way, sparsity, data, seed, epochs):
    """Train once and return the test accuracy; `way` is `None` for the dense network."""
    (x, y), test = data
    keras.utils.set_random_seed(seed)
    model = NETWORKS[network](x.shape[1:], int(y.max()) + 1)

    callbacks = []
    if way == "random mask":
        random = kr.criteria.Random(seed)
        model = kr.prune(model, sparsity, criterion=random, renormalize=None, layers=prunable)
        model = kr.to_prunable(model, layers=prunable, from_zeros=True)
    elif way is not None:
        model = kr.to_prunable(model, layers=prunable)
        callbacks.append(WAYS[way](sparsity, seed))
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile("adam", loss, metrics=["accuracy"], steps_per_execution=16)
    model.fit(x, y, batch_size=128 if len(x) > 10_000 else 16, epochs=epochs, verbose=0, callbacks=callbacks)
    rows = [row for row in kr.summary(model).rows if row.layer != "logits"]
    reached = 1 - sum(row.kept for row in rows) / sum(row.weights for row in rows)
    if abs(reached - sparsity) > 1e-3:
        raise RuntimeError(f"{way}: sparsity {reached:.4f} instead of {sparsity}")
    return float(model.evaluate(*test, batch_size=1000, verbose=0)[1])


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    datasets.add_arguments(parser, several=True)
    parser.add_argument("--network", nargs="+", choices=NETWORKS, default=list(NETWORKS))
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=8)
    arguments = parser.parse_args()
    OUT.mkdir(exist_ok=True)
    for name in arguments.dataset:
        data = datasets.load(name, arguments.data_dir)
        for network in arguments.network:
            path = OUT / f"prune_at_initialization_{name}_{network}.json"
            rows = json.loads(path.read_text()) if path.exists() else []
            for seed in range(arguments.seeds):
                for way in arguments.ways:
                    row = dict(setting=f"{name}, {network}", way=way, seed=seed, epochs=arguments.epochs)
                    if any(row.items() <= done.items() for done in rows):
                        continue
                    same = (done for done in rows if done["seed"] == seed and done["epochs"] == arguments.epochs)
                    first = next(same, None)
                    row["dense"] = first["dense"] if first else run(network, None, 0, data, seed, arguments.epochs)
                    row["accuracies"] = [run(network, way, s, data, seed, arguments.epochs) for s in SPARSITIES]
                    rows.append(row)
                    curves.save(path, rows)
            asked = [row for row in rows if row["epochs"] == arguments.epochs and row["way"] in arguments.ways]
            print("\n" + curves.table(asked, SPARSITIES), flush=True)
            curves.picture(asked, SPARSITIES, path.with_suffix(".png"))


if __name__ == "__main__":
    main()
