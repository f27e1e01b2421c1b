"""The experiment of M. Rawson's renormalized pruning (arXiv 2206.10088), with every renormalization of this library.

Trains a fully connected network of three layers (512-256-classes, SGD with momentum, 20 epochs), prunes its first hidden
layer after training over a range of sparsities, and, in a second part, all layers but the last. No labels and no training
after pruning; the calibrated ways see at most 4096 unlabelled training images. Prints tables of test accuracies, writes
pictures and the data into saved_models/, and draws the paper's theorem: what a unit computes before and after pruning as
its weights and inputs become equal.

    python examples/renormalized_pruning.py
    python examples/renormalized_pruning.py --dataset mnist fashion_mnist cifar10 --seeds 3
"""

from __future__ import annotations

import argparse
import os
import pathlib

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import curves
import datasets
import keras
import numpy as np

import keras_renorm as kr

OUT = pathlib.Path(__file__).parents[1] / "saved_models"
SPARSITIES = (0.5, 0.8, 0.9, 0.95, 0.98, 0.99, 0.995)
SAMPLES = 4096
MAGNITUDE = dict(criterion="magnitude")
WAYS = {
    "plain": dict(MAGNITUDE, renormalize=None),
    "l1": dict(MAGNITUDE, renormalize="l1"),
    "l2": dict(MAGNITUDE, renormalize="l2"),
    "moments": dict(MAGNITUDE, renormalize="moments", calibrated=True),
    "lstsq": dict(MAGNITUDE, renormalize="lstsq", calibrated=True),
    "lstsq, admm (default)": dict(calibrated=True),
    "the same, then recover": dict(calibrated=True, recover=True),
}
# Recovery takes minutes.
QUICK = list(WAYS)[:-1]

SETTINGS = {
    "first layer, group='unit'": dict(layers="hidden_1", group="unit"),
    "first layer, group='layer'": dict(layers="hidden_1"),
    "all layers but the last": dict(layers="hidden_*"),
}


def network(shape, classes):
    return keras.Sequential(
        [
            keras.Input(shape),
            keras.layers.Flatten(),
            keras.layers.Dense(512, "relu", name="hidden_1"),
            keras.layers.Dense(256, "relu", name="hidden_2"),
            keras.layers.Dense(classes, name="logits"),
        ]
    )


def trained(train, seed, epochs, learning_rate):
    keras.utils.set_random_seed(seed)
    images, labels = train
    model = network(images.shape[1:], int(labels.max()) + 1)
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(keras.optimizers.SGD(learning_rate, momentum=0.9), loss)
    model.fit(images, labels, batch_size=128 if len(images) > 10_000 else 16, epochs=epochs, verbose=0)
    return model


def accuracy(model, data):
    images, labels = data
    return float(np.mean(model.predict(images, batch_size=1000, verbose=0).argmax(axis=-1) == labels))


def curve(model, test, samples, calibrated=False, **how):
    if calibrated:
        how = dict(how, calibration=samples, verbose=0)
    return [accuracy(kr.prune(model, sparsity, **how), test) for sparsity in SPARSITIES]


def experiment(name, seed, arguments):
    """Rows of accuracies: the first hidden layer for both groups, and all layers but the last."""
    train, test = datasets.load(name, arguments.data_dir)
    model = trained(train, seed, arguments.epochs, arguments.learning_rate)
    samples = train[0][np.random.default_rng(seed).permutation(len(train[0]))[:SAMPLES]]
    dense = accuracy(model, test)
    for setting in arguments.settings:
        for way in arguments.ways:
            accuracies = curve(model, test, samples, **SETTINGS[setting], **WAYS[way])
            yield dict(setting=f"{name}, {setting}", way=way, seed=seed, dense=dense, accuracies=accuracies)


def theorem(path, inputs=200, units=100, sparsity=0.8, seed=0):
    """Relative error of units whose weights are `c + eps * xi` and whose inputs are `m + eps * eta`, as eps goes to 0."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    generator = np.random.default_rng(seed)
    xi, eta = generator.standard_normal((inputs, units)), generator.standard_normal((1000, inputs))
    model = keras.Sequential([keras.Input((inputs,)), keras.layers.Dense(units, use_bias=False)])
    sizes = np.logspace(-4, 0, 9)
    errors = {"plain": [], "l1": [], "l2": []}
    for eps in sizes:
        model.layers[0].kernel.assign(1 + eps * xi)
        x = (1 + eps * eta).astype("float32")
        wanted = model.predict(x, verbose=0)
        for way, row in errors.items():
            pruned = kr.prune(model, sparsity, group="unit", renormalize=None if way == "plain" else way)
            row.append(float(np.sqrt(np.mean((pruned.predict(x, verbose=0) - wanted) ** 2) / np.mean(wanted**2))))
    figure, ax = plt.subplots(figsize=(5, 4), layout="constrained")
    for (way, row), style in zip(errors.items(), ("k-o", "C0-s", "C1-^")):
        ax.loglog(sizes, row, style, label=way)
    ax.loglog(sizes, sizes, ":", color="0.5", label="slope 1")
    ax.set(xlabel="eps", ylabel="relative error of a unit", title=f"{sparsity:.0%} of each unit's weights removed")
    ax.legend()
    figure.savefig(path, dpi=100)
    plt.close(figure)
    print("eps        " + "".join(f"{eps:10.1e}" for eps in sizes))
    for way, row in errors.items():
        print(f"{way:11}" + "".join(f"{error:10.1e}" for error in row))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    datasets.add_arguments(parser, several=True)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--learning-rate", type=float, default=0.01)
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=QUICK)
    parser.add_argument("--settings", nargs="+", choices=SETTINGS, default=list(SETTINGS))
    parser.add_argument("--out", type=pathlib.Path, default=OUT, help="folder for pictures and data")
    arguments = parser.parse_args()
    arguments.out.mkdir(exist_ok=True)
    theorem(arguments.out / "renormalized_pruning_theorem.png")
    for name in arguments.dataset:
        rows = []
        for seed in range(arguments.seeds):
            for row in experiment(name, seed, arguments):
                rows.append(row)
                curves.save(arguments.out / f"renormalized_pruning_{name}.json", rows)
        print("\n" + curves.table(rows, SPARSITIES), flush=True)
        curves.picture(rows, SPARSITIES, arguments.out / f"renormalized_pruning_{name}.png")


if __name__ == "__main__":
    main()
