"""Prune, renormalize and ship two small networks, in a minute.

Trains a dense and a convolutional network on handwritten digits, prunes them in one shot with and without
renormalization, and with images but no labels, trains one with a schedule of tfmot and the callback, and exports it.
Prints one table and writes a picture and the exported model into saved_models/.

    python examples/quickstart.py
    python examples/quickstart.py --dataset mnist
"""

from __future__ import annotations

import argparse
import logging
import os
import pathlib

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
logging.getLogger("tensorflow").setLevel(logging.ERROR)

import datasets
import keras
import numpy as np

import keras_renorm as kr

OUT = pathlib.Path(__file__).parents[1] / "saved_models"
SPARSITIES = (0.0, 0.5, 0.7, 0.8, 0.9, 0.95)
WAYS = {
    "plain": dict(group="layer", renormalize=None),
    "renormalized": dict(group="layer", renormalize="auto"),
    "plain, per unit": dict(group="unit", renormalize=None),
    "renormalized, per unit": dict(group="unit", renormalize="auto"),
}
FINAL_SPARSITY = 0.9
BATCH = 32


def dense_network(shape, classes):
    return keras.Sequential(
        [
            keras.Input(shape),
            keras.layers.Flatten(),
            keras.layers.Dense(300, activation="relu", name="hidden_1"),
            keras.layers.Dense(100, activation="relu", name="hidden_2"),
            keras.layers.Dense(classes, name="logits"),
        ],
        name="dense",
    )


def convolutional_network(shape, classes):
    return keras.Sequential(
        [
            keras.Input(shape),
            keras.layers.Conv2D(32, 3, padding="same", activation="relu", name="conv_1"),
            keras.layers.MaxPooling2D(),
            keras.layers.Conv2D(64, 3, padding="same", activation="relu", name="conv_2"),
            keras.layers.GlobalMaxPooling2D(),
            keras.layers.Dense(classes, name="logits"),
        ],
        name="convolutional",
    )


def compile_and_fit(model, data, epochs, callbacks=()):
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile("adam", loss, metrics=["accuracy"])
    model.fit(*data, batch_size=BATCH, epochs=epochs, verbose=0, callbacks=list(callbacks))
    return model


def accuracy(model, data):
    images, labels = data
    return float(np.mean(model.predict(images, batch_size=512, verbose=0).argmax(axis=-1) == labels))


def tfmot_schedule(steps):
    """The schedule that a user of tfmot has already; `kr.schedules.PolynomialDecay` takes the same arguments."""
    import tensorflow_model_optimization as tfmot

    frequency = max(steps // 20, 1)
    return tfmot.sparsity.keras.PolynomialDecay(
        initial_sparsity=0.0, final_sparsity=FINAL_SPARSITY, begin_step=0, end_step=10 * frequency, frequency=frequency
    )


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    datasets.add_arguments(parser)
    parser.add_argument("--epochs", type=int, help="default: 15 for the digits, 3 for the larger sets")
    arguments = parser.parse_args()
    epochs = arguments.epochs or (15 if arguments.dataset == "digits" else 3)
    keras.utils.set_random_seed(0)
    train, test = datasets.load(arguments.dataset, arguments.data_dir)
    shape, classes = train[0].shape[1:], int(train[1].max()) + 1
    OUT.mkdir(exist_ok=True)

    print(f"{arguments.dataset}: {len(train[0])} images to train on, {len(test[0])} to test. One shot, no retraining:\n")
    ways = WAYS | {"with images, no labels": dict(calibration=train[0][:1000], verbose=0)}
    curves = {}
    for make in (dense_network, convolutional_network):
        model = compile_and_fit(make(shape, classes), train, epochs)
        print(f"{model.name + ' network':24}" + "".join(f"{sparsity:8.0%}" for sparsity in SPARSITIES) + "  sparsity")
        for way, how in ways.items():
            curve = [accuracy(kr.prune(model, sparsity, **how), test) for sparsity in SPARSITIES]
            curves[model.name, way] = curve
            print(f"  {way:22}" + "".join(f"{value:8.3f}" for value in curve) + "  accuracy")
        print()
        if make is dense_network:
            dense = model

    print(f"Pruned while it trains, to {FINAL_SPARSITY:.0%} with a schedule of tfmot:\n")
    steps = -(-len(train[0]) // BATCH) * epochs
    prunable = kr.to_prunable(dense, pruning_schedule=tfmot_schedule(steps))
    compile_and_fit(prunable, train, epochs, [kr.callbacks.UpdatePruning()])
    plain = kr.strip(prunable)
    plain.save(OUT / "pruned.keras")
    print(kr.summary(prunable), "\n")

    print(f"{'':24}accuracy  sparsity      bytes   gzipped")
    for name, model, file in (("dense network", dense, "dense.tflite"), ("pruned and trained", plain, "pruned.tflite")):
        report = kr.export_tflite(model, OUT / file, samples=test[0][:8], storage="sparse")
        sparsity = kr.summary(model).sparsity
        print(f"  {name:22}{accuracy(model, test):8.3f}  {sparsity:8.3f}  {report.bytes:9,} {report.gzip_bytes:9,}")
    half = kr.export_tflite(plain, OUT / "pruned_float16.tflite", quantize="float16", samples=test[0][:8])
    print(f"  {'  the same in float16':22}{'':8}  {'':8}  {half.bytes:9,} {half.gzip_bytes:9,}\n")
    print(report, "\n")

    picture(curves, prunable, OUT / "quickstart.png")
    print(f"Written to {OUT.name}/: quickstart.png, pruned.keras, dense.tflite, pruned.tflite, pruned_float16.tflite")


def picture(curves, prunable, path):
    """Accuracy against sparsity, and the masks of the trained network."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure = plt.figure(figsize=(12, 8), layout="constrained")
    top, bottom = figure.subfigures(2, 1)
    for ax, name in zip(top.subplots(1, 2, sharey=True), dict.fromkeys(name for name, _ in curves)):
        kr.plots.accuracy(
            SPARSITIES, {way: curve for (of, way), curve in curves.items() if of == name}, ylabel="test accuracy", ax=ax
        )
        ax.set_title(f"{name} network, one shot")
    bottom.suptitle(f"masks after training to {FINAL_SPARSITY:.0%} (black = kept; a row is an input, a column a unit)")
    layers = prunable.layers[1:]
    for ax, layer in zip(bottom.subplots(1, len(layers), width_ratios=[3, 2, 1]), layers):
        kr.plots.mask(layer, ax=ax)
    figure.savefig(path, dpi=100)


if __name__ == "__main__":
    main()
