"""Recovery without labels: what `keras_renorm.recover` gives a pruned classifier back, and how long it takes.

Prunes the convolutions of a trained classifier in one shot with unlabelled samples, lets the dense model teach the pruned one
on the same samples, and prints accuracies: on the last 5000 training images, or on the test split with --test. (A network that
was trained on these images knows them; differences count.) Also prints the time of a pass over the samples as a ratio to an
epoch of `fit` over the same samples with labels. Writes JSON.

    python benchmarks/recovery.py --dataset cifar10 --data-dir DIR --model resnet20.keras --input-scale 255
    python benchmarks/recovery.py ... --samples 10000 --sparsity 0.9 0.95 --pattern unstructured block unit
"""

from __future__ import annotations

import argparse
import json
import os
import pathlib
import sys
import time

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
sys.path.insert(0, str(pathlib.Path(__file__).parents[1] / "examples"))

import datasets
import keras
import numpy as np
from one_shot import accuracy

import keras_renorm as kr

HELD_OUT = 5000
PATTERNS = {"unstructured": "unstructured", "block": kr.patterns.Block((4, 1)), "unit": "unit"}


def seconds_of_an_epoch(model, x, batch_size):
    """Of `fit` with labels, after the first epoch, which is traced."""
    model = keras.models.clone_model(model)
    model.compile("adam", keras.losses.SparseCategoricalCrossentropy(from_logits=True), jit_compile=False)
    labels, times = np.zeros(len(x), int), []
    for _ in range(3):
        started = time.perf_counter()
        model.fit(x, labels, batch_size=batch_size, verbose=0)
        times.append(time.perf_counter() - started)
    return min(times[1:])


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset", default="cifar10", choices=("mnist", "fashion_mnist", "cifar10"))
    parser.add_argument("--data-dir", type=pathlib.Path)
    parser.add_argument("--model", type=pathlib.Path, required=True, help="a .keras file with logits as outputs")
    parser.add_argument("--input-scale", type=float, default=1.0)
    parser.add_argument("--samples", type=int, default=1024)
    parser.add_argument("--sparsity", type=float, nargs="+", default=[0.9])
    parser.add_argument("--pattern", nargs="+", choices=PATTERNS, default=["unstructured"])
    parser.add_argument("--epochs", type=int)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--learning-rate", type=float, default=3e-3)
    parser.add_argument("--augment", action="store_true", help="flips and shifts")
    parser.add_argument("--test", action="store_true", help="measure on the test split")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("recovery.json"))
    arguments = parser.parse_args()
    train, test = datasets.load(arguments.dataset, arguments.data_dir)
    images = train[0][: arguments.samples] * arguments.input_scale
    measured, labels = test if arguments.test else (train[0][-HELD_OUT:], train[1][-HELD_OUT:])
    measured = measured * arguments.input_scale
    model = keras.models.load_model(arguments.model, compile=False)
    augment = [keras.layers.RandomFlip("horizontal"), keras.layers.RandomTranslation(0.1, 0.1, fill_mode="constant")]
    augment = keras.Sequential(augment) if arguments.augment else None
    epoch = seconds_of_an_epoch(model, images, arguments.batch_size)
    print(f"dense {accuracy(model, measured, labels):.4f}")
    rows = []
    for pattern in arguments.pattern:
        for sparsity in arguments.sparsity:
            how = dict(layers=keras.layers.Conv2D, pattern=PATTERNS[pattern], calibration=images, verbose=0)
            pruned = kr.prune(model, sparsity, **how)
            better = kr.recover(
                pruned,
                model,
                images,
                epochs=arguments.epochs,
                batch_size=arguments.batch_size,
                learning_rate=arguments.learning_rate,
                from_logits=True,
                augment=None if augment is None else lambda x: augment(x, training=True),
                seed=arguments.seed,
                verbose=0,
            )
            report = better.recovery_report
            passes = report.steps * arguments.batch_size / report.samples
            row = dict(
                pattern=pattern,
                sparsity=sparsity,
                samples=arguments.samples,
                pruned=accuracy(pruned, measured, labels),
                recovered=accuracy(better, measured, labels),
                agreement=report.agreement_after,
                seconds=report.seconds,
                pass_to_epoch=report.seconds / passes / epoch,
            )
            rows.append(row)
            print(
                ", ".join(f"{key} {value:.4g}" if isinstance(value, float) else f"{key} {value}" for key, value in row.items())
            )
    arguments.out.write_text(json.dumps(dict(vars(arguments), rows=rows), indent=1, default=str))


if __name__ == "__main__":
    main()
