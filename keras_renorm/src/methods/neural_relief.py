"""Neural relief: rounds of pruning by activity and retraining."""

from __future__ import annotations

import contextlib
import dataclasses
import os
from collections.abc import Callable, Mapping
from typing import Any

import keras
import numpy as np
from keras import ops

from keras_renorm.src.calibration.gathering import KernelStatistics, gather_statistics, masks_of
from keras_renorm.src.calibration.samples import Samples
from keras_renorm.src.core import validation
from keras_renorm.src.core.keras_internals import flatten_layers, history_of, inbound_nodes
from keras_renorm.src.core.moments import InputSizes
from keras_renorm.src.core.tables import format_table
from keras_renorm.src.layers.prunable import prunable_layers
from keras_renorm.src.methods import rounds as loop
from keras_renorm.src.methods.outcome import Goal, Outcome, direction
from keras_renorm.src.methods.round_training import check_fit
from keras_renorm.src.models.model_copies import copy_model
from keras_renorm.src.pruning.conversion import plain_copy, plain_variables, to_prunable
from keras_renorm.src.pruning.model_event import assign_masks, remove_unread_units
from keras_renorm.src.rules.criteria.activity import Activity

# A failed round is tried again with half, a quarter and an eighth of what it removed.
SMALLEST_STEP = 0.125


@dataclasses.dataclass(frozen=True)
class NeuralRelief(Outcome):
    """The result of `neural_relief`. Print it for a table of the rounds.

    `Round.details` of each row of `history` holds:

    - `"before"`: the metric after pruning and before retraining;
    - `"parameters"`: number of remaining parameters: weights, and biases and normalization weights of units with connections;
    - `"flops"`: floating-point operations for one sample, two for each weight at each position where it is used;
    - `"units"`: number of units with connections, by the name of the layer.
    """

    @property
    def compression(self) -> float:
        """Parameters of the dense model over remaining parameters of `model`."""
        last = [row for row in self.history if row.held][-1]
        return self.history[0].details["parameters"] / last.details["parameters"]

    def __str__(self) -> str:
        dense = self.history[0].details
        header = ("round", "before", self.metric, "held", "parameters", "compression", "FLOPs left", "epochs", "units", "note")
        cells = [
            (
                str(row.round),
                f"{row.details['before']:.4g}",
                f"{row.metric:.4g}",
                "yes" if row.held else "no",
                f"{row.details['parameters']:,}",
                f"{dense['parameters'] / row.details['parameters']:.2f}x",
                f"{row.details['flops'] / dense['flops']:.2%}",
                str(row.epochs),
                "-".join(map(str, row.details["units"].values())),
                row.note,
            )
            for row in self.history
        ]
        end = "" if self.floor is None else f"\nfloor of {self.metric}: {self.floor:.4g}"
        return format_table(header, cells, right=(0, 1, 2, 4, 5, 6, 7)) + end

    __repr__ = __str__


def neural_relief(
    model: keras.Model,
    data: Any,
    alpha_conv: float = 0.95,
    alpha_dense: float = 0.95,
    rounds: int = 10,
    fit: Mapping[str, Any] | Callable[[keras.Model], Any] | None = None,
    metric: str = "val_accuracy",
    floor: float | None = None,
    tolerance: float | None = None,
    mode: str = "auto",
    evaluate: Callable[[keras.Model], float] | None = None,
    layers: Any = None,
    rewind: keras.Model | None = None,
    directory: str | os.PathLike | None = None,
    seed: int = 0,
    batch_size: int = 128,
    verbose: int | str = "auto",
) -> NeuralRelief:
    """Prune the connections that carry the least activity and retrain, in rounds.

    A round passes samples through the network and scores every connection by its activity (`keras_renorm.criteria.Activity`).
    Each unit keeps the smallest set of connections whose scores reach a share `alpha` of its total. Then connections from
    inputs that are zero for all samples are removed and, from the outputs back, all connections of units that no layer reads
    any more, also through residual and concatenating graphs. The remaining network is trained with the optimizer and the
    learning rate that it had at first.

    With a `floor` or a `tolerance`, a round that misses it is undone and repeated with half as much removed (`1 - alpha` is
    halved, at most three times). Kernels that cannot be scored by samples (recurrent layers, embeddings, your own layers) are
    not pruned.

    The model that is passed in is not changed.

    Source: A. Dekhovich, D. Tax, M. Sluiter and M. Bessa, Neural network relief: a pruning algorithm based on neural activity,
    arXiv 2109.10795. Deviation: the paper also prunes biases and, in residual networks, an operand of a sum that carries less
    than a share `1 - alpha` of it; this library does not. The floor and the repetition are additions of this library.

    Args:
        model: a trained and compiled Sequential or Functional model, with plain or prunable layers.
        data: unlabelled samples to score with, as `calibration` in `keras_renorm.prune`. The paper uses 1000.
        alpha_conv: share of the activity of a unit to keep in convolutions, in (0, 1]. Defaults to 0.95.
        alpha_dense: share of the activity of a unit to keep in all other layers, in (0, 1]. Defaults to 0.95.
        rounds: the largest number of rounds. Pruning ends earlier if a round finds nothing to remove. Defaults to 10.
        fit: the retraining of a round: a dict of arguments of `model.fit`, or a function `model -> logs` (or `History`).
        metric: name of the metric in the logs of `fit`. Its value in the last epoch counts. Defaults to `"val_accuracy"`.
        floor: the value that the metric must reach. Defaults to `None`: no floor.
        tolerance: how much worse than the trained model the metric may be, in its own units. Defaults to `None`: any.
        mode: `"max"` if larger values of the metric are better, `"min"` if smaller values are, `"auto"` to decide by its name.
            Defaults to `"auto"`.
        evaluate: function `model -> metric` for the value before retraining. Defaults to `None`: the model is evaluated on the
            `validation_data` of `fit`, or on its `x` and `y` if the metric is a training metric.
        layers: the layers of a plain model to prune, as in `keras_renorm.to_prunable`. Defaults to `None`: all.
        rewind: a model of the same architecture, such as a copy made before training. Before each retraining, the remaining
            weights take its values, as the paper does for the LeNets. Defaults to `None`: training continues from the trained
            values.
        directory: folder for the state, which is written after every round. If the folder holds the state of the same run, that
            run is resumed. Only one run at a time can use it. Defaults to `None`: no state is kept.
        seed: integer. Round `r` begins with `keras.utils.set_random_seed(seed + r)`. Defaults to 0.
        batch_size: batch size for `data`, if it is an array. Defaults to 128.
        verbose: `"auto"`, 0, 1, or 2: the progress bar. Defaults to `"auto"`.

    Returns:
        A `NeuralRelief` with `model` (of plain Keras layers), `history`, `sparsity`, `compression`, and `plot()`.

    Raises:
        ValueError: if an argument is not possible, the metric is not in the logs, the trained model does not reach the floor,
            or the directory holds the state of another run, is in use by another run, or holds a damaged state.

    Example:

    >>> import keras, numpy as np, keras_renorm as kr
    >>> keras.utils.set_random_seed(0)
    >>> x = np.random.default_rng(0).standard_normal((256, 8)).astype("float32")
    >>> model = keras.Sequential([keras.Input((8,)), keras.layers.Dense(16, "relu"), keras.layers.Dense(1)])
    >>> model.compile(keras.optimizers.Adam(0.01), "mse")
    >>> fit = dict(x=x, y=x[:, :1], epochs=20)
    >>> history = model.fit(**fit, verbose=0)
    >>> found = kr.methods.neural_relief(model, x, 0.9, 0.9, rounds=2, fit=fit, metric="loss", verbose=0)
    >>> found.compression > 1.5
    True
    """
    validation.check_model(model)
    for value, argument in ((alpha_conv, "alpha_conv"), (alpha_dense, "alpha_dense")):
        validation.check_share(value, argument)
    if floor is not None and tolerance is not None:
        raise ValueError(f"Pass `floor` or `tolerance`, not both. Received: floor={floor}, tolerance={tolerance}.")
    plan = loop.RunPlan(
        fit=check_fit(fit, model),
        goal=Goal(metric, direction(metric, mode), floor, tolerance),
        step=1.0,
        smallest_step=SMALLEST_STEP,
        max_rounds=validation.check_count(rounds, "rounds"),
        stop_early=False,
        seed=seed,
        verbose=validation.check_verbose(verbose),
    )
    measure = evaluate or _evaluation(fit, metric)
    pruned = copy_model(model)[0] if prunable_layers(model) else to_prunable(model, layers, renormalize=None)
    early = _early_weights(pruned, rewind)
    # `rounds` is no part of it: a run may go on for more of them.
    settings = dict(metric=metric, floor=floor, tolerance=tolerance, mode=plan.goal.better, seed=seed)
    settings.update(alpha_conv=alpha_conv, alpha_dense=alpha_dense, rewind=rewind is not None)
    with contextlib.ExitStack() as stack:
        samples = stack.enter_context(Samples(data, model, batch_size))
        positions = {}

        def look() -> dict[str, Any]:
            parameters, flops, units = _what_is_left(pruned, positions)
            return {"before": measure(pruned), "parameters": parameters, "flops": flops, "units": units}

        def first():
            seen = _see(pruned, samples)
            positions.update({key: one.statistics.sizes.shape[1] for key, one in seen.items()})
            details = look()
            return details["before"], details

        def prune(step):
            seen = _see(pruned, samples)
            positions.update({key: one.statistics.sizes.shape[1] for key, one in seen.items()})
            _keep_shares(pruned, seen, 1 - step * (1 - alpha_conv), 1 - step * (1 - alpha_dense))
            # What no sample brings to life any more.
            _keep_shares(pruned, _see(pruned, samples), 1.0, 1.0)
            remove_unread_units(pruned)
            details = look()
            for variable, value in early:
                variable.assign(value)
            return details

        state = loop.run_rounds(pruned, prune, plan, directory, settings, first, reset_optimizer=True)
    return NeuralRelief(plain_copy(pruned)[0], tuple(state.history), metric, state.floor)


def _see(model: keras.Model, samples: Samples) -> dict[int, KernelStatistics]:
    """What is known of the inputs of each kernel, by the `id` of its variable."""
    plain, variables = plain_copy(model)
    seen = gather_statistics(plain, samples, InputSizes)
    return {key: seen[id(variable)] for key, variable in variables.items() if id(variable) in seen}


def _keep_shares(model: keras.Model, seen: dict[int, KernelStatistics], alpha_conv: float, alpha_dense: float) -> None:
    conv = {key: one for key, one in seen.items() if hasattr(one.part.layer, "kernel_size")}
    masks = masks_of(conv, Activity(alpha_conv))
    masks.update(masks_of({key: one for key, one in seen.items() if key not in conv}, Activity(alpha_dense)))
    assign_masks(model, masks)


def _what_is_left(model: keras.Model, positions: dict[int, int]) -> tuple[int, int, dict[str, int]]:
    """The remaining parameters, the operations for a sample, and the units of each prunable layer that have connections."""
    units, alive, flops = {}, {}, 0
    parameters = sum(int(np.prod(v.shape)) for v in model.trainable_variables)
    for layer in prunable_layers(model):
        for kernel in layer.masked_kernels:
            mask = ops.convert_to_numpy(kernel.mask)
            parameters -= mask.size - np.count_nonzero(mask)
            flops += 2 * int(np.count_nonzero(mask)) * positions.get(id(kernel.variable), 1)
            alive[id(layer)] = mask.any(axis=kernel.input_axes).reshape(-1)
        units[layer.name] = int(np.count_nonzero(alive[id(layer)]))
        parameters -= _of_dead_units(layer, alive[id(layer)])
    for layer in flatten_layers(model):
        if isinstance(layer, keras.layers.BatchNormalization) and len(inbound_nodes(layer)) == 1:
            maker = history_of(inbound_nodes(layer)[0].input_tensors[0]).operation
            if id(maker) in alive:
                dead = np.count_nonzero(~alive[id(maker)])
                parameters -= sum(dead for v in layer.trainable_variables if v.shape == alive[id(maker)].shape)
    return int(parameters), flops, units


def _of_dead_units(layer: keras.Layer, alive: np.ndarray) -> int:
    """The number of biases that belong to units without connections."""
    kernels = {id(kernel.variable) for kernel in layer.masked_kernels}
    biases = [v for v in layer.trainable_variables if id(v) not in kernels and int(np.prod(v.shape)) == alive.size]
    return len(biases) * int(np.count_nonzero(~alive))


def _evaluation(fit: Any, metric: str) -> Callable[[keras.Model], float]:
    """How to measure a model without training it, from the arguments of `fit`."""
    name = metric.removeprefix("val_")
    if isinstance(fit, Mapping):
        data, size = (fit.get("x"), fit.get("y")), fit.get("batch_size")
        if metric.startswith("val_"):
            data, size = fit.get("validation_data"), fit.get("validation_batch_size", size)
        data = data if isinstance(data, (tuple, list)) else (data, None)
        if data[0] is not None:
            x, y, *weights = data
            arguments = dict(zip(("x", "y", "sample_weight"), (x, y, *weights)))
            return lambda model: _logged(model.evaluate(**arguments, batch_size=size, verbose=0, return_dict=True), name)
    raise ValueError(
        "Argument `evaluate` is needed to measure the model before retraining, as `fit` does not have the data for metric "
        f"{metric!r}. Pass `evaluate=lambda model: ...`, or `validation_data` in `fit`. Received: evaluate=None."
    )


def _logged(logs: Mapping[str, float], name: str) -> float:
    if name not in logs:
        raise ValueError(
            f"Argument `metric` is not measured by the model. Received: metric={name!r}. There are: {sorted(logs)}."
        )
    return float(logs[name])


def _early_weights(model: keras.Model, rewind: keras.Model | None) -> list[tuple[keras.Variable, np.ndarray]]:
    """The variables of a model with prunable layers, each with the value to return to."""
    if rewind is None:
        return []
    validation.check_model(rewind, "rewind")
    plain = [variable for layer in model.layers for variable in plain_variables(layer)]
    early = [variable for layer in rewind.layers for variable in plain_variables(layer)]
    shapes = [[tuple(variable.shape) for variable in variables] for variables in (plain, early)]
    if shapes[0] != shapes[1]:
        raise ValueError(
            "Argument `rewind` must be a model of the same architecture. Received: a model whose weights have the shapes "
            f"{shapes[1]}, where `model` has {shapes[0]}."
        )
    return [(variable, np.array(ops.convert_to_numpy(value))) for variable, value in zip(plain, early)]
