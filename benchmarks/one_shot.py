"""One-shot pruning without data: which renormalization, and which group, keeps how much accuracy.

Trains a fully connected network (512-256-10, SGD with momentum) on all but the last 8000 training images, prunes its first
hidden layer or all layers, and measures accuracy on those 8000: the test split is not looked at, so that defaults can be
chosen by what this prints. With --model a trained Keras classifier is pruned instead. Writes JSON and a picture.

    python benchmarks/one_shot.py --dataset mnist fashion_mnist cifar10 --data-dir DIR
    python benchmarks/one_shot.py --dataset cifar10 --data-dir DIR --model resnet20.keras --input-scale 255
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

SPARSITIES = (0.5, 0.7, 0.8, 0.9, 0.95, 0.98)
RENORMALIZERS = {
    "none": None,
    "l1": kr.renorm.L1(),
    "l1, max 2": kr.renorm.L1(max_scale=2.0),
    "l1, layer": kr.renorm.L1("layer"),
    "l2": kr.renorm.L2(),
    "l2, max 2": kr.renorm.L2(max_scale=2.0),
    "l2, layer": kr.renorm.L2("layer"),
}
HELD_OUT = 8000


def fully_connected(shape, images, labels, seed):
    keras.utils.set_random_seed(seed)
    layers = keras.layers
    model = keras.Sequential(
        [
            keras.Input(shape),
            layers.Flatten(),
            layers.Dense(512, "relu", name="hidden_1"),
            layers.Dense(256, "relu", name="hidden_2"),
            layers.Dense(10, name="logits"),
        ]
    )
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(keras.optimizers.SGD(0.05, momentum=0.9), loss)
    model.fit(images, labels, batch_size=128, epochs=8, verbose=0)
    return model


def accuracy(model, images, labels):
    return float(np.mean(model.predict(images, batch_size=1000, verbose=0).argmax(axis=-1) == labels))


def networks(name, data_dir, seeds, path, input_scale):
    """Trained networks with the layers to prune and held-out data."""
    (images, labels), _ = datasets.load(name, data_dir)
    held_out = images[-HELD_OUT:] * input_scale, labels[-HELD_OUT:]
    if path:
        yield path.stem, keras.models.load_model(path, compile=False), keras.layers.Conv2D, held_out
        return
    for seed in range(seeds):
        model = fully_connected(images.shape[1:], images[:-HELD_OUT], labels[:-HELD_OUT], seed)
        yield f"{name}, first layer", model, "hidden_1", held_out
        yield f"{name}, all layers", model, None, held_out


def table(rows) -> str:
    lines = [" " * 45 + "dense" + "".join(f"{sparsity:8.0%}" for sparsity in SPARSITIES)]
    for key in dict.fromkeys((row["network"], row["group"], row["renormalize"]) for row in rows):
        runs = [row for row in rows if (row["network"], row["group"], row["renormalize"]) == key]
        means = np.mean([row["accuracies"] for row in runs], axis=0)
        dense = np.mean([row["dense"] for row in runs])
        lines.append(f"{key[0]:26} {key[1]:6} {key[2]:10} {dense:6.3f}" + "".join(f"{mean:8.3f}" for mean in means))
    return "\n".join(lines)


def picture(rows, path):
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    names = list(dict.fromkeys(row["network"] for row in rows))
    figure, axes = plt.subplots(2, len(names), figsize=(4 * len(names), 7), squeeze=False, sharey="col", layout="constrained")
    for column, name in zip(axes.T, names):
        for ax, group in zip(column, ("layer", "unit")):
            for renormalize, style in zip(RENORMALIZERS, ("k-", "C0-", "C0--", "C0:", "C1-", "C1--", "C1:")):
                runs = [
                    r["accuracies"] for r in rows if (r["network"], r["group"], r["renormalize"]) == (name, group, renormalize)
                ]
                ax.plot(range(len(SPARSITIES)), np.mean(runs, axis=0), style, label=renormalize)
            ax.set(title=f"{name}, group='{group}'", xticks=range(len(SPARSITIES)))
            ax.set_xticklabels([f"{sparsity:.0%}" for sparsity in SPARSITIES])
    axes[0, 0].legend()
    figure.savefig(path, dpi=100)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset", nargs="+", default=["mnist", "fashion_mnist", "cifar10"])
    parser.add_argument("--data-dir", default=os.environ.get("KERAS_RENORM_DATA"))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--model", type=pathlib.Path, help="a trained classifier; its convolutions are pruned")
    parser.add_argument("--input-scale", type=float, default=1.0, help="what images in [0, 1] are multiplied by")
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path(__file__).parent / "results")
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    rows = []
    for name in arguments.dataset:
        options = (arguments.data_dir, arguments.seeds, arguments.model, arguments.input_scale)
        for network, model, layers, held_out in networks(name, *options):
            dense = accuracy(model, *held_out)
            for group in ("layer", "unit"):
                for label, renormalize in RENORMALIZERS.items():
                    how = dict(layers=layers, group=group, renormalize=renormalize, allocation="uniform")
                    accuracies = [accuracy(kr.prune(model, sparsity, **how), *held_out) for sparsity in SPARSITIES]
                    rows.append(dict(network=network, group=group, renormalize=label, dense=dense, accuracies=accuracies))
                    print(rows[-1], flush=True)
    stem = arguments.model.stem if arguments.model else "one_shot"
    (arguments.out / f"{stem}.json").write_text(json.dumps(rows, indent=1))
    print(table(rows))
    picture(rows, arguments.out / f"{stem}.png")


if __name__ == "__main__":
    main()
