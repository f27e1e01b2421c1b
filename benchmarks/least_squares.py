"""How long it takes to choose and to fit the survivors of one wide layer.

Times the masked least squares of a square Dense layer, and the choice of its mask by ADMM, against one product of its moments
with its kernel, in the same run.

    python benchmarks/least_squares.py
    python benchmarks/least_squares.py --width 1024
"""

from __future__ import annotations

import argparse
import time

import numpy as np

from keras_renorm.src.core.moments import Moments
from keras_renorm.src.kernels import masks
from keras_renorm.src.rules import criteria, renorm


def problem(width, rows, generator):
    """Inputs that hang together as those behind a ReLU do."""
    latent = generator.standard_normal((rows, width // 8), np.float32)
    mixing = generator.standard_normal((width // 8, width), np.float32) / np.sqrt(width / 8)
    inputs = np.maximum(latent @ mixing + 0.7 * generator.standard_normal((rows, width), np.float32), 0)
    matrix = generator.standard_normal((width, width), np.float32) / np.sqrt(width)
    targets = inputs @ matrix
    inputs, targets = inputs - inputs.mean(axis=0), targets - targets.mean(axis=0)
    zeros = np.zeros((1, width))
    moments = Moments(
        rows,
        (inputs.T @ inputs / rows)[None].astype(np.float64),
        (inputs.T @ targets / rows)[None].astype(np.float64),
        np.square(targets).mean(axis=0)[None].astype(np.float64),
        zeros,
        zeros,
    )
    return matrix[None].astype(np.float64), moments


def timed(call):
    start = time.perf_counter()
    return call(), time.perf_counter() - start


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, default=4096)
    parser.add_argument("--sparsity", type=float, nargs="+", default=[0.5, 0.9, 0.95])
    arguments = parser.parse_args()
    matrix, moments = problem(arguments.width, 2 * arguments.width, np.random.default_rng(0))
    single = moments.gram[0].astype(np.float32), matrix[0].astype(np.float32)
    one = min(timed(lambda: single[0] @ single[1])[1] for _ in range(3))
    print(f"width {arguments.width}: one product of moments and kernel {one:.2f} s")
    zeros = np.zeros((1, arguments.width))
    for sparsity in arguments.sparsity:

        def mask_of(scores, sparsity=sparsity):
            return masks.compute_mask(scores[0], sparsity)[None]

        for name, criterion in (("magnitude", None), ("admm", criteria.ADMM())):
            chosen = 0.0
            mask = mask_of(np.abs(matrix))
            if criterion:
                mask, chosen = timed(lambda criterion=criterion: criterion.select(matrix, moments, mask_of))
            fitted, seconds = timed(lambda mask=mask: renorm.LeastSquares()(matrix, mask, moments))
            plain, after = moments.error(np.where(mask, matrix, 0), zeros), moments.error(fitted, zeros)
            print(
                f"{sparsity:6.0%} {name:10} mask {chosen:6.1f} s ({chosen / one:5.1f} products)   "
                f"refit {seconds:6.1f} s ({seconds / one:5.1f} products)   error {plain:.4f} -> {after:.4f}",
                flush=True,
            )


if __name__ == "__main__":
    main()
