"""Gradual pruning in `fit`, beside tfmot in the same run.

LeNet-300-100, Adam, batch 128, PolynomialDecay over every Dense layer. tfmot trains the same network on `tf_keras`; both
get the same data, epochs, schedule and seeds. Writes the table as JSON and a picture.

    python benchmarks/gradual.py --dataset mnist fashion_mnist --data-dir DIR
"""

from __future__ import annotations

import argparse
import json
import os
import pathlib
import sys

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
sys.path.insert(0, str(pathlib.Path(__file__).parents[1] / "examples"))

import datasets
import keras
import numpy as np

import keras_renorm as kr

BATCH = 128


SPARSITIES = (0.9, 0.95, 0.98, 0.99)
SCHEDULE = {"initial_sparsity": 0.0, "begin_step": 469, "end_step": 3283}
EPOCHS = 10


def network(library):
    """LeNet-300-100 of Keras 3 or of tf_keras, compiled."""
    model = library.Sequential([library.layers.Dense(300, "relu"), library.layers.Dense(100, "relu"), library.layers.Dense(10)])
    model.build((None, 784))
    return model


def compile_and(model, library):
    loss = library.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(optimizer=library.optimizers.Adam(), loss=loss, metrics=["accuracy"])
    return model


def train_dense(data, sparsity, seed):
    keras.utils.set_random_seed(seed)
    model = compile_and(network(keras), keras)
    model.fit(*data[0], batch_size=BATCH, epochs=EPOCHS, verbose=0)
    return model.evaluate(*data[1], verbose=0)[1], 0.0


def train_ours(data, sparsity, seed):
    keras.utils.set_random_seed(seed)
    schedule = kr.schedules.PolynomialDecay(final_sparsity=sparsity, **SCHEDULE)
    model = compile_and(kr.to_prunable(network(keras), pruning_schedule=schedule), keras)
    model.fit(*data[0], batch_size=BATCH, epochs=EPOCHS, verbose=0, callbacks=[kr.callbacks.UpdatePruning()])
    plain = kr.strip(model)
    return plain.evaluate(*data[1], verbose=0)[1], kr.summary(plain).sparsity


def train_tfmot(data, sparsity, seed):
    import tensorflow_model_optimization as tfmot
    import tf_keras

    tf_keras.utils.set_random_seed(seed)
    library = tfmot.sparsity.keras
    schedule = library.PolynomialDecay(final_sparsity=sparsity, **SCHEDULE)
    model = compile_and(library.prune_low_magnitude(network(tf_keras), pruning_schedule=schedule), tf_keras)
    model.fit(*data[0], batch_size=BATCH, epochs=EPOCHS, verbose=0, callbacks=[library.UpdatePruningStep()])
    plain = compile_and(library.strip_pruning(model), tf_keras)
    kernels = [weight.numpy() for weight in plain.weights if len(weight.shape) > 1]
    zeros = sum(np.count_nonzero(kernel == 0) for kernel in kernels)
    return plain.evaluate(*data[1], verbose=0)[1], zeros / sum(kernel.size for kernel in kernels)


def measure(name, data_dir, seeds, sparsities):
    """Train everything on one data set, ours and tfmot's in turns; yields one row a run."""
    data = [(images.reshape(len(images), -1), labels) for images, labels in datasets.load(name, data_dir)]
    for seed in seeds:
        yield name, 0.0, "dense", seed, *train_dense(data, 0.0, seed)
        for sparsity in sparsities:
            yield name, sparsity, "keras_renorm", seed, *train_ours(data, sparsity, seed)
            yield name, sparsity, "tfmot", seed, *train_tfmot(data, sparsity, seed)


def table(rows) -> str:
    lines = ["data set        sparsity  library        mean    lowest  highest  (test accuracy)"]
    for key in dict.fromkeys(row[:3] for row in rows):
        accuracies = [row[4] for row in rows if row[:3] == key]
        name, sparsity, library = key
        lines.append(
            f"{name:14}  {sparsity:8.2f}  {library:12}  {np.mean(accuracies):6.4f}  "
            f"{min(accuracies):6.4f}  {max(accuracies):6.4f}"
        )
    return "\n".join(lines)


def picture(rows, sparsities, path):
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    names = list(dict.fromkeys(row[0] for row in rows))
    figure, axes = plt.subplots(1, len(names), figsize=(5 * len(names), 4), squeeze=False, layout="constrained")
    for ax, name in zip(axes[0], names):
        dense = np.mean([row[4] for row in rows if row[0] == name and row[2] == "dense"])
        ax.axhline(dense, color="0.6", linestyle=":", label="dense")
        for library, style in (("keras_renorm", "o-"), ("tfmot", "s--")):
            curves = [[row[4] for row in rows if row[:3] == (name, sparsity, library)] for sparsity in sparsities]
            means = [np.mean(curve) for curve in curves]
            spread = [[mean - min(curve) for mean, curve in zip(means, curves)], [max(c) - m for m, c in zip(means, curves)]]
            ax.errorbar(range(len(sparsities)), means, yerr=spread, fmt=style, capsize=3, label=library)
        ax.set(title=name, xlabel="sparsity", ylabel="test accuracy", xticks=range(len(sparsities)))
        ax.set_xticklabels([f"{sparsity:.0%}" for sparsity in sparsities])
        ax.legend()
    figure.savefig(path, dpi=120)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset", nargs="+", default=["mnist", "fashion_mnist"], help="images of 28x28")
    parser.add_argument("--data-dir", default=os.environ.get("KERAS_RENORM_DATA"))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--sparsity", nargs="+", type=float, default=SPARSITIES)
    parser.add_argument(
        "--out", default=str(pathlib.Path(__file__).parent / "results"), help="folder of the JSON and the picture"
    )
    arguments = parser.parse_args()
    out = pathlib.Path(arguments.out)
    out.mkdir(parents=True, exist_ok=True)
    rows = []
    for name in arguments.dataset:
        for row in measure(name, arguments.data_dir, range(arguments.seeds), arguments.sparsity):
            rows.append(row)
            print("{} sparsity {} {} seed {}: accuracy {:.4f}, zeros {:.4f}".format(*row), flush=True)
            fields = ("dataset", "sparsity", "library", "seed", "accuracy", "zeros")
            (out / "gradual.json").write_text(json.dumps([dict(zip(fields, row)) for row in rows], indent=1))
    print(table(rows))
    picture(rows, arguments.sparsity, out / "gradual.png")


if __name__ == "__main__":
    main()
