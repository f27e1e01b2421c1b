"""A copy computes what the model computes, whatever its layers hold, share, capture and draw."""

import functools
import random

import keras
import numpy as np
import pytest
from keras import ops

import keras_renorm as kr
from keras_renorm.src.models import model_copies
from keras_renorm.src.models.copying import Copier
from tests.models import every_layer

L = keras.layers

WITHOUT_EXPORT = {
    "to_prunable": lambda model: kr.to_prunable(model),
    "strip": lambda model: kr.strip(kr.to_prunable(model)),
    "prune": lambda model: kr.prune(model, {"head": 0.0}),
    "compact": lambda model: kr.compact(model),
    "repair": lambda model: kr.export.repair(model),
}
EVERY_CLASS = pytest.mark.parametrize("name", every_layer.layer_classes())
# Of Flatten behind Masking, and of what cannot be pruned and stays as it is.
pytestmark = [
    pytest.mark.filterwarnings("ignore:Layer '.*was passed an input with a mask:UserWarning"),
    pytest.mark.filterwarnings("ignore:Left as they are. layer 'spectral_normalization:UserWarning"),
]


def answers(model, inputs):
    with keras.StatelessScope():
        return [np.asarray(ops.convert_to_numpy(one)) for one in keras.tree.flatten(model(inputs, training=False))]


def assert_same(model, copy, inputs):
    expected, received = answers(model, inputs), answers(copy, inputs)
    for one, other in zip(expected, received, strict=True):
        np.testing.assert_allclose(other, one, rtol=1e-4, atol=1e-5 * max(1, np.abs(one).max()))
    assert len(copy.trainable_variables) == len(model.trainable_variables)
    own = {id(variable) for variable in model.variables}
    assert not own & {id(variable) for variable in copy.variables}


def train(model, inputs, outputs):
    model.compile("sgd", "mse", run_eagerly=True)
    model.train_on_batch(inputs, np.ones((2, outputs), "float32"))


@EVERY_CLASS
def test_a_layer_of_every_class_computes_the_same(name):
    model = every_layer.small_model_of(name)
    for function in ("to_prunable", "prune", "compact"):
        assert_same(model, WITHOUT_EXPORT[function](model), every_layer.inputs_of(name)[: len(model.inputs)])


@pytest.mark.slow
@EVERY_CLASS
def test_shared_frozen_and_nested_layers_before_and_after_a_step(name):
    model, inputs = every_layer.model_of(name), every_layer.inputs_of(name)
    for trained in (False, True):
        if trained:
            train(model, inputs, 3)
        for make in WITHOUT_EXPORT.values():
            assert_same(model, make(model), inputs)


@pytest.mark.slow
@EVERY_CLASS
def test_a_layer_of_every_class_in_a_subclass(name):
    class Mine(keras.Model):
        def call(self, inputs, training=None):
            return super().call(inputs, training=training) + 1.0

    plain = every_layer.small_model_of(name)
    model = Mine(plain.inputs, plain.outputs)
    inputs = every_layer.inputs_of(name)[: len(plain.inputs)]
    train(model, inputs, 3)
    for function in ("to_prunable", "strip", "prune"):
        copy = WITHOUT_EXPORT[function](model)
        assert type(copy) is Mine
        assert_same(model, copy, inputs)
    for function in ("compact", "repair"):
        with pytest.raises(ValueError, match="must be a Sequential or Functional model.*Mine"):
            WITHOUT_EXPORT[function](model)


# What the user gets where Keras' own export writes a file that LiteRT does not run.
_NO_OPERATION = r"Nothing was written: .*TFLite has no operation {} \(in '{}'\)\. Write that layer with operations that it has"
NOT_EXPORTED: dict[str, str] = {
    "AdaptiveAveragePooling3D": _NO_OPERATION.format("AvgPool3D", "adaptive_average_pooling3d"),
    "AdaptiveMaxPooling3D": _NO_OPERATION.format("MaxPool3D", "adaptive_max_pooling3d"),
    "AveragePooling3D": _NO_OPERATION.format("AvgPool3D", "average_pooling3d"),
    "CategoryEncoding": _NO_OPERATION.format("DenseBincount", "category_encoding"),
    "HashedCrossing": _NO_OPERATION.format("SparseCross", "hashed_crossing"),
    "Hashing": _NO_OPERATION.format("AsString, StringToHashBucketFast", "hashing"),
    "IntegerLookup": _NO_OPERATION.format("HashTableV2, LookupTableFindV2, LookupTableImportV2", "integer_lookup"),
    "MaxPooling3D": _NO_OPERATION.format("MaxPool3D", "max_pooling3d"),
    "TextVectorization": _NO_OPERATION.format("StringLower, .*RaggedTensorToTensor", "text_vectorization"),
}


@pytest.mark.slow
@EVERY_CLASS
def test_the_file_of_a_layer_of_every_class(name, tmp_path):
    model = every_layer.small_model_of(name)
    inputs = every_layer.inputs_of(name)[: len(model.inputs)]
    samples = [np.asarray(ops.convert_to_numpy(one)) for one in inputs]
    train(model, inputs, 3)
    if name in NOT_EXPORTED:
        with pytest.raises(RuntimeError, match=NOT_EXPORTED[name]):
            kr.export_tflite(model, tmp_path / "model.tflite", samples=samples)
        return
    try:
        model.export(tmp_path / "keras.tflite", format="litert", verbose=False)
    except Exception:
        # A scope whose name TensorFlow does not take: the copy has a name of its own.
        if name != "Wrapper":
            with pytest.raises((RuntimeError, ValueError), match=f"(?s){model.name}"):
                kr.export_tflite(model, tmp_path / "model.tflite", samples=samples)
            return
    report = kr.export_tflite(model, tmp_path / "model.tflite", samples=samples)
    assert report.difference <= 1e-3 * max(1, report.output_range)


def around(layer, shape=(8,)):
    inputs = keras.Input(shape)
    return keras.Model(inputs, L.Dense(3, name="head")(L.Flatten()(layer(inputs))))


class DrawnInBuild(L.Layer):
    def build(self, input_shape):
        self.matrix = np.random.default_rng(0).standard_normal((input_shape[-1], 4)).astype("float32")
        self.parts = {"scale": [np.float32(random.random()), {"more": self.matrix[:, :1] * 2}]}

    def call(self, inputs):
        return ops.matmul(inputs, self.matrix) * self.parts["scale"][0] + ops.matmul(inputs, self.parts["scale"][1]["more"])


class StoredByItself(L.Layer):
    def build(self, input_shape):
        self.table = {}

    def call(self, inputs):
        return inputs * self.table.get("factor", 1.0)

    def save_own_variables(self, store):
        store["factor"] = np.array(self.table.get("factor", 1.0))

    def load_own_variables(self, store):
        self.table["factor"] = float(np.array(store["factor"]))


class WithoutKwargs(L.Layer):
    def __init__(self, units, secret):
        super().__init__()
        self.inner, self.secret = L.Dense(units), secret

    def call(self, inputs):
        return self.inner(inputs) * self.secret


class Compiled(L.Layer):
    def build(self, input_shape):
        import tensorflow as tf

        self.kernel = self.add_weight(shape=(input_shape[-1], 4), initializer="normal", name="kernel")
        self.function = tf.function(lambda x: tf.matmul(x, self.kernel))
        self.plain = tf.Variable(2.0)

    def call(self, inputs):
        return self.function(inputs) * self.plain


def stored():
    layer = StoredByItself()
    layer.build((None, 8))
    layer.table["factor"] = 7.5
    return layer


ON_TENSORFLOW = pytest.mark.skipif(keras.backend.backend() != "tensorflow", reason="holds what is TensorFlow's")


@pytest.mark.parametrize(
    "make",
    [DrawnInBuild, stored, lambda: WithoutKwargs(4, 3.0), pytest.param(Compiled, marks=ON_TENSORFLOW)],
    ids=["drawn", "stored", "without", "compiled"],
)
@pytest.mark.parametrize("function", WITHOUT_EXPORT)
def test_what_a_config_does_not_tell(make, function):
    model, x = around(make()), np.random.default_rng(0).standard_normal((4, 8)).astype("float32")
    copy = WITHOUT_EXPORT[function](model)
    before = answers(copy, x)
    assert_same(model, copy, x)
    for variable in model.variables:
        variable.assign(variable + 1 if variable.dtype.startswith("float") else variable)
    np.testing.assert_array_equal(answers(copy, x), before)


class Tied(L.Layer):
    def __init__(self, source, **kwargs):
        super().__init__(**kwargs)
        self.source = source

    def call(self, inputs):
        return ops.matmul(inputs, ops.transpose(self.source.kernel))


def tied():
    encoder, inputs = L.Dense(4, "relu", name="encoder"), keras.Input((8,))
    return keras.Model(inputs, Tied(encoder, name="decoder")(encoder(inputs)))


def tied_before_its_source():
    """The layer that reads the kernel comes first in the model."""
    encoder, inputs = L.Dense(4, "relu", name="encoder"), keras.Input((8,))
    hidden = encoder(inputs)
    return keras.Model(inputs, [Tied(encoder, name="decoder")(hidden), hidden])


class HoldsTheKernel(L.Layer):
    def __init__(self, kernel):
        super().__init__()
        self.kernel = kernel

    def call(self, inputs):
        return ops.matmul(inputs, self.kernel)


def with_one_variable_in_two_layers():
    one, inputs = L.Dense(8, name="one"), keras.Input((8,))
    hidden = one(inputs)
    return keras.Model(inputs, L.Dense(2, name="head")(HoldsTheKernel(one.kernel)(hidden)))


@pytest.mark.parametrize("make", [tied, tied_before_its_source, with_one_variable_in_two_layers])
@pytest.mark.filterwarnings("ignore:Left as they are. layer 'one', whose weights:UserWarning")
def test_what_was_shared_stays_shared_and_counts_once(make):
    model, x = make(), np.random.default_rng(0).standard_normal((4, 8)).astype("float32")
    kernels = sum(len(variable.shape) > 1 for variable in {id(v): v for v in model.variables}.values())
    pruned = kr.prune(model, 0.5)
    assert len(pruned.pruning_report.rows) == len(kr.summary(pruned).rows) == kernels
    assert kr.summary(pruned).sparsity == pytest.approx(0.5, abs=0.02)
    for copy in (pruned, kr.prune(model, 0.0), kr.to_prunable(model), kr.strip(kr.to_prunable(model)), kr.compact(model)):
        assert len({id(v) for v in copy.trainable_variables}) == len({id(v) for v in model.trainable_variables})
    assert_same(model, kr.prune(model, 0.0), x)


@pytest.mark.parametrize("make", [tied, tied_before_its_source])
def test_a_tied_kernel_is_masked_wherever_it_is_read(make, tmp_path):
    model, x = make(), np.random.default_rng(0).standard_normal((16, 8)).astype("float32")
    prunable = kr.to_prunable(model, renormalize="l2")
    prunable.compile("adam", "mse")
    targets = [np.zeros(value.shape) for value in answers(prunable, x)]
    targets = targets if len(targets) > 1 else targets[0]
    pruning = kr.callbacks.UpdatePruning(kr.schedules.ConstantSparsity(0.5, 0, end_step=4, frequency=1))
    prunable.fit(x, targets, epochs=8, batch_size=4, verbose=0, callbacks=[pruning])
    assert kr.summary(prunable).sparsity == 0.5
    stripped = kr.strip(prunable)
    assert_same(prunable, stripped, x)
    kernel = stripped.get_layer("encoder").kernel
    assert kernel is stripped.get_layer("decoder").source.kernel
    assert np.count_nonzero(ops.convert_to_numpy(kernel)) == 16


def captured_by_operation():
    embedding, inputs = L.Embedding(9, 8, name="embedding"), keras.Input((6,), dtype="int32")
    hidden = L.Dense(8, "relu", name="hidden")(embedding(inputs))
    return keras.Model(inputs, ops.einsum("btd,vd->btv", hidden, embedding.embeddings))


def captured_by_closure():
    embedding, inputs = L.Embedding(9, 8, name="embedding"), keras.Input((6,), dtype="int32")
    hidden = L.Dense(8, "relu", name="hidden")(embedding(inputs))
    read = L.Lambda(lambda x: ops.matmul(x, ops.transpose(embedding.embeddings)), output_shape=(6, 9))
    return keras.Model(inputs, read(hidden))


def captured_by_method():
    embedding, inputs = L.Embedding(9, 8, name="embedding"), keras.Input((6,), dtype="int32")

    class Reads(L.Layer):
        def call(self, x):
            return self._read(x)

        def _read(self, x):
            return ops.matmul(x, ops.transpose(embedding.embeddings))

    hidden = L.Dense(8, "relu", name="hidden")(embedding(inputs))
    return keras.Model(inputs, Reads()(hidden))


def captured_by_global():
    global _EMBEDDING
    _EMBEDDING, inputs = L.Embedding(9, 8, name="embedding"), keras.Input((6,), dtype="int32")
    hidden = L.Dense(8, "relu", name="hidden")(_EMBEDDING(inputs))
    read = L.Lambda(lambda x: ops.matmul(x, ops.transpose(_EMBEDDING.embeddings)), output_shape=(6, 9))
    return keras.Model(inputs, read(hidden))


@pytest.mark.parametrize("make", [captured_by_operation, captured_by_closure, captured_by_method, captured_by_global])
def test_what_is_captured_is_the_copys_own(make):
    x = np.arange(12).reshape(2, 6) % 9
    for function in ("prune", "compact", "repair", "strip"):
        model = make()
        copy = {"prune": lambda model: kr.prune(model, 0.0), "strip": kr.strip}.get(function, WITHOUT_EXPORT[function])(model)
        assert_same(model, copy, x)
        before = answers(copy, x)
        embeddings = model.get_layer("embedding").embeddings
        embeddings.assign(embeddings * 5 + 1)
        np.testing.assert_array_equal(answers(copy, x), before)
        own = copy.get_layer("embedding").embeddings
        own.assign(own * 5 + 1)
        assert_same(model, copy, x)


@pytest.mark.parametrize("make", [captured_by_operation, captured_by_closure, captured_by_method, captured_by_global])
def test_a_captured_kernel_stays_whole_in_a_prunable_model(make):
    with pytest.warns(UserWarning, match=r"Left as they are: layer 'embedding', whose weights \['.*'\] use as well"):
        prunable = kr.to_prunable(make())
    assert type(prunable.get_layer("embedding")) is L.Embedding
    assert isinstance(prunable.get_layer("hidden"), kr.layers.PrunableDense)


def test_frozen_parts_stay_frozen_and_thaw():
    backbone = keras.Sequential(
        [keras.Input((8,)), L.Dense(8, name="inner"), L.BatchNormalization(name="norm")], name="backbone"
    )
    backbone.trainable = False
    inputs = keras.Input((8,))
    model = keras.Model(inputs, L.Dense(2, name="head")(backbone(inputs)))
    x, y = np.random.default_rng(0).standard_normal((32, 8)).astype("float32") * 3 + 2, np.ones((32, 2), "float32")
    for copy in (kr.to_prunable(model), kr.prune(model, 0.0), kr.strip(model)):
        before = [np.array(ops.convert_to_numpy(variable)) for variable in copy.get_layer("backbone").variables]
        copy.compile(keras.optimizers.SGD(0.1), "mse")
        copy.fit(x, y, verbose=0)
        for variable, value in zip(copy.get_layer("backbone").variables, before):
            np.testing.assert_array_equal(ops.convert_to_numpy(variable), value)
        copy.get_layer("backbone").trainable = True
        assert len(copy.trainable_variables) == 6
        copy.compile(keras.optimizers.SGD(0.1), "mse")
        copy.fit(x, y, verbose=0)
        kernel = ops.convert_to_numpy(copy.get_layer("backbone").get_layer("inner").kernel)
        assert np.abs(kernel - before[0]).max() > 0


def test_random_numbers_go_on_where_they_were():
    inputs = keras.Input((64,))
    model = keras.Model(inputs, L.Dense(1, name="head")(L.Dropout(0.5, seed=1)(inputs, training=True)))
    x = np.ones((2, 64), "float32")
    model(x)
    copy = kr.prune(model, 0.0)
    np.testing.assert_array_equal(ops.convert_to_numpy(model(x)), ops.convert_to_numpy(copy(x)))


def test_models_that_share_layers_do_not_come_along():
    inputs = keras.Input((8,))
    hidden = L.Dense(4, name="hidden")(inputs)
    model = keras.Model(inputs, L.Dense(2, name="head")(hidden))
    other = keras.Model(inputs, L.Dense(5, name="of_another_model")(hidden))
    copier = Copier(model)
    copier.copy(model)
    assert id(other.get_layer("of_another_model")) not in copier.copies


def test_a_copy_trains_saves_and_is_copied_again(tmp_path):
    model = around(L.Dense(6, "relu", name="first"))
    model.compile("adam", "mse", metrics=["mae"])
    copy = kr.strip(kr.prune(kr.to_prunable(model), 0.0))
    assert copy.compiled
    assert copy.optimizer is not model.optimizer
    x = np.random.default_rng(0).standard_normal((8, 8)).astype("float32")
    copy.fit(x, np.ones((8, 3)), verbose=0)
    copy.save(tmp_path / "copy.keras")
    assert_same(copy, keras.models.load_model(tmp_path / "copy.keras"), x)
    assert [layer.name for layer in copy.layers] == [layer.name for layer in model.layers]
    assert [variable.path for variable in copy.variables] == [variable.path for variable in model.variables]


def test_a_layer_alone():
    layer = L.Dense(3)
    layer.build((None, 2))
    copy = Copier(layer).copy(layer)
    np.testing.assert_array_equal(ops.convert_to_numpy(copy.kernel), ops.convert_to_numpy(layer.kernel))
    assert copy.kernel is not layer.kernel


@functools.lru_cache
def _cached(factor):
    return factor * 2.0


def test_functions_that_are_no_functions_of_python():
    """Captured or not; where they were written, the model may stand as well."""
    global _EMBEDDING
    layer = WithoutKwargs(4, _cached(1.5))
    layer.cached, layer.smallest = _cached, min
    model = around(layer)
    _EMBEDDING = layer
    assert_same(model, kr.prune(model, 0.0), np.ones((2, 8), "float32"))
    layer.of_a_layer = functools.lru_cache(lambda x, inner=layer.inner: inner(x))
    with pytest.raises(ValueError, match="is held by an object of type .*lru_cache"):
        kr.prune(model, 0.0)


class Adversarial(keras.Model):
    """A model with optimizers of its own, as in Keras' examples."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.one, self.two = L.Dense(4, name="one"), L.Dense(2, name="two")
        self.seen = keras.metrics.Mean(name="seen")
        self.first, self.second = keras.optimizers.Adam(0.1), keras.optimizers.SGD(0.1)

    def build(self, shape):
        self.one.build(shape)
        self.two.build((*shape[:-1], 4))

    def call(self, inputs):
        return self.two(self.one(inputs))


def test_optimizers_and_metrics_of_ones_own():
    model, x = Adversarial(), np.ones((4, 8), "float32")
    model.build((None, 8))
    model.first.build(model.one.trainable_variables)
    model.first.apply([ops.ones(v.shape) for v in model.one.trainable_variables])
    model.seen.update_state(3.0)
    copy = kr.prune(model, 0.0)
    assert type(copy) is Adversarial
    assert_same(model, copy, x)
    assert copy.first is not model.first
    assert int(ops.convert_to_numpy(copy.first.iterations)) == 1
    assert copy.first._trainable_variables[0] is copy.one.kernel
    assert float(ops.convert_to_numpy(copy.seen.result())) == 3.0
    before = np.array(ops.convert_to_numpy(model.one.kernel))
    copy.first.apply([ops.ones(v.shape) for v in copy.one.trainable_variables])
    np.testing.assert_array_equal(ops.convert_to_numpy(model.one.kernel), before)


def test_what_cannot_be_copied_is_named():
    class Opaque:
        __slots__ = ("layer",)

        def __deepcopy__(self, memo):
            raise TypeError

    class Holder(L.Layer):
        def call(self, inputs):
            return self.opaque.layer(inputs)

    inner, holder = L.Dense(4, name="inner"), Holder()
    holder.opaque = Opaque()
    holder.opaque.layer = inner
    inputs = keras.Input((8,))
    model = keras.Model(inputs, holder(inner(inputs) @ np.ones((4, 8), "float32")))
    with pytest.raises(ValueError, match="Layer 'inner' is held by an object of type .*Opaque.*Nothing was changed"):
        kr.prune(model, 0.5)


@pytest.mark.parametrize("function", [kr.to_prunable, kr.strip, lambda model: kr.prune(model, 0.0)])
def test_a_damaged_copy_is_refused_by_the_name_of_its_first_layer(function, monkeypatch):
    original = Copier._variable

    def damaged(self, variable):
        new = original(self, variable)
        if "normalization" in variable.path and variable.name == "moving_mean":
            new.assign(variable + 1)
        return new

    monkeypatch.setattr(Copier, "_variable", damaged)
    model = keras.Sequential([keras.Input((8,)), L.Dense(4), L.BatchNormalization(name="normalization"), L.Dense(2)])
    with pytest.raises(ValueError, match=r"Layer 'normalization' \(of type BatchNormalization\) is the first that differs: by"):
        function(model)


@pytest.mark.skipif(keras.backend.backend() != "tensorflow", reason="TFLite is TensorFlow's")
def test_a_file_of_a_damaged_copy_is_refused(monkeypatch, tmp_path):
    """Also where the check of the copy itself sees nothing."""
    original = Copier._variable

    def damaged(self, variable):
        new = original(self, variable)
        if variable.name == "kernel":
            new.assign(variable * 1.5)
        return new

    monkeypatch.setattr(Copier, "_variable", damaged)
    monkeypatch.setattr(model_copies, "check_same", lambda *arguments, **keywords: None)
    model = keras.Sequential([keras.Input((8,)), L.Dense(4), L.Dense(2)])
    with pytest.raises(RuntimeError, match="differ from those of model"):
        kr.export_tflite(model, tmp_path / "model.tflite")
    assert not list(tmp_path.iterdir())
