import io
import json
import os
import pathlib
import runpy
import signal
import subprocess
import sys
import tokenize
import warnings
import zipfile

import keras
import numpy as np
import pytest

import keras_renorm as kr
from keras_renorm.cli import compare, files, parser, report
from keras_renorm.cli import main as cli
from keras_renorm.src.export import running, storage, verification
from keras_renorm.src.export.benchmark import Inference
from keras_renorm.src.pruning.recovery import recover

L = keras.layers
ROOT = pathlib.Path(kr.__file__).parents[1]
on_tensorflow = pytest.mark.skipif(keras.backend.backend() != "tensorflow", reason="export needs TensorFlow")


@keras.saving.register_keras_serializable("tests")
class OwnLayer(L.Dense):
    pass


@keras.saving.register_keras_serializable("tests")
def own_activation(x):
    return x


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model, samples, and labels that the model gets right."""
    keras.utils.set_random_seed(7)
    folder = tmp_path_factory.mktemp("cli")
    layers = [L.Dense(32, "relu", name="hidden"), L.Dense(4, name="logits")]
    model = keras.Sequential([keras.Input((16,)), *layers], name="net")
    model.compile("adam", "mse")
    model.save(folder / "model.keras")
    kr.prune(model, 0.75).save(folder / "pruned.keras")
    x = np.random.default_rng(7).standard_normal((300, 16)).astype("float32")
    np.savez(folder / "x.npz", x=x)
    np.savez(folder / "xy.npz", x=x, y=model.predict(x, verbose=0).argmax(axis=-1))
    return folder


@pytest.fixture
def run(folder, tmp_path, monkeypatch, capsys):
    """Runs a command where the files are; output goes to `tmp_path`."""
    monkeypatch.chdir(folder)

    def run(*arguments):
        words = [str(tmp_path / word[1:]) if word.startswith("@") else word for word in " ".join(arguments).split()]
        capsys.readouterr()
        status = cli.main(words)
        return status, *capsys.readouterr()

    return run


def test_prune_without_samples(run, tmp_path):
    status, out, err = run("prune model.keras --sparsity 0.9 -o @out.keras")
    assert (status, err) == (0, "")
    assert "Magnitude" in out
    assert "error before  error after" in out.splitlines()[0]
    assert ["total", "pruned", "640", "64", "0.9000"] in [line.split() for line in out.splitlines()]
    assert f"written: {tmp_path / 'out.keras'}" in out
    pruned = keras.models.load_model(tmp_path / "out.keras")
    assert kr.summary(pruned).sparsity == pytest.approx(0.9, abs=0.01)
    assert os.listdir(tmp_path) == ["out.keras"]


def test_prune_with_everything(run, tmp_path):
    status, out, err = run(
        "prune model.keras --sparsity hidden=0.75 --sparsity log*=0.5 --pattern hidden=block:8,1 --pattern logits=n_of_m:2,4",
        "--calibration x.npz --criterion obs --renormalize lstsq --batch-size 64 --json -o @out.keras",
    )
    assert (status, err) == (0, "")
    told = json.loads(out)
    assert [(row["layer"], row["sparsity"], row["renormalize"]) for row in told["rows"]] == [
        ("hidden", 0.75, "LeastSquares"),
        ("logits", 0.5, "LeastSquares"),
    ]
    kernel = np.asarray(keras.models.load_model(tmp_path / "out.keras").get_layer("hidden").kernel)
    assert np.isin((kernel.reshape(2, 8, 32) != 0).sum(axis=1), (0, 8)).all()


def test_prune_units_and_take_them_out(run, tmp_path):
    status, out, _ = run(
        "prune model.keras --sparsity 0.5 --pattern unit --layer hidden --compact --renormalize none -o @s.keras"
    )
    assert status == 0
    assert "(16, 32)  (16, 16)" in out
    assert keras.models.load_model(tmp_path / "s.keras").get_layer("hidden").units == 16


def test_prune_and_recover(run, tmp_path, monkeypatch):
    monkeypatch.setattr(recover, "STEPS", 40)
    command = "prune model.keras --sparsity 0.9 --calibration x.npz --recover -o @out.keras"
    status, out, err = run(command)
    assert (status, err) == (0, "")
    assert "samples that were held out" in out
    told = json.loads(run(f"{command} --force --json")[1])
    assert told["recovered"]["after"] <= told["recovered"]["before"]
    assert kr.summary(keras.models.load_model(tmp_path / "out.keras")).sparsity == pytest.approx(0.9, abs=0.01)


def test_report_of_a_keras_file(run):
    status, out, _ = run("report pruned.keras")
    assert status == 0
    assert "hidden" in out
    assert "0.7500" in out.splitlines()[-1]
    told = json.loads(run("report pruned.keras --json")[1])
    assert told["sparsity"] == 0.75
    assert [row["layer"] for row in told["rows"]] == ["hidden", "logits"]


@on_tensorflow
def test_export_and_report_of_the_file(run, tmp_path):
    status, out, err = run("export pruned.keras -o @p.tflite --samples x.npz --storage sparse")
    assert (status, err) == (0, "")
    assert "sparse storage" in out
    assert "Microcontrollers refuses the file" in out
    status, out, _ = run("report @p.tflite --json")
    told = json.loads(out)
    assert status == 0
    assert told["sparsity"] == pytest.approx(0.75)
    assert told["metadata"]["sparsity"] == 0.75
    out = run("report @p.tflite")[1]
    assert "FULLY_CONNECTED" in out
    assert out.endswith("With `keras-renorm prune`: `--pattern block:4,1`.\n")
    status, out, _ = run("report pruned.keras --explain")
    assert "as exported" in out
    assert out.endswith("With `keras-renorm prune`: `--pattern block:4,1`.\n")
    assert "exported" in json.loads(run("report pruned.keras --explain --json")[1])


@on_tensorflow
def test_export_of_integers(run, tmp_path):
    options = "--quantize int8 --representative-data x.npz --smallest --storage full --integer-io --json"
    status, out, _ = run(f"export pruned.keras -o @i.tflite {options}")
    told = json.loads(out)
    assert (status, told["quantize"], told["path"]) == (0, "int8", str(tmp_path / "i.tflite"))
    assert not told["stored_sparse"]
    details = verification.load(tmp_path / "i.tflite").get_signature_runner().get_input_details()
    assert [one["dtype"] for one in details.values()] == [np.int8]
    # `compare` gives and reads floats all the same.
    told = json.loads(run("compare pruned.keras @i.tflite --data xy.npz --runs 2 --json")[1])
    assert told["difference"] < 0.1 * told["output_range"]


@on_tensorflow
def test_compare_files_of_both_kinds(run, tmp_path):
    kr.export_tflite(keras.models.load_model("model.keras", compile=False), tmp_path / "dense.tflite")
    status, out, err = run("compare model.keras @dense.tflite --data xy.npz --runs 3 --json")
    assert (status, err) == (0, "")
    told = json.loads(out)
    assert [row["accuracy"] for row in told["files"]] == [1.0, 1.0]
    assert [row["bytes"] for row in told["files"]] == [
        os.path.getsize("model.keras"),
        os.path.getsize(tmp_path / "dense.tflite"),
    ]
    assert told["difference"] < 1e-5 < told["output_range"]
    assert (told["samples"], told["random"], told["same_class"]) == (300, False, 1.0)
    status, out, _ = run("compare @dense.tflite pruned.keras --runs 3 --threads 2")
    assert status == 0
    assert "random inputs" in out
    assert "latency" in out
    assert "accuracy" not in out
    status, out, _ = run("compare @dense.tflite @dense.tflite --data xy.npz --runs 3")
    assert ["accuracy", "1.0000", "1.0000", "+0.0000"] in [line.split() for line in out.splitlines()]


def test_compare_keras_files_on_samples(run):
    status, out, _ = run("compare model.keras pruned.keras --data x.npz --runs 2")
    assert status == 0
    assert "on 300 samples" in out
    told = json.loads(run("compare model.keras pruned.keras --data xy.npz --runs 2 --json")[1])
    assert told["same_class"] == told["files"][1]["accuracy"] < told["files"][0]["accuracy"] == 1.0


def test_several_inputs_come_by_their_names(run, tmp_path, generator):
    left, right = keras.Input((4,), name="left"), keras.Input((6,), name="right")
    model = keras.Model([right, left], L.Dense(1, "sigmoid")(L.Concatenate()([left, right])))
    model.save(tmp_path / "two.keras")
    x = {"left": generator.standard_normal((300, 4)), "right": generator.standard_normal((300, 6))}
    y = np.asarray(model.predict([x["right"], x["left"]], verbose=0)) > 0.5
    np.savez(tmp_path / "two.npz", y=y, **x)
    told = json.loads(run("compare @two.keras @two.keras --data @two.npz --runs 1 --json")[1])
    assert [row["accuracy"] for row in told["files"]] == [1.0, 1.0]
    assert told["same_class"] is None
    assert run("prune @two.keras --sparsity 0.5 --criterion activation --calibration @two.npz -o @out.keras")[0] == 0
    status, _, err = run("prune @two.keras --sparsity 0.5 --calibration x.npz -o @other.keras")
    assert status == 1
    assert "one array for each input of the model: ['right', 'left']. It holds ['x']" in err
    assert "take different inputs" in run("compare model.keras @two.keras")[2]


def test_inputs_that_are_a_dict_come_by_its_keys(run, tmp_path, generator):
    """Samples are handed on in the structure that the model takes; Keras warns of another one."""
    inputs = {"words": keras.Input((4,), name="words"), "mask": keras.Input((6,), name="mask")}
    model = keras.Model(inputs, L.Dense(2, name="out")(L.Concatenate()([inputs["words"], inputs["mask"]])))
    model.save(tmp_path / "dict.keras")
    np.savez(tmp_path / "dict.npz", words=generator.standard_normal((30, 4)), mask=generator.standard_normal((30, 6)))
    status, _, err = run("prune @dict.keras --sparsity 0.5 --calibration @dict.npz --criterion activation -o @out.keras")
    assert (status, err) == (0, "")
    told = json.loads(run("compare @dict.keras @dict.keras --data @dict.npz --runs 1 --json")[1])
    assert (told["difference"], told["samples"], told["shapes"]) == (0.0, 30, "1x6, 1x4")
    assert "['mask', 'words']. It holds ['x']" in run("compare @dict.keras @dict.keras --data x.npz")[2]
    if keras.backend.backend() == "tensorflow":
        assert run("export @dict.keras --samples @dict.npz -o @d.tflite")[0] == 0


@on_tensorflow
def test_latencies_are_those_of_the_samples_sizes(run, tmp_path, monkeypatch):
    inputs = keras.Input((None, None, 3))
    x = L.GlobalAveragePooling2D()(L.Conv2D(4, 3, padding="same")(inputs))
    model = keras.Model(inputs, L.Dense(2)(x))
    model.save(tmp_path / "free.keras")
    model.export(str(tmp_path / "free.tflite"), format="litert", verbose=False)
    np.savez(tmp_path / "images.npz", x=np.zeros((5, 24, 20, 3), "float32"))
    timed = []
    monkeypatch.setattr(compare, "Inference", lambda *arguments: timed.append(Inference(*arguments)) or timed[-1])
    status, out, _ = run("compare @free.keras @free.tflite --data @images.npz --runs 2")
    assert status == 0
    assert "inferences of one sample (1x24x20x3), in turns" in out
    run("compare @free.tflite @free.keras --runs 2")
    assert [one.shapes for one in timed] == [((1, 24, 20, 3),), ((1, 32, 32, 3),)]


@pytest.mark.parametrize(
    ("outputs", "labels", "accuracy"),
    [
        ([[0.1, 0.9], [0.8, 0.2]], [1, 1], 0.5),
        ([[0.1, 0.9], [0.8, 0.2]], [[1.0], [0.0]], 1.0),
        ([[0.1, 0.9], [0.8, 0.2]], [[0, 1], [0, 1]], 0.5),
        ([[0.3], [0.6]], [0, 1], 1.0),
        ([[-0.3], [0.2]], [[0], [0]], 0.5),
        ([[[0.1, 0.9], [0.8, 0.2]]], [[1, 0]], 1.0),
    ],
)
def test_accuracies(outputs, labels, accuracy):
    from keras_renorm.cli.compare import _accuracy

    assert _accuracy([np.asarray(outputs)], np.asarray(labels), pathlib.Path("xy.npz")) == accuracy


def test_other_backends_are_told_how_to_export(run, tmp_path, monkeypatch):
    monkeypatch.setattr(keras.backend, "backend", lambda: "jax")
    for command in ("export pruned.keras -o @p.tflite", "report pruned.keras --explain"):
        status, out, err = run(command)
        assert (status, out, err.count("\n")) == (1, "", 1)
        assert "Run the command again with KERAS_BACKEND=tensorflow" in err
    assert not os.listdir(tmp_path)


def test_a_missing_tensorflow_is_not_a_broken_file(run, tmp_path, monkeypatch):
    (tmp_path / "p.tflite").write_bytes(b"1234TFL3")
    monkeypatch.setitem(sys.modules, "tensorflow.lite.python", None)
    for command in ("report @p.tflite", "compare pruned.keras @p.tflite"):
        status, _, err = run(command)
        assert (status, err.count("\n")) == (1, 1)
        assert "TensorFlow, which is not installed" in err


BAD_MODELS = {
    "text": (b"hello", "is not a Keras model"),
    "empty": (b"", "is not a Keras model"),
    "cut": (lambda whole: whole[: len(whole) // 2], "begins like a Keras model, but is cut off"),
    "damaged": (lambda whole: whole.replace(b"logits", b"legits"), "is damaged in its part"),
}


@pytest.mark.parametrize("name", BAD_MODELS)
def test_files_that_are_no_models(name, run, folder, tmp_path):
    content, message = BAD_MODELS[name]
    whole = (folder / "model.keras").read_bytes()
    (tmp_path / "bad.keras").write_bytes(content(whole) if callable(content) else content)
    for command in ("report @bad.keras", "prune @bad.keras --sparsity 0.5 -o @out.keras", "compare model.keras @bad.keras"):
        status, out, err = run(command)
        assert (status, out, err.count("\n")) == (1, "", 1)
        assert err.startswith("keras-renorm: error: ")
        assert message in err
    assert os.listdir(tmp_path) == ["bad.keras"]


def test_other_files_that_are_no_models(run, tmp_path):
    with zipfile.ZipFile(tmp_path / "zip.keras", "w") as archive:
        archive.writestr("a.txt", "nothing")
    assert "not a complete Keras model" in run("report @zip.keras")[2]
    (tmp_path / "text.tflite").write_text("no model at all")
    assert "must be a `.tflite` model" in run("report @text.tflite")[2]
    assert "must be a `.tflite` model" in run("compare model.keras @text.tflite")[2]
    assert "No such file" in run("report @missing.keras")[2]
    (tmp_path / "folder.keras").mkdir()
    assert "is a folder" in run("report @folder.keras")[2]


def test_objects_of_the_users_own(run, tmp_path, monkeypatch):
    model = keras.Sequential([keras.Input((4,)), OwnLayer(3), L.Dense(2, activation=own_activation)])
    model.save(tmp_path / "own.keras")
    assert run("report @own.keras")[0] == 0
    for name in ("tests>OwnLayer", "tests>own_activation"):
        monkeypatch.delitem(keras.saving.get_custom_objects(), name, raising=False)
        monkeypatch.setattr("keras.src.saving.object_registration.GLOBAL_CUSTOM_OBJECTS", _without(name))
    status, _, err = run("report @own.keras")
    assert status == 1
    assert "tests>OwnLayer, tests>own_activation. Pass `--import MODULE`" in err
    source = (
        "import keras\n"
        "@keras.saving.register_keras_serializable('tests')\nclass OwnLayer(keras.layers.Dense): pass\n"
        "@keras.saving.register_keras_serializable('tests')\ndef own_activation(x): return x\n"
    )
    (tmp_path / "module_of_mine.py").write_text(source)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    assert cli.main(["report", "own.keras", "--import", "module_of_mine"]) == 0
    assert run("report own.keras --import no_such_module")[2].count("--import no_such_module: ModuleNotFoundError") == 1


def _without(name):
    from keras.src.saving import object_registration

    return {key: value for key, value in object_registration.GLOBAL_CUSTOM_OBJECTS.items() if key != name}


@pytest.mark.filterwarnings("ignore:The object being serialized includes a `lambda`")
@pytest.mark.parametrize("nested", [False, True])
def test_code_in_a_file_is_not_run(nested, run, tmp_path):
    """What is told is the layer, not that Functional is a class of somebody's own."""
    double = L.Lambda(lambda x: 2 * x, name="double")
    inputs = keras.Input((4,))
    inner = keras.Sequential([keras.Input((4,)), double], name="inner") if nested else double
    keras.Model(inputs, L.Dense(2)(inner(inputs))).save(tmp_path / "code.keras")
    status, _, err = run("report @code.keras")
    assert status == 1
    assert (
        "code.keras' cannot be loaded. It holds Python code, which is not run: the function in layer 'double' (Lambda)" in err
    )
    assert "pass `--import MODULE`; or, if you trust the file" in err


BAD_SAMPLES = {
    "wrong shape": (dict(x=np.zeros((9, 15))), "takes (None, 16). Received: an array of shape (9, 15)"),
    "objects": (dict(x=np.array([{"a": 1}], dtype=object)), "does not hold plain arrays"),
    "no x": (dict(a=np.zeros((9, 16)), b=np.zeros(3)), "must hold `x`. It holds ['a', 'b']"),
    "none": (dict(x=np.zeros((0, 16))), "contains no samples"),
    "nan": (dict(x=np.full((9, 16), np.nan)), "holds NaN or infinity"),
    "strings": (dict(x=np.full((9, 16), "a")), "must hold numbers"),
    "a single value": (dict(x=3.0), "It holds a single value as `x`: leave it out"),
    "nothing": (dict(), "must hold `x`. It holds []"),
}


@pytest.mark.parametrize("name", BAD_SAMPLES)
def test_samples_that_cannot_be_used(name, run, tmp_path):
    arrays, message = BAD_SAMPLES[name]
    np.savez(tmp_path / "bad.npz", **arrays)
    status, out, err = run("prune model.keras --sparsity 0.5 --calibration @bad.npz -o @out.keras")
    assert (status, out, err.count("\n")) == (1, "", 1)
    assert message in err
    assert str(tmp_path / "bad.npz") in err
    assert os.listdir(tmp_path) == ["bad.npz"]


def test_labels_and_files_that_cannot_be_used(run, folder, tmp_path):
    x = np.zeros((9, 16), "float32")
    wrong = [
        (np.zeros(8, int), "9 samples, 8 labels"),
        (np.zeros((9, 3)), "must be classes"),
        (np.full(9, 4), "must be classes below 4"),
    ]
    for labels, message in wrong:
        np.savez(tmp_path / "bad.npz", x=x, y=labels)
        assert message in run("compare model.keras pruned.keras --data @bad.npz --runs 1")[2]
    np.savez(tmp_path / "bad.npz", x=x, y=3)
    assert "bad.npz' must hold arrays whose first" in run("compare model.keras pruned.keras --data @bad.npz --runs 1")[2]
    (tmp_path / "cut.npz").write_bytes((folder / "x.npz").read_bytes()[:500])
    assert "cannot be read as NumPy's arrays" in run("compare model.keras pruned.keras --data @cut.npz")[2]
    np.save(tmp_path / "x.npy", x)
    assert run("compare model.keras pruned.keras --data @x.npy --runs 1")[0] == 0


@pytest.mark.parametrize("error", [tokenize.TokenError("EOF in multi-line"), IndexError("list index out of range"), EOFError()])
def test_whatever_reading_samples_raises(error, run, folder, monkeypatch):
    def load(*arguments, **more):
        raise error

    monkeypatch.setattr(np, "load", load)
    status, _, err = run("compare model.keras pruned.keras --data x.npz")
    assert status == 1
    assert err.startswith("keras-renorm: error: 'x.npz' cannot be read as NumPy's arrays: ")
    assert err.endswith(". Copy it again, or write it with `np.savez`.\n")


def test_damaged_files_of_every_kind(folder, tmp_path):
    """Flipped bits and lost ends: a whole file, or an error that names it."""
    np.save(tmp_path / "x.npy", np.zeros((4, 16), "float32"))
    assert len(_errors_of(tmp_path / "x.npy", files.load_arrays, 60, tmp_path / "bad.npy")) > 10
    assert len(_errors_of(folder / "x.npz", files.load_arrays, 60, tmp_path / "bad.npz")) > 10
    assert len(_errors_of(folder / "model.keras", files.load_model, 15, tmp_path / "bad.keras")) > 4


def _errors_of(whole, load, tries, path):
    generator, errors = np.random.default_rng(0), []
    for _ in range(tries):
        data = bytearray(whole.read_bytes())
        # Where it stands how to read the rest.
        ends = np.r_[: min(200, len(data)), max(0, len(data) - 200) : len(data)]
        data[generator.choice(ends)] ^= 1 << generator.integers(8)
        path.write_bytes(data[: generator.integers(len(data))] if generator.random() < 0.3 else data)
        try:
            load(path)
        except ValueError as error:
            errors.append(str(error))
    assert all(str(path) in error for error in errors)
    return errors


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs pipes in the file system")
@pytest.mark.parametrize(
    "command",
    [
        "report @pipe.keras",
        "report @pipe.tflite",
        "prune @pipe.keras --sparsity 0.5 -o @out.keras",
        "prune model.keras --sparsity 0.5 -o @pipe.keras --force",
        "prune model.keras --sparsity 0.5 --calibration @pipe.npz -o @out.keras",
        "export @pipe.keras -o @out.tflite",
        "export model.keras --samples @pipe.npy -o @out.tflite",
        "export model.keras --quantize int8 --representative-data @pipe.npz -o @out.tflite",
        "compare @pipe.keras model.keras",
        "compare model.keras pruned.keras --data @pipe.npz",
    ],
)
def test_pipes_are_not_waited_for(command, run, tmp_path):
    pipe = tmp_path / next(word for word in command.split() if "pipe" in word)[1:]
    os.mkfifo(pipe)
    status, out, err = run(command)
    assert (status, out) == (1, "")
    assert err.startswith(f"keras-renorm: error: '{pipe}' is a pipe or a device, not a file. ")
    assert os.listdir(tmp_path) == [pipe.name]


def test_errors_name_the_file_that_they_are_about(run, tmp_path):
    np.savez(tmp_path / "bad.npz", x=np.zeros((9, 15)))
    assert run("prune model.keras --sparsity nosuch=0.5 -o @out.keras")[2].startswith("keras-renorm: error: 'model.keras': ")
    err = run("compare model.keras pruned.keras --data @bad.npz")[2]
    assert err.startswith(f"keras-renorm: error: '{tmp_path / 'bad.npz'}': Argument `data` must hold arrays of shapes")


def test_nothing_is_written_over_without_force(run, tmp_path):
    (tmp_path / "out.keras").write_text("precious")
    status, _, err = run("prune model.keras --sparsity 0.5 -o @out.keras")
    assert (status, (tmp_path / "out.keras").read_text()) == (1, "precious")
    assert "exists already. Pass --force" in err
    assert run("prune model.keras --sparsity 0.5 --force -o @out.keras")[0] == 0
    assert kr.summary(keras.models.load_model(tmp_path / "out.keras")).sparsity == 0.5


def test_folders_that_cannot_be_written(run, tmp_path, monkeypatch):
    assert "its folder does not exist" in run("prune model.keras --sparsity 0.5 -o @nowhere/out.keras")[2]
    if pathlib.Path("/proc/self").exists():
        # Where even root cannot write.
        status, _, err = run("prune model.keras --sparsity 0.5 -o /proc/out.keras")
        assert (status, err) == (1, "keras-renorm: error: '/proc/out.keras' cannot be written: No such file or directory.\n")
    monkeypatch.setattr(os, "access", lambda *arguments: False)
    for command in ("prune model.keras --sparsity 0.5 -o @out.keras", "export model.keras -o @out.tflite"):
        status, _, err = run(command)
        assert status == 1
        assert "no permission to write to its folder" in err


@on_tensorflow
@pytest.mark.skipif(not pathlib.Path("/proc/self").exists(), reason="needs a folder where even root cannot write")
def test_an_export_that_cannot_be_written(run):
    status, _, err = run("export model.keras -o /proc/out.tflite")
    assert (status, err) == (1, "keras-renorm: error: '/proc/out.tflite' cannot be written: No such file or directory.\n")


@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError(28, "No space left on device"), MemoryError()])
def test_what_ends_in_the_middle_leaves_nothing(error, run, tmp_path, monkeypatch):
    def save(self, path):
        path.write_bytes(b"half")
        raise error

    monkeypatch.setattr(keras.Model, "save", save)
    (tmp_path / "old.keras").write_text("old")
    status, out, err = run("prune model.keras --sparsity 0.5 --force -o @old.keras")
    assert (status, out, err.count("\n")) == (130 if isinstance(error, KeyboardInterrupt) else 1, "", 1)
    if isinstance(error, OSError):
        assert f"'{tmp_path / 'old.keras'}' cannot be written: No space left on device. Make room in its folder" in err
    assert os.listdir(tmp_path) == ["old.keras"]
    assert (tmp_path / "old.keras").read_text() == "old"


@on_tensorflow
def test_a_terminated_export_leaves_nothing(run, tmp_path, monkeypatch):
    def convert(model, path, *arguments, **keywords):
        path.write_bytes(b"half")
        signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(running, "convert", convert)
    before = signal.getsignal(signal.SIGTERM)
    assert run("export pruned.keras -o @p.tflite") == (143, "", "keras-renorm: terminated\n")
    assert os.listdir(tmp_path) == []
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_sparsity_of_no_layer(run):
    status, _, err = run("prune model.keras --sparsity nosuch=0.5 -o @out.keras")
    assert status == 1
    assert "Argument `sparsity` names no layer of model 'net'. Received: 'nosuch'" in err


def test_debug_shows_where_it_went_wrong(run):
    status, _, err = run("prune model.keras --sparsity 0.5 --layer nothing -o @out.keras --debug")
    assert status == 1
    assert "Traceback (most recent call last)" in err
    assert "Traceback" not in run("prune model.keras --sparsity 0.5 --layer nothing -o @out.keras")[2]


def test_warnings_take_one_line(run, tmp_path):
    keras.Sequential([keras.Input((4,)), L.Dense(2), L.Dropout(0.1, name="drop")]).save(tmp_path / "m.keras")
    with warnings.catch_warnings():
        warnings.simplefilter("default", UserWarning)
        status, _, err = run("prune @m.keras --sparsity 0.5 --layer * -o @out.keras")
    assert status == 0
    assert err == "keras-renorm: warning: Left as they are: layer 'drop' has no kernel.\n"


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("", "required: COMMAND"),
        ("shrink model.keras", "invalid choice: 'shrink'"),
        ("prune model.keras -o out.keras", "required: --sparsity"),
        ("prune model.keras --sparsity 0.9", "required: -o"),
        ("prune model.keras --sparsity 90 -o out.keras", "must be a number in [0, 1)"),
        ("prune model.keras --sparsity fc=much -o out.keras", "must be a number in [0, 1)"),
        ("prune model.keras --sparsity 0.9 --sparsity fc=0.5 -o out.keras", "one value for all layers, or LAYER=value"),
        ("prune model.keras --sparsity fc=0.9 --sparsity 0.5 -o out.keras", "one value for all layers, or LAYER=value"),
        ("prune model.keras --sparsity 0.9 -o out.tflite", "must end in .keras"),
        ("prune model.keras --sparsity 0.9 -o out.h5", "must end in .keras, but is 'out.h5'"),
        (
            "prune model.h5 --sparsity 0.9 -o out.keras",
            "must end in .keras: convert it in Python with `keras.models.load_model('model.h5', compile=False)"
            ".save('model.keras')`",
        ),
        ("report model.h5", ".save('model.keras')`"),
        ("prune model.keras --spars 0.9 -o out.keras", "required: --sparsity"),
        ("report model.keras --expl", "unrecognized arguments: --expl"),
        ("prune model.keras --sparsity 0.9 --pattern block:4 -o out.keras", "must be like block:4,1"),
        ("prune model.keras --sparsity 0.9 --pattern unit:4,1 -o out.keras", "must be like block:4,1"),
        ("prune model.keras --sparsity 0.9 --pattern block:0,1 -o out.keras", "must be like block:4,1"),
        ("prune model.keras --sparsity 0.9 --pattern n_of_m:4,4 -o out.keras", "must keep fewer than all"),
        ("prune model.keras --sparsity fc=0.9 --sparsity fc=0.5 -o out.keras", "'fc' is given twice"),
        ("prune model.keras --sparsity fc=0.9 --layer out -o out.keras", "either --layer or --sparsity LAYER=SHARE"),
        ("prune model.keras --sparsity 0.9 --target litert --pattern unit -o out.keras", "--target chooses the patterns"),
        ("prune model.keras --sparsity 0.9 --criterion admm -o out.keras", "admm needs samples: --calibration"),
        ("prune model.keras --sparsity 0.9 --recover -o out.keras", "--recover needs samples: --calibration"),
        ("prune model.keras --sparsity 0.9 --augment flip -o out.keras", "--augment goes with --recover"),
        (
            "prune model.keras --sparsity 0.9 --criterion taylor --calibration x.npz -o out.keras",
            "taylor needs labels and the loss of the model",
        ),
        ("prune model.keras --sparsity 0.9 --renormalize lstsq -o out.keras", "lstsq needs samples: --calibration"),
        ("prune model.keras --sparsity 0.9 --pattern blok -o out.keras", "must be one of block,"),
        ("prune model.keras --sparsity 0.9 --criterion magnitud -o out.keras", "must be one of activation,"),
        ("prune model.keras --sparsity 0.9 --renormalize l3 -o out.keras", "must be one of auto,"),
        ("prune model.keras --sparsity 0.9 --batch-size 0 -o out.keras", "must be an integer of at least 1"),
        ("export model.keras -o out.tflite --quantize int4", "invalid choice: 'int4'"),
        ("export model.keras -o out.tflite --representative-data x.npz", "goes with --quantize int8"),
        ("export model.keras -o out.tflite --quantize int8 --integer-io", "--integer-io goes with"),
        ("export model.keras -o out.tflite --storage dense", "invalid choice: 'dense'"),
        ("compare model.keras", "required: B"),
        ("compare a.keras b.keras --runs many", "must be an integer of at least 1"),
        ("report model.txt", "must end in .keras or .tflite"),
    ],
)
def test_wrong_use(command, message, capsys):
    with pytest.raises(SystemExit) as status:
        cli.main(command.split())
    assert status.value.code == 2
    assert message in capsys.readouterr().err


def test_names_are_those_of_the_library():
    assert set(report._OPTIONS) == {*(f"Block(({block}, 1))" for block in storage.BLOCKS.values()), "pattern='unit'"}


def test_json_knows_no_infinity(tmp_path):
    told = cli._plain({"a": (1, float("nan"), [float("inf"), tmp_path]), "b": "x", "c": None})
    assert told == {"a": [1, None, [None, str(tmp_path)]], "b": "x", "c": None}


def test_help_teaches(capsys):
    for command in ((), ("prune",), ("report",), ("export",), ("compare",)):
        with pytest.raises(SystemExit) as status:
            cli.main([*command, "--help"])
        assert status.value.code == 0
        assert "examples:\n  keras-renorm " in capsys.readouterr().out


def test_examples_of_the_help_are_right():
    """Every line of the help that shows a command is one."""
    made = parser.make_parser()
    shown = "\n".join((parser.EXAMPLES, parser.PRUNE, parser.REPORT, parser.EXPORT, parser.COMPARE))
    lines = [
        line.split("   ")[0].split("|")[0] for line in map(str.strip, shown.splitlines()) if line.startswith("keras-renorm ")
    ]
    assert len(lines) > 15
    for line in lines:
        made.parse_args(line.replace("'", "").split()[1:])


COMMAND = [sys.executable, "-m", "keras_renorm"]


def test_help_version_and_wrong_use_come_without_keras(tmp_path):
    """An import of Keras here would be that of a module that fails."""
    (tmp_path / "keras.py").write_text("raise AssertionError")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), str(ROOT), os.environ.get("PYTHONPATH", "")])}
    script = tmp_path / "keras-renorm"
    script.write_text("import sys\nfrom keras_renorm.cli.main import main\nsys.exit(main())\n")
    for command in (COMMAND, [sys.executable, str(script)]):
        for option, status, start in (("--help", 0, "usage: keras-renorm"), ("--version", 0, "keras-renorm 0."), ("x", 2, "")):
            done = subprocess.run([*command, option], capture_output=True, text=True, cwd=tmp_path, env=environment)
            assert (done.returncode, done.stdout.startswith(start), "AssertionError" in done.stderr) == (status, True, False)


def test_a_process_says_nothing_but_the_answer(folder):
    paths = [str(ROOT), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))}
    command = [*COMMAND, "report", "pruned.keras"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=folder, env=environment, check=True)
    assert done.stdout.startswith("pruned.keras: ")
    assert done.stderr == ""


def test_the_package_is_the_command(folder, monkeypatch, capsys):
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "argv", ["keras_renorm", "report", "pruned.keras"])
    with pytest.raises(SystemExit) as status:
        runpy.run_module("keras_renorm", run_name="__main__")
    assert status.value.code == 0
    assert capsys.readouterr().out.startswith("pruned.keras: ")


def test_a_reader_that_has_seen_enough(folder, monkeypatch):
    class Closed(io.StringIO):
        def write(self, text):
            raise BrokenPipeError

        def fileno(self):
            return os.open(os.devnull, os.O_WRONLY)

    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "stdout", Closed())
    assert cli.main(["report", "pruned.keras"]) == 1
