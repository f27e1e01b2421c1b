"""One-shot pruning with calibration samples: what each choice is worth, one at a time.

Around the defaults of `keras_renorm.prune` with samples, exchanges the criterion (also with nothing renormalized), the
allocation and the renormalization, and also prunes without samples with every allocation. Fully connected networks
(512-256-10), or LeNet-5 with --network, trained on all but the last 8000 training images, lose weights in all layers, a trained
classifier (--model) in its convolutions. Accuracies are those on the 8000 held-out training images, never on the test split.
Prints a table and writes JSON.

    python benchmarks/calibrated.py --dataset mnist fashion_mnist --data-dir DIR
    python benchmarks/calibrated.py --dataset cifar10 --data-dir DIR --model resnet20.keras --input-scale 255
"""

from __future__ import annotations

import argparse
import json
import os
import pathlib
import sys
import warnings

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
sys.path.insert(0, str(pathlib.Path(__file__).parents[1] / "examples"))

import datasets
import keras
import networks
import numpy as np
from one_shot import HELD_OUT, accuracy, fully_connected

import keras_renorm as kr

ALLOCATIONS = ("uniform", "global", "erk", "lamp")
# Small batches have gradients that differ.
TAYLOR = dict(criterion="taylor", batch_size=16)
CHOICES = {
    "defaults": dict(),
    **{f"criterion {name}": dict(criterion=name) for name in ("magnitude", "activation", "obs")},
    "criterion taylor": TAYLOR,
    **{f"only {name}": dict(criterion=name, renormalize=None) for name in ("magnitude", "activation", "obs", "admm")},
    "only taylor": dict(TAYLOR, renormalize=None),
    **{f"allocation {name}": dict(allocation=name) for name in ALLOCATIONS},
    **{f"renormalize {name}": dict(renormalize=name) for name in (None, "l2", "moments")},
    **{f"no samples, {name}": dict(allocation=name, calibration=None) for name in ("balanced", *ALLOCATIONS)},
}
LOSS = keras.losses.SparseCategoricalCrossentropy(from_logits=True)


def lenet_5(shape, images, labels, seed):
    keras.utils.set_random_seed(seed)
    model = networks.lenet_5(shape, 10)
    model.compile(keras.optimizers.Adam(1e-3), LOSS)
    model.fit(images, labels, batch_size=128, epochs=3, verbose=0)
    return model


NETWORKS = {"fully_connected": fully_connected, "lenet_5": lenet_5}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    datasets.add_arguments(parser, several=True)
    parser.add_argument("--choices", nargs="+", default=list(CHOICES), help="rows to measure")
    parser.add_argument("--sparsities", type=float, nargs="+", default=[0.8, 0.9, 0.95])
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--samples", type=int, help="default: 4096, or 1024 with --model")
    parser.add_argument("--model", type=pathlib.Path, help="a trained classifier; its convolutions are pruned")
    parser.add_argument("--network", choices=list(NETWORKS), default="fully_connected", help="what is trained without --model")
    parser.add_argument("--input-scale", type=float, default=1.0, help="what images in [0, 1] are multiplied by")
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path(__file__).parent / "results")
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore", message="Argument `calibration` has few samples")
    arguments.out.mkdir(parents=True, exist_ok=True)
    rows = []
    for name in arguments.dataset:
        (images, labels), _ = datasets.load(name, arguments.data_dir)
        images = images * arguments.input_scale
        held_out = images[-HELD_OUT:], labels[-HELD_OUT:]
        for seed in range(arguments.seeds):
            if arguments.model:
                model, layers, count = keras.models.load_model(arguments.model, compile=False), keras.layers.Conv2D, 1024
                model.compile(loss=LOSS)
            else:
                train = NETWORKS[arguments.network]
                model = train(images.shape[1:], images[:-HELD_OUT], labels[:-HELD_OUT], seed)
                layers, count = None, 4096
            order = np.random.default_rng(seed).permutation(len(images) - HELD_OUT)[: arguments.samples or count]
            print(f"{name}, seed {seed}, dense {accuracy(model, *held_out):.4f}")
            for choice in arguments.choices:
                with_labels = CHOICES[choice].get("criterion") == "taylor"
                samples = (images[order], labels[order]) if with_labels else images[order]
                how = dict(calibration=samples, layers=layers, verbose=0) | CHOICES[choice]
                accuracies = [accuracy(kr.prune(model, sparsity, **how), *held_out) for sparsity in arguments.sparsities]
                rows.append(dict(dataset=name, seed=seed, choice=choice, accuracies=accuracies))
                print(f"  {choice:22}" + "".join(f"{value:8.4f}" for value in accuracies), flush=True)
    stem = arguments.model.stem if arguments.model else "_".join([arguments.network, *arguments.dataset])
    (arguments.out / f"calibrated_{stem}.json").write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
