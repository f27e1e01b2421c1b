import keras
import numpy as np
import pytest
from keras import ops
from keras.src.backend.common import global_state

import keras_renorm as kr
from keras_renorm.src.layers.kernels import find_kernels

L = keras.layers


class Positions(L.Layer):
    """A table that says where things are, whatever comes in."""

    def build(self, input_shape):
        self.table = self.add_weight(name="table", shape=input_shape[1:])

    def call(self, x):
        return ops.broadcast_to(ops.convert_to_tensor(self.table), ops.shape(x))


class Tokens(L.Layer):
    """A token before what comes in, positions added to all, and a projection."""

    def build(self, input_shape):
        _, length, size = input_shape
        self.token = self.add_weight(name="a", shape=(1, 1, size))
        self.positions = self.add_weight(name="b", shape=(1, length + 1, size))
        self.projection = self.add_weight(name="c", shape=(size, 3))

    def call(self, x):
        token = ops.broadcast_to(self.token, (ops.shape(x)[0], 1, x.shape[-1]))
        return ops.matmul(ops.concatenate([token, x], axis=1) + self.positions, self.projection)


class Words(L.Layer):
    """Embeddings of words, and of their positions."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.words, self.places = L.Embedding(9, 4, name="words"), L.Embedding(6, 4, name="places")

    def call(self, x):
        return self.words(x) + self.places(ops.arange(x.shape[-1]))


class Factors(L.Layer):
    """A kernel that is a product of two, held in a list."""

    def build(self, input_shape):
        self.factors = [self.add_weight(name="a", shape=(input_shape[-1], 2)), self.add_weight(name="b", shape=(2, 5))]

    def call(self, x):
        return ops.einsum("...i,io->...o", x, ops.matmul(*self.factors))


class Table(L.Layer):
    def build(self, input_shape):
        self.table = self.add_weight(name="table", shape=(9, 4))

    def call(self, x):
        return ops.take(self.table, ops.cast(x, "int32"), axis=0)


class Gate(L.Layer):
    def build(self, input_shape):
        self.gate = self.add_weight(name="gate", shape=(1, input_shape[-1]))

    def call(self, x):
        return x * self.gate


class Unseen(L.Layer):
    """Its call cannot be followed: names and shapes decide."""

    def build(self, input_shape):
        self.kernel = self.add_weight(name="kernel", shape=(input_shape[-1], 3))
        self.positions = self.add_weight(name="position_embedding", shape=(input_shape[1], 3))
        self.start = self.add_weight(name="start", shape=(1, 1, 3))

    def call(self, x):
        return ops.matmul(x, self.kernel.value) + self.positions.value + self.start.value


class Named(Positions):
    def get_prunable_weights(self):
        return [self.table]


SEQUENCE = np.ones((2, 6, 4), "float32")
WORDS = np.ones((2, 6), "int32")


@pytest.mark.parametrize(
    ("layer", "inputs", "names"),
    [
        (Tokens, SEQUENCE, ["c"]),
        (Words, WORDS, ["embeddings"]),
        (Factors, SEQUENCE, ["a", "b"]),
        (Table, WORDS, ["table"]),
        (Gate, SEQUENCE, ["gate"]),
        (Unseen, SEQUENCE, ["kernel"]),
        (Named, SEQUENCE, ["table"]),
    ],
)
def test_what_is_multiplied_or_looked_up_is_a_kernel(layer, inputs, names):
    layer = layer()
    layer(inputs)
    before, names_taken = dict(vars(layer)), dict(global_state.get_global_attribute("object_name_uids"))
    found = find_kernels(layer)
    assert [kernel.variable.name for kernel in found] == names
    assert not any(kernel.added for kernel in found)
    # The call left nothing behind.
    assert vars(layer) == before
    assert not any(part._inbound_nodes for part in layer._flatten_layers())
    assert global_state.get_global_attribute("object_name_uids") == names_taken


def model():
    inputs = keras.Input((6, 4))
    x = inputs + Positions(name="positions")(inputs)
    return keras.Model(inputs, L.Dense(5, name="fc")(x))


def test_positions_are_pruned_where_they_are_asked_for():
    dense = model()
    dense.get_layer("positions").table.assign(np.arange(1.0, 25).reshape(6, 4))
    pruned = kr.prune(dense, 0.5)
    assert [row.layer for row in pruned.pruning_report.rows] == ["fc"]
    assert np.all(ops.convert_to_numpy(pruned.get_layer("positions").table) > 0)
    assert [row.layer for row in kr.summary(pruned).rows] == ["fc"]
    named = kr.prune(dense, 0.5, layers="positions", renormalize=None)
    assert np.count_nonzero(ops.convert_to_numpy(named.get_layer("positions").table)) == 12
    assert [row.layer for row in kr.summary(named).rows] == ["positions", "fc"]
    assert [layer.name for layer in kr.to_prunable(dense).layers if hasattr(layer, "masked_kernels")] == ["fc"]
    wrapped = kr.to_prunable(dense, layers="positions").get_layer("positions")
    assert [kernel.variable.name for kernel in wrapped.masked_kernels] == ["table"]
