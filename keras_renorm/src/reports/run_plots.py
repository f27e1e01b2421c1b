"""Pictures of what runs of pruning found: accuracies over sparsities, and rounds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from keras_renorm.src.reports.drawing import STYLES, log_axis, new_axes, percent


def accuracy(
    sparsities: Sequence[float],
    curves: Mapping[str, Any],
    dense: float | None = None,
    ylabel: str = "accuracy",
    ax: Any = None,
) -> Any:
    """Draw accuracy against sparsity for several ways of pruning, and the spread over seeds.

    Args:
        sparsities: where it was measured; they are drawn at equal distances.
        curves: name -> accuracies, of shape `(sparsities,)`, or `(seeds, sparsities)`: the line is their mean, the band reaches
            from the lowest to the highest.
        dense: accuracy of the dense model, drawn as a line.
        ylabel: what is measured.
        ax: matplotlib axes; new ones if `None`.

    Returns:
        The axes.

    Raises:
        ValueError: if a curve has not one value for each sparsity.
        ImportError: if matplotlib is missing.

    Example:

    >>> import keras_renorm as kr
    >>> curves = {"plain": [[0.9, 0.7], [0.8, 0.6]], "renormalized": [[0.95, 0.9], [0.94, 0.91]]}
    >>> ax = kr.plots.accuracy([0.8, 0.9], curves, dense=0.96)
    >>> ax.figure.savefig("accuracy.png")  # doctest: +SKIP
    """
    checked = {}
    for name, values in curves.items():
        checked[name] = np.atleast_2d(np.asarray(values, float))
        if checked[name].ndim != 2 or checked[name].shape[1] != len(sparsities):
            raise ValueError(
                f"Argument `curves` must have {len(sparsities)} values in each row of {name!r}, one for each of `sparsities`. "
                f"Received: an array of shape {np.shape(values)}."
            )
    ax = new_axes(ax)
    places = np.arange(len(sparsities))
    if dense is not None:
        ax.axhline(dense, color="0.5", linestyle=(0, (1, 3)), label="dense")
    for index, (name, values) in enumerate(checked.items()):
        style = STYLES[index % len(STYLES)]
        ax.plot(places, values.mean(axis=0), markersize=4, label=name, **style)
        if len(values) > 1:
            ax.fill_between(places, values.min(axis=0), values.max(axis=0), color=style["color"], alpha=0.15, linewidth=0)
    ax.set(xlabel="sparsity", ylabel=ylabel)
    ax.set_xticks(places, [percent(one) for one in sparsities])
    ax.grid(alpha=0.3)
    ax.legend(fontsize="small")
    return ax


def history(found: Any, ax: Any = None) -> Any:
    """Draw the rounds of an iterative method: the metric over what is left, rounds that were taken back, and the floor.

    Args:
        found: what `keras_renorm.methods.prune_iteratively` or `neural_relief` returned.
        ax: matplotlib axes; new ones if `None`.

    Returns:
        The axes.

    Raises:
        ImportError: if matplotlib is missing.

    Example:

    >>> import keras, numpy as np, keras_renorm as kr
    >>> model = keras.Sequential([keras.Input((8,)), keras.layers.Dense(16, "relu"), keras.layers.Dense(1)])
    >>> model.compile("adam", "mse")
    >>> fit = dict(x=np.ones((32, 8)), y=np.zeros((32, 1)))
    >>> found = kr.methods.prune_iteratively(model, fit, metric="loss", floor=100.0, step=0.5, max_rounds=2, verbose=0)
    >>> kr.plots.history(found).get_xlabel()
    'weights left'
    """
    ax = new_axes(ax)
    rows = found.history
    dense = rows[0].details.get("parameters")
    what = "weights" if dense is None else "parameters"
    left = [1 - row.sparsity if dense is None else row.details["parameters"] / dense for row in rows]
    held = [index for index, row in enumerate(rows) if row.held]
    failed = [index for index, row in enumerate(rows) if not row.held]
    ax.plot([left[index] for index in held], [rows[index].metric for index in held], "ko-", label="held")
    if failed:
        ax.plot([left[index] for index in failed], [rows[index].metric for index in failed], "kx", label="rolled back")
    if "before" in rows[0].details:
        before = [rows[index].details["before"] for index in held]
        ax.plot([left[index] for index in held], before, "o--", color="0.6", label="before retraining", zorder=1)
    if found.floor is not None:
        ax.axhline(found.floor, color="0.5", linestyle=":", label="floor")
    log_axis(ax, lambda value, _: percent(value))
    ax.set(xlabel=f"{what} left", ylabel=found.metric)
    ax.invert_xaxis()
    ax.legend()
    return ax
