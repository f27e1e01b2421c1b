"""The experiment of Bonetta and others (arXiv 2204.04977): the sparsest network that still holds a given accuracy.

Trains LeNet-300-100 or LeNet-5 (20-50-500-10), then prunes by magnitude over the whole network and trains, again and again, as
long as the accuracy on validation images stays above the floor: with irrelevant-weight regularization, with plain L2 decay, and
with neither. The validation images are taken from the training images; the test images are looked at once, at the end.
Prints tables, writes pictures and data into saved_models/. A run that was stopped goes on where it was.

    python examples/irrelevant_weights.py
    python examples/irrelevant_weights.py --dataset mnist --network lenet-300-100 lenet-5 --floor 0.98 --seeds 3
    python examples/irrelevant_weights.py --dataset fashion_mnist --network lenet-5 --floor 0.905 --seeds 3
"""

from __future__ import annotations

import argparse
import json
import os
import pathlib
import time

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import curves
import datasets
import keras
import networks
import numpy as np

import keras_renorm as kr

OUT = pathlib.Path(__file__).parents[1] / "saved_models"
NETWORKS = {"lenet-300-100": networks.lenet_300_100, "lenet-5": networks.lenet_5}
WAYS = ("irrelevant weights", "L2 decay", "neither")


def compiled(network, way, shape, classes, seed, arguments):
    keras.utils.set_random_seed(seed)
    regularizer = keras.regularizers.L2(arguments.l2) if way == "L2 decay" else None
    model = NETWORKS[network](shape, classes, regularizer)
    optimizer = keras.optimizers.Adam(1e-3)
    if way == "irrelevant weights":
        optimizer = kr.optimizers.IrrelevanceDecay(
            optimizer, arguments.gamma, arguments.alpha, relative=not arguments.raw_gradients, decay_steps=arguments.decay_steps
        )
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(optimizer, loss, metrics=["accuracy"], steps_per_execution=16)
    return model


def annealed(epochs):
    """The learning rate falls to zero over the epochs of a training, each time."""
    return keras.callbacks.LearningRateScheduler(lambda epoch: 1e-3 * (1 - epoch / epochs))


def split(train, seed=0, share=0.1):
    """Training and validation images, the same for every seed of the network."""
    x, y = train
    order = np.random.default_rng(seed).permutation(len(x))
    held_out, rest = np.split(order, [int(share * len(x))])
    return (x[rest], y[rest]), (x[held_out], y[held_out])


def run(name, network, way, seed, arguments):
    """One network: dense, pruned as far as the floor allows, and tested once."""
    train, test = datasets.load(name, arguments.data_dir)
    (x, y), validation = split(train)
    model = compiled(network, way, x.shape[1:], int(y.max()) + 1, seed, arguments)
    batch = 128 if len(x) > 10_000 else 16
    dense_epochs, epochs = arguments.dense_epochs, arguments.epochs
    model.fit(x, y, batch_size=batch, epochs=dense_epochs, verbose=0, callbacks=[annealed(dense_epochs)])
    fit = dict(x=x, y=y, batch_size=batch, epochs=epochs, callbacks=[annealed(epochs)])
    fit.update(validation_data=validation, validation_batch_size=1000)
    slug = f"{name}-{network}-{way.replace(' ', '_')}-{seed}"
    started = time.monotonic()
    found = kr.methods.prune_iteratively(
        model,
        fit,
        metric="val_accuracy",
        floor=arguments.floor,
        step=arguments.step,
        smallest_step=arguments.smallest_step,
        directory=arguments.out / "irrelevant_weights" / slug,
        seed=1000 * seed,
        verbose=0,
    )
    found.model.compile(metrics=["accuracy"], loss=model.loss)
    accuracy = found.model.evaluate(*test, batch_size=1000, verbose=0)[1]
    found.model.save(arguments.out / "irrelevant_weights" / f"{slug}.keras")
    held = [(1 - row.sparsity, row.metric) for row in found.history if row.held]
    row = dict(setting=f"{name}, {network}", way=way, seed=seed, left=1 - found.sparsity, validation=held[-1][1])
    seconds = time.monotonic() - started
    return {**row, "test": float(accuracy), "rounds": len(found.history) - 1, "seconds": seconds, "curve": held}


def table(rows):
    lines = [f"{'':38}  weights left (lowest to highest)   validation   test    rounds  minutes"]
    for setting, way in dict.fromkeys((row["setting"], row["way"]) for row in rows):
        here = [row for row in rows if (row["setting"], row["way"]) == (setting, way)]
        left, validation, test, rounds, seconds = (
            [row[key] for row in here] for key in ("left", "validation", "test", "rounds", "seconds")
        )
        lines.append(
            f"{setting + ', ' + way:38}  {np.mean(left):7.2%} ({min(left):.2%} to {max(left):.2%})".ljust(75)
            + f"  {np.mean(validation):.4f}       {np.mean(test):.4f}  {np.mean(rounds):6.0f}  {np.mean(seconds) / 60:7.1f}"
        )
    return "\n".join(lines)


def picture(rows, floor, path):
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, ax = plt.subplots(figsize=(6, 4.2), layout="constrained")
    for way, style in zip(dict.fromkeys(row["way"] for row in rows), ("k-o", "C0--s", "C1:^")):
        for index, row in enumerate(row for row in rows if row["way"] == way):
            ax.plot(*zip(*row["curve"]), style, markersize=3, label=way if index == 0 else None)
    ax.axhline(floor, color="0.5", linestyle="--", label="floor")
    ax.set(xscale="log", xlabel="weights left", ylabel="validation accuracy", title=rows[0]["setting"])
    ax.invert_xaxis()
    ax.legend()
    figure.savefig(path, dpi=100)
    plt.close(figure)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    datasets.add_arguments(parser)
    parser.add_argument("--network", nargs="+", choices=NETWORKS, default=["lenet-300-100"])
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS))
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--floor", type=float, default=0.95)
    parser.add_argument("--dense-epochs", type=int, default=10, help="of training before the first round")
    parser.add_argument("--epochs", type=int, default=10, help="of a round, at most: it ends as soon as the floor is held")
    parser.add_argument("--step", type=float, default=0.2)
    parser.add_argument("--smallest-step", type=float, default=0.02)
    parser.add_argument("--gamma", type=float, default=3e-4)
    parser.add_argument("--alpha", type=float, default=3.0)
    parser.add_argument("--decay-steps", type=int, default=None)
    parser.add_argument("--raw-gradients", action="store_true", help="compare |g| with alpha itself, as the paper")
    parser.add_argument("--l2", type=float, default=3e-4)
    parser.add_argument("--out", type=pathlib.Path, default=OUT)
    arguments = parser.parse_args()
    (arguments.out / "irrelevant_weights").mkdir(exist_ok=True, parents=True)
    for network in arguments.network:
        path = arguments.out / f"irrelevant_weights_{arguments.dataset}_{network}.json"
        rows = json.loads(path.read_text()) if path.exists() else []
        for seed in range(arguments.first_seed, arguments.first_seed + arguments.seeds):
            for way in arguments.ways:
                if not any((row["way"], row["seed"]) == (way, seed) for row in rows):
                    rows.append(run(arguments.dataset, network, way, seed, arguments))
                    curves.save(path, rows)
        print("\n" + table(rows), flush=True)
        picture(rows, arguments.floor, path.with_suffix(".png"))


if __name__ == "__main__":
    main()
