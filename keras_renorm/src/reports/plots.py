"""Pictures of what is pruned, readable in print: shades and marks, not colors alone.

Every function draws on the axes that it is given, or on new ones, and returns them. matplotlib is imported when one is called:
`pip install 'keras-renorm[plot]'`.
"""

from __future__ import annotations

from typing import Any

import keras
import numpy as np

from keras_renorm.src.core import validation
from keras_renorm.src.pruning.selection import outermost_layers
from keras_renorm.src.reports.drawing import draw_matrix, log_axis, new_axes, percent, pyplot
from keras_renorm.src.reports.kernel_matrices import kernel_matrices, kernel_matrix
from keras_renorm.src.reports.summary import Summary, summary
from keras_renorm.src.rules import criteria
from keras_renorm.src.rules.criteria.base import score

_MOST_LABELLED = 60


def sparsity(model: keras.Model | Summary, ax: Any = None) -> Any:
    """Draw the sparsity of every kernel, and that of all together.

    Args:
        model: a built model, with prunable layers or plain, or what `keras_renorm.summary` gave for it.
        ax: matplotlib axes; new ones if `None`.

    Returns:
        The axes.

    Raises:
        ValueError: if nothing in the model can be pruned.
        ImportError: if matplotlib is missing.

    Example:

    >>> import keras, keras_renorm as kr
    >>> model = keras.Sequential([keras.Input((8,)), keras.layers.Dense(4, name="fc")])
    >>> ax = kr.plots.sparsity(kr.prune(model, 0.75))
    >>> ax.get_xlabel()
    'sparsity'
    """
    table = model if isinstance(model, Summary) else summary(model)
    if not table.rows:
        raise ValueError("Argument `model` has no kernel whose sparsity can be drawn. Received a model with nothing to prune.")
    rows = table.rows[::-1]
    ax = new_axes(ax, (6, 1.2 + 0.28 * min(len(rows), _MOST_LABELLED)))
    several = len({row.layer for row in rows}) < len(rows)
    names = [f"{row.layer}: {row.kernel}" if several else row.layer for row in rows]
    places = np.arange(len(rows))
    ax.barh(places, [row.sparsity for row in rows], color="0.4", height=0.7)
    for place, row in zip(places, rows):
        # Within the bar where there is room, as beside it the line of the total may be.
        inside = row.sparsity > 0.3
        ax.text(
            row.sparsity + (-0.01 if inside else 0.01),
            place,
            percent(row.sparsity),
            ha="right" if inside else "left",
            va="center",
            color="white" if inside else "black",
            fontsize="small",
        )
    ax.axvline(table.sparsity, color="black", linestyle="--", label=f"all: {percent(table.sparsity)}")
    ax.set(xlim=(0, 1), ylim=(-0.6, len(rows) - 0.4), xlabel="sparsity")
    ax.set_yticks(places if len(rows) <= _MOST_LABELLED else [], names if len(rows) <= _MOST_LABELLED else [])
    ax.xaxis.set_major_formatter(lambda value, _: percent(value))
    ax.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), frameon=False)
    return ax


def mask(layer: keras.Layer, kernel: int = 0, ax: Any = None) -> Any:
    """Draw which weights of a layer are kept (black): a row is an input, a column a unit.

    Args:
        layer: a prunable layer, or a plain one, whose zeros count as pruned.
        kernel: which of its kernels, if it has several.
        ax: matplotlib axes; new ones if `None`.

    Returns:
        The axes.

    Raises:
        ValueError: if the layer has no such kernel.
        ImportError: if matplotlib is missing.

    Example:

    >>> import keras, keras_renorm as kr
    >>> model = keras.Sequential([keras.Input((8,)), keras.layers.Dense(4, name="fc")])
    >>> ax = kr.plots.mask(kr.prune(model, 0.75).get_layer("fc"))
    >>> ax.get_title()
    'fc: 75% zeros'
    """
    one = kernel_matrix(layer, kernel)
    ax = new_axes(ax)
    draw_matrix(ax, one.kept, 1.0)
    ax.set_title(f"{one.name}: {percent(1 - one.kept.mean())} zeros")
    return ax


def kernels(before: keras.Model, after: keras.Model, layer: str, kernel: int = 0, ax: Any = None) -> Any:
    """Draw the size of every weight of a layer before and after pruning, in the same shades: white is zero.

    Args:
        before: a model.
        after: the same model, pruned.
        layer: name of the layer in both.
        kernel: which of its kernels, if it has several.
        ax: two matplotlib axes; new ones if `None`.

    Returns:
        The two axes.

    Raises:
        ValueError: if a model has no such layer, or they differ in shape.
        ImportError: if matplotlib is missing.

    Example:

    >>> import keras, keras_renorm as kr
    >>> model = keras.Sequential([keras.Input((8,)), keras.layers.Dense(4, name="fc")])
    >>> before, after = kr.plots.kernels(model, kr.prune(model, 0.75), "fc")
    >>> after.get_title()
    'fc after: 75% zeros'
    """
    both = []
    for model, argument in ((before, "before"), (after, "after")):
        validation.check_model(model, argument)
        found = {one.name: one for one in outermost_layers(model)}
        if layer not in found:
            raise ValueError(f"Argument `layer` names no layer of `{argument}`. Received: {layer!r}. There are: {list(found)}.")
        both.append(kernel_matrix(found[layer], kernel))
    shapes = [one.values.shape for one in both]
    if shapes[0] != shapes[1]:
        raise ValueError(
            f"Layer '{layer}' has another shape before and after: {shapes[0]} and {shapes[1]} (inputs, units). Compare with "
            "the model from before `keras_renorm.compact`."
        )
    if ax is None:
        ax = pyplot().subplots(1, 2, figsize=(9, 4), sharex=True, sharey=True, layout="constrained")[1]
    # A few very large weights would leave the others white.
    most = float(np.quantile(np.abs(both[0].values), 0.99)) or 1.0
    for one_ax, one, when in zip(ax, both, ("before", "after"), strict=True):
        image = draw_matrix(one_ax, np.abs(one.effective), most)
        one_ax.set_title(f"{one.name} {when}: {percent(1 - one.kept.mean())} zeros")
    ax[1].figure.colorbar(image, ax=list(ax), label="size of the weight", extend="max")
    return ax


def scores(model: keras.Model | keras.Layer, criterion: Any = None, ax: Any = None) -> Any:
    """Draw how the scores of the weights are distributed, those of kept weights beside those of removed ones.

    Args:
        model: a built model, or a layer. In prunable layers what is removed still has a value, and thus a score; in plain ones
            it is zero.
        criterion: what scores the weights, without samples; `None` for the layers' own.
        ax: matplotlib axes; new ones if `None`.

    Returns:
        The axes.

    Raises:
        ValueError: if there are no kernels, or the criterion needs samples.
        ImportError: if matplotlib is missing.

    Example:

    >>> import keras, keras_renorm as kr
    >>> model = keras.Sequential([keras.Input((8,)), kr.layers.PrunableDense(4)])
    >>> model.layers[0].update_masks(0.5)
    >>> kr.plots.scores(model).get_ylabel()
    'weights'
    """
    given = None if criterion is None else criteria.get(criterion)
    kept, removed = [], []
    for one in kernel_matrices(model):
        values = score(given or one.criterion, one.values)
        kept.append(values[one.kept])
        removed.append(values[~one.kept])
    kept, removed = np.concatenate(kept), np.concatenate(removed)
    everything = np.concatenate([kept, removed])
    # Infinity marks weights that are always kept, and cannot be drawn.
    everything = everything[np.isfinite(everything)]
    positive = everything[everything > 0]
    ax = new_axes(ax)
    if positive.size and everything.min() >= 0:
        # What is far below the rest would stretch the axis over empty decades.
        bins = np.geomspace(max(positive.min(), positive.max() * 1e-5), positive.max() * 1.001, 61)
        log_axis(ax, lambda value, _: f"{value:.3g}")
    else:
        bins = np.linspace(everything.min(), everything.max() + 1e-9, 61)
    for values, label, style in (
        (removed, "removed", dict(color="0.75")),
        (kept, "kept", dict(histtype="step", color="black", linewidth=1.5)),
    ):
        drawn = np.clip(values[values > 0], bins[0], None) if bins[0] > 0 else values
        zeros = values.size - drawn.size
        if values.size:
            ax.hist(drawn, bins, label=f"{label}: {values.size:,}" + (f" ({zeros:,} of them zero)" if zeros else ""), **style)
    ax.set(xlabel="score", ylabel="weights")
    ax.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=2, frameon=False)
    return ax


def scales(model: keras.Model | keras.Layer, ax: Any = None) -> Any:
    """Draw how the scales of the units are distributed, layer by layer: the darker, the more units.

    Args:
        model: a built model with prunable layers, or one of these.
        ax: matplotlib axes; new ones if `None`.

    Returns:
        The axes.

    Raises:
        ValueError: if it has no prunable layers.
        ImportError: if matplotlib is missing.

    Example:

    >>> import keras, keras_renorm as kr
    >>> model = keras.Sequential([keras.Input((8,)), kr.layers.PrunableDense(4)])
    >>> model.layers[0].update_masks(0.5)
    >>> kr.plots.scales(model).get_xlabel()
    'scale'
    """
    rows = [(one.name, one.scale.ravel()) for one in kernel_matrices(model) if one.scale is not None]
    if not rows:
        raise ValueError(
            "Argument `model` has no prunable layers, whose scales can be drawn: a plain model has them in its kernels. Pass "
            "the model before `keras_renorm.strip`."
        )
    low, high = (limit(float(limit(values)) for _, values in rows) for limit in (min, max))
    margin = 0.05 * (high - low) or 0.1
    bins = np.linspace(min(low, 1.0) - margin, max(high, 1.0) + margin, 41)
    shares = np.array([np.histogram(values, bins)[0] / values.size for _, values in rows])
    if len(rows) == 1:
        ax = new_axes(ax)
        ax.bar(bins[:-1], shares[0], np.diff(bins), align="edge", color="0.4")
        ax.set(ylabel="share of the units", title=rows[0][0])
    else:
        ax = new_axes(ax, (6, 1.6 + 0.28 * min(len(rows), _MOST_LABELLED)))
        places = np.arange(len(rows))
        image = ax.pcolormesh(bins, np.arange(len(rows) + 1) - 0.5, shares, cmap="gray_r", vmin=0)
        ax.set(ylim=(len(rows) - 0.5, -0.5))
        ax.hlines(places[1:] - 0.5, bins[0], bins[-1], color="0.85", linewidth=0.8)
        labelled = len(rows) <= _MOST_LABELLED
        ax.set_yticks(places if labelled else [], [name for name, _ in rows] if labelled else [])
        ax.figure.colorbar(image, ax=ax, label="share of the units")
    ax.axvline(1.0, color="black", linestyle=":")
    ax.set(xlabel="scale", xlim=(bins[0], bins[-1]))
    return ax
