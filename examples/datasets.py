"""The data sets of the examples and benchmarks: handwritten digits offline, larger ones by name."""

from __future__ import annotations

import argparse
import os
import pathlib

import keras
import numpy as np

DOWNLOADS = ("mnist", "fashion_mnist", "cifar10", "cifar100")


def add_arguments(parser: argparse.ArgumentParser, several: bool = False) -> None:
    """Add `--dataset` (a list of names, if `several`) and `--data-dir`."""
    parser.add_argument(
        "--dataset",
        nargs="+" if several else None,
        default=["digits"] if several else "digits",
        help=f"digits (default, inside scikit-learn), {', '.join(DOWNLOADS)}, or NAME for DATA_DIR/NAME.npz",
    )
    parser.add_argument(
        "--data-dir",
        default=os.environ.get("KERAS_RENORM_DATA"),
        help="folder with NAME.npz (x_train, y_train, x_test, y_test); default: the environment's KERAS_RENORM_DATA",
    )


def load(name: str, data_dir: str | None = None):
    """Load a data set.

    Args:
        name: `"digits"`, one that `keras.datasets` has, or the name of a file `NAME.npz` in `data_dir`.
        data_dir: folder with files of the layout of Keras' own `mnist.npz`.

    Returns:
        `(x_train, y_train), (x_test, y_test)`: images as float32 in [0, 1] of shape `(N, height, width, channels)`, labels
        as int32 of shape `(N,)`.
    """
    if name == "digits":
        return _digits()
    path = pathlib.Path(data_dir or ".") / f"{name}.npz"
    if data_dir and path.exists():
        with np.load(path) as arrays:
            train, test = (tuple(arrays[f"{part}_{split}"] for part in "xy") for split in ("train", "test"))
    elif name in DOWNLOADS:
        try:
            train, test = getattr(keras.datasets, name).load_data()
        except Exception as error:
            raise SystemExit(
                f"Data set '{name}': there is no {path} (--data-dir, or the environment's KERAS_RENORM_DATA), and "
                f"keras.datasets.{name} could not download it: {error}"
            ) from error
    else:
        raise SystemExit(
            f"Data set '{name}': there is no {path} (--data-dir, or the environment's KERAS_RENORM_DATA), and "
            f"keras.datasets has none of that name. Known: digits, {', '.join(DOWNLOADS)}."
        )
    return _prepare(*train), _prepare(*test)


def _digits():
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    digits = load_digits()
    images = (digits.images * (255 / 16)).astype("uint8")
    x_train, x_test, y_train, y_test = train_test_split(
        images, digits.target, test_size=0.25, random_state=0, stratify=digits.target
    )
    return _prepare(x_train, y_train), _prepare(x_test, y_test)


def _prepare(images, labels):
    images = images.astype("float32") / 255
    return images if images.ndim == 4 else images[..., None], labels.reshape(-1).astype("int32")
