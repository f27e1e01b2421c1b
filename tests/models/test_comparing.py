import keras
import numpy as np
import pytest
from keras import ops

from keras_renorm.src.models import comparing
from keras_renorm.src.models.comparing import _differ, check_same, made_inputs

L = keras.layers


@pytest.mark.parametrize(
    ("one", "other", "difference"),
    [
        ([1.0, 2.0], [1.0, 2.0019], None),  # a thousandth of the largest
        ([1.0, 2.0], [1.0, 2.0021], "by 0.0021, where its outputs reach 2"),
        ([0.0, 0.0], [0.0, 0.0], None),
        ([np.nan, np.inf], [np.nan, np.inf], None),
        ([np.nan, 1.0], [1.0, np.nan], "NaN or infinity elsewhere"),
        ([np.inf, 1.0], [-np.inf, 1.0], "NaN or infinity elsewhere"),
        ([1.0, 2.0], [[1.0, 2.0]], r"shapes \[\(2,\)\] became \[\(1, 2\)\]"),
        (["a", "b"], ["a", "b"], None),
        (["a", "b"], ["a", "c"], "other strings"),
        ([3, 4], [3, 5], "by 1, where its outputs reach 4"),
    ],
)
def test_differences_in_words(one, other, difference):
    found = _differ([np.array(one)], [np.array(other)])
    assert (found is None) == (difference is None)
    if difference is not None:
        assert np.char.find(found, difference.replace("\\", "")) >= 0


def test_inputs_are_what_the_model_takes():
    ids, image = keras.Input((None,), dtype="int32", name="ids"), keras.Input((None, 4, 3), name="image")
    outputs = [L.Embedding(2, 3)(ids), image * 2.0]
    model = keras.Model({"ids": ids, "image": image}, outputs, name="m")
    made = made_inputs(model, samples=3, free_side=5)
    assert {key: (tuple(value.shape), keras.backend.standardize_dtype(value.dtype)) for key, value in made.items()} == {
        "ids": ((3, 5), "int32"),
        "image": ((3, 5, 4, 3), "float32"),
    }
    assert set(np.unique(ops.convert_to_numpy(made["ids"]))) <= {0, 1}


class Counts(L.Layer):
    def build(self, input_shape):
        self.count = self.add_weight(shape=(), initializer="zeros", trainable=False, name="count")

    def call(self, inputs):
        self.count.assign(self.count + 1)
        return inputs


def test_nothing_changes_in_either():
    models = []
    for _ in range(2):
        inputs = keras.Input((4,))
        x = L.BatchNormalization(name="norm")(Counts()(inputs), training=True)
        models.append(keras.Model(inputs, L.Dropout(0.5, seed=3)(x, training=True)))
    before = [[np.array(ops.convert_to_numpy(v)) for v in model.variables] for model in models]
    twins = {id(one): other for one, other in zip(models[0].layers, models[1].layers)}
    check_same(*models, twins)
    for model, values in zip(models, before):
        for variable, value in zip(model.variables, values, strict=True):
            np.testing.assert_array_equal(ops.convert_to_numpy(variable), value)
    models[1].get_layer("norm").gamma.assign([1.0, 2.0, 1.0, 1.0])
    with pytest.raises(
        ValueError, match=r"The copy of model '.*' does not compute .*Layer 'norm' \(of type BatchNorm.*\) is the"
    ):
        check_same(*models, twins)


def test_a_model_that_runs_where_the_other_does_not():
    model = keras.Sequential([keras.Input((4,)), L.Dense(2)])
    other = keras.Sequential([keras.Input((3,)), L.Dense(2)])
    with pytest.raises(ValueError, match="The smaller one of model '.*' does not run where the model does"):
        check_same(model, other, {}, "The smaller one")


class OnlyItsOwn(L.Layer):
    """Takes nothing that is made up."""

    def call(self, inputs):
        if float(ops.max(inputs)) < 100:
            raise ValueError("too small")
        return inputs

    def compute_output_spec(self, inputs):
        return keras.KerasTensor(inputs.shape, inputs.dtype)


def test_samples_go_before_what_is_made_up():
    one, two = (keras.Sequential([keras.Input((4,)), OnlyItsOwn(), L.Rescaling(scale)]) for scale in (1.0, 2.0))
    check_same(one, two, {})
    with pytest.raises(ValueError, match="Its outputs differ: by 500, where its outputs reach 500"):
        check_same(one, two, {}, inputs=np.full((1, 4), 500.0, "float32"))


@pytest.mark.parametrize(("dtype", "coarse"), [("float32", False), ("float16", True)])
def test_devices_that_round_coarsely_are_told_by_a_product(monkeypatch, dtype, coarse):
    here, product = comparing._rounds_coarsely(), ops.matmul
    monkeypatch.setattr(ops, "matmul", lambda *args: ops.cast(product(*args), dtype))
    assert comparing._rounds_coarsely.__wrapped__() is (coarse or here)
