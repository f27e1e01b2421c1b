"""All that the package uses of Keras beyond its public API: one small function, or one class, for each use.

What another release of Keras calls otherwise, or no longer has, is mended here; `tests/core/test_keras_internals.py` tells
which it is.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import keras
from keras.src.backend.common import global_state
from keras.src.models import Functional
from keras.src.ops import nn, numpy
from keras.src.ops.function import make_node_key
from keras.src.ops.node import KerasHistory, Node
from keras.src.saving.keras_saveable import KerasSaveable
from keras.src.utils.tracking import DotNotTrackScope, Tracker

__all__ = ["Functional", "KerasSaveable", "Node", "Tracker"]

# Attributes of an operation that tell of its calls, and what makes each anew.
OF_CALLS = {"_inbound_nodes": list, "_outbound_nodes": list, "_losses": list, "_loss_ids": set, "_losses_override": list}
# Attributes of a model that come with `compile` and `fit`.
OF_TRAINING = {"optimizer", "history", "stop_training", "_compile_config", "_compiled_trainable_state", "_eval_epoch_iterator"}
# The attribute of a symbolic tensor that says which call made it.
HISTORY = "_keras_history"
# Attributes of a layer that list its own variables.
LISTS_OF_VARIABLES = ("_trainable_variables", "_non_trainable_variables")
# The attribute by which PyTorch knows the variables of a layer.
TORCH_PARAMETERS = "_torch_params"


# Layers


def flatten_layers(layer: keras.Layer, include_self: bool = True, recursive: bool = True) -> list[keras.Layer]:
    """The layers in a layer or model, each once; by default with itself, and with those within them."""
    return layer._flatten_layers(include_self=include_self, recursive=recursive)


def build_shapes(layer: keras.Layer) -> dict[str, Any]:
    """The shapes that a layer was built with, by the names of the arguments of `build`; a single one is `input_shape`."""
    # Not a `get_build_config` of the layer's own, which may tell anything.
    config = keras.Layer.get_build_config(layer) or {}
    return config.get("shapes_dict", config)


def takes_training(operation: keras.Operation) -> bool:
    """Whether the `call` of a layer has an argument `training`."""
    return getattr(operation, "_call_has_training_arg", False)


def has_gate(operation: keras.Operation) -> bool:
    """Whether this is an attention layer with weights for a gate."""
    return getattr(operation, "_use_gate", False)


def lambda_output_shape(layer: keras.layers.Lambda) -> Any:
    """The `output_shape` that a `Lambda` layer was made with."""
    return layer._output_shape


def turn_remat_off(layer: keras.Layer) -> None:
    """Let a layer keep what its backward pass needs, also where a `keras.RematScope` said to compute it anew."""
    layer._remat_mode = None


def own_trainable_variables(layer: keras.Layer) -> list[keras.Variable]:
    """The variables to train of a layer without those of layers in it, also while it is frozen."""
    return layer._trainable_variables


def own_variables(layer: keras.Layer) -> list[keras.Variable]:
    """The variables that a layer stores itself, in the order in which it stores them."""
    return layer._trainable_variables + layer._non_trainable_variables


def unlock_variables(layer: keras.Layer) -> None:
    """Let a layer that is built have more variables."""
    layer._tracker.unlock()


def lock_variables(layer: keras.Layer) -> None:
    """Let a layer have no more variables, as when it was built."""
    layer._lock_state()


def replace_variable(layer: keras.Layer, variable: keras.Variable, other: keras.Variable) -> None:
    """List another variable in the place of one of a layer's own."""
    tracker = layer._tracker
    store = next(name for name in ("trainable_variables", "non_trainable_variables") if tracker.is_in_store(name, variable))
    _, variables = tracker.config[store]
    # By identity: the tracker's own `replace_tracked_value` compares values.
    variables[:] = [other if one is variable else one for one in variables]
    renew_ids(tracker)


def renew_ids(tracker: Tracker) -> None:
    """Let a tracker know what is in the lists that it keeps."""
    tracker.stored_ids = {name: set(map(id, tracker.config[name][1])) for name in tracker.stored_ids}


def untracked() -> DotNotTrackScope:
    """A scope in which layers do not track what is assigned to their attributes."""
    return DotNotTrackScope()


def is_trackable(layer: Any) -> bool:
    """Whether TensorFlow knows what a layer depends on."""
    return hasattr(layer, "_track_trackable")


def track_trackable(layer: Any, value: Any, name: str) -> None:
    """Let TensorFlow know that a layer depends on a value."""
    layer._track_trackable(value, name=name, overwrite=True)


def track_torch_parameters(layer: Any) -> None:
    """Let PyTorch know the variables of a layer."""
    layer._track_variables()


def names_in_use() -> dict[str, int] | None:
    """How often each name was given to layers, for the next one's number; `None` before the first."""
    return global_state.get_global_attribute("object_name_uids")


# Variables


def raw_value(variable: keras.Variable) -> Any:
    """The backend's variable, whatever scope is open; `None` before it is initialized."""
    return variable._value


def initialize(variable: keras.Variable, value: Any) -> None:
    """Make the backend's variable with a value."""
    variable._initialize(value)


def flag_trainable(variable: keras.Variable, trainable: bool) -> None:
    """Set `trainable` of a variable that may not be initialized."""
    variable._trainable = trainable


# Graphs


def operation_classes(*names: str) -> tuple[type, ...]:
    """The classes of operations of `keras.ops` on symbolic tensors, such as `"Add"` and `"Relu"`."""
    return tuple(getattr(numpy, name, None) or getattr(nn, name) for name in names)


def functional_in(model: keras.Model) -> Functional | None:
    """The functional model that a Sequential one runs; `None` for any other, and before it is built."""
    return getattr(model, "_functional", None)


def inputs_structure(model: keras.Model) -> Any:
    """The symbolic inputs of a functional model in the structure that it takes; `None` for any other."""
    return model.input if isinstance(model, Functional) else None


def outputs_structure(model: keras.Model) -> Any:
    """The symbolic outputs of a functional model in the structure that it gives; `None` for any other."""
    return model.output if isinstance(model, Functional) else None


def standardize_inputs(functional: Functional, inputs: Any) -> list[Any]:
    """What a functional model hands to its layers of what it is called with."""
    return functional._standardize_inputs(inputs)


def nodes_of(function: keras.Function) -> list[Node]:
    """The calls in a graph of operations, in the order in which they are run."""
    by_depth = function._nodes_by_depth
    return [node for depth in sorted(by_depth, reverse=True) for node in by_depth[depth]]


def name_nodes(function: keras.Function, nodes: Iterable[Node]) -> None:
    """Let a graph of operations have these calls."""
    function._nodes = {make_node_key(node.operation, node.operation._inbound_nodes.index(node)) for node in nodes}


def inbound_nodes(operation: keras.Operation) -> list[Node]:
    """The calls of an operation on symbolic tensors."""
    return operation._inbound_nodes


def outbound_nodes(operation: keras.Operation) -> list[Node]:
    """The calls that take what an operation made."""
    return operation._outbound_nodes


def flat_arguments(node: Node) -> list[Any]:
    """All arguments of a call, those in lists and dicts too."""
    return node.arguments._flat_arguments


def history_of(tensor: Any) -> KerasHistory | None:
    """The operation that made a symbolic tensor, the number of its call and of the output; `None` for any other tensor."""
    return getattr(tensor, HISTORY, None)


def set_history(tensor: keras.KerasTensor, operation: keras.Operation, node_index: int, tensor_index: int) -> None:
    """Note which output of which call a symbolic tensor is."""
    tensor._keras_history = KerasHistory(operation, node_index, tensor_index)


# Training


# The base class of `keras.Model` that trains, as the backend has it.
_TRAINER = next(base for base in keras.Model.__mro__ if not issubclass(base, keras.Layer))


def before_training() -> dict[str, Any]:
    """The attributes that Keras gives a model to train, as they are before `compile`."""
    fresh = object.__new__(_TRAINER)
    _TRAINER.__init__(fresh)
    # Whether a `compute_loss` of the model's own has an argument is no matter of training.
    return {key: value for key, value in vars(fresh).items() if key != "_compute_loss_has_training_arg"}


def save_with_optimizer(model: keras.Model, optimizer: keras.optimizers.Optimizer) -> None:
    """Let `model.save` write down another optimizer than `compile` got."""
    model._compile_config.config["optimizer"] = optimizer


def trained_variables(optimizer: keras.optimizers.Optimizer) -> list[keras.Variable]:
    """The variables of the model that an optimizer trains."""
    return optimizer._trainable_variables


def index_in_optimizer(optimizer: keras.optimizers.Optimizer, variable: keras.Variable) -> int:
    """The place of a variable among those that an optimizer trains."""
    return optimizer._get_variable_index(variable)


def has_indices(optimizer: Any) -> bool:
    """Whether an optimizer knows the places of the variables that it trains."""
    return "_trainable_variables_indices" in vars(optimizer)


def renew_indices(optimizer: keras.optimizers.Optimizer) -> None:
    """Let an optimizer know the places of the variables that it trains."""
    keys = map(optimizer._var_key, optimizer._trainable_variables)
    optimizer._trainable_variables_indices = {key: index for index, key in enumerate(keys)}


def times_applied(optimizer: keras.optimizers.Optimizer) -> keras.Variable:
    """How many batches an optimizer has seen; its `iterations` are fewer if it accumulates their gradients."""
    return optimizer._iterations


def update_all(optimizer: keras.optimizers.Optimizer, gradients: list, variables: list, learning_rate: Any) -> None:
    """Call `update_step` for each variable, as `apply` does: under `tf.distribute` with sums over replicas."""
    optimizer._backend_update_step(gradients, variables, learning_rate)


def sum_over_replicas(optimizer: keras.optimizers.Optimizer, gradients_and_variables: list[tuple]) -> list[tuple]:
    """Gradients as `tf.distribute` sums them over replicas, with their variables."""
    return optimizer._all_reduce_sum_gradients(gradients_and_variables)


def replicas_of(optimizer: keras.optimizers.Optimizer) -> int:
    """How many replicas `tf.distribute` has of what an optimizer trains."""
    strategy = getattr(optimizer, "_distribution_strategy", None)
    return strategy.num_replicas_in_sync if strategy else 1
