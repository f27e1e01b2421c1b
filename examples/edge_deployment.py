"""From a trained network to the files of a phone: pruned for its runtime, repaired, exported in all kinds, and measured.

Trains a network (or takes one, --model), lets it qualify for the runtime's sparse kernels (`keras_renorm.export.repair`),
prunes it for floats and for integers with unlabelled images, trains it a little further (--fine-tune), takes dead units out,
and exports it. Prints one table (accuracy of each file, bytes, gzipped bytes, latency, and ratios to the dense file), what the
runtime does with the zeros, and writes the models, the files and a picture into saved_models/.

    python examples/edge_deployment.py
    python examples/edge_deployment.py --dataset fashion_mnist --network lenet-300-100 --sparsity 0.9
    python examples/edge_deployment.py --dataset cifar10 --model my_network.keras --fine-tune 2
"""

from __future__ import annotations

import argparse
import functools
import os
import pathlib

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import datasets
import keras
import networks
import numpy as np

import keras_renorm as kr

OUT = pathlib.Path(__file__).parents[1] / "saved_models"
NETWORKS = {
    "mobile": functools.partial(networks.mobile, width=0.5, blocks=networks.SMALL_MOBILE),
    "lenet-300-100": networks.lenet_300_100,
    "vgg-quarter": functools.partial(networks.vgg, width=0.25),
}
KINDS = {
    "float32": dict(),
    "float16": dict(quantize="float16"),
    "int8 weights": dict(quantize="int8"),
    "int8": dict(quantize="int8", full=True),
}


def fit(model, data, epochs):
    rate = keras.optimizers.schedules.CosineDecay(2e-3, epochs * -(-len(data[0]) // 64))
    model.compile(keras.optimizers.Adam(rate), keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    model.fit(*data, batch_size=64, epochs=epochs, verbose=0)
    return model


def prune(model, data, target, sparsity, arguments):
    """A smaller model for a target: one shot with samples, then training as long as asked for, then without dead units."""
    pruned = kr.prune(model, sparsity, target=target, calibration=data[0][: arguments.samples], verbose=0)
    if arguments.fine_tune:
        pruned = kr.strip(fit(kr.to_prunable(pruned, from_zeros=True), data, arguments.fine_tune))
    return kr.compact(pruned)


def accuracy(path, data):
    """Of a `.tflite` file, as whoever uses it would run it."""
    from ai_edge_litert.interpreter import Interpreter

    runner = Interpreter(str(path)).get_signature_runner("serving_default")
    ((name, details),) = runner.get_input_details().items()
    images, labels = data
    answers = [
        next(iter(runner(**{name: images[start : start + 100].astype(details["dtype"])}).values()))
        for start in range(0, len(images), 100)
    ]
    return float(np.mean(np.concatenate(answers).argmax(axis=-1) == labels))


def export(model, name, kinds, train, test, dense=None):
    """Rows of the table: one for each kind of file."""
    rows = []
    for kind in kinds:
        settings = dict(KINDS[kind])
        if settings.pop("full", False):
            settings["representative_data"] = train[0][:300]
        path = OUT / f"edge_{name}_{kind.replace(' ', '_')}.tflite"
        report = kr.export_tflite(model, path, samples=test[0][:8], storage="sparse", **settings)
        times = kr.export.benchmark(path, against=dense or path, runs=100)
        row = dict(name=f"{name}, {kind}", path=path, accuracy=accuracy(path, test), bytes=report.bytes)
        rows.append(row | dict(gzipped=report.gzip_bytes, latency=times.rows[0].median, times=times.ratio, notes=report.notes))
        dense = dense or path
    return rows


def table(rows):
    lines = [f"{'':24}{'accuracy':>9}{'bytes':>12}{'gzipped':>11}{'latency':>12}{'bytes':>9}{'time':>7}  of dense float32"]
    for row in rows:
        lines.append(
            f"{row['name']:24}{row['accuracy']:9.4f}{row['bytes']:12,}{row['gzipped']:11,}{1e3 * row['latency']:9.3f} ms"
            f"{row['bytes'] / rows[0]['bytes']:9.2f}{row['times']:7.2f}"
        )
    return "\n".join(lines)


def picture(rows, path):
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(9, 3.6), layout="constrained", sharey=True)
    for ax, key, unit, label in (
        (axes[0], "bytes", 1e3, "kilobytes"),
        (axes[1], "latency", 1e-3, "milliseconds for one image"),
    ):
        for row, marker in zip(rows, "sDo^vP"):
            color = "k" if row["name"].startswith("dense") else "C1"
            ax.plot(row[key] / unit, row["accuracy"], color + marker, markersize=8, label=row["name"], markeredgecolor="k")
        ax.set(xlabel=label, xlim=(0, None))
        ax.margins(y=0.1)
    axes[0].set_ylabel("test accuracy")
    axes[1].legend(fontsize=8)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    datasets.add_arguments(parser)
    parser.add_argument("--network", choices=NETWORKS, default="mobile")
    parser.add_argument("--model", type=pathlib.Path, help="a trained classifier for the data set, ending in logits")
    parser.add_argument("--input-scale", type=float, default=1.0, help="what images in [0, 1] are multiplied by")
    parser.add_argument("--sparsity", type=float, default=0.8)
    parser.add_argument("--integer-sparsity", type=float, default=0.5, help="whole units go there, which costs more")
    parser.add_argument("--samples", type=int, default=1024, help="unlabelled images to prune with")
    parser.add_argument("--epochs", type=int, help="of training; default: 20 for the digits, 4 for the larger sets")
    parser.add_argument("--fine-tune", type=int, default=None, help="epochs after pruning; default: 5 for the digits, else 1")
    arguments = parser.parse_args()
    small = arguments.dataset == "digits"
    if arguments.fine_tune is None:
        arguments.fine_tune = 5 if small else 1
    keras.utils.set_random_seed(0)
    train, test = [(arguments.input_scale * x, y) for x, y in datasets.load(arguments.dataset, arguments.data_dir)]
    OUT.mkdir(exist_ok=True)
    if arguments.model:
        model = keras.models.load_model(arguments.model, compile=False)
    else:
        model = NETWORKS[arguments.network](train[0].shape[1:], int(train[1].max()) + 1)
        fit(model, train, arguments.epochs or (20 if small else 4))

    rows = export(model, "dense", ["float32", "int8"], train, test)
    repaired = kr.export.repair(model)
    print("\n".join(repaired.repair_notes))
    pruned = prune(repaired, train, "litert", arguments.sparsity, arguments)
    integers = prune(repaired, train, "litert-int8", arguments.integer_sparsity, arguments)
    print(f"Pruned for floats: {kr.summary(pruned).sparsity:.1%} of the weights are zero.", end=" ")
    print(f"For integers: {integers.count_params():,} of {model.count_params():,} parameters are left.")
    rows += export(pruned, "pruned", ["float32", "float16"], train, test, rows[0]["path"])
    rows += export(integers, "pruned", ["int8 weights", "int8"], train, test, rows[0]["path"])
    print(f"\n{table(rows)}\n")
    print(kr.export.explain(next(row["path"] for row in rows if row["name"] == "pruned, float32")))
    for row in rows:
        for note in row["notes"]:
            print(f"{row['name']}: {note}")
    pruned.save(OUT / "edge_deployment.keras")
    picture(rows, OUT / "edge_deployment.png")


if __name__ == "__main__":
    main()
