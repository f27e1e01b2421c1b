"""Files on TensorFlow Lite for Microcontrollers."""

import keras
import numpy as np
import pytest

import keras_renorm as kr
from keras_renorm.src.export import verification

micro = pytest.importorskip("tflite_micro.python.tflite_micro.runtime")
if keras.backend.backend() != "tensorflow":
    pytest.skip("export needs TensorFlow", allow_module_level=True)

L = keras.layers


def mlp(sparsity=0.9, **arguments):
    model = keras.Sequential([keras.Input((64,)), L.Dense(128, "relu"), L.Dense(10)])
    return kr.prune(model, sparsity, **arguments)


def compacted():
    layers = [L.Conv2D(16, 3, activation="relu"), L.DepthwiseConv2D(3), L.Conv2D(32, 1, activation="relu")]
    model = keras.Sequential([keras.Input((12, 12, 3)), *layers, L.GlobalAveragePooling2D(), L.Dense(10)])
    return kr.compact(kr.prune(model, 0.5, pattern="unit"))


def run(path, samples):
    """What the runtime of boards answers, sample by sample."""
    interpreter = micro.Interpreter.from_file(str(path), arena_size=2**20)
    answers = []
    for sample in samples:
        interpreter.set_input(sample[None], 0)
        interpreter.invoke()
        answers.append(interpreter.get_output(0)[0].copy())
    return np.array(answers)


def samples_of(model, generator):
    return generator.standard_normal((32, *model.inputs[0].shape[1:])).astype("float32")


@pytest.mark.parametrize(
    ("make", "integers"),
    [
        (mlp, False),
        (lambda: mlp(target="litert"), False),
        (lambda: mlp(target="litert-int8"), True),
        (compacted, False),
    ],
    ids=["single weights", "blocks", "integers in blocks", "compacted"],
)
def test_small_networks_run_as_they_come(make, integers, tmp_path, generator):
    model = make()
    data = samples_of(model, generator)
    arguments = dict(quantize="int8", representative_data=data) if integers else {}
    report = kr.export_tflite(model, tmp_path / "model.tflite", **arguments)
    assert not report.stored_sparse
    expected = model.predict_on_batch(data[:4])
    np.testing.assert_allclose(run(report.path, data[:4]), expected, atol=(0.05 if integers else 1e-5) * np.abs(expected).max())


def test_integers_from_end_to_end(tmp_path, generator):
    model = compacted()
    data = samples_of(model, generator)
    report = kr.export_tflite(
        model, tmp_path / "model.tflite", "int8", representative_data=data, storage="full", integer_io=True
    )
    runner = verification.load(report.path).get_signature_runner()
    (given,), (answered,) = runner.get_input_details().values(), runner.get_output_details().values()
    assert (given["dtype"], answered["dtype"]) == (np.int8, np.int8)
    scale, zero = given["quantization"]
    answers = run(report.path, np.clip(np.round(data[:4] / scale) + zero, -128, 127).astype("int8"))
    assert answers.dtype == np.int8
    scale, zero = answered["quantization"]
    expected = model.predict_on_batch(data[:4])
    np.testing.assert_allclose((answers.astype(float) - zero) * scale, expected, atol=0.05 * np.abs(expected).max())
    assert report.difference < 0.05 * report.output_range


@pytest.mark.parametrize("pattern", ["unstructured", kr.patterns.Block((4, 1))], ids=["single", "blocks"])
def test_sparse_files_are_refused_and_never_computed_wrongly(pattern, tmp_path):
    report = kr.export_tflite(mlp(pattern=pattern), tmp_path / "model.tflite", storage="sparse")
    assert report.stored_sparse
    assert any("Microcontrollers refuses the file" in note for note in report.notes)
    with pytest.raises(RuntimeError, match="failed to allocate"):
        run(report.path, np.zeros((1, 64), "float32"))


def test_sparse_blocks_of_integers_are_refused(tmp_path, generator):
    model = mlp(target="litert-int8")
    data = samples_of(model, generator)
    report = kr.export_tflite(model, tmp_path / "model.tflite", "int8", representative_data=data, storage="sparse")
    assert report.stored_sparse
    with pytest.raises(RuntimeError, match="failed to allocate"):
        run(report.path, data[:1])
