"""Half of the units out: how much smaller and faster a network gets, and whether its outputs stay the same.

Prunes half of the units of every layer but the last in one shot, takes them out with `keras_renorm.compact`, exports both
networks and measures them in turns. The weights are random: what is measured does not depend on them.

    python benchmarks/compaction.py
"""

from __future__ import annotations

import argparse
import os
import pathlib
import sys
import tempfile
import time

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
sys.path.insert(0, str(pathlib.Path(__file__).parents[1] / "examples"))

import keras
import networks
import numpy as np

import keras_renorm as kr

NETWORKS = {
    "VGG-16": lambda: networks.vgg((32, 32, 3), 10),
    "ResNet-20": lambda: networks.resnet((32, 32, 3), 10),
    "MobileNet": lambda: keras.applications.MobileNet(weights=None),
    "MobileNetV2": lambda: keras.applications.MobileNetV2(weights=None),
    "ResNet50V2": lambda: keras.applications.ResNet50V2(weights=None),
}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--network", nargs="*", choices=NETWORKS, default=list(NETWORKS))
    parser.add_argument("--runs", type=int, default=30)
    arguments = parser.parse_args()
    print("network       parameters (millions)   difference  seconds   file      latency of one sample, one thread")
    for name in arguments.network:
        keras.utils.set_random_seed(0)
        model = NETWORKS[name]()
        generator = np.random.default_rng(0)
        for variable in model.variables:
            if variable.name in ("beta", "moving_mean", "bias"):
                variable.assign(0.1 * generator.standard_normal(variable.shape))
        sparse = kr.prune(model, 0.5, pattern="unit", allocation="uniform")
        started = time.perf_counter()
        small = kr.compact(sparse)
        seconds = time.perf_counter() - started
        x = generator.standard_normal((4, *model.inputs[0].shape[1:])).astype("float32")
        before, after = (one.predict(x, verbose=0) for one in (sparse, small))
        difference = np.abs(before - after).max() / np.abs(before).max()
        with tempfile.TemporaryDirectory() as folder:
            paths = [pathlib.Path(folder, f"{which}.tflite") for which in ("small", "dense")]
            reports = [kr.export_tflite(one, path) for one, path in zip((small, model), paths)]
            times = kr.export.benchmark(*paths, runs=arguments.runs)
        millions = [one.count_params() / 1e6 for one in (model, small)]
        print(
            f"{name:12}  {millions[0]:6.2f} -> {millions[1]:5.2f} ({millions[1] / millions[0]:.2f})  {difference:9.1e}  "
            f"{seconds:7.1f}   {reports[0].bytes / reports[1].bytes:.2f}x   "
            f"{1e3 * times.rows[1].median:.2f} -> {1e3 * times.rows[0].median:.2f} ms ({times.ratio:.2f}x)",
            flush=True,
        )


if __name__ == "__main__":
    main()
