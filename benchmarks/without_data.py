"""One-shot pruning without data: what renormalization does to the outputs and to the accuracy, network by network.

Prunes every network with each renormalizer and allocation and prints, on training images that it was not fitted to here, the
error of the outputs (squared distance from the dense ones over their variance) and the accuracy. Fully connected and
convolutional networks (with and without BatchNormalization) are trained on 10,000 images for a few epochs; `--models` adds
trained Keras classifiers. Writes JSON.

    python benchmarks/without_data.py --data-dir DIR
    python benchmarks/without_data.py --data-dir DIR --networks --models resnet20.keras resnet56.keras --input-scale 255
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

L = keras.layers
SPARSITIES = (0.5, 0.8, 0.9, 0.95)
ALLOCATIONS = ("balanced", "uniform")
RENORMALIZERS = {
    "none": None,
    "l2, max 2": kr.renorm.L2(max_scale=2.0),
    "l2, layer": kr.renorm.L2("layer"),
    "l1": kr.renorm.L1(),
}
HELD_OUT, TRAINED_ON = 1000, 10_000


def fully_connected(shape):
    return [keras.Input(shape), L.Flatten(), L.Dense(512, "relu"), L.Dense(256, "relu"), L.Dense(10)]


def convolutional(shape):
    blocks = [L.Conv2D(32, 3, activation="relu"), L.Conv2D(32, 3, strides=2, activation="relu")]
    blocks += [L.Conv2D(64, 3, activation="relu"), L.Conv2D(64, 3, strides=2, activation="relu")]
    return [keras.Input(shape), L.Reshape((*shape[:2], -1)), *blocks, L.Flatten(), L.Dense(10)]


def normalized(shape):
    blocks = []
    for filters, strides in ((32, 1), (32, 2), (64, 1), (64, 2)):
        blocks += [L.Conv2D(filters, 3, strides=strides, use_bias=False), L.BatchNormalization(momentum=0.9), L.ReLU()]
    return [keras.Input(shape), L.Reshape((*shape[:2], -1)), *blocks, L.GlobalAveragePooling2D(), L.Dense(10)]


NETWORKS = {"fully connected": fully_connected, "convolutional": convolutional, "with BatchNormalization": normalized}


def trained(make, images, labels, epochs):
    keras.utils.set_random_seed(0)
    model = keras.Sequential(make(images.shape[1:]))
    model.compile(keras.optimizers.Adam(1e-3), keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    model.fit(images, labels, batch_size=128, epochs=epochs, verbose=0)
    return model


def outputs(model, images):
    parts = [keras.ops.convert_to_numpy(model(images[at : at + 250], training=False)) for at in range(0, len(images), 250)]
    return np.concatenate(parts).astype(np.float64)


def measure(name, model, images, labels):
    """One row for each renormalizer and allocation."""
    dense = outputs(model, images)
    yield dict(network=name, allocation="", renormalize="dense", accuracy=[float(np.mean(dense.argmax(-1) == labels))])
    for allocation in ALLOCATIONS:
        for label, renormalize in RENORMALIZERS.items():
            row = dict(network=name, allocation=allocation, renormalize=label, error=[], accuracy=[])
            for sparsity in SPARSITIES:
                answer = outputs(kr.prune(model, sparsity, renormalize=renormalize, allocation=allocation), images)
                row["error"].append(float(np.mean((answer - dense) ** 2) / dense.var()))
                row["accuracy"].append(float(np.mean(answer.argmax(-1) == labels)))
            yield row


def table(rows) -> str:
    lines = [f"| network | allocation | renormalize | {' | '.join(f'{sparsity:.0%}' for sparsity in SPARSITIES)} |"]
    lines.append("| --- " * (3 + len(SPARSITIES)) + "|")
    for row in rows:
        if row["renormalize"] == "dense":
            dense = row["accuracy"][0]
            continue
        cells = [f"{error:.3g}, {accuracy:.3f}" for error, accuracy in zip(row["error"], row["accuracy"])]
        lines.append(f"| {row['network']} ({dense:.3f}) | {row['allocation']} | {row['renormalize']} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset", help="for the networks, default fashion_mnist; for --models, cifar10")
    parser.add_argument("--data-dir", default=os.environ.get("KERAS_RENORM_DATA"))
    parser.add_argument("--networks", nargs="*", default=list(NETWORKS), choices=list(NETWORKS))
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--models", nargs="*", type=pathlib.Path, default=[], help="trained classifiers")
    parser.add_argument("--input-scale", type=float, default=1.0, help="what images in [0, 1] are multiplied by for --models")
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path(__file__).parent / "results")
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    rows = []
    if arguments.networks:
        (images, labels), _ = datasets.load(arguments.dataset or "fashion_mnist", arguments.data_dir)
        for name in arguments.networks:
            model = trained(NETWORKS[name], images[:TRAINED_ON], labels[:TRAINED_ON], arguments.epochs)
            for row in measure(name, model, images[-HELD_OUT:], labels[-HELD_OUT:]):
                rows.append(row)
                print(row, flush=True)
    if arguments.models:
        (images, labels), _ = datasets.load(arguments.dataset or "cifar10", arguments.data_dir)
        images, labels = images[-HELD_OUT:] * arguments.input_scale, labels[-HELD_OUT:]
        for path in arguments.models:
            for row in measure(path.stem, keras.models.load_model(path, compile=False), images, labels):
                rows.append(row)
                print(row, flush=True)
    (arguments.out / "without_data.json").write_text(json.dumps(rows, indent=1))
    print(table(rows))


if __name__ == "__main__":
    main()
