"""Each test has the name of the function that it calls: what fails with another release of Keras has to be mended there."""

import ast
import inspect
import pathlib

import keras
import numpy as np
import pytest
from keras import ops

from keras_renorm.src.core import keras_internals as internals

L = keras.layers
BACKEND = keras.backend.backend()
on_tensorflow = pytest.mark.skipif(BACKEND != "tensorflow", reason="TensorFlow's")
FUNCTIONS = [
    name for name, value in vars(internals).items() if inspect.isfunction(value) and value.__module__ == internals.__name__
]


@pytest.fixture
def dense():
    layer = L.Dense(3)
    layer.build((None, 2))
    return layer


@pytest.fixture
def model():
    """Two inputs by name, two outputs in a list."""
    inputs = {"a": keras.Input((2,), name="a"), "b": keras.Input((2,), name="b")}
    total = L.Add()([inputs["a"], inputs["b"]])
    return keras.Model(inputs, [L.Dense(3)(total), total])


@pytest.fixture
def variable():
    return keras.Variable(np.ones(3, "float32"))


@pytest.fixture
def optimizer(variable):
    optimizer = keras.optimizers.SGD(0.5)
    optimizer.build([keras.Variable(np.zeros(2, "float32")), variable])
    return optimizer


@pytest.mark.parametrize("name", FUNCTIONS)
def test_every_function_has_a_test_and_a_line_of_documentation(name):
    tests = {node.name for node in ast.parse(pathlib.Path(__file__).read_text()).body if isinstance(node, ast.FunctionDef)}
    assert f"test_{name}" in tests
    assert len(getattr(internals, name).__doc__.splitlines()) == 1


def test_classes(model, dense):
    assert type(model) is internals.Functional
    assert type(model.operations[0]._inbound_nodes[0]) is internals.Node
    assert type(dense._tracker) is internals.Tracker
    for saved in (dense, keras.optimizers.SGD(), keras.metrics.Mean(), keras.losses.MeanSquaredError()):
        assert isinstance(saved, internals.KerasSaveable)


def test_attributes_of_calls(dense):
    dense(keras.Input((2,)))
    for name, make in internals.OF_CALLS.items():
        assert isinstance(vars(dense)[name], make), name


def test_attributes_of_training(model):
    seen = set()
    note = keras.callbacks.LambdaCallback(on_epoch_end=lambda epoch, logs: seen.update(vars(model)))
    before = set(vars(model))
    model.compile("sgd", ["mse", None])
    data = {"a": np.ones((4, 2)), "b": np.ones((4, 2))}, [np.ones((4, 3)), np.ones((4, 2))]
    model.fit(*data, validation_data=data, callbacks=[note], verbose=0)
    later = {"_compiled_trainable_state"} if keras.__version__.startswith(("3.13.", "3.14.")) else set()
    assert internals.OF_TRAINING - (seen | set(vars(model))) <= later
    assert internals.OF_TRAINING & before == set()


def test_attributes_of_tensors_and_layers(model, dense):
    assert internals.HISTORY in vars(model.outputs[0])
    assert set(internals.LISTS_OF_VARIABLES) <= set(vars(dense))


def test_flatten_layers():
    inner = keras.Sequential([keras.Input((2,)), L.Dense(2)])
    outer = keras.Sequential([inner])
    assert internals.flatten_layers(outer)[:2] == [outer, inner]
    assert inner.layers[0] in internals.flatten_layers(outer, include_self=False)
    assert internals.flatten_layers(outer, include_self=False, recursive=False) == [inner]


def test_build_shapes():
    class Mine(L.Layer):
        def build(self, first_shape, second_shape):
            pass

        def get_build_config(self):
            return {"other": 1}

    one, two = L.Dense(3), Mine()
    assert internals.build_shapes(one) == {}
    one.build((None, 2))
    two.build((None, 2), (None, 3))
    assert internals.build_shapes(one) == {"input_shape": (None, 2)}
    assert internals.build_shapes(two) == {"first_shape": (None, 2), "second_shape": (None, 3)}


def test_takes_training(model):
    assert internals.takes_training(L.Dropout(0.5))
    assert internals.takes_training(model)
    assert not internals.takes_training(L.ReLU())


def test_has_gate(dense):
    # The first releases that `setup.cfg` allows have none.
    if "use_gate" in inspect.signature(L.MultiHeadAttention).parameters:
        assert internals.has_gate(L.MultiHeadAttention(1, 2, use_gate=True))
    assert not internals.has_gate(L.MultiHeadAttention(1, 2))
    assert not internals.has_gate(dense)


def test_lambda_output_shape():
    assert internals.lambda_output_shape(L.Lambda(lambda x: x, output_shape=(3,))) == (3,)


def test_turn_remat_off():
    with keras.RematScope(mode="full"):
        layer = L.Dense(3)
    assert layer._remat_mode is not None
    internals.turn_remat_off(layer)
    assert layer._remat_mode is None


def test_own_trainable_variables(dense):
    dense.trainable = False
    assert internals.own_trainable_variables(dense) == [dense.kernel, dense.bias]
    assert internals.own_trainable_variables(keras.Sequential([dense])) == []


def test_own_variables():
    layer, store = L.BatchNormalization(), {}
    layer.build((None, 2))
    layer.moving_variance.assign([5.0, 5.0])
    layer.save_own_variables(store)
    for index, variable in enumerate(internals.own_variables(layer)):
        np.testing.assert_array_equal(store[str(index)], ops.convert_to_numpy(variable))


def test_unlock_variables(dense):
    with pytest.raises(ValueError, match="cannot add new elements"):
        dense.add_weight(shape=(1,))
    internals.unlock_variables(dense)
    dense.add_weight(shape=(1,))


def test_lock_variables(dense):
    internals.unlock_variables(dense)
    internals.lock_variables(dense)
    with pytest.raises(ValueError, match="cannot add new elements"):
        dense.add_weight(shape=(1,))


def test_replace_variable():
    layer = L.BatchNormalization()
    layer.build((None, 3))
    for before in (layer.beta, layer.moving_mean):
        other = keras.Variable(np.ones(3, "float32"), trainable=before.trainable)
        internals.replace_variable(layer, before, other)
        assert any(other is one for one in layer.variables)
        assert all(before is not one for one in layer.variables)
        assert layer._tracker.is_in_store("trainable_variables" if before.trainable else "non_trainable_variables", other)


def test_renew_ids():
    one, two = object(), object()
    tracker = internals.Tracker({"objects": (lambda value: True, [one])})
    assert not tracker.is_in_store("objects", one)
    internals.renew_ids(tracker)
    assert tracker.is_in_store("objects", one)
    assert not tracker.is_in_store("objects", two)


def test_untracked(dense):
    layer = L.Layer()
    with internals.untracked():
        layer.dense = dense
    assert layer.variables == []
    layer.again = dense
    assert len(layer.variables) == 2


def test_is_trackable(dense):
    assert internals.is_trackable(dense) == (BACKEND == "tensorflow")


@on_tensorflow
def test_track_trackable(dense):
    import tensorflow as tf

    other = L.Dense(1)
    with internals.untracked():
        internals.track_trackable(dense, other, "other")
    assert tf.train.TrackableView(dense).children(dense)["other"] is other


@pytest.mark.skipif(BACKEND != "torch", reason="PyTorch's")
def test_track_torch_parameters(dense):
    assert internals.TORCH_PARAMETERS in dense._modules
    del dense._modules[internals.TORCH_PARAMETERS]
    internals.track_torch_parameters(dense)
    assert len(list(dense.parameters())) == 2


def test_names_in_use():
    keras.Sequential(name=None)
    before = dict(internals.names_in_use())
    keras.Sequential()
    assert internals.names_in_use() == {**before, "sequential": before["sequential"] + 1}


def test_raw_value(variable):
    value = internals.raw_value(variable)
    with keras.StatelessScope([(variable, ops.zeros(3))]):
        assert internals.raw_value(variable) is value
    np.testing.assert_array_equal(ops.convert_to_numpy(value), np.ones(3))


def test_initialize(variable):
    with keras.StatelessScope(initialize_variables=False):
        new = keras.Variable("zeros", shape=(3,))
    assert internals.raw_value(new) is None
    internals.initialize(new, np.ones(3, "float32"))
    np.testing.assert_array_equal(ops.convert_to_numpy(new), np.ones(3))


def test_flag_trainable():
    with keras.StatelessScope(initialize_variables=False):
        new = keras.Variable("zeros", shape=(3,))
    internals.flag_trainable(new, False)
    assert not new.trainable
    internals.initialize(new, np.ones(3, "float32"))


def test_operation_classes():
    x = keras.Input((2,))
    made = [ops.add(x, x), ops.multiply(x, x), ops.relu(x)]
    assert tuple(type(internals.history_of(one).operation) for one in made) == internals.operation_classes(
        "Add", "Multiply", "Relu"
    )
    with pytest.raises(AttributeError, match="Bogus"):
        internals.operation_classes("Bogus")


def test_functional_in(model, dense):
    assert type(internals.functional_in(keras.Sequential([keras.Input((2,)), L.Dense(1)]))) is internals.Functional
    assert internals.functional_in(keras.Sequential([L.Dense(1)])) is None
    assert internals.functional_in(model) is None


def test_inputs_structure(model):
    assert {name: tensor.name for name, tensor in internals.inputs_structure(model).items()} == {"a": "a", "b": "b"}
    assert internals.inputs_structure(keras.Sequential([keras.Input((2,)), L.Dense(1)])) is None


def test_outputs_structure(model):
    structure = internals.outputs_structure(model)
    assert isinstance(structure, list)
    assert [tensor.shape for tensor in structure] == [(None, 3), (None, 2)]
    assert internals.outputs_structure(keras.Sequential([keras.Input((2,)), L.Dense(1)])) is None


def test_standardize_inputs(model):
    given = internals.standardize_inputs(model, {"b": np.ones((1, 2)), "a": np.zeros((1, 2))})
    assert [float(ops.sum(one)) for one in given] == [0.0, 2.0]


def test_nodes_of(model):
    operations = [type(node.operation) for node in internals.nodes_of(model)]
    assert operations == [L.InputLayer, L.InputLayer, L.Add, L.Dense]


def test_name_nodes(model):
    before, model._nodes = model._nodes, set()
    internals.name_nodes(model, internals.nodes_of(model))
    assert model._nodes == before != set()


def test_inbound_nodes(dense):
    x = keras.Input((2,))
    outputs = [dense(x), dense(x)]
    assert [node.outputs[0] for node in internals.inbound_nodes(dense)] == outputs
    assert all(node.input_tensors[0] is x for node in internals.inbound_nodes(dense))


def test_outbound_nodes(dense):
    relu = L.ReLU()
    relu(dense(keras.Input((2,))))
    assert [node.operation for node in internals.outbound_nodes(dense)] == [relu]


def test_flat_arguments(model):
    node = next(node for node in internals.nodes_of(model) if isinstance(node.operation, L.Add))
    assert internals.flat_arguments(node) == model.inputs


def test_history_of(dense):
    dense(keras.Input((2,)))
    made = dense(keras.Input((2,)))
    assert internals.history_of(made) == (dense, 1, 0)
    assert internals.history_of(keras.KerasTensor((2,))) is None


def test_set_history(dense):
    tensor = keras.KerasTensor((None, 3))
    internals.set_history(tensor, dense, 2, 1)
    history = internals.history_of(tensor)
    assert (history.operation, history.node_index, history.tensor_index) == (dense, 2, 1)


def test_before_training(model):
    fresh = internals.before_training()
    assert {key: value for key, value in vars(model).items() if key in fresh} == fresh
    model.compile("sgd", ["mse", None])
    vars(model).update(fresh)
    assert not model.compiled


def test_save_with_optimizer(model):
    model.compile("sgd", ["mse", None])
    internals.save_with_optimizer(model, keras.optimizers.Adam())
    assert model.get_compile_config()["optimizer"]["class_name"] == "Adam"


def test_trained_variables(optimizer, variable):
    assert internals.trained_variables(optimizer)[1] is variable


def test_index_in_optimizer(optimizer, variable):
    assert internals.index_in_optimizer(optimizer, variable) == 1


def test_has_indices(optimizer, dense):
    assert internals.has_indices(optimizer)
    assert not internals.has_indices(dense)


def test_renew_indices(optimizer, variable):
    internals.trained_variables(optimizer).reverse()
    internals.renew_indices(optimizer)
    assert internals.index_in_optimizer(optimizer, variable) == 0


def test_times_applied(variable):
    optimizer = keras.optimizers.SGD(gradient_accumulation_steps=2)
    for _ in range(4):
        optimizer.apply([ops.ones(3)], [variable])
    assert int(internals.times_applied(optimizer)) == 4
    assert int(optimizer.iterations) == 2


def test_update_all(optimizer, variable):
    internals.update_all(optimizer, [ops.ones(3)], [variable], 0.25)
    np.testing.assert_allclose(ops.convert_to_numpy(variable), 0.75)


@on_tensorflow
def test_sum_over_replicas(optimizer, variable):
    ((gradient, same),) = internals.sum_over_replicas(optimizer, [(ops.ones(3), variable)])
    assert same is variable
    np.testing.assert_array_equal(ops.convert_to_numpy(gradient), np.ones(3))


def test_replicas_of(optimizer):
    assert internals.replicas_of(optimizer) == 1
    if BACKEND == "tensorflow":
        assert vars(optimizer)["_distribution_strategy"].num_replicas_in_sync == 1
