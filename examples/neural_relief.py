"""The experiments of Dekhovich and others (arXiv 2109.10795): pruning by neural activity, beside pruning by magnitude.

Trains a network (or takes one that is trained, --model) and relieves it in rounds: connections that carry little go, then
units, and what is left is trained. Then the same network is pruned by magnitude over all layers, in as many rounds, to the
same sparsities, with the same training. Validation images come from the training images; the test images are looked at once,
at the end. Prints tables, writes pictures and data into saved_models/. A run that was stopped goes on where it was.

    python examples/neural_relief.py
    python examples/neural_relief.py --dataset mnist --network lenet-300-100 lenet-5 --rounds 20 --rewind --seeds 3
    python examples/neural_relief.py --dataset cifar10 --network resnet-20 --optimizer sgd --alpha-dense 0.99 --rounds 10
"""

from __future__ import annotations

import argparse
import json
import math
import os
import pathlib

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import curves
import datasets
import keras
import networks
import numpy as np

import keras_renorm as kr

OUT = pathlib.Path(__file__).parents[1] / "saved_models"
NETWORKS = {
    "lenet-300-100": networks.lenet_300_100,
    "lenet-5": networks.lenet_5,
    "vgg": networks.vgg,
    "vgg-quarter": lambda *arguments: networks.vgg(*arguments, width=0.25),
    "resnet-20": networks.resnet,
    "resnet-32": lambda *arguments: networks.resnet(*arguments, depth=32),
}
LEARNING_RATE = {"adam": 1e-3, "sgd": 0.1}


def compiled(model, arguments):
    rate = arguments.learning_rate or LEARNING_RATE[arguments.optimizer]
    sgd = arguments.optimizer == "sgd"
    optimizer = keras.optimizers.SGD(rate, momentum=0.9) if sgd else keras.optimizers.Adam(rate)
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(optimizer, loss, metrics=["accuracy"], steps_per_execution=16)
    return model


def training(data, validation, epochs, arguments):
    """Arguments of `fit`: the learning rate falls to a tenth after half of the epochs, and again after three quarters."""
    rate = arguments.learning_rate or LEARNING_RATE[arguments.optimizer]
    schedule = keras.callbacks.LearningRateScheduler(
        lambda epoch: rate * (0.01 if 4 * epoch >= 3 * epochs else 0.1 if 2 * epoch >= epochs else 1.0)
    )
    x, y = data
    batch = 128 if len(x) > 5_000 else 16
    held_out = dict(validation_data=validation, validation_batch_size=500)
    return dict(x=x, y=y, batch_size=batch, epochs=epochs, callbacks=[schedule], verbose=0, **held_out)


def slice_magnitude(kernel):
    """The root mean square of each slice of a convolution's kernel, at each of its weights: what relief removes, by size."""
    return np.abs(kernel) if kernel.ndim < 3 else np.broadcast_to(np.sqrt(np.mean(kernel**2, axis=(0, 1))), kernel.shape)


WAYS = {"magnitude": "magnitude", "slices": slice_magnitude}


def in_rounds(model, sparsities, fit, criterion, arguments):
    """Validation accuracies after retraining, and the last model: a global threshold, the same sparsities and epochs."""
    accuracies = []
    for round_, sparsity in enumerate(sparsities):
        keras.utils.set_random_seed(round_ + 1)
        model = kr.prune(model, sparsity, criterion=criterion, allocation="global", renormalize=None)
        model = compiled(kr.to_prunable(model, from_zeros=True), arguments)
        accuracies.append(model.fit(**fit).history["val_accuracy"][-1])
    return accuracies, model


def run(name, network, seed, arguments):
    train, test = datasets.load(name, arguments.data_dir)
    x, y = train[0] * arguments.input_scale, train[1]
    test = test[0] * arguments.input_scale, test[1]
    order = np.random.default_rng(0).permutation(len(x))
    held_out, rest = np.split(order, [len(x) // 10])
    if arguments.images:
        rest = rest[: arguments.images]
    data, validation = (x[rest], y[rest]), (x[held_out], y[held_out])
    keras.utils.set_random_seed(seed)
    if arguments.model:
        early, model = None, compiled(keras.models.load_model(arguments.model, compile=False), arguments)
    else:
        regularizer = keras.regularizers.L2(arguments.l2) if arguments.l2 else None
        model = compiled(NETWORKS[network](x.shape[1:], int(y.max()) + 1, regularizer), arguments)
        early = keras.models.clone_model(model)
        early.set_weights(model.get_weights())
        model.fit(**training(data, validation, arguments.dense_epochs, arguments))
    fit = training(data, validation, arguments.epochs, arguments)
    slug = f"{name}-{network}-{arguments.optimizer}-{seed}"
    found = kr.methods.neural_relief(
        model,
        data[0][: arguments.samples],
        arguments.alpha_conv,
        arguments.alpha_dense,
        arguments.rounds,
        fit=fit,
        tolerance=arguments.tolerance,
        layers=lambda layer: relieved(layer, arguments),
        rewind=early if arguments.rewind else None,
        directory=arguments.out / "neural_relief" / slug,
        seed=1000 * seed,
        verbose=0,
    )
    print(f"\n{slug}\n{found}", flush=True)
    small = kr.compact(found.model)
    print(
        f"without dead units the arrays hold {small.count_params():,} numbers, instead of {model.count_params():,}", flush=True
    )
    small.save(arguments.out / "neural_relief" / f"{slug}.keras")
    held = [row for row in found.history if row.held]
    # Of all weights, those of layers that are left as they are among them.
    sizes = [(math.prod(layer.kernel.shape), relieved(layer, arguments)) for layer in model.layers if hasattr(layer, "kernel")]
    share = sum(size for size, there in sizes if there) / sum(size for size, _ in sizes)
    row = dict(setting=f"{name}, {network}, {arguments.optimizer}", seed=seed, compression=found.compression)
    row["left"] = 1 / found.compression
    row["rounds"] = [
        dict(
            compression=held[0].details["parameters"] / one.details["parameters"],
            sparsity=share * one.sparsity,
            relief=one.metric,
        )
        for one in held
    ]
    row["test"] = {"dense": accuracy(model, test), "relief": accuracy(found.model, test)}
    for way in arguments.ways:
        accuracies, other = in_rounds(model, [share * one.sparsity for one in held[1:]], fit, WAYS[way], arguments)
        for one, value in zip(row["rounds"], [held[0].metric, *accuracies]):
            one[way] = value
        row["test"][way] = accuracy(other, test)
    return row


def relieved(layer, arguments):
    """Whether a layer takes part: all that have a kernel, but convolutions with few filters if so asked."""
    return hasattr(layer, "kernel") and getattr(layer, "filters", arguments.least_filters) >= arguments.least_filters


def accuracy(model, data):
    images, labels = data
    return float(np.mean(model.predict(images, batch_size=500, verbose=0).argmax(axis=-1) == labels))


def table(rows):
    """What is left and the test accuracies, one line a setting: means over the seeds, lowest and highest in brackets."""
    lines = [f"{'':34}  parameters left             dense            relief           magnitude        slices, same sparsity"]
    for setting in dict.fromkeys(row["setting"] for row in rows):
        here = [row for row in rows if row["setting"] == setting]
        left = [row["left"] for row in here]
        line = f"{setting:34}  {np.mean(left):7.2%} ({min(left):.2%} to {max(left):.2%})"
        for way in ("dense", "relief", *WAYS):
            values = [row["test"][way] for row in here if way in row["test"]]
            line += f"  {np.mean(values):.4f} ±{(max(values) - min(values)) / 2:.4f}" if values else " " * 17
        lines.append(line.rstrip())
    return "\n".join(lines)


def curve(row):
    """Validation accuracies after every round of one run."""
    ways = [way for way in ("relief", *WAYS) if way in row["rounds"][0]]
    lines = [f"compression  sparsity{''.join(f'{way:>11}' for way in ways)}"]
    for one in row["rounds"]:
        values = "".join(f"{one[way]:11.4f}" for way in ways)
        lines.append(f"{one['compression']:10.2f}x  {one['sparsity']:8.4f}{values}")
    return "\n".join(lines)


def picture(rows, path):
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, ax = plt.subplots(figsize=(6, 4.2), layout="constrained")
    for way, style in (("relief", "k-o"), ("magnitude", "C1--s"), ("slices", "C0:^")):
        for index, row in enumerate(rows):
            points = [(one["compression"], one[way]) for one in row["rounds"] if way in one]
            if points:
                ax.plot(*zip(*points), style, markersize=3, label=way if index == 0 else None)
    ax.set(xscale="log", xlabel="parameters, dense / left", ylabel="validation accuracy", title=rows[0]["setting"])
    ax.legend()
    figure.savefig(path, dpi=100)
    plt.close(figure)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    datasets.add_arguments(parser)
    parser.add_argument("--network", nargs="+", choices=NETWORKS, default=["lenet-300-100"])
    parser.add_argument("--model", type=pathlib.Path, help="a trained classifier for the data set, ending in logits")
    parser.add_argument("--input-scale", type=float, default=1.0, help="what images in [0, 1] are multiplied by")
    parser.add_argument("--optimizer", choices=LEARNING_RATE, default="adam")
    parser.add_argument("--learning-rate", type=float, default=None, help="default: 0.001 for adam, 0.1 for sgd")
    parser.add_argument("--l2", type=float, default=1e-4, help="L2 decay of the kernels; 0 for none")
    parser.add_argument("--alpha-conv", type=float, default=0.95)
    parser.add_argument("--alpha-dense", type=float, default=0.95)
    parser.add_argument("--least-filters", type=int, default=0, help="leave convolutions with fewer filters as they are")
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--tolerance", type=float, default=None, help="validation accuracy that may be lost; default: any")
    parser.add_argument("--rewind", action="store_true", help="retrain from the weights before training")
    parser.add_argument("--samples", type=int, default=1000, help="images to score with")
    parser.add_argument("--images", type=int, default=None, help="train on so many images only")
    parser.add_argument("--dense-epochs", type=int, default=10)
    parser.add_argument("--epochs", type=int, default=5, help="of each round")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument(
        "--ways",
        nargs="+",
        choices=WAYS,
        default=["magnitude"],
        help="what to compare with: pruning by magnitude, weight by weight or in the slices of kernels that relief removes",
    )
    parser.add_argument("--no-magnitude", dest="ways", action="store_const", const=[], help="relief alone")
    parser.add_argument("--out", type=pathlib.Path, default=OUT)
    arguments = parser.parse_args()
    (arguments.out / "neural_relief").mkdir(exist_ok=True, parents=True)
    for network in arguments.network:
        path = arguments.out / f"neural_relief_{arguments.dataset}_{network}_{arguments.optimizer}.json"
        rows = json.loads(path.read_text()) if path.exists() else []
        for seed in range(arguments.first_seed, arguments.first_seed + arguments.seeds):
            if not any(row["seed"] == seed for row in rows):
                rows.append(run(arguments.dataset, network, seed, arguments))
                curves.save(path, rows)
                print("\n" + curve(rows[-1]), flush=True)
        print("\n" + table(rows), flush=True)
        picture(rows, path.with_suffix(".png"))


if __name__ == "__main__":
    main()
