import keras
import numpy as np
import pytest

import keras_renorm as kr
from tests import fresh
from tests.runtimes.test_xnnpack import mobile

pytest.importorskip("tensorflow")
if keras.backend.backend() != "tensorflow":
    pytest.skip("export needs TensorFlow", allow_module_level=True)

L = keras.layers


def explained(model, tmp_path, **arguments):
    return kr.export.explain(kr.export_tflite(model, tmp_path / "model.tflite", storage="sparse", **arguments).path)


def test_a_network_with_the_sparse_path(tmp_path):
    layers = [layer.name for layer in mobile().layers if type(layer) is L.Conv2D]
    model = mobile()
    pruned = kr.prune(model, 0.9, target="litert")
    told = explained(pruned, tmp_path)
    assert told.sparse_path
    assert told.breakers == ()
    assert told.zeros > 2 / 3
    assert told.metadata["model"] == model.name
    assert len(layers) == 7
    skipped = {row.layer for row in told.rows if row.skips}
    assert {row.layer for row in told.rows if row.storage == "sparse"} <= skipped
    assert "XNNPACK's sparse path holds" in str(told)
    # With fewer zeros it does not hold, though nothing is in the way.
    told = explained(kr.prune(model, 0.5, target="litert"), tmp_path)
    assert told.sparse_path is False
    assert told.breakers == ()
    assert "it takes more than two thirds" in str(told)
    assert not any(row.skips for row in told.rows if row.operation == "CONV_2D")


def test_what_breaks_it_and_that_repair_mends_it(tmp_path):
    x = inputs = keras.Input((32, 32, 3))
    x = L.Conv2D(8, 3, 2, "same", activation="relu", name="entry")(x)
    x = L.Conv2D(64, 1, activation="relu", name="wide")(x)
    x = L.DepthwiseConv2D(3, 2, "same", name="halve")(x)
    x = L.Conv2D(64, 1, activation="relu", name="point")(x)
    model = keras.Model(inputs, L.Dense(8, name="last")(L.GlobalAveragePooling2D()(x)))
    pruned = kr.prune(model, {"wide": 0.9, "point": 0.9})
    told = explained(pruned, tmp_path)
    assert told.sparse_path is False
    assert [breaker.layer for breaker in told.breakers] == ["entry", "halve"]
    rows = {row.layer: row for row in told.rows}
    assert "broken, first by 'entry'" in rows["point"].why
    assert "repair" in rows["point"].remedy
    told = explained(kr.export.repair(pruned), tmp_path)
    assert told.sparse_path
    assert {row.layer for row in told.rows if row.skips} == {"point", "wide"}


def test_margins_of_odd_sides_are_written_down(tmp_path, generator):
    """For them "same" comes to equal margins, but XNNPACK does not look."""
    layers = [L.Conv2D(8, 3, 2, "same"), L.Conv2D(64, 1, activation="relu"), L.DepthwiseConv2D(3, 2, "same")]
    layers += [L.Conv2D(64, 1), L.GlobalAveragePooling2D()]
    model = kr.prune(keras.Sequential([keras.Input((33, 33, 3)), *layers]), 0.9, target="litert")
    assert explained(model, tmp_path).sparse_path


def test_reasons_for_other_layers(tmp_path, generator):
    inputs = [keras.Input((8, 8, 32)), keras.Input((4,), dtype="int32")]
    x = L.Conv2D(64, 3, name="conv")(inputs[0])
    x = L.Concatenate()([L.Flatten()(x), L.Flatten()(L.Embedding(200, 16, name="words")(inputs[1]))])
    model = keras.Model(inputs, L.Dense(12, name="dense")(x))
    told = explained(kr.prune(model, 0.8), tmp_path)
    rows = {row.operation: row for row in told.rows}
    assert told.sparse_path is None
    assert not any(row.skips for row in told.rows)
    assert "no kernel of the runtime skips zeros of a 3x3 convolution" in rows["CONV_2D"].why
    assert "keras_renorm.compact" in rows["CONV_2D"].remedy
    assert "Block((4, 1))" in rows["FULLY_CONNECTED"].remedy
    assert "looked up" in rows["GATHER"].why
    assert rows["CONV_2D"].layer == "conv"
    samples = [generator.random((8, 8, 8, 32)).astype("float32"), np.zeros((8, 4), "int32")]
    told = explained(kr.prune(model, 0.8), tmp_path, quantize="int8", representative_data=samples)
    assert "Block((16, 1))" in next(row for row in told.rows if row.operation == "FULLY_CONNECTED").remedy


def test_a_model_without_zeros_and_a_model_in_memory(tmp_path):
    model = keras.Sequential([keras.Input((64,)), L.Dense(64, name="one")])
    told = kr.export.explain(model)
    assert told.path is None
    assert (told.rows[0].layer, told.rows[0].why, told.rows[0].density) == ("one", "", 1.0)
    assert "few" in str(told)
    assert kr.export.explain(kr.prune(model, 0.9)).rows[0].storage == "sparse"


def test_a_file_of_another_maker(tmp_path):
    model = keras.Sequential([keras.Input((64,)), L.Dense(64)])
    path = tmp_path / "other.tflite"
    model.export(str(path), format="litert", verbose=False)
    told = kr.export.explain(path)
    assert told.metadata is None
    assert "keras_renorm" not in str(told)


def test_what_is_no_model(tmp_path):
    (tmp_path / "text.tflite").write_text("not a model at all")
    (tmp_path / "empty.tflite").write_bytes(b"")
    for name in ("text", "empty"):
        with pytest.raises(ValueError, match="must be a `.tflite` model"):
            kr.export.explain(tmp_path / f"{name}.tflite")
    with pytest.raises(FileNotFoundError):
        kr.export.explain(tmp_path / "missing.tflite")
    with pytest.raises(TypeError, match="`model_or_path` must be a Keras model or the path"):
        kr.export.explain(7)


def test_bits_that_flipped_are_an_error_that_names_the_file(tmp_path, generator):
    model = kr.prune(keras.Sequential([keras.Input((12, 12, 8)), L.Conv2D(16, 3), L.Flatten(), L.Dense(4)]), 0.8)
    whole = kr.export_tflite(model, tmp_path / "whole.tflite", storage="sparse").path.read_bytes()
    path, told = tmp_path / "flipped.tflite", []
    for _ in range(150):
        data = bytearray(whole)
        for place in generator.integers(8, len(data), 4):
            data[place] ^= 1 << int(generator.integers(8))
        path.write_bytes(data)
        try:
            str(kr.export.explain(path))
        except ValueError as error:
            told.append(str(error))
    assert len(told) > 10
    assert all(str(path) in one for one in told)


def test_metadata_of_somebody_else(tmp_path):
    """What cannot be shown is damaged, too."""
    path = kr.export_tflite(keras.Sequential([keras.Input((8,)), L.Dense(4)]), tmp_path / "m.tflite").path
    path.write_bytes(path.read_bytes().replace(b'"sparsity"', b'"sparsitz"'))
    with pytest.raises(ValueError, match=r"must be a whole `.tflite` model.*damaged.*m.tflite"):
        kr.export.explain(path)


def test_a_file_that_was_cut_off_is_an_error_and_no_crash(tmp_path):
    """In a process of its own: the runtime itself would bring this one down."""
    whole = kr.export_tflite(keras.Sequential([keras.Input((64,)), L.Dense(64)]), tmp_path / "whole.tflite").path.read_bytes()
    for name, data in {"half": whole[: len(whole) // 2], "torn": whole[:64] + b"\xff" * 512 + whole[576:]}.items():
        (tmp_path / f"{name}.tflite").write_bytes(data)
    program = """
import pathlib, sys
import keras_renorm as kr
for name in ("half", "torn"):
    for function in (kr.export.explain, kr.export.benchmark):
        try:
            function(pathlib.Path(sys.argv[1], f"{name}.tflite"))
        except (ValueError, RuntimeError) as error:
            print(type(error).__name__, error)
"""
    assert fresh.run(program, tmp_path).count("Error") == 4
