"""One-shot pruning of a convolutional network with residual connections, without labels and without training.

Trains a small residual network (or takes one that is trained already, --model), prunes all its convolutions with every
renormalization, and prints a table of test accuracies. The calibrated ways see a few hundred unlabelled training images;
the seeds of the table are different choices of these. Writes a picture and the data into saved_models/.

    python examples/one_shot_resnet.py
    python examples/one_shot_resnet.py --dataset cifar10 --model resnet20.keras --input-scale 255 --samples 1024
    python examples/one_shot_resnet.py ... --recover --augment flip shift
"""

from __future__ import annotations

import argparse
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
SPARSITIES = (0.5, 0.7, 0.8, 0.9, 0.95)
WAYS = {
    "plain": dict(renormalize=None, criterion="magnitude"),
    "l1": dict(renormalize="l1", criterion="magnitude"),
    "l2": dict(renormalize="l2", criterion="magnitude"),
    "moments": dict(renormalize="moments", criterion="magnitude", calibrated=True),
    "lstsq": dict(renormalize="lstsq", criterion="magnitude", calibrated=True),
    "lstsq, admm (default)": dict(calibrated=True),
}


def trained(train, epochs):
    keras.utils.set_random_seed(0)
    images, labels = train
    model = networks.resnet(images.shape[1:], int(labels.max()) + 1, depth=14)
    model.compile("adam", keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    model.fit(images, labels, batch_size=64, epochs=epochs, verbose=0)
    return model


def accuracy(model, data):
    images, labels = data
    return float(np.mean(model.predict(images, batch_size=500, verbose=0).argmax(axis=-1) == labels))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    datasets.add_arguments(parser)
    parser.add_argument("--model", type=pathlib.Path, help="a trained classifier for the data set, ending in logits")
    parser.add_argument("--input-scale", type=float, default=1.0, help="what images in [0, 1] are multiplied by")
    parser.add_argument("--samples", type=int, default=1024)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=15)
    parser.add_argument(
        "--recover", action="store_true", help="the dense model then teaches the pruned one, which takes minutes"
    )
    parser.add_argument("--augment", nargs="*", choices=("flip", "shift"), default=[], help="with --recover")
    arguments = parser.parse_args()
    (images, labels), (test_images, test_labels) = datasets.load(arguments.dataset, arguments.data_dir)
    images, test = images * arguments.input_scale, (test_images * arguments.input_scale, test_labels)
    if arguments.model:
        model = keras.models.load_model(arguments.model, compile=False)
    else:
        model = trained((images, labels), arguments.epochs)
    dense = accuracy(model, test)
    OUT.mkdir(exist_ok=True)
    ways = dict(WAYS)
    if arguments.recover:
        options = dict(augment=arguments.augment or None, from_logits=True)
        ways["the same, then recover"] = dict(calibrated=True, recover=options)
    rows = []
    for seed in range(arguments.seeds):
        samples = images[np.random.default_rng(seed).permutation(len(images))[: arguments.samples]]
        for way, how in ways.items():
            how = dict(how, layers=keras.layers.Conv2D)
            if how.pop("calibrated", False):
                how.update(calibration=samples, verbose=0)
            elif seed:
                continue
            accuracies = []
            start = time.perf_counter()
            for sparsity in SPARSITIES:
                pruned = kr.prune(model, sparsity, **how)
                accuracies.append(accuracy(pruned, test))
            seconds = (time.perf_counter() - start) / len(SPARSITIES)
            rows.append(
                dict(setting=arguments.dataset, way=way, seed=seed, dense=dense, accuracies=accuracies, seconds=seconds)
            )
            curves.save(OUT / f"one_shot_resnet_{arguments.dataset}.json", rows)
    print(pruned.pruning_report)
    print("\n" + curves.table(rows, SPARSITIES))
    curves.picture(rows, SPARSITIES, OUT / f"one_shot_resnet_{arguments.dataset}.png")


if __name__ == "__main__":
    main()
