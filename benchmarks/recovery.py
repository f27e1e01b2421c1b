"""Recovery without labels: what `keras_renorm.recover` gives a pruned classifier back, and how long it takes.

Prunes the convolutions of a trained classifier in one shot with unlabelled samples, lets the dense model teach the pruned one
on the same samples, and prints accuracies: on the last 5000 training images, or on the test split with --test. (A network that
was trained on these images knows them; differences count.) With --labels, the pruned model is also trained as usual, with the
labels of the same samples, for as many steps. With --time, prints the time of a pass over the samples as a ratio to an epoch of
`fit` over the same samples with labels. With --models, models are kept in a folder, and read from there the next time.
Writes JSON after each row.

    python benchmarks/recovery.py --dataset cifar10 --data-dir DIR --model resnet20.keras --input-scale 255 --augment flip shift
    python benchmarks/recovery.py ... --samples 10000 --epochs 20 --sparsity 0.95 --pattern unstructured block --seeds 0 1 2
"""

from __future__ import annotations

import argparse
import json
import math
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
from keras_renorm.src.pruning.recovery import augmentation

HELD_OUT = 5000
PATTERNS = {"unstructured": "unstructured", "block": kr.patterns.Block((4, 1)), "unit": "unit"}


def trained(model, x, labels, steps, seed, arguments):
    """The pruned model after training with labels: masks remain, normalization follows the batches."""
    keras.utils.set_random_seed(seed)
    model = kr.to_prunable(model, from_zeros=True)
    inputs = varied = keras.Input(x.shape[1:])
    for name in arguments.augment:
        varied = augmentation.KNOWN[name]()(varied)
    whole = keras.Model(inputs, model(varied))
    rate = keras.optimizers.schedules.CosineDecay(arguments.learning_rate, steps)
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    whole.compile(keras.optimizers.Adam(rate), loss, jit_compile=False)
    epochs = math.ceil(steps * arguments.batch_size / len(x))
    whole.fit(x, labels, batch_size=arguments.batch_size, epochs=epochs, verbose=0)
    return kr.strip(model)


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


def kept(name, make, arguments):
    """The model of this name in the folder of models; or a new one, which is then kept there. And what is known of it."""
    path = arguments.models and arguments.models / f"{arguments.model.stem}_{name}.keras"
    if path and path.exists():
        return keras.models.load_model(path, compile=False), json.loads(path.with_suffix(".json").read_text())
    model, known = make()
    if path:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.with_suffix(".json").write_text(json.dumps(known))
        partial = path.with_stem(f"partial_{path.stem}")
        model.save(partial)
        partial.replace(path)
    return model, known


def pruned_with(model, images, pattern, sparsity, seed, arguments):
    """The model, pruned with the first of the images."""
    images = images[: arguments.calibration_samples]

    def prune():
        how = dict(layers=keras.layers.Conv2D, pattern=PATTERNS[pattern], calibration=images, verbose=0)
        return kr.prune(model, sparsity, **how), {}

    return kept(f"{pattern}_{sparsity:g}_{len(images)}_{seed}", prune, arguments)[0]


def recovered_with(model, pruned, images, pattern, sparsity, seed, arguments):
    """The pruned model after recovery, and what its report says."""
    how = {name: getattr(arguments, name) or None for name in ("epochs", "batch_size", "learning_rate", "seconds", "augment")}

    def recover():
        better = kr.recover(pruned, model, images, from_logits=True, seed=seed, verbose=0, **how)
        report = better.recovery_report
        known = dict(agreement=report.agreement_after, steps=report.steps, best_step=report.best_step, seconds=report.seconds)
        known["pass_seconds"] = report.seconds * report.samples / (report.steps * arguments.batch_size)
        return better, known

    settings = "_".join(str(value) for value in (arguments.calibration_samples, *how.values()))
    return kept(f"{pattern}_{sparsity:g}_{len(images)}_{seed}_recovered_{settings}", recover, arguments)


def compare(model, data, measured, pattern, sparsity, seed, arguments):
    """One row: accuracies of the pruned model, after recovery, and after training with labels."""
    images, labels = data
    pruned = pruned_with(model, images, pattern, sparsity, seed, arguments)
    better, known = recovered_with(model, pruned, images, pattern, sparsity, seed, arguments)
    row = dict(pattern=pattern, sparsity=sparsity, samples=len(images), seed=seed)
    row |= dict(pruned=accuracy(pruned, *measured), recovered=accuracy(better, *measured))
    if arguments.labels:
        row["with labels"] = accuracy(trained(pruned, images, labels, known["steps"], seed, arguments), *measured)
    return row | known


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset", default="cifar10", choices=("mnist", "fashion_mnist", "cifar10"))
    parser.add_argument("--data-dir", type=pathlib.Path)
    parser.add_argument("--model", type=pathlib.Path, required=True, help="a .keras file with logits as outputs")
    parser.add_argument("--input-scale", type=float, default=1.0)
    parser.add_argument("--samples", type=int, default=1024)
    parser.add_argument("--calibration-samples", type=int, help="the model is pruned with so many of them; default: all")
    parser.add_argument("--models", type=pathlib.Path, help="folder for pruned and recovered models")
    parser.add_argument("--sparsity", type=float, nargs="+", default=[0.9])
    parser.add_argument("--pattern", nargs="+", choices=PATTERNS, default=["unstructured"])
    parser.add_argument("--epochs", type=int)
    parser.add_argument("--seconds", type=float, help="time limit of each recovery")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--learning-rate", type=float, default=3e-3)
    parser.add_argument("--augment", nargs="*", choices=augmentation.KNOWN, default=[])
    parser.add_argument("--labels", action="store_true", help="also train with labels")
    parser.add_argument("--time", action="store_true", help="also compare the time with that of `fit`")
    parser.add_argument("--test", action="store_true", help="measure on the test split")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="each with other samples")
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("recovery.json"))
    arguments = parser.parse_args()
    (images, labels), test = datasets.load(arguments.dataset, arguments.data_dir)
    measured = test if arguments.test else (images[-HELD_OUT:], labels[-HELD_OUT:])
    measured = measured[0] * arguments.input_scale, measured[1]
    model = keras.models.load_model(arguments.model, compile=False)
    dense = accuracy(model, *measured)
    print(f"dense {dense:.4f}", flush=True)
    rows = []
    for pattern in arguments.pattern:
        for sparsity in arguments.sparsity:
            for seed in arguments.seeds:
                chosen = np.random.default_rng(seed).permutation(len(images) - HELD_OUT)[: arguments.samples]
                data = images[chosen] * arguments.input_scale, labels[chosen]
                row = compare(model, data, measured, pattern, sparsity, seed, arguments)
                if arguments.time:
                    row["pass_to_epoch"] = row["pass_seconds"] / seconds_of_an_epoch(model, data[0], arguments.batch_size)
                rows.append(row)
                cells = [f"{key} {value:.4g}" if isinstance(value, float) else f"{key} {value}" for key, value in row.items()]
                print(", ".join(cells), flush=True)
                arguments.out.write_text(json.dumps(dict(vars(arguments), dense=dense, rows=rows), indent=1, default=str))


if __name__ == "__main__":
    main()
