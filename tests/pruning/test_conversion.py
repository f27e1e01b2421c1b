import subprocess
import sys

import keras
import numpy as np
import pytest
from keras import ops

import keras_renorm as kr
from keras_renorm.src.layers.prunable import prunable_layers
from tests.layers.cases import CASES, model_around, model_inputs
from tests.outputs import outputs

L = keras.layers


def sequential():
    return keras.Sequential(
        [keras.Input((8, 8, 3)), L.Conv2D(4, 3, activation="relu", name="conv"), L.Flatten(), L.Dense(5, name="fc")]
    )


def sequential_built_late():
    model = keras.Sequential([L.Dense(6, activation="relu"), L.Dropout(0.5), L.Dense(2)])
    model.build((None, 8))
    return model


def residual():
    inputs = keras.Input((8, 8, 4))
    x = L.Conv2D(4, 3, padding="same", use_bias=False)(inputs)
    x = L.BatchNormalization()(x)
    x = L.Add()([inputs, L.ReLU()(x)])
    y = L.DepthwiseConv2D(3, padding="same")(x)
    return keras.Model(inputs, L.Dense(3)(L.GlobalAveragePooling2D()(L.Concatenate()([x, y]))))


def shared():
    one, two = keras.Input((6,), name="one"), keras.Input((6,), name="two")
    tower = L.Dense(4, activation="relu", name="tower")
    merged = L.Concatenate()([tower(one), tower(two)])
    return keras.Model([one, two], [L.Dense(2, name="left")(merged), L.Dense(3, name="right")(merged)])


def named_inputs():
    inputs = {"a": keras.Input((6,), name="a"), "b": keras.Input((5,), name="b")}
    return keras.Model(inputs, {"sum": L.Dense(2)(inputs["a"]) + L.Dense(2)(inputs["b"]) * 2.0})


def nested():
    block = keras.Sequential([keras.Input((6,)), L.Dense(6, activation="relu", name="inner")], name="block")
    inputs = keras.Input((6,))
    x = block(block(inputs))
    core = keras.Model(y := keras.Input((6,)), L.Dense(3, name="deep")(y), name="core")
    return keras.Model(inputs, core(x))


def with_lambda():
    return keras.Sequential([keras.Input((6,)), L.Lambda(lambda x: x * 2.0), L.Dense(3)])


def sequences():
    inputs = keras.Input((7,), dtype="int32")
    x = L.Embedding(11, 6, mask_zero=True)(inputs)
    x = L.Bidirectional(L.GRU(4, return_sequences=True))(x)
    return keras.Model(inputs, L.TimeDistributed(L.Dense(2))(L.LayerNormalization()(x)))


MODELS = [sequential, sequential_built_late, residual, shared, named_inputs, nested, with_lambda, sequences]
EVERY_MODEL = pytest.mark.parametrize("make", MODELS, ids=lambda make: make.__name__)


def batch_for(model):
    generator = np.random.default_rng(0)
    arrays = {}
    for tensor in keras.tree.flatten(model.inputs):
        shape = (4, *tensor.shape[1:])
        floats = tensor.dtype == "float32"
        arrays[tensor.name] = generator.standard_normal(shape).astype("float32") if floats else np.ones(shape, "int32")
    if make_dict(model):
        return arrays
    return list(arrays.values()) if len(arrays) > 1 else next(iter(arrays.values()))


def make_dict(model):
    return not isinstance(model, keras.Sequential) and isinstance(model.input, dict)


def names(model):
    """Input layers are always made anew, as in `keras.models.clone_model`."""
    return [layer.name for layer in model.layers if not isinstance(layer, L.InputLayer)]


# Recurrent layers of PyTorch do not round alike where their arrays lie elsewhere in memory.
ROUNDING = 1e-6 if keras.backend.backend() == "torch" else 0


def assert_same_outputs(one, other, batch, **tolerance):
    pairs = zip(*(keras.tree.flatten(outputs(model, batch)) for model in (one, other)), strict=True)
    for first, second in pairs:
        np.testing.assert_allclose(first, second, **tolerance)


@EVERY_MODEL
def test_to_prunable_changes_no_output(make):
    model = make()
    before = [weight.copy() for weight in model.get_weights()]
    prunable = kr.to_prunable(model)
    assert prunable_layers(prunable)
    assert_same_outputs(model, prunable, batch_for(model), rtol=0, atol=0)
    assert names(prunable) == names(model)
    assert prunable.name == model.name
    assert not prunable_layers(model)
    for old, new in zip(before, model.get_weights(), strict=True):
        np.testing.assert_array_equal(old, new)


@EVERY_MODEL
@pytest.mark.parametrize("renormalize", [None, "l2"])
def test_strip_keeps_the_outputs(make, renormalize):
    model = make()
    for weight in model.weights:
        weight.assign(np.random.default_rng(1).standard_normal(weight.shape) * 0.1 + 0.01)
    prunable = kr.to_prunable(model, renormalize=renormalize)
    for layer in prunable_layers(prunable):
        layer.update_masks(0.5)
    plain = kr.strip(prunable)
    assert not prunable_layers(plain)
    assert_same_outputs(prunable, plain, batch_for(model), rtol=1e-5, atol=1e-5)
    assert names(plain) == names(model)
    assert [type(layer) for layer in plain.layers] == [type(layer) for layer in model.layers]
    assert kr.summary(plain).sparsity == pytest.approx(kr.summary(prunable).sparsity)
    assert_same_outputs(plain, kr.strip(plain), batch_for(model), rtol=0)


@pytest.mark.parametrize("name", list(CASES))
def test_every_layer_goes_there_and_back(name):
    make, inputs, kernels, _ = CASES[name]
    model = model_around(make(), inputs)
    prunable = kr.to_prunable(model)
    assert len([kernel for layer in prunable_layers(prunable) for kernel in layer.masked_kernels]) == len(kernels) + 1
    batch = model_inputs(inputs)
    assert_same_outputs(model, prunable, batch, rtol=0, atol=ROUNDING)
    for layer in prunable_layers(prunable):
        layer.update_masks(0.5)
    plain = kr.strip(prunable)
    assert_same_outputs(prunable, plain, batch, rtol=1e-5, atol=1e-6)
    again = kr.to_prunable(plain, from_zeros=True)
    assert kr.summary(again).kept == kr.summary(prunable).kept


def test_from_zeros_keeps_every_zero_in_training():
    sparse = kr.prune(sequential(), 0.8)
    prunable = kr.to_prunable(sparse, from_zeros=True)
    assert_same_outputs(sparse, prunable, batch_for(sparse), rtol=0, atol=0)
    prunable.compile("adam", "mse")
    x = np.random.default_rng(0).standard_normal((8, 8, 8, 3))
    prunable.fit(x, np.ones((8, 5)), epochs=3, verbose=0)
    tuned = kr.strip(prunable)
    for old, new in ((sparse.get_layer(name).kernel.numpy(), tuned.get_layer(name).kernel.numpy()) for name in ("conv", "fc")):
        np.testing.assert_array_equal(new[old == 0], 0)
        assert (new[old != 0] != old[old != 0]).any()


def test_from_zeros_of_a_layer_that_holds_nothing_else():
    model = keras.Sequential([keras.Input((4,)), L.Dense(2, kernel_initializer="zeros", name="empty")])
    with pytest.warns(UserWarning, match=r"All weights of .*empty/kernel.* are zero"):
        kr.to_prunable(model, from_zeros=True)


def test_which_layers():
    def chosen(layers):
        return [layer.name for layer in prunable_layers(kr.to_prunable(residual_named(), layers=layers))]

    assert chosen("conv_*") == ["conv_a", "conv_b"]
    assert chosen(["conv_a", L.Dense]) == ["conv_a", "fc"]
    assert chosen(L.Conv2D) == ["conv_a", "conv_b"]
    assert chosen(lambda layer: layer.name.endswith("b")) == ["conv_b"]
    assert chosen(None) == ["conv_a", "conv_b", "fc"]


def residual_named():
    inputs = keras.Input((8, 8, 3))
    x = L.Conv2D(4, 3, name="conv_a")(inputs)
    x = L.BatchNormalization(name="norm")(x)
    x = L.Conv2D(4, 3, name="conv_b")(x)
    return keras.Model(inputs, L.Dense(2, name="fc")(L.Flatten()(x)))


def test_a_layer_that_cannot_be_pruned_is_left_and_listed():
    with pytest.warns(UserWarning, match="Left as they are: layer 'norm' has no kernel"):
        prunable = kr.to_prunable(residual_named(), layers=["norm", "fc"])
    assert [layer.name for layer in prunable_layers(prunable)] == ["fc"]


def test_a_layer_with_lora_is_left_and_listed():
    model = keras.Sequential([keras.Input((8,)), L.Dense(6, name="a"), L.Dense(2, name="b")])
    model.get_layer("a").enable_lora(2)
    with pytest.warns(UserWarning, match="layer 'a' uses LoRA"):
        prunable = kr.to_prunable(model)
    assert [layer.name for layer in prunable_layers(prunable)] == ["b"]


def test_a_layer_that_was_never_built_is_named():
    model = Subclassed()
    model.first.build((None, 6))
    model.built = True
    assert [row.layer for row in kr.summary(model).rows] == [model.first.name]
    assert ["was never built" in note for note in kr.summary(model).notes] == [True, True]


def test_names_that_are_not_there():
    with pytest.raises(ValueError, match=r"`layers` names no layer.*'fcc'.*conv_a"):
        kr.to_prunable(residual_named(), layers=["fc", "fcc"])


@pytest.mark.parametrize("convert", [kr.to_prunable, kr.strip, kr.summary, lambda model: kr.prune(model, 0.5)])
class TestWrongModels:
    def test_not_built(self, convert):
        with pytest.raises(ValueError, match="`model` has no weights yet"):
            convert(keras.Sequential([L.Dense(3)]))

    def test_not_a_model(self, convert):
        with pytest.raises(TypeError, match="`model` must be a `keras.Model`"):
            convert(L.Dense(3))

    def test_tf_keras(self, convert):
        tf_keras = pytest.importorskip("tf_keras")
        model = tf_keras.Sequential([tf_keras.layers.Dense(3, input_shape=(4,))])
        with pytest.raises(TypeError, match=r"object of `tf_keras`.*`import keras`"):
            convert(model)


@pytest.mark.parametrize("convert", [kr.to_prunable, lambda model: kr.prune(model, 0.5)])
def test_nothing_to_prune(convert):
    with pytest.raises(ValueError, match="has nothing to prune"):
        convert(keras.Sequential([keras.Input((4, 4, 2)), L.BatchNormalization(), L.Flatten()]))


@keras.saving.register_keras_serializable(package="tests")
class Subclassed(keras.Model):
    def __init__(self, units=4, prunable=False, **kwargs):
        super().__init__(**kwargs)
        self.units = units
        self.first = (kr.layers.PrunableDense if prunable else L.Dense)(units, activation="relu")
        self.rest = [L.Dense(3), L.Dense(2)]

    def build(self, input_shape):
        self.first.build(input_shape)
        for layer, size in zip(self.rest, (self.units, 3)):
            layer.build((None, size))

    def call(self, inputs):
        x = self.first(inputs)
        for layer in self.rest:
            x = layer(x)
        return x

    def get_config(self):
        return {**super().get_config(), "units": self.units}


def test_a_subclassed_model_is_told_what_to_write():
    model = Subclassed()
    model.build((None, 6))
    with pytest.raises(ValueError, match=r"subclass of `keras.Model`.*PrunableDense.*RenormalizedPruning"):
        kr.to_prunable(model)
    prunable = Subclassed(prunable=True)
    prunable.build((None, 6))
    with pytest.raises(ValueError, match="subclass of `keras.Model`"):
        kr.strip(prunable)


def test_compiled_models_stay_compiled():
    model = sequential()
    model.compile("adam", "mse", metrics=["mae"])
    prunable = kr.to_prunable(model)
    x, y = batch_for(model), np.ones((4, 5))
    prunable.fit(x, y, verbose=0)
    assert kr.strip(prunable).compiled


@pytest.mark.filterwarnings("ignore:The object being serialized includes a `lambda`")
@pytest.mark.parametrize("loss", [lambda y, p: keras.ops.mean((y - p) ** 2), "unregistered"], ids=["lambda", "function"])
def test_a_loss_that_cannot_be_copied(loss):
    def unregistered(y, p):
        return keras.ops.mean((y - p) ** 2)

    model = sequential()
    model.compile("sgd", unregistered if loss == "unregistered" else loss)
    with pytest.warns(UserWarning, match="is not compiled.*Call `compile` on it"):
        assert not kr.prune(model, 0.5).compiled
    assert model.compiled


def scale_by_two(x):
    return np.float32(2) * x


@pytest.mark.parametrize(
    "layer",
    [
        L.Lambda(lambda x: np.float32(2) * x),
        L.Lambda(scale_by_two),
        L.Dense(4, activation=lambda x: x * 2, name="lambda"),
        L.Dense(4, activation=scale_by_two, name="function"),
    ],
)
def test_functions_that_are_not_registered(layer):
    model = keras.Sequential([keras.Input((8,)), L.Dense(4), layer])
    assert_same_outputs(model, kr.to_prunable(model), np.ones((2, 8), "float32"), rtol=0)


def test_a_layer_without_a_config_is_copied_as_it_is():
    class Secretive(L.Layer):
        def __init__(self, secret):
            super().__init__(name="secretive")
            self.secret = secret

        def call(self, inputs):
            return inputs * self.secret

    model = keras.Sequential([keras.Input((8,)), L.Dense(4), Secretive(3)])
    x = np.ones((2, 8), "float32")
    for copy in (kr.to_prunable(model), kr.prune(model, 0.0), kr.strip(model)):
        np.testing.assert_array_equal(ops.convert_to_numpy(copy(x)), ops.convert_to_numpy(model(x)))
        assert copy.get_layer("secretive") is not model.get_layer("secretive")


def test_a_subclass_stays_what_it_is():
    class Mine(keras.Sequential):
        pass

    model = Mine([keras.Input((8,)), L.Dense(4)])
    for copy in (kr.to_prunable(model), kr.prune(model, 0.5), kr.strip(model)):
        assert type(copy) is Mine


def test_a_model_that_is_partly_prunable_keeps_its_masks():
    model = keras.Sequential([keras.Input((8,)), kr.layers.PrunableDense(8, name="a"), L.Dense(2, name="b")])
    model.get_layer("a").update_masks(0.5)
    prunable = kr.to_prunable(model)
    assert [layer.sparsity for layer in prunable_layers(prunable)] == [0.5, 0.0]
    assert_same_outputs(model, prunable, np.ones((2, 8), "float32"), rtol=0)
    from_zeros = kr.to_prunable(model, from_zeros=True)
    assert [layer.sparsity for layer in prunable_layers(from_zeros)] == [0.5, 0.0]


def test_a_frozen_layer_of_ones_own_is_prunable(tmp_path):
    model = model_around(CASES["a layer of one's own"][0](), CASES["a layer of one's own"][1])
    model.layers[1].trainable = False
    prunable = kr.to_prunable(model)
    assert len(prunable_layers(prunable)) == 2
    prunable.save(tmp_path / "frozen.keras")
    assert len(prunable_layers(keras.models.load_model(tmp_path / "frozen.keras"))) == 2


def test_a_prunable_layer_inside_keras_own_wrapper():
    inputs = keras.Input((5, 6))
    model = keras.Model(inputs, L.TimeDistributed(kr.layers.PrunableDense(3, name="fc"), name="each")(inputs))
    prunable_layers(model)[0].update_masks(0.5)
    plain = kr.strip(model)
    assert type(plain.get_layer("each").layer) is L.Dense
    assert_same_outputs(model, plain, np.ones((2, 5, 6), "float32"), rtol=1e-6)


LOAD = """
import sys, keras, numpy as np
model = keras.models.load_model(sys.argv[1])
np.save(sys.argv[2], model.predict_on_batch(np.ones((2, 8, 8, 3), "float32")))
assert "keras_renorm" not in sys.modules
"""


def test_a_stripped_model_loads_without_keras_renorm(tmp_path):
    prunable = kr.to_prunable(sequential(), renormalize="l1")
    for layer in prunable_layers(prunable):
        layer.update_masks(0.7)
    plain = kr.strip(prunable)
    plain.save(tmp_path / "plain.keras")
    command = [sys.executable, "-W", "ignore", "-c", LOAD, tmp_path / "plain.keras", tmp_path / "out.npy"]
    subprocess.run(command, check=True, cwd=tmp_path)
    expected = outputs(prunable, np.ones((2, 8, 8, 3), "float32"))
    np.testing.assert_allclose(np.load(tmp_path / "out.npy"), expected, rtol=1e-5, atol=1e-6)


def test_no_event_does_not_go_unnoticed():
    model = kr.to_prunable(sequential(), pruning_schedule=kr.schedules.ConstantSparsity(0.5, 0))
    model.compile("sgd", "mse")
    model.fit(batch_for(model), np.ones((4, 5)), verbose=0)
    with pytest.warns(UserWarning, match=r"No pruning event ever ran.*UpdatePruning\(\)"):
        kr.strip(model)
    assert "No pruning event ever ran" in str(kr.summary(model))


def test_with_events_no_warning():
    model = kr.to_prunable(sequential(), pruning_schedule=kr.schedules.ConstantSparsity(0.5, 0))
    model.compile("sgd", "mse")
    model.fit(batch_for(model), np.ones((4, 5)), verbose=0, callbacks=[kr.callbacks.UpdatePruning()])
    kr.strip(model)


@pytest.mark.parametrize("arguments", [dict(), dict(jit_compile=True), dict(run_eagerly=True)], ids=["graph", "xla", "eager"])
def test_training_one_of_two_models_leaves_the_other_as_it_is(arguments, generator):
    """They may share memory until one is written to."""
    model = keras.Sequential([keras.Input((16,)), keras.layers.Dense(64, "relu"), keras.layers.Dense(1)])
    prunable = kr.to_prunable(model)
    x, y = generator.standard_normal((32, 16)), generator.standard_normal((32, 1))
    for trained, other in ((prunable, model), (model, prunable)):
        before = [weight.copy() for weight in other.get_weights()]
        own = [weight.copy() for weight in trained.get_weights()]
        trained.compile(keras.optimizers.SGD(0.1), "mse", **arguments)
        trained.fit(x, y, verbose=0)
        assert not np.array_equal(own[0], trained.get_weights()[0])
        for weight, expected in zip(other.get_weights(), before, strict=True):
            np.testing.assert_array_equal(weight, expected)
