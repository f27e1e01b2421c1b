import ast
import os
import pathlib
import subprocess
import sys

import pytest

import keras_renorm as kr

ROOT = pathlib.Path(kr.__file__).parent

# Rooms, from the ground up: a module imports from rooms above its own line only, or from its own.
ROOMS = [
    ["version", "arrays", "serialization", "tables", "moments", "run_folder"],
    ["validation", "copying", "comparing"],
    ["streaming", "patterns", "least_squares", "schedules", "allocation", "report"],
    ["masks", "renorm"],
    ["criteria"],
    ["events"],
    ["layers"],
    ["graph", "delivery"],
    ["xnnpack"],
    ["targets"],
    ["calibration", "conversion"],
    ["channels"],
    ["sites", "masking", "scoring", "compaction"],
    ["calibrated"],
    ["optimizers"],
    ["settling"],
    ["pruning", "summary", "callbacks"],
    ["plots"],
    ["rounds"],
    ["methods"],
    ["export"],
    ["cli"],
]
LEVEL = {room: level for level, rooms in enumerate(ROOMS) for room in rooms}
MODULES = sorted(ROOT.rglob("*.py"))


def imports_of(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "keras_renorm":
            parts = node.module.split(".")[1:]
            yield from [parts[0]] if parts else [alias.name for alias in node.names]
        elif isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.startswith("keras_renorm."):
                    yield alias.name.split(".")[1]


@pytest.mark.parametrize("path", [path for path in MODULES if path.parent != ROOT or path.name != "__init__.py"], ids=str)
def test_imports_point_one_way(path):
    room = path.relative_to(ROOT).parts[0].removesuffix(".py")
    for other in imports_of(path):
        assert other == room or LEVEL[other] < LEVEL[room], f"{room} imports {other}"


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
