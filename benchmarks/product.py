"""The product on the way back through a Dense layer, by the size of the kernel and of the batch, on TensorFlow.

`gradient @ kernel.T`, as TensorFlow's own gradient of a matrix product computes it, beside what `PrunableDense` does where the
kernel is much larger than the batch. In turns. `TF_ENABLE_ONEDNN_OPTS=0` shows it without Intel's library.

    python benchmarks/product.py
"""

from __future__ import annotations

import argparse
import os

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import tensorflow as tf
from speed import medians

from keras_renorm.src.layers import product

SIZES = ((32, 784, 300), (16, 25088, 1024), (32, 2048, 2048), (128, 784, 2048), (128, 2048, 2048), (256, 4096, 1024))
SIZES += ((128, 256, 256), (1024, 512, 512), (512, 1024, 4096), (4096, 64, 64))


def functions(batch, inputs, units):
    gradient, kernel = tf.random.normal((batch, units)), tf.Variable(tf.random.normal((inputs, units)))
    ways = {
        "tensorflow": lambda: tf.matmul(gradient, kernel, transpose_b=True),
        "by the transposed": lambda: product.by_transposed(gradient, kernel),
    }
    compiled = {name: tf.function(way) for name, way in ways.items()}
    return {name: lambda way=way: way().numpy() for name, way in compiled.items()}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=30)
    runs = parser.parse_args().runs
    print("batch  inputs  units  tensorflow  by the transposed  ratio  PrunableDense takes")
    for batch, inputs, units in SIZES:
        first, second = medians(functions(batch, inputs, units), runs).values()
        taken = "the second" if product.is_much_larger(batch, inputs, units) else "the first"
        print(
            f"{batch:5}  {inputs:6}  {units:5}  {1e3 * first:7.2f} ms  {1e3 * second:14.2f} ms  {second / first:5.2f}  {taken}"
        )


if __name__ == "__main__":
    main()
