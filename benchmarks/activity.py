"""What scoring by activity costs: all connections of a VGG-16 on 1000 images of 32 x 32, beside one `predict` of the same.

python benchmarks/activity.py
"""

from __future__ import annotations

import argparse
import os
import pathlib
import sys
import time
import tracemalloc

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
sys.path.insert(0, str(pathlib.Path(__file__).parents[1] / "examples"))

import networks
import numpy as np

from keras_renorm.criteria import Activity
from keras_renorm.src.calibration.gathering import gather_statistics, masks_of
from keras_renorm.src.calibration.samples import Samples
from keras_renorm.src.core.moments import InputSizes


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, nargs="+", default=[250, 1000])
    parser.add_argument("--runs", type=int, default=3)
    arguments = parser.parse_args()
    model = networks.vgg((32, 32, 3), 10)
    print(f"{model.count_params() / 1e6:.1f} million parameters")
    for count in arguments.samples:
        images = np.random.default_rng(0).random((count, 32, 32, 3), np.float32)
        seconds = {"predict": [], "a pass that gathers sizes": [], "scores and masks": []}
        for _ in range(arguments.runs):
            started = time.perf_counter()
            model.predict(images, batch_size=128, verbose=0)
            between = time.perf_counter()
            seen = gather_statistics(model, Samples(images, model, 128), InputSizes)
            done = time.perf_counter()
            masks_of(seen, Activity(0.95))
            for way, value in zip(seconds, (between - started, done - between, time.perf_counter() - done)):
                seconds[way].append(value)
        medians = {way: float(np.median(values)) for way, values in seconds.items()}
        print(f"\n{count} images")
        for way, value in medians.items():
            print(f"{way:26} {value:6.2f} s  {value / medians['predict']:5.2f}x", flush=True)
        tracemalloc.start()
        gather_statistics(model, Samples(images, model, 128), InputSizes)
        print(f"{'peak of what NumPy holds':26} {tracemalloc.get_traced_memory()[1] / 2**20:6.1f} MiB")
        tracemalloc.stop()


if __name__ == "__main__":
    main()
