import os
import sys

import keras
import numpy as np
import pytest

import keras_renorm as kr
from keras_renorm.src.export import failures, running, verification

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

    monkeypatch.setattr(*((running, "convert") if failing == "convert" else (verification, "run")), fail)
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


def small(inputs=None, *layers):
    return keras.Sequential([keras.Input((8,)) if inputs is None else inputs, *layers, L.Dense(2)])


def test_what_a_small_network_is_stored_as(tmp_path):
    """In full, for it may be meant for a microcontroller; in types that run there."""
    model = kr.prune(small(keras.Input((64,)), L.Dense(128, "relu")), 0.9)
    paths = [tmp_path / f"{index}.tflite" for index in range(4)]
    automatic, sparse = kr.export_tflite(model, paths[0]), kr.export_tflite(model, paths[1], storage="sparse")
    assert (automatic.stored_sparse, sparse.stored_sparse) == (False, True)
    assert automatic.bytes == automatic.dense_bytes > 2 * sparse.bytes
    assert f"`storage='sparse'` takes {sparse.bytes:,} bytes" in automatic.notes[-1]
    assert "TensorFlow Lite for Microcontrollers refuses the file" in sparse.notes[-1]
    assert kr.export_tflite(model, paths[2], quantize="float16").stored_sparse
    full = kr.export_tflite(model, paths[3], quantize="float16", storage="full")
    assert (full.stored_sparse, full.notes) == (False, ())


def test_a_large_network_stored_in_full_is_not_taken_apart(tmp_path):
    model = kr.prune(keras.Sequential([keras.Input((600,)), L.Dense(300)]), 0.9)
    report = kr.export_tflite(model, tmp_path / "model.tflite", storage="full")
    assert (report.stored_sparse, report.notes) == (False, ())
    assert [tensor.shape for tensor in report.tensors] == [(300, 600)]


@pytest.mark.parametrize(
    ("make", "samples"),
    [
        (lambda: small(keras.Input((None, None, 3)), L.Conv2D(4, 3), L.MaxPooling2D(2), L.Conv2D(4, 3)), (24, 20, 3)),
        (lambda: small(keras.Input((None, 8)), L.Conv1D(4, 5), L.GlobalMaxPooling1D()), (9, 8)),
    ],
    ids=["images", "sequences"],
)
def test_inputs_of_any_size(make, samples, tmp_path, generator):
    model = make()
    data = generator.random((3, *samples)).astype("float32")
    for arguments in ({}, dict(samples=data), dict(quantize="int8", representative_data=data)):
        report = kr.export_tflite(model, tmp_path / "model.tflite", **arguments)
        assert report.difference < (0.1 if "quantize" in arguments else 1e-5)
        assert any("`resize_tensor_input`" in note for note in report.notes)
    answer = verification.run(report.path, [data], ["x"])[0]
    assert answer.shape == model.predict_on_batch(data).shape


def test_random_inputs_are_as_long_as_it_takes(tmp_path):
    """More than 32 for these windows, at most 20 for these positions."""
    layers = [layer for _ in range(4) for layer in (L.Conv1D(2, 5), L.MaxPooling1D(2))]
    assert kr.export_tflite(small(keras.Input((None, 2)), *layers), tmp_path / "long.tflite").difference < 1e-5
    tokens = keras.Input((None,), dtype="int32")
    x = L.Embedding(50, 4)(tokens)
    model = keras.Model(tokens, L.Dense(2)(OfAtMost20()(x)))
    assert kr.export_tflite(model, tmp_path / "short.tflite").difference < 1e-5


@keras.saving.register_keras_serializable("tests")
class OfAtMost20(L.Layer):
    def build(self, shape):
        self.positions = self.add_weight(shape=(20, shape[-1]), name="positions")

    def call(self, x):
        return x + self.positions[: keras.ops.shape(x)[1]]


def nested_inputs():
    p, q, r = (keras.Input((4,), name=name) for name in "pqr")
    return keras.Model([p, {"q": q, "r": r}], L.Dense(2)(L.Concatenate()([p, q, r])))


def test_nested_inputs(tmp_path, generator):
    p, q, r = generator.random((3, 5, 4)).astype("float32")
    model = nested_inputs()
    for samples in (None, [p, {"q": q, "r": r}], {"p": p, "q": q, "r": r}, [p, q, r]):
        assert kr.export_tflite(model, tmp_path / "model.tflite", samples=samples).difference < 1e-5
    names = verification.Runner(tmp_path / "model.tflite").inputs
    assert set(names) == {"p", "q", "r"}
    with pytest.raises(ValueError, match="`samples` must hold arrays"):
        kr.export_tflite(model, tmp_path / "model.tflite", samples=[p, {"q": q}])


def test_nested_outputs_are_written_in_a_list(tmp_path, generator):
    inputs = keras.Input((8,))
    a, b, c = (L.Dense(units)(inputs) for units in (2, 3, 4))
    model = keras.Model(inputs, {"x": a, "y": [b, {"v": c}]})
    data = generator.random((3, 8)).astype("float32")
    report = kr.export_tflite(model, tmp_path / "model.tflite", samples=data)
    assert "`output_0` is ['x'], `output_1` is ['y'][0], `output_2` is ['y'][1]['v']" in report.notes[0]
    answers = model.predict_on_batch(data)
    expected = [answers["x"], answers["y"][0], answers["y"][1]["v"]]
    for answer, right in zip(verification.run(report.path, [data], ["x"]), expected, strict=True):
        np.testing.assert_allclose(answer, right, atol=1e-5)


def test_strings(tmp_path):
    words = keras.Input((1,), dtype="string")
    ids = L.StringLookup(vocabulary=["a", "ä"])(words)
    model = keras.Model(words, L.Dense(2)(L.Flatten()(L.Embedding(3, 8)(ids))))
    # LiteRT runs two samples of the file with a batch of any size, but not one.
    assert "one sample at a time" in kr.export_tflite(model, tmp_path / "model.tflite").notes[0]
    for data in (np.array([["a"], ["ä"]]), np.array([["a"], ["ä"]], object)):
        assert kr.export_tflite(model, tmp_path / "model.tflite", samples=data).difference < 1e-6
    answers = verification.run(tmp_path / "model.tflite", [np.array([["ä".encode()]], object)], ["x"])
    np.testing.assert_allclose(answers[0], np.asarray(model(tf.constant([["ä"]]))), atol=1e-6)
    with pytest.raises(ValueError, match="`samples` must hold numbers for input"):
        kr.export_tflite(small(), tmp_path / "numbers.tflite", samples=np.array([["a"] * 8]))


def test_states(tmp_path):
    """Operations that assign them have no outputs; samples leave the model's own states alone."""
    model = small(keras.Input((5, 8), batch_size=2), L.LSTM(4, stateful=True))
    data = np.ones((6, 5, 8), "float32")
    report = kr.export_tflite(model, tmp_path / "model.tflite", samples=data)
    assert report.difference < 1e-5
    assert "2 samples at a time" in report.notes[0]
    assert all(np.all(np.asarray(state) == 0) for state in model.layers[0].states)
    assert kr.export.explain(report.path).rows
    expected = np.concatenate([model.predict_on_batch(data[:2]) for _ in range(3)])
    np.testing.assert_allclose(verification.run(report.path, [data], ["x"])[0], expected, atol=1e-5)


@keras.saving.register_keras_serializable("tests")
class Sorted(L.Layer):
    def call(self, x):
        return x if isinstance(x, keras.KerasTensor) else keras.ops.convert_to_tensor(np.sort(np.asarray(x), -1))

    def compute_output_shape(self, shape):
        return shape


@keras.saving.register_keras_serializable("tests")
class Branching(Sorted):
    def call(self, x):
        return x if isinstance(x, keras.KerasTensor) or keras.ops.sum(x) > 0 else -x


@keras.saving.register_keras_serializable("tests")
class Sized(Sorted):
    def call(self, x):
        return x if isinstance(x, keras.KerasTensor) else keras.ops.reshape(x, (x.shape[0] * 2, 4))


@keras.saving.register_keras_serializable("tests")
class Fourier(Sorted):
    def call(self, x):
        return keras.ops.fft((x, x))[0]


@pytest.mark.parametrize(
    ("layer", "told"),
    [
        (Sorted, r"Layer 'mine' \(Sorted\) fails in its `call` \(line \d+ of test_tflite.py\): .*in place of NumPy"),
        (Branching, r"Layer 'mine' \(Branching\) fails in its `call` .*`keras.ops.where`"),
        (Fourier, r"TFLite has no operation Complex, FFT \(in 'mine'\)"),
    ],
)
def test_the_layer_that_fails_is_named(layer, told, tmp_path):
    model = small(None, layer(name="mine"))
    with pytest.raises(RuntimeError, match=told):
        kr.export_tflite(model, tmp_path / "model.tflite")
    assert not list(tmp_path.iterdir())


def test_the_reason_of_an_error():
    """In short, wherever it stands in what TensorFlow and Keras say."""
    cause = failures.reason
    assert cause(ValueError("in user code:\n\n\n    ValueError: Got a list. More.\n")) == "ValueError: Got a list"
    keras_says = "Exception encountered when calling A.call().\n\n\x1b[1mno fold\x1b[0m\n\nArguments received by A.call():\n x"
    assert cause(KeyError(keras_says)) == "KeyError: no fold"
    assert cause(RuntimeError("")) == "RuntimeError"
    layer = Sized(name="sized")
    with failures.whole_tracebacks(), pytest.raises(TypeError) as caught:
        tf.function(layer).get_concrete_function(tf.TensorSpec((None, 8)))
    assert "Layer 'sized' (Sized) fails in its `call`" in cause(caught.value)
    assert "read sizes with `keras.ops.shape`" in cause(caught.value)


def test_integers_that_are_far_off_are_told(tmp_path, monkeypatch, generator):
    data = generator.random((16, 8)).astype("float32")
    original = verification.largest_difference
    monkeypatch.setattr(verification, "largest_difference", lambda *both: original(*both) + 0.5)
    report = kr.export_tflite(small(), tmp_path / "m.tflite", quantize="int8", representative_data=data)
    assert any("integers are coarse for this network" in note and "`representative_data`" in note for note in report.notes)


def test_integers_that_are_no_numbers_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(verification, "run", lambda path, inputs, names, keys: [np.full((8, 2), np.nan)])
    with pytest.raises(RuntimeError, match="differ from those of model 'sequential' by inf"):
        kr.export_tflite(small(), tmp_path / "model.tflite", quantize="int8")
    assert not list(tmp_path.iterdir())


def test_the_smallest_type_is_told(tmp_path, generator):
    """At 90% integers of convolutions, which are stored in full, take more than floats without their zeros."""
    model = kr.prune(keras.Sequential([keras.Input((8, 8, 64)), L.Conv2D(128, 3)]), 0.9)
    reports = {quantize: kr.export_tflite(model, tmp_path / "m.tflite", quantize) for quantize in (None, "float16", "int8")}
    for report in reports.values():
        for quantize, other in reports.items():
            assert report.estimated_bytes[quantize or "float32"] == pytest.approx(other.bytes, rel=0.15)
    assert reports["float16"].bytes < reports[None].bytes < reports["int8"].bytes
    assert "float16 is more exact, and smaller" in reports["int8"].notes[-1]
    assert "as float16 (the smallest)" in str(reports[None])
    assert not any("more exact" in note for quantize in (None, "float16") for note in reports[quantize].notes)


def test_a_full_disk_is_told(tmp_path, monkeypatch):
    def fail(*_, **__):
        try:
            raise tf.errors.ResourceExhaustedError(None, None, "part-00000; No space left on device [Op:SaveV2]")
        except tf.errors.ResourceExhaustedError as error:
            raise RuntimeError("TensorFlow could not convert") from error

    monkeypatch.setattr(running, "convert", fail)
    with pytest.raises(OSError, match=r"model.tflite' was not written: no space is left .*TMPDIR"):
        kr.export_tflite(small(), tmp_path / "model.tflite")


def test_integer_io_needs_to_know_what_an_integer_is_worth(tmp_path):
    with pytest.raises(ValueError, match="`integer_io` is used with `quantize='int8'` and `representative_data`"):
        kr.export_tflite(small(), tmp_path / "model.tflite", quantize="int8", integer_io=True)
    with pytest.raises(ValueError, match="`storage` must be one of"):
        kr.export_tflite(small(), tmp_path / "model.tflite", storage="dense")
