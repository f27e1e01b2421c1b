import importlib.metadata

import keras
import numpy as np
import pytest

import keras_renorm as kr

pytestmark = pytest.mark.skipif(keras.backend.backend() != "tensorflow", reason="export needs TensorFlow")
L = keras.layers


def litert_version():
    try:
        return int(importlib.metadata.version("ai-edge-litert").split(".")[0])
    except importlib.metadata.PackageNotFoundError:
        return 0


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    for name, units in (("small", 8), ("large", 1024)):
        layers = [L.Dense(units, "relu"), L.Dense(units, "relu"), L.Dense(3)]
        kr.export_tflite(keras.Sequential([keras.Input((64,)), *layers]), folder / f"{name}.tflite")
    return folder


def test_files_are_measured_in_turns(files):
    report = kr.export.benchmark(files / "small.tflite", against=files / "large.tflite", runs=20)
    small, large = report.rows
    assert small.low <= small.median <= small.high
    assert report.ratio == small.median / large.median
    assert len(str(report).splitlines()) == 3
    assert "of it" in str(report).splitlines()[2]


def test_alone_and_with_several_others(files):
    alone = kr.export.benchmark(str(files / "small.tflite"), runs=2, warmup=1, threads=2)
    assert alone.ratio is None
    assert (alone.runs, alone.threads, len(alone.rows)) == (2, 2, 1)
    several = kr.export.benchmark(files / "small.tflite", [files / "large.tflite"] * 2, runs=2)
    assert len(several.rows) == 3


def test_integers_several_inputs_and_free_sides(tmp_path):
    words, other = keras.Input((None,), dtype="int32", name="words"), keras.Input((4,), name="other")
    x = L.GlobalAveragePooling1D()(L.Embedding(9, 5)(words))
    kr.export_tflite(keras.Model([words, other], L.Dense(2)(L.Concatenate()([x, other]))), tmp_path / "m.tflite")
    assert kr.export.benchmark(tmp_path / "m.tflite", runs=2).rows[0].median > 0


@pytest.fixture(scope="module")
def any_size(tmp_path_factory):
    """A file that takes images of any size, but not of 1x1."""
    path = tmp_path_factory.mktemp("free") / "free.tflite"
    layers = [L.Conv2D(4, 3), L.MaxPooling2D(), L.Conv2D(4, 3), L.GlobalAveragePooling2D(), L.Dense(3)]
    keras.Sequential([keras.Input((None, None, 3), name="images"), *layers]).export(str(path), format="litert", verbose=False)
    return path


def test_the_sizes_of_samples(any_size):
    free = kr.export.benchmark(any_size, against=any_size, runs=2)
    assert [row.shapes for row in free.rows] == [((1, 32, 32, 3),)] * 2
    for samples in (np.zeros((5, 24, 20, 3)), {"images": np.zeros((5, 24, 20, 3), "float32")}):
        report = kr.export.benchmark(any_size, runs=2, samples=samples)
        assert report.rows[0].shapes == ((1, 24, 20, 3),)
        assert "of one sample (1x24x20x3), 1 thread(s)" in str(report)


def test_samples_that_a_file_does_not_take(any_size, files):
    shape = r"must hold an array of shape \(-1, -1, -1, 3\) .* for input 'images' of '.*free.tflite'. Received: shape "
    for samples, message in (
        (np.zeros((5, 24, 20)), shape + r"\(5, 24, 20\)"),
        (np.zeros((5, 24, 20, 4)), shape + r"\(5, 24, 20, 4\)"),
        (np.zeros((0, 24, 20, 3)), shape + r"\(0, 24, 20, 3\)"),
        (np.float32(1), shape + r"\(\)"),
        ({"image": np.zeros((5, 24, 20, 3))}, r"a dict of arrays for inputs \['images'\] of .* Received: \['image'\]"),
    ):
        with pytest.raises(ValueError, match=f"`samples` must .*{message}|`samples` {message}"):
            kr.export.benchmark(any_size, runs=1, samples=samples)


@pytest.mark.skipif(litert_version() < 2, reason="older runtimes bring the process down")
def test_samples_that_are_too_small(any_size):
    with pytest.raises(RuntimeError, match=r"cannot run '.*free.tflite' on inputs of 1x2x2x3"):
        kr.export.benchmark(any_size, runs=1, samples=np.zeros((1, 2, 2, 3)))


def test_what_is_no_model(tmp_path, files):
    (tmp_path / "text.tflite").write_text("not a model at all")
    (tmp_path / "empty.tflite").write_bytes(b"")
    for name in ("text", "empty"):
        with pytest.raises(ValueError, match=f"must be a `.tflite` model.*{name}.tflite"):
            kr.export.benchmark(tmp_path / f"{name}.tflite")
    with pytest.raises(FileNotFoundError):
        kr.export.benchmark(tmp_path / "missing.tflite")
    for arguments in (dict(threads=0), dict(runs=0), dict(warmup=1.5)):
        with pytest.raises(ValueError, match=f"`{next(iter(arguments))}` must be an integer of at least 1"):
            kr.export.benchmark(files / "small.tflite", **arguments)
