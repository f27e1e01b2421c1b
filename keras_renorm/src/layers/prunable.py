"""The mix-in of prunable layers: masks and scales beside the kernels, applied in `call`."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import keras
import numpy as np
from keras import ops

from keras_renorm.src.core import registry
from keras_renorm.src.core.arrays import as_array
from keras_renorm.src.core.keras_internals import flatten_layers, lock_variables, own_variables, unlock_variables
from keras_renorm.src.layers.arguments import PRUNING_ARGUMENTS, PruningArguments
from keras_renorm.src.layers.kernel_plan import KernelPlan, PruningRules, prune_planned
from keras_renorm.src.layers.kernels import find_kernels
from keras_renorm.src.layers.prunable_kernel import OfEffectiveKernel, PrunableKernel, holding_effective, scale_shape
from keras_renorm.src.rules import schedules

NEVER = -1
_GOAL = "goal"


class _RecordingScope(keras.StatelessScope):
    """A `StatelessScope` that remembers which variables were assigned, tracked by a layer or not (states of an RNN)."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.updated = []

    def add_update(self, update):
        variable, _ = update
        if all(variable is not known for known in self.updated):
            self.updated.append(variable)
        super().add_update(update)


class PrunableLayer:
    """Mix-in for layers whose kernels are pruned while they are used. It precedes the Keras layer in the bases.

    Args:
        pruning_schedule: when to prune and how much; `None` for the schedule of the callback. Defaults to `None`.
        criterion: what scores the weights. Defaults to `"magnitude"`.
        pattern: which weights are removed together. Defaults to `"unstructured"`.
        group: which weights compete with each other: `"layer"` or `"unit"`. Defaults to `"layer"`.
        renormalize: how the kept weights are rescaled at each event, or `None`. Defaults to `"auto"`.
        regrow: whether a later event may bring a removed weight back. Defaults to `False`.
    """

    def __init__(
        self,
        *args,
        pruning_schedule=None,
        criterion="magnitude",
        pattern="unstructured",
        group="layer",
        renormalize="auto",
        regrow=False,
        **kwargs,
    ):
        super().__init__(*args, **kwargs)
        self._set_pruning(PruningArguments(pruning_schedule, criterion, pattern, group, renormalize, regrow))

    def _set_pruning(self, arguments: PruningArguments) -> None:
        # Keras is extended when there is a prunable layer, not by an import.
        from keras_renorm.src.layers.plain_weights import accept_plain_weights

        accept_plain_weights()
        if getattr(self, "lora_rank", None):
            self.enable_lora(self.lora_rank)
        for name, value in vars(arguments.resolve()).items():
            setattr(self, name, value)
        self.masked_kernels = ()
        self.goal: schedules.Goal | None = None
        self._count = None

    # Whether `call` uses the kernel by `PrunableKernel.product`, which need not apply the mask of a settled kernel.
    can_settle = False

    def become_prunable(self, arguments: PruningArguments) -> None:
        """Add masks to a copy of a built plain layer whose class was changed to this one."""
        # Keras lets no layer that is built have more variables.
        unlock_variables(self)
        self._set_pruning(arguments)
        self._add_masks(self)
        lock_variables(self)

    def _add_masks(self, layer: keras.Layer) -> None:
        """Create a mask and a scale for every kernel of `layer`. Called at the end of `build`."""
        adopted = {id(kernel.variable) for kernel in self._adopted_kernels(layer)}
        kernels = [kernel for kernel in find_kernels(layer) if id(kernel.variable) not in adopted]
        if not kernels and adopted:
            return
        if not kernels:
            raise ValueError(
                f"Layer '{layer.name}' (of type {type(layer).__name__}) has nothing to prune: it has no kernel. A layer of "
                "your own can name its weights with a method `get_prunable_weights()` that returns a list of variables."
            )
        masked = []
        for kernel in kernels:
            inner_path = kernel.variable.path.removeprefix(f"{layer.path}/")
            prefix = "" if len(kernels) == 1 else inner_path.replace("/", "_") + "_"
            mask = self.add_weight(
                name=f"{prefix}mask", shape=kernel.variable.shape, dtype="bool", initializer="ones", trainable=False
            )
            scale = self.add_weight(
                name=f"{prefix}scale",
                shape=scale_shape(kernel),
                dtype="float32",
                initializer="ones",
                trainable=False,
            )
            masked.append(PrunableKernel(kernel.variable, kernel.input_axes, mask, scale))
            if kernel.variable.regularizer is not None:
                kernel.variable.regularizer = OfEffectiveKernel(kernel.variable.regularizer, masked[-1])
        self.pruning_step = self.add_weight(
            name="pruning_step", shape=(), dtype="int32", initializer=keras.initializers.Constant(NEVER), trainable=False
        )
        self.masked_kernels = tuple(masked)

    def _call_masked(self, layer: keras.Layer, function: Callable, *args, **kwargs) -> Any:
        """Call `function`, which reads the variables of `layer`, with effective kernels in place of the kernels."""
        kernels = [*self.masked_kernels, *self._adopted_kernels(layer)]
        effective = {id(kernel.variable): kernel.effective() for kernel in kernels}
        variables = without_added(layer.variables + layer.metrics_variables, [self])
        if len(effective.keys() & {id(variable) for variable in variables}) < len(effective):
            raise ValueError(
                f"Layer '{layer.name}' no longer has the kernels that its masks were made for: it was quantized or rebuilt. "
                "Use `keras_renorm.strip(model)` first, and quantize the result."
            )
        # Within a scope only mapped variables have the values of the scopes around it, so all are mapped.
        scope = _RecordingScope(
            [(variable, effective.get(id(variable), variable)) for variable in variables],
            collect_losses=True,
            initialize_variables=False,
        )
        with holding_effective(effective), scope:
            outputs = function(*args, **kwargs)
        for variable in scope.updated:
            variable.assign(scope.get_current_value(variable))
        for loss in scope.losses:
            self.add_loss(loss)
        return outputs

    def _adopted_kernels(self, layer: keras.Layer) -> list[PrunableKernel]:
        """The kernels within `layer` whose masks belong to a prunable layer inside it."""
        return [kernel for part in prunable_layers(layer) if part is not self for kernel in part.masked_kernels]

    @property
    def sparsity(self) -> float:
        """Fraction of zeros in the masks."""
        kept, size = self.count_kept()
        return 1 - kept / size if size else 0.0

    def count_kept(self) -> tuple[int, int]:
        """The number of kept weights, and the number of weights."""
        kept = sum(int(np.count_nonzero(as_array(kernel.mask))) for kernel in self.masked_kernels)
        return kept, sum(kernel.size for kernel in self.masked_kernels)

    def update_masks(self, sparsity: float) -> None:
        """Prune every kernel to `sparsity`, and renormalize it: one pruning event.

        Raises:
            ValueError: if a kernel holds NaN or infinity, or the pattern does not allow the sparsity. Then nothing is changed.
        """
        self.assign_masks(self.compute_pruning_masks(sparsity))

    def compute_pruning_masks(
        self,
        sparsity: float | Sequence[float],
        read: np.ndarray | None = None,
        scores: Mapping[int, np.ndarray] | None = None,
    ) -> list[tuple[np.ndarray, np.ndarray]]:
        """Compute the masks and scales of a pruning event, in the order of `masked_kernels`, without assigning them.

        Args:
            sparsity: fraction of the weights to remove, in [0, 1), or a list with one for each kernel.
            read: for a layer with one kernel, whether a later layer reads each unit. Defaults to `None`: all are read.
            scores: scores of the weights by the `id` of the variable of the kernel. Defaults to `None`: the criterion scores
                them.
        """
        sparsities = sparsity if isinstance(sparsity, Sequence) else [sparsity] * len(self.masked_kernels)
        return [
            self._compute_mask(kernel, one, read, None if scores is None else scores[id(kernel.variable)])
            for kernel, one in zip(self.masked_kernels, sparsities, strict=True)
        ]

    def assign_masks(self, masks_and_scales: list[tuple[np.ndarray, np.ndarray]]) -> bool:
        """Assign the mask and the scale of every kernel. Returns whether any of them changed."""
        changed = False
        for kernel, (mask, scale) in zip(self.masked_kernels, masks_and_scales):
            scale = np.reshape(scale, kernel.scale.shape)
            if np.array_equal(mask, as_array(kernel.mask)) and np.array_equal(scale, as_array(kernel.scale)):
                continue
            kernel.mask.assign(mask)
            kernel.scale.assign(scale)
            changed = True
        return changed

    def keep_all(self, kernels: Sequence[PrunableKernel]) -> None:
        """Keep all weights of some kernels, with scales of one, and set the step to zero, as in a new layer."""
        for kernel in kernels:
            kernel.mask.assign(ops.ones(kernel.mask.shape, "bool"))
            kernel.scale.assign(ops.ones(kernel.scale.shape))
        self.count_steps(NEVER, write=True)

    def mask_zeros(self) -> None:
        """Mask the weights that are zero, such as those of a sparse model whose weights were loaded."""
        for kernel in self.masked_kernels:
            kept = as_array(kernel.mask) & (as_array(kernel.variable) != 0)
            kernel.mask.assign(kept)

    def _compute_mask(
        self, masked: PrunableKernel, sparsity: float, read: np.ndarray | None, scores: np.ndarray | None
    ) -> tuple[np.ndarray, np.ndarray]:
        values, mask, scale = (as_array(variable) for variable in (masked.variable, masked.mask, masked.scale))
        plan = KernelPlan(self, masked, self.pattern, sparsity)
        rules = PruningRules(self.criterion, self.group, self.renormalize)
        scored_by = self.criterion if scores is None else lambda kernel: scores
        return prune_planned(plan, rules, values, scored_by, mask=mask, scale=scale, regrow=self.regrow, read=read)

    def enable_lora(self, *args, **kwargs):
        raise ValueError(
            f"{type(self).__name__} does not take LoRA (`lora_rank`, `enable_lora`): merging its update would fill the "
            "pruned weights in again. Train with LoRA first and prune the merged model, or `keras_renorm.strip` this "
            "model and enable LoRA on the result."
        )

    def quantize(self, *args, **kwargs):
        # What `Model.quantize` turns into a warning.
        raise NotImplementedError(
            f"{type(self).__name__} '{self.name}' is not quantized: masks are for kernels of floating point. Call "
            "`keras_renorm.strip(model)` first, and quantize the result."
        )

    def count_steps(self, steps: int, write: bool) -> None:
        """Set the number of trained batches. The variable is written if `write`, and whenever the layer is saved."""
        if write:
            self.pruning_step.assign(steps)
        self._count = (steps, steps if write else self._count[1])

    @property
    def was_restored(self) -> bool:
        """Whether an earlier step was restored, together with its weights."""
        return self._count is not None and self._step() < self._count[0] and self._step() != self._count[1]

    def _step(self) -> int:
        return int(ops.convert_to_numpy(self.pruning_step))

    def save_own_variables(self, store):
        # Not if the variable was set by somebody else in between, as by restoring the best weights.
        if self._count is not None and self._step() == self._count[1]:
            self.count_steps(self._count[0], write=True)
        # Not the Keras layer's own, which stores only the variables that it knows of.
        keras.Layer.save_own_variables(self, store)
        if self.goal is not None:
            store[_GOAL] = np.array(dataclasses.astuple(self.goal))

    def load_own_variables(self, store):
        values = {key: store[key] for key in store.keys()}  # noqa: SIM118 (a store is no dict)
        goal = values.pop(_GOAL, None)
        self.goal = None if goal is None else _goal_from(goal)
        plain = without_added(own_variables(self), [self])
        if plain and len(values) == len(plain):
            _load_plain(self, plain, values)
        else:
            keras.Layer.load_own_variables(self, values)

    def get_config(self):
        return {
            **super().get_config(),
            "pruning_schedule": schedules.serialize(self.pruning_schedule),
            "criterion": registry.serialize(self.criterion),
            "pattern": registry.serialize(self.pattern),
            "group": self.group,
            "renormalize": registry.serialize(self.renormalize),
            "regrow": self.regrow,
        }


def drop_in(cls: type) -> type:
    """Class decorator: show the signature of the Keras layer, with the pruning arguments as keyword-only arguments after it."""
    plain = inspect.signature(cls.plain_class.__init__).parameters.values()
    pruning = [inspect.signature(PrunableLayer.__init__).parameters[name] for name in PRUNING_ARGUMENTS]
    kwargs = [parameter for parameter in plain if parameter.kind is parameter.VAR_KEYWORD]
    arguments = [parameter for parameter in plain if parameter.kind is not parameter.VAR_KEYWORD]
    cls.__signature__ = inspect.Signature(arguments[1:] + pruning + kwargs)
    return cls


def prunable_layers(layer: keras.Layer) -> list[PrunableLayer]:
    """All built layers with masks in a model or layer (itself included), in order, each once."""
    return [part for part in flatten_layers(layer) if isinstance(part, PrunableLayer) and part.masked_kernels]


def sparsity_of(model: keras.Layer) -> float:
    """Fraction of zeros in all masks of a model."""
    counts = [layer.count_kept() for layer in prunable_layers(model)]
    return 1 - sum(kept for kept, _ in counts) / sum(size for _, size in counts)


def without_added(variables: Sequence[keras.Variable], layers: Sequence[PrunableLayer]) -> list[keras.Variable]:
    """The variables without the masks, scales and steps of some layers."""
    added = set()
    for layer in layers:
        if layer.masked_kernels:
            added.add(id(layer.pruning_step))
        added.update(id(variable) for kernel in layer.masked_kernels for variable in (kernel.mask, kernel.scale))
    return [variable for variable in variables if id(variable) not in added]


def _load_plain(layer: PrunableLayer, variables: Sequence[keras.Variable], store: Mapping[str, Any]) -> None:
    """Load the variables of the plain counterpart of a layer, and keep all weights."""
    values = [store[str(index)] for index in range(len(variables))]
    for variable, value in zip(variables, values):
        stored = keras.backend.standardize_dtype(value.dtype)
        if keras.backend.is_float_dtype(stored) != keras.backend.is_float_dtype(variable.dtype):
            raise ValueError(
                f"Layer '{layer.name}' expected values of type {variable.dtype} for '{variable.name}', but {stored} is stored: "
                "the layer was quantized. Load the weights from before."
            )
        if tuple(value.shape) != tuple(variable.shape):
            raise ValueError(
                f"Layer '{layer.name}' expected shape {tuple(variable.shape)} for '{variable.name}', but "
                f"{tuple(value.shape)} is stored."
            )
    for variable, value in zip(variables, values):
        variable.assign(value)
    layer.keep_all(layer.masked_kernels)


def _goal_from(values: np.ndarray) -> schedules.Goal:
    sparsity, last_event, sparsity_at_last_event, end_step, began = (float(value) for value in np.asarray(values))
    return schedules.Goal(sparsity, int(last_event), sparsity_at_last_event, int(end_step), int(began))
