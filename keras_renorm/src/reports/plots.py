"""Pictures of what is pruned, readable in print: shades and marks, not colors alone.

Every function draws on the axes that it is given, or on new ones, and returns them. matplotlib is imported when one is called:
`pip install 'keras-renorm[plot]'`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import keras
import numpy as np
from keras import ops

from keras_renorm.src.core import validation
from keras_renorm.src.layers.kernels import find_kernels, name_within
from keras_renorm.src.layers.prunable import PrunableLayer, prunable_layers
from keras_renorm.src.pruning.conversion import outermost_layers
from keras_renorm.src.reports.summary import Summary, summary
from keras_renorm.src.rules import criteria
from keras_renorm.src.rules.criteria.base import CalibratedCriterion, score
from keras_renorm.src.rules.criteria.magnitude import Magnitude

# Told apart by mark and line, and by shade where two cross.
_STYLES = (
    dict(color="black", linestyle="-", marker="o"),
    dict(color="#0072b2", linestyle="--", marker="s"),
    dict(color="#d55e00", linestyle="-.", marker="^"),
    dict(color="#009e73", linestyle=":", marker="D"),
    dict(color="#56b4e9", linestyle="-", marker="v"),
    dict(color="#e69f00", linestyle="--", marker="P"),
    dict(color="#cc79a7", linestyle="-.", marker="X"),
    dict(color="0.6", linestyle=":", marker="*"),
)
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
        raise ValueError(
            "Argument `model` has no kernel whose sparsity could be drawn. Received a model with nothing to prune."
        )
    rows = table.rows[::-1]
    ax = _axes(ax, (6, 1.2 + 0.28 * min(len(rows), _MOST_LABELLED)))
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
            _percent(row.sparsity),
            ha="right" if inside else "left",
            va="center",
            color="white" if inside else "black",
            fontsize="small",
        )
    ax.axvline(table.sparsity, color="black", linestyle="--", label=f"all: {_percent(table.sparsity)}")
    ax.set(xlim=(0, 1), ylim=(-0.6, len(rows) - 0.4), xlabel="sparsity")
    ax.set_yticks(places if len(rows) <= _MOST_LABELLED else [], names if len(rows) <= _MOST_LABELLED else [])
    ax.xaxis.set_major_formatter(lambda value, _: _percent(value))
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
    one = _kernel(layer, kernel)
    ax = _axes(ax)
    _image(ax, one.kept, 1.0)
    ax.set_title(f"{one.name}: {_percent(1 - one.kept.mean())} zeros")
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
        both.append(_kernel(found[layer], kernel))
    shapes = [one.values.shape for one in both]
    if shapes[0] != shapes[1]:
        raise ValueError(
            f"Layer '{layer}' has another shape before and after: {shapes[0]} and {shapes[1]} (inputs, units). Compare with "
            "the model from before `keras_renorm.compact`."
        )
    if ax is None:
        ax = _pyplot().subplots(1, 2, figsize=(9, 4), sharex=True, sharey=True, layout="constrained")[1]
    # A few very large weights would leave the others white.
    most = float(np.quantile(np.abs(both[0].values), 0.99)) or 1.0
    for one_ax, one, when in zip(ax, both, ("before", "after"), strict=True):
        image = _image(one_ax, np.abs(one.effective), most)
        one_ax.set_title(f"{one.name} {when}: {_percent(1 - one.kept.mean())} zeros")
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
    for one in _kernels(model):
        values = score(given or one.criterion, one.values)
        kept.append(values[one.kept])
        removed.append(values[~one.kept])
    kept, removed = np.concatenate(kept), np.concatenate(removed)
    everything = np.concatenate([kept, removed])
    # Infinity marks what always stays; it has no place on an axis.
    everything = everything[np.isfinite(everything)]
    positive = everything[everything > 0]
    ax = _axes(ax)
    if positive.size and everything.min() >= 0:
        # What is far below the rest would stretch the axis over empty decades.
        bins = np.geomspace(max(positive.min(), positive.max() * 1e-5), positive.max() * 1.001, 61)
        _log_axis(ax, lambda value, _: f"{value:.3g}")
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
    rows = [(one.name, one.scale.ravel()) for one in _kernels(model) if one.scale is not None]
    if not rows:
        raise ValueError(
            "Argument `model` has no prunable layers, whose scales could be drawn: a plain model has them in its kernels. Pass "
            "the model before `keras_renorm.strip`."
        )
    low, high = (limit(float(limit(values)) for _, values in rows) for limit in (min, max))
    margin = 0.05 * (high - low) or 0.1
    bins = np.linspace(min(low, 1.0) - margin, max(high, 1.0) + margin, 41)
    shares = np.array([np.histogram(values, bins)[0] / values.size for _, values in rows])
    if len(rows) == 1:
        ax = _axes(ax)
        ax.bar(bins[:-1], shares[0], np.diff(bins), align="edge", color="0.4")
        ax.set(ylabel="share of the units", title=rows[0][0])
    else:
        ax = _axes(ax, (6, 1.6 + 0.28 * min(len(rows), _MOST_LABELLED)))
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
    ax = _axes(ax)
    places = np.arange(len(sparsities))
    if dense is not None:
        ax.axhline(dense, color="0.5", linestyle=(0, (1, 3)), label="dense")
    for index, (name, values) in enumerate(checked.items()):
        style = _STYLES[index % len(_STYLES)]
        ax.plot(places, values.mean(axis=0), markersize=4, label=name, **style)
        if len(values) > 1:
            ax.fill_between(places, values.min(axis=0), values.max(axis=0), color=style["color"], alpha=0.15, linewidth=0)
    ax.set(xlabel="sparsity", ylabel=ylabel)
    ax.set_xticks(places, [_percent(one) for one in sparsities])
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
    ax = _axes(ax)
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
    _log_axis(ax, lambda value, _: _percent(value))
    ax.set(xlabel=f"{what} left", ylabel=found.metric)
    ax.invert_xaxis()
    ax.legend()
    return ax


@dataclasses.dataclass(frozen=True)
class _Kernel:
    """A kernel as a matrix of inputs and units, with its mask; `scale` is `None` in a plain layer."""

    name: str
    values: np.ndarray
    kept: np.ndarray
    effective: np.ndarray
    scale: np.ndarray | None
    criterion: Any


def _kernels(model: keras.Layer) -> Iterator[_Kernel]:
    """All kernels of a model or of a layer."""
    if isinstance(model, keras.Model):
        validation.check_model(model)
    layers = list(outermost_layers(model)) if isinstance(model, keras.Model) else [model]
    found = [one for layer in layers for one in _kernels_of(layer)]
    if not found:
        raise ValueError(f"'{model.name}' has no kernel that could be drawn. Received: {model!r}.")
    yield from found


def _kernels_of(layer: keras.Layer) -> list[_Kernel]:
    parts = prunable_layers(layer)
    if parts:
        return [_masked(layer, part, one) for part in parts for one in part.masked_kernels]
    try:
        return [_plain(layer, one) for one in find_kernels(layer)]
    except ValueError:
        # What cannot be pruned is not drawn.
        return []


def _masked(layer: keras.Layer, part: PrunableLayer, one: Any) -> _Kernel:
    criterion = Magnitude() if isinstance(part.criterion, CalibratedCriterion) else part.criterion
    arrays = (ops.convert_to_numpy(value) for value in (one.variable, one.mask, one.effective()))
    matrices = [_matrix(array, one.input_axes) for array in arrays]
    return _Kernel(_name(layer, one), *matrices, ops.convert_to_numpy(one.scale), criterion)


def _plain(layer: keras.Layer, one: Any) -> _Kernel:
    values = _matrix(ops.convert_to_numpy(one.variable), one.input_axes)
    return _Kernel(_name(layer, one), values, values != 0, values, None, Magnitude())


def _name(layer: keras.Layer, one: Any) -> str:
    inner = name_within(one.variable, layer)
    return layer.name if inner in ("kernel", f"{layer.name}/kernel") else f"{layer.name}: {inner}"


def _kernel(layer: keras.Layer, index: int) -> _Kernel:
    if not isinstance(layer, keras.Layer):
        raise TypeError(f"Argument `layer` must be a Keras layer. Received: layer={layer!r} (of type {type(layer)}).")
    found = _kernels_of(layer)
    if not 0 <= index < len(found):
        raise ValueError(
            f"Argument `kernel` must be less than the number of kernels that layer '{layer.name}' has, which is {len(found)}. "
            f"Received: kernel={index}."
        )
    return found[index]


def _matrix(array: np.ndarray, input_axes: tuple[int, ...]) -> np.ndarray:
    """Inputs (all the positions of a filter) by units."""
    array = np.asarray(array, bool if array.dtype == bool else "float32")
    inputs = [array.shape[axis] for axis in input_axes]
    return np.moveaxis(array, input_axes, range(len(input_axes))).reshape(int(np.prod(inputs)), -1)


def _image(ax: Any, matrix: np.ndarray, most: float) -> Any:
    # matplotlib's own choice shows every weight of a large kernel, and blurs a small one.
    interpolation = "nearest" if max(matrix.shape) <= 256 else "auto"
    image = ax.imshow(matrix.astype("float32"), cmap="gray_r", vmin=0, vmax=most, aspect="auto", interpolation=interpolation)
    ax.set(xlabel="unit", ylabel="input")
    for axis in (ax.xaxis, ax.yaxis):
        axis.get_major_locator().set_params(integer=True)
    return image


def _axes(ax: Any, size: tuple[float, float] | None = None) -> Any:
    return _pyplot().figure(figsize=size, layout="constrained").add_subplot() if ax is None else ax


def _log_axis(ax: Any, formatter: Callable[[float, Any], str]) -> None:
    """A logarithmic x axis with labels also within a decade."""
    from matplotlib import ticker

    ax.set_xscale("log")
    ax.xaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 3, 5)))
    ax.xaxis.set_major_formatter(formatter)
    ax.xaxis.set_minor_formatter(ticker.NullFormatter())


def _pyplot() -> Any:
    try:
        import matplotlib.pyplot
    except ImportError as error:
        raise ImportError(
            "Pictures need matplotlib, which is not installed: `pip install 'keras-renorm[plot]'`. The figures in them are in "
            "`keras_renorm.summary(model).rows` and in the results' `history`."
        ) from error
    return matplotlib.pyplot


def _percent(share: float) -> str:
    """A share as few digits as tell it from 0 and 1."""
    return f"{100 * share:.3g}%" if share <= 0.995 or share == 1 else f"{100 * share:.4g}%"
