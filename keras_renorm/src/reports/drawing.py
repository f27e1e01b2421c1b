"""Axes, styles and labels that all pictures share. Only here, and when a picture is drawn, is matplotlib imported."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

# Told apart by mark and line, and by shade where two cross.
STYLES = (
    dict(color="black", linestyle="-", marker="o"),
    dict(color="#0072b2", linestyle="--", marker="s"),
    dict(color="#d55e00", linestyle="-.", marker="^"),
    dict(color="#009e73", linestyle=":", marker="D"),
    dict(color="#56b4e9", linestyle="-", marker="v"),
    dict(color="#e69f00", linestyle="--", marker="P"),
    dict(color="#cc79a7", linestyle="-.", marker="X"),
    dict(color="0.6", linestyle=":", marker="*"),
)


def draw_matrix(ax: Any, matrix: np.ndarray, most: float) -> Any:
    # matplotlib's own choice shows every weight of a large kernel, and blurs a small one.
    interpolation = "nearest" if max(matrix.shape) <= 256 else "auto"
    image = ax.imshow(matrix.astype("float32"), cmap="gray_r", vmin=0, vmax=most, aspect="auto", interpolation=interpolation)
    ax.set(xlabel="unit", ylabel="input")
    for axis in (ax.xaxis, ax.yaxis):
        axis.get_major_locator().set_params(integer=True)
    return image


def new_axes(ax: Any, size: tuple[float, float] | None = None) -> Any:
    return pyplot().figure(figsize=size, layout="constrained").add_subplot() if ax is None else ax


def log_axis(ax: Any, formatter: Callable[[float, Any], str]) -> None:
    """A logarithmic x axis with labels also within a decade."""
    from matplotlib import ticker

    ax.set_xscale("log")
    ax.xaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 3, 5)))
    ax.xaxis.set_major_formatter(formatter)
    ax.xaxis.set_minor_formatter(ticker.NullFormatter())


def pyplot() -> Any:
    try:
        import matplotlib.pyplot
    except ImportError as error:
        raise ImportError(
            "Pictures need matplotlib, which is not installed: `pip install 'keras-renorm[plot]'`. The figures in them are in "
            "`keras_renorm.summary(model).rows` and in the results' `history`."
        ) from error
    return matplotlib.pyplot


def percent(share: float) -> str:
    """A share as few digits as tell it from 0 and 1."""
    return f"{100 * share:.3g}%" if share <= 0.995 or share == 1 else f"{100 * share:.4g}%"
