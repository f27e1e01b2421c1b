import ast
import os
import pathlib
import re
import subprocess
import sys

import pytest

import keras_renorm as kr
from tests import fresh

ROOT = pathlib.Path(kr.__file__).parent

MODULES = sorted(ROOT.rglob("*.py"))
# The table in CONTRIBUTING.md, from the ground up: a module imports from the rooms above its own row, or from its own.
ROOMS = re.findall(r"^\| `(\w+)/?` \|", (ROOT.parent / "CONTRIBUTING.md").read_text(encoding="utf-8"), re.MULTILINE)
PUBLIC = "keras_renorm"


def room_of(module):
    """The room of a module, by its dotted name: a folder of `src`, the command line, or the public modules."""
    parts = module.split(".")
    if parts[1:2] == ["src"]:
        return parts[2]
    return "cli" if parts[1:2] in (["cli"], ["__main__"]) else PUBLIC


def imports_of(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "keras_renorm":
            # `from keras_renorm.src import layers` names a room, too.
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name.startswith("keras_renorm"))


def test_the_table_names_every_room():
    rooms = {path.parent.name for path in (ROOT / "src").glob("*/__init__.py")}
    assert sorted(ROOMS) == sorted({*rooms, "cli", PUBLIC})


@pytest.mark.parametrize("path", MODULES, ids=str)
def test_imports_point_one_way(path):
    room = room_of(".".join(path.relative_to(ROOT.parent).with_suffix("").parts))
    for imported in imports_of(path):
        other = room_of(imported)
        if imported != "keras_renorm.version.__version__":
            assert other == room or ROOMS.index(other) < ROOMS.index(room), f"{room} imports {imported}"


INTERNALS = ROOT / "src" / "core" / "keras_internals.py"
# Of named tuples, and of what `tf.function` makes.
NOT_OF_KERAS = {"_make", "_jit_compile"}


def private_names(path):
    """Private names in a module: those of its classes' own, of attributes of anything, and in strings."""
    own, attributes, strings = set(), set(), set()
    for node in ast.walk(ast.parse(path.read_text())):
        match node:
            case ast.FunctionDef(name=name) | ast.Attribute(ast.Name("self"), name, ast.Store()) if name.startswith("_"):
                own.add(name)
            case ast.Attribute(_, name) if re.match("_[a-z]", name):
                attributes.add((getattr(node.value, "id", None), name))
            case ast.Constant(str(name)) if re.fullmatch(r"_[a-z]\w*", name):
                strings.add(name)
    return own, attributes, strings


@pytest.mark.parametrize("path", [path for path in MODULES if path != INTERNALS], ids=str)
def test_internals_of_keras_are_used_in_one_module(path):
    assert "keras.src" not in path.read_text()
    _, attributes, strings = private_names(INTERNALS)
    of_keras = {name for _, name in attributes} | strings
    own, attributes, strings = private_names(path)
    assert {name for owner, name in attributes if owner not in ("self", "cls") or name in of_keras - own} <= NOT_OF_KERAS
    assert not strings & of_keras


def test_importing_it_changes_nothing():
    """Neither the environment, nor Keras' classes, nor what `tf.keras` will be."""
    code = """if True:
        import os, keras
        def functions():
            return [keras.Layer.set_weights, keras.Model.load_weights, keras.saving.load_weights, keras.Layer.__init__]
        before = dict(os.environ), functions()
        import keras_renorm
        assert (dict(os.environ), functions()) == before
        keras_renorm.layers.PrunableDense(1)
        assert functions() != before[1]
    """
    subprocess.run([sys.executable, "-W", "ignore", "-c", code], check=True)


@pytest.mark.parametrize("name", ["images", "sequences"])
def test_models_of_earlier_releases_load(name):
    """In a process that has imported the package alone: masks, scales, schedules and the state of the optimizer."""
    folder = pathlib.Path(__file__).parent / "data" / "before_rooms"
    code = """if True:
        import sys, keras, keras_renorm, numpy as np
        model, saved = keras.models.load_model(sys.argv[1] + ".keras"), np.load(sys.argv[1] + ".npz")
        np.testing.assert_allclose(model.predict(saved["inputs"], verbose=0), saved["outputs"], rtol=1e-4, atol=1e-5)
        found = [layer.sparsity for layer in model._flatten_layers() if hasattr(layer, "update_masks")]
        np.testing.assert_array_equal(found, saved["sparsity"])
        assert int(model.optimizer.iterations) == saved["iterations"]
        assert type(model.optimizer).__module__.startswith("keras_renorm.")
    """
    fresh.run(code, folder / name)


# `product.py` is imported by layers that are called on TensorFlow.
@pytest.mark.parametrize("path", [path for path in MODULES if not {"export", "product.py"} & set(path.parts)], ids=str)
def test_tensorflow_is_imported_only_where_it_is_used(path):
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else [node.module or ""]
            assert not any(name.split(".")[0].startswith(("tensorflow", "tf_keras", "ai_edge_litert")) for name in names)


def test_public_surface():
    assert sorted(kr.__all__) == [
        "__version__",
        "callbacks",
        "compact",
        "criteria",
        "export",
        "export_tflite",
        "layers",
        "methods",
        "optimizers",
        "patterns",
        "plots",
        "prune",
        "recover",
        "renorm",
        "schedules",
        "strip",
        "summary",
        "to_prunable",
    ]
    assert all(hasattr(kr, name) for name in kr.__all__)


def test_importing_it_imports_neither_tfmot_nor_tf_keras_nor_matplotlib():
    # Keras itself imports matplotlib where it is installed.
    code = """if True:
        import sys, keras
        by_keras = {"matplotlib"} & set(sys.modules)
        import keras_renorm
        assert {"tf_keras", "tensorflow_model_optimization", "matplotlib"} & set(sys.modules) == by_keras
    """
    environment = {name: value for name, value in os.environ.items() if name != "TF_USE_LEGACY_KERAS"}
    subprocess.run([sys.executable, "-W", "ignore", "-c", code], check=True, env=environment)
