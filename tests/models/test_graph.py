import keras
import numpy as np
from keras import ops

from keras_renorm.src.models.graph import functional_of, graph_of, rebuild_model

L = keras.layers


def test_a_model_called_on_its_own_inputs_the_other_way_round():
    """Tensors of the model within stand for other tensors than in the model around it."""
    a, b = keras.Input((4,), name="a"), keras.Input((4,), name="b")
    inner = keras.Model([a, b], L.Subtract(name="difference")([L.Dense(3, name="one")(a), L.Dense(3, name="two")(b)]))
    model = keras.Model([a, b], [inner([b, a]), L.Dense(2, name="three")(a)])
    calls = {call.operation.name: call for call in graph_of(model).calls}
    assert set(calls) == {"one", "two", "three", "difference"}
    assert [calls[name].inputs[0] for name in ("one", "two", "three")] == [b, a, a]
    x = [np.random.default_rng(seed).standard_normal((5, 4)).astype("float32") for seed in (0, 1)]
    again = rebuild_model(model, graph_of(model), lambda call: call.operation)
    for before, after in zip(model(x), again(x)):
        np.testing.assert_array_equal(*map(ops.convert_to_numpy, (before, after)))


def test_what_a_model_is_called_with_is_for_its_layers():
    inputs = keras.Input((4,))
    block = keras.Sequential([keras.Input((4,)), L.Dropout(0.5, name="inner")])
    x = L.Dropout(0.5, name="outer")(block(inputs, training=True))
    model = keras.Model(inputs, x)
    training = {call.operation.name: call.training for call in graph_of(model).calls}
    assert training["inner"] is True
    # Keras from 3.16 on leaves it open here.
    assert training["outer"] in (False, None)
    again = rebuild_model(model, graph_of(model), lambda call: call.operation)
    assert len(np.unique(ops.convert_to_numpy(again(np.ones((50, 4)))))) == 2


def test_models_that_do_more_than_call_their_layers_stay_calls():
    class Doubling(keras.Model):
        def call(self, x):
            return 2 * super().call(x)

    inputs, of_integers = keras.Input((4,)), keras.Input((4,), dtype="int32")
    inner = keras.Input((4,))
    doubling = Doubling(inner, L.Dense(4)(inner))
    casting = keras.Sequential([keras.Input((4,)), L.Dense(4)], name="casting")
    assert functional_of(doubling) is None
    assert [call.operation for call in graph_of(keras.Model(inputs, doubling(inputs))).calls] == [doubling]
    assert [call.operation for call in graph_of(keras.Model(of_integers, casting(of_integers))).calls] == [casting]


def test_arguments_are_handed_over_as_they_are():
    inputs = keras.Input((4,))
    variable, vector = keras.Variable(np.ones(4, "float32")), np.arange(4, dtype="float32")
    model = keras.Model(inputs, ops.where(ops.concatenate([inputs, inputs], axis=0) > 0, variable, vector))
    given = []

    def operation_for(call):
        return lambda *args, **kwargs: given.append((args, kwargs)) or call.operation(*args, **kwargs)

    rebuild_model(model, graph_of(model), operation_for)
    assert given[-1][0][1] is variable
    assert given[-1][0][2] is vector


def test_inputs_that_are_looked_up_by_their_names():
    first, second = keras.Input((4,), name="z"), keras.Input((4,), name="a")
    inner = keras.Model([first, second], L.Subtract()([L.Dense(3)(first), L.Dense(3)(second)]))
    one, other = keras.Input((4,)), keras.Input((4,))
    model = keras.Model([one, other], inner({"z": one, "a": other}))
    assert [call.operation for call in graph_of(model).calls] == [inner]
    model = keras.Model([one, other], inner((one, other)))
    assert len(graph_of(model).calls) == 3


def test_inputs_keep_their_names():
    unnamed, named = keras.Input((4,)), keras.Input((4,), name="named", optional=True)
    model = keras.Model([unnamed, named], L.Add(name="sum")([unnamed, named]))
    again = rebuild_model(model, graph_of(model), lambda call: call.operation)
    assert [layer.name for layer in again.layers] == [layer.name for layer in model.layers]
    assert [tensor.name for tensor in again.inputs] == [tensor.name for tensor in model.inputs]
    assert [tensor._keras_history.operation.optional for tensor in again.inputs] == [False, True]
