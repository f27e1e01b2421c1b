import os
import sys

import keras
import numpy as np
import pytest

import keras_renorm as kr
from keras_renorm.export import tflite, verification

tf = pytest.importorskip("tensorflow")
if keras.backend.backend() != "tensorflow":
    pytest.skip("export needs TensorFlow", allow_module_level=True)

L = keras.layers


def dense(sparsity=0.9):
    model = keras.Sequential([keras.Input((256,)), L.Dense(512, "relu", name="one"), L.Dense(10, name="two")])
    return kr.prune(model, sparsity, allocation="uniform") if sparsity else model


def convolutional():
    model = keras.Sequential(
        [
            keras.Input((16, 16, 3)),
            L.Conv2D(16, 3, activation="relu"),
            L.DepthwiseConv2D(3),
            L.Conv2D(64, 1, activation="relu"),
            L.GlobalAveragePooling2D(),
            L.Dense(10),
        ]
    )
    return kr.prune(model, 0.8)


def two_inputs():
    b, a = keras.Input((64,), name="b"), keras.Input((32,), name="a")
    x = L.Concatenate()([L.Dense(64, "relu")(b), a])
    return kr.prune(keras.Model([b, a], [L.Dense(3, name="z")(x), L.Dense(2, name="y")(x)]), 0.8)


def named():
    inputs = {"a": keras.Input((32,), name="a"), "b": keras.Input((64,), name="b")}
    x = L.Concatenate()([inputs["b"], inputs["a"]])
    return kr.prune(keras.Model(inputs, {"p": L.Dense(3)(x), "o": L.Dense(2)(x)}), 0.8)


def tokens():
    return keras.Sequential([keras.Input((6,), dtype="int32"), L.Embedding(50, 16), L.GlobalAveragePooling1D(), L.Dense(2)])


def recurrent():
    return kr.prune(keras.Sequential([keras.Input((5, 8)), L.LSTM(16), L.Dense(2)]), 0.8)


def half_precision():
    inputs = keras.Input((16, 8))
    x = L.TimeDistributed(L.Dense(32, dtype="mixed_float16"), dtype="mixed_float16")(inputs)
    x = L.LayerNormalization(dtype="mixed_float16")(x)
    return kr.prune(keras.Model(inputs, L.Dense(4, dtype="float32")(L.Flatten()(x))), 0.8)


def keys_like_numbers():
    inputs = keras.Input((8,))
    return keras.Model(inputs, {"output_10": L.Dense(3)(inputs), "output_2": L.Dense(3)(inputs), "z": L.Dense(3)(inputs)})


def prunable():
    model = kr.to_prunable(dense(None), renormalize="l2")
    for layer in model.layers:
        layer.update_masks(0.9)
    return model


MODELS = [dense, convolutional, two_inputs, named, tokens, recurrent, half_precision, keys_like_numbers, prunable]


@pytest.mark.parametrize("make", MODELS, ids=lambda make: make.__name__)
@pytest.mark.parametrize("quantize", [None, "float16", "int8"])
def test_every_file_loads_and_agrees(make, quantize, tmp_path):
    report = kr.export_tflite(make(), tmp_path / "model.tflite", quantize=quantize)
    assert report.path.stat().st_size == report.bytes
    assert report.bytes <= report.dense_bytes
    tolerance = {None: 5e-3 if make is half_precision else 1e-5, "float16": 2e-3, "int8": 3e-2}[quantize]
    assert report.difference <= tolerance * max(report.output_range, 1)
    assert [path.name for path in tmp_path.iterdir()] == ["model.tflite"]


def test_a_dense_network_at_90_percent_takes_a_fifth(tmp_path):
    report = kr.export_tflite(dense(0.9), tmp_path / "model.tflite")
    dense_bytes = kr.export_tflite(dense(None), tmp_path / "dense.tflite").bytes
    assert report.stored_sparse
    assert report.dense_bytes == pytest.approx(dense_bytes, rel=0.01)
    assert report.bytes <= dense_bytes / 5
    assert report.ratio == report.bytes / report.dense_bytes
    assert [tensor.stored_sparse for tensor in report.tensors] == [True, True]
    assert [round(tensor.sparsity, 3) for tensor in report.tensors] == [0.9, 0.9]
    assert sum(tensor.bytes for tensor in report.tensors) < report.bytes
    assert "sparse storage" in str(report)


def test_a_dense_network_is_stored_dense(tmp_path):
    report = kr.export_tflite(dense(None), tmp_path / "model.tflite")
    assert not report.stored_sparse
    assert report.bytes == report.dense_bytes


def test_full_integers_with_representative_data(tmp_path, generator):
    data = generator.standard_normal((64, 16, 16, 3)).astype("float32")
    report = kr.export_tflite(convolutional(), tmp_path / "model.tflite", quantize="int8", representative_data=data)
    dynamic = kr.export_tflite(convolutional(), tmp_path / "dynamic.tflite", quantize="int8")
    assert {tensor.dtype for tensor in report.tensors} == {"int8"}
    assert "float32" in {tensor.dtype for tensor in dynamic.tensors}
    assert report.difference < 0.1 * report.output_range


def test_given_samples_are_compared(tmp_path, monkeypatch):
    seen = []
    original = verification.run
    monkeypatch.setattr(
        verification,
        "run",
        lambda path, inputs, *rest, **kwargs: seen.append(inputs) or original(path, inputs, *rest, **kwargs),
    )
    samples = np.full((3, 256), 0.5)
    kr.export_tflite(dense(), tmp_path / "model.tflite", samples=samples)
    np.testing.assert_array_equal(seen[0][0], samples)


def test_without_litert_tensorflows_interpreter_serves(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "ai_edge_litert.interpreter", None)
    assert verification._interpreter().__module__.startswith("tensorflow")
    report = kr.export_tflite(dense(), tmp_path / "model.tflite")
    assert report.stored_sparse
    assert report.difference < 1e-5


def test_a_recurrent_model_takes_one_sample_at_a_time(tmp_path):
    report = kr.export_tflite(recurrent(), tmp_path / "model.tflite")
    if tuple(map(int, tf.__version__.split(".")[:2])) < (2, 20):
        assert not report.notes
        return
    assert "one sample at a time" in report.notes[0]


@pytest.mark.parametrize("failing", ["convert", "run"])
def test_a_failure_leaves_the_old_file(failing, tmp_path, monkeypatch):
    path = tmp_path / "model.tflite"
    path.write_bytes(b"old")

    def fail(*args, **kwargs):
        raise RuntimeError("no such operation")

    monkeypatch.setattr(*((tflite, "convert") if failing == "convert" else (verification, "run")), fail)
    with pytest.raises(RuntimeError, match="no such operation"):
        kr.export_tflite(dense(), path)
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["model.tflite"]


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (dict(path="model.lite"), ValueError, r"`path` must end in '.tflite'"),
        (dict(quantize="int8", representative_data=lambda: None), ValueError, "`representative_data` must hold arrays"),
        (dict(path="missing/model.tflite"), OSError, "`path` cannot be written.*missing"),
        (dict(quantize="int4"), ValueError, "`quantize` must be one of"),
        (dict(representative_data=np.ones((4, 256))), ValueError, "`representative_data` is used with `quantize='int8'`"),
        (
            dict(quantize="int8", representative_data=np.ones((4, 255))),
            ValueError,
            r"`representative_data` must hold arrays of shapes \[\(None, 256\)\].*Received: shapes \[\(4, 255\)\]",
        ),
        (dict(quantize="int8", representative_data=np.ones((0, 256))), ValueError, "`representative_data` must hold"),
        (dict(quantize="int8", representative_data=np.full((4, 256), np.nan)), ValueError, "`representative_data` holds NaN"),
        (dict(samples=np.full((4, 256), np.inf)), ValueError, "`samples` holds NaN or infinity for input"),
        (dict(samples=[np.ones((4, 256)), np.ones((4, 256))]), ValueError, "`samples` must hold arrays"),
        (dict(samples={"inputs": np.ones((4, 256))}), ValueError, "`samples` has no entry for inputs"),
    ],
)
def test_wrong_arguments_write_nothing(arguments, error, message, tmp_path):
    arguments = {"path": "model.tflite", **arguments}
    arguments["path"] = tmp_path / arguments["path"]
    with pytest.raises(error, match=message):
        kr.export_tflite(dense(), **arguments)
    assert not list(tmp_path.iterdir())


def test_a_folder_is_not_a_file(tmp_path):
    (tmp_path / "model.tflite").mkdir()
    with pytest.raises(OSError, match="it is a folder"):
        kr.export_tflite(dense(), tmp_path / "model.tflite")


def test_no_event_is_said(tmp_path):
    model = kr.to_prunable(dense(None), pruning_schedule=kr.schedules.ConstantSparsity(0.5, 0))
    with pytest.warns(UserWarning, match="No pruning event ever ran"):
        report = kr.export_tflite(model, tmp_path / "model.tflite")
    assert "No pruning event ever ran" in report.notes[0]


def test_a_model_that_gives_nan_is_not_exported(tmp_path):
    model = dense(None)
    model.get_layer("two").bias.assign(np.full(10, np.nan))
    with pytest.raises(ValueError, match="gives NaN or infinity on the samples"):
        kr.export_tflite(model, tmp_path / "model.tflite")
    assert not list(tmp_path.iterdir())


def test_outputs_that_are_wrong_write_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(verification, "run", lambda path, inputs, names, keys: [np.full((8, 10), 99.0)])
    with pytest.raises(RuntimeError, match="differ from those of model"):
        kr.export_tflite(dense(), tmp_path / "model.tflite")
    assert not list(tmp_path.iterdir())


def test_a_path_that_is_none():
    with pytest.raises(TypeError, match="`path` must be a string or a path"):
        kr.export_tflite(dense(), None)


def test_an_operation_that_tflite_does_not_have_is_named(tmp_path):
    @keras.saving.register_keras_serializable("tests")
    class Unusual(L.Layer):
        def call(self, x):
            return tf.math.igamma(tf.abs(x) + 1, tf.abs(x))

        def compute_output_shape(self, shape):
            return shape

    model = keras.Sequential([keras.Input((8,)), L.Dense(8), Unusual(name="unusual")])
    with pytest.raises(RuntimeError, match=r"TFLite has no operation Igamma \(in 'unusual'\)"):
        kr.export_tflite(model, tmp_path / "model.tflite")
    assert not list(tmp_path.iterdir())


def test_samples_beyond_the_representative_data_are_said(tmp_path, generator):
    data = generator.random((32, 256)).astype("float32")
    arguments = dict(quantize="int8", representative_data=data)
    within = kr.export_tflite(dense(), tmp_path / "model.tflite", samples=data[:4], **arguments)
    beyond = kr.export_tflite(dense(), tmp_path / "model.tflite", samples=255 * data[:4], **arguments)
    assert not any("cut off" in note for note in within.notes)
    assert any("lies between" in note and "cut off" in note for note in beyond.notes)


@pytest.mark.parametrize("size", [1, 5])
def test_the_signature_takes_a_batch_of_any_size(size, tmp_path, generator):
    model = two_inputs()
    path = kr.export_tflite(model, tmp_path / "model.tflite").path
    runner = verification.load(path).get_signature_runner("serving_default")
    feeds = {"b": generator.random((size, 64)).astype("float32"), "a": generator.random((size, 32)).astype("float32")}
    answer = runner(**feeds)
    for index, expected in enumerate(model([feeds["b"], feeds["a"]])):
        np.testing.assert_allclose(answer[f"output_{index}"], expected, atol=1e-5)


def test_a_head_that_fails_on_arm_is_exported_as_an_equal_one(tmp_path):
    x = inputs = keras.Input((8, 8, 4))
    x = L.Conv2D(6, 1, name="head")(L.GlobalAveragePooling2D(keepdims=True)(x))
    report = kr.export_tflite(keras.Model(inputs, L.Flatten()(x)), tmp_path / "model.tflite")
    assert "'head': Dense in place of a 1x1 convolution" in report.notes[0]
    assert report.difference < 1e-5


def test_loops_are_not_calibrated(tmp_path, generator):
    """TensorFlow's calibrator crashes on them: over a fixed number of steps they are unrolled, else it is an error."""
    data = generator.standard_normal((16, 5, 8)).astype("float32")
    report = kr.export_tflite(recurrent(), tmp_path / "model.tflite", quantize="int8", representative_data=data)
    assert any("unrolled" in note for note in report.notes)
    assert report.difference < 0.2 * report.output_range
    free = keras.Sequential([keras.Input((None, 8)), L.Bidirectional(L.GRU(4)), L.Dense(2)])
    with pytest.raises(ValueError, match="has a loop, such as a recurrent layer over any number of steps"):
        kr.export_tflite(free, tmp_path / "free.tflite", quantize="int8", representative_data=data)


def test_a_second_output_that_is_nan_is_refused():
    inputs = keras.Input((4,))
    model = keras.Model(
        inputs, [keras.layers.Dense(2)(inputs), keras.layers.Dense(2, bias_initializer=np.full(2, np.nan))(inputs)]
    )
    with pytest.raises(ValueError, match="gives NaN or infinity on the samples"):
        verification.Reference(model, [np.ones((3, 4), "float32")])


@pytest.mark.parametrize("quantize", [None, "float16", "int8"])
def test_no_tolerance_lets_nan_or_another_shape_pass(quantize):
    reference = verification.Reference(dense(None), [np.zeros((3, 256), "float32")])
    for reference.range in (0.0, 5.0):
        for received in (np.full((3, 10), np.nan), np.ones((3, 9))):
            assert verification.largest_difference([np.ones((3, 10))], [received]) > reference.tolerance(quantize)
