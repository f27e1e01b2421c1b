"""The documentation: its programs run, its commands and links lead somewhere.

Every block marked `python` of a page is run, all blocks of a page one after the other in one namespace and an empty folder.
What a page leaves to the reader (`model`, `images`, ...) is made here, as small as it may be.
"""

from __future__ import annotations

import ast
import functools
import json
import os
import pathlib
import re
import shlex
import subprocess
import sys
import textwrap
import warnings

import keras
import matplotlib
import matplotlib.pyplot
import numpy as np
import pytest

import keras_renorm as kr
from keras_renorm.cli import parser

matplotlib.use("Agg")

ROOT = pathlib.Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "examples" / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
BLOCK = re.compile(r"^```python(?: title=\"(?P<title>[^\"]*)\")?\n(?P<code>.*?)^```$", re.MULTILINE | re.DOTALL)
L = keras.layers


def name_of(page: pathlib.Path) -> str:
    return page.relative_to(ROOT).as_posix()


def blocks_of(page: pathlib.Path, titles: tuple[str | None, ...]) -> list[str]:
    """The programs of a page; lines have the numbers that they have there."""
    text = page.read_text(encoding="utf-8")
    return [
        "\n" * text[: match.start("code")].count("\n") + match["code"]
        for match in BLOCK.finditer(text)
        if match["title"] in titles
    ]


def dense_network(features=12, outputs=3):
    hidden = [L.Dense(16, activation="relu", name="hidden_1"), L.Dense(16, activation="relu", name="hidden_2")]
    model = keras.Sequential([keras.Input((features,)), *hidden, L.Dense(outputs, activation="softmax", name="logits")])
    model.compile("adam", "sparse_categorical_crossentropy", metrics=["accuracy"])
    return model


def convolutional_network():
    layers = [L.Conv2D(8, 3, 2, "same", activation="relu"), L.Conv2D(16, 1, activation="relu"), L.GlobalAveragePooling2D()]
    return keras.Sequential([keras.Input((16, 16, 3)), *layers, L.Dense(16)])


def clusters(samples=384, features=12, classes=3):
    """Samples that every network learns at once."""
    generator = np.random.default_rng(0)
    y = generator.integers(0, classes, samples)
    return (3 * np.eye(features)[y] + 0.1 * generator.standard_normal((samples, features))).astype("float32"), y


def with_changes(function, **changes):
    @functools.wraps(function)
    def call(*args, **kwargs):
        return function(*args, **kwargs | changes)

    return call


def stand_ins(page: str, monkeypatch: pytest.MonkeyPatch) -> dict:
    """What the programs of a page take from the reader."""
    x, y = clusters()
    loss = "sparse_categorical_crossentropy"
    model = dense_network()
    batches = [(x[:32], y[:32])] * 3
    trained = dict(
        model=model, x=x, y=y, x_val=x, y_val=y, images=x, loss=loss, batches=batches, train_step=lambda *batch: None
    )
    if page in ("README.md", "docs/README.md"):
        # With so few batches as here their schedules do not come to their end.
        warnings.filterwarnings("ignore", "The sparsity of .* is .*, not ")
    if page == "docs/iterative.md":
        few = with_changes(kr.methods.prune_iteratively, max_rounds=1, floor=0.5)
        monkeypatch.setattr(kr.methods, "prune_iteratively", few)
    elif page == "docs/neural_relief.md":
        few = with_changes(kr.methods.neural_relief, rounds=1, tolerance=0.5)
        monkeypatch.setattr(kr.methods, "neural_relief", few)
    elif page == "docs/what_it_does.md":
        schedule = kr.schedules.ConstantSparsity(0.5, begin_step=0)
        trained |= dict(model=kr.to_prunable(dense_network()), schedule=schedule)
    elif page == "docs/README.md":
        monkeypatch.setattr(keras.Sequential, "fit", with_changes(keras.Sequential.fit, epochs=2))
    elif page == "docs/edge.md":
        model = convolutional_network()
        kr.export_tflite(model, "dense.tflite")
        images = np.random.default_rng(0).standard_normal((64, 16, 16, 3)).astype("float32")
        return dict(model=model, images=images)
    elif page == "docs/recovery.md":
        monkeypatch.setattr(kr, "recover", with_changes(kr.recover, epochs=2))
        images = np.random.default_rng(0).standard_normal((64, 16, 16, 3)).astype("float32")
        return dict(model=convolutional_network(), images=images)
    elif page == "examples/README.md":
        kr.export_tflite(dense_network(), "model.tflite")
    return trained if page in LEFT_TO_THE_READER else {}


LEFT_TO_THE_READER = {
    "README.md",
    "docs/at_initialization.md",
    "docs/calibration.md",
    "docs/compaction.md",
    "docs/iterative.md",
    "docs/neural_relief.md",
    "docs/what_it_does.md",
}
WITH_PROGRAMS = [page for page in PAGES if blocks_of(page, (None, "both", "keras_renorm"))]


@pytest.mark.parametrize("page", WITH_PROGRAMS, ids=name_of)
def test_programs_run(page, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    namespace = {"__name__": "__page__", **stand_ins(name_of(page), monkeypatch)}
    for code in blocks_of(page, (None, "both", "keras_renorm")):
        exec(compile(code, name_of(page), "exec"), namespace)


@pytest.mark.slow
def test_programs_of_tfmot_run(tmp_path):
    """The other side of each pair, on Keras 2."""
    program = tmp_path / "program.py"
    program.write_text("\n".join(textwrap.dedent(code) for code in blocks_of(ROOT / "docs" / "tfmot.md", ("tfmot", "both"))))
    environment = os.environ | {"TF_CPP_MIN_LOG_LEVEL": "3"}
    result = subprocess.run([sys.executable, program], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


def test_every_program_belongs_to_someone():
    """No block is left out because of a typing error in its first line."""
    known = {None, "both", "keras_renorm", "tfmot"}
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        assert len(BLOCK.findall(text)) == len(re.findall(r"^ *```py", text, re.MULTILINE)), page
        assert {match["title"] for match in BLOCK.finditer(text)} <= known, page


def test_every_public_name_of_tfmot_has_its_place():
    pytest.importorskip("tensorflow_model_optimization")
    import tensorflow_model_optimization.python.core.api.sparsity.keras as api

    page = (ROOT / "docs" / "tfmot.md").read_text(encoding="utf-8")
    missing = [name for name in vars(api) if not name.startswith("_") and name not in page]
    assert not missing


def options_of(script: pathlib.Path) -> set[str]:
    """The options that a script takes, its own and those of the examples and benchmarks that it imports."""
    options = {"--help"}
    for node in ast.walk(ast.parse(script.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Call) and getattr(node.func, "attr", "") == "add_argument":
            options |= {argument.value for argument in node.args if isinstance(argument, ast.Constant)}
        elif isinstance(node, (ast.Import, ast.ImportFrom)):
            for name in [node.module] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names]:
                for folder in ("examples", "benchmarks"):
                    beside = ROOT / folder / f"{name}.py"
                    options |= options_of(beside) if beside.exists() else set()
    return options


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_commands_exist(page):
    text = page.read_text(encoding="utf-8").replace("\\\n", " ")
    for script, rest in re.findall(r"(?:python3?|bin/python) ((?:examples|benchmarks)/\w+\.py)([^\n`]*)", text):
        assert (ROOT / script).exists(), script
        unknown = set(re.findall(r"(?<![\w-])--[a-z][\w-]*", rest)) - options_of(ROOT / script)
        assert not unknown, f"{script} does not take {sorted(unknown)}"
    for arguments in re.findall(r"^(?:keras-renorm|python -m keras_renorm) (.*)$", text, re.MULTILINE):
        parser.make_parser().parse_args(shlex.split(arguments, comments=True))


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_lead_somewhere(page):
    """On a code host, where no site is built; `mkdocs build --strict` checks those of the site."""
    for target, anchor in re.findall(r"\]\((?![a-z]+:)([^)#\s]*)(#[^)\s]*)?\)", page.read_text(encoding="utf-8")):
        goal = page.parent / target if target else page
        assert goal.exists(), f"{target} in {page.name}"
        if anchor and goal.suffix == ".md":
            headings = re.findall(r"^#+ (.*)$", goal.read_text(encoding="utf-8"), re.MULTILINE)
            names = {re.sub(r"[^\w\- ]", "", heading.replace("`", "").lower()).replace(" ", "-") for heading in headings}
            assert anchor[1:] in names, f"{target}{anchor} in {page.name}"


NOTEBOOKS = sorted((ROOT / "examples").glob("*.ipynb"))


def cells_of(notebook: pathlib.Path) -> list[dict]:
    return [cell for cell in json.loads(notebook.read_text(encoding="utf-8"))["cells"] if cell["cell_type"] == "code"]


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=name_of)
def test_notebooks_are_whole(notebook):
    """Run from top to bottom, without an error, and installing only where there is something to install."""
    cells = cells_of(notebook)
    assert "%pip install" in "".join(cells[0]["source"])
    assert "find_spec" in "".join(cells[0]["source"])
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))
    assert not [output for cell in cells for output in cell["outputs"] if output["output_type"] == "error"]


@pytest.mark.slow
@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=name_of)
def test_notebooks_run(notebook, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(matplotlib.pyplot, "show", matplotlib.pyplot.close)
    namespace = {"__name__": "__notebook__"}
    for number, cell in enumerate(cells_of(notebook), 1):
        code = re.sub(r"^( *)%pip .*$", r"\1pass", "".join(cell["source"]), flags=re.MULTILINE)
        exec(compile(code, f"{notebook.name}, cell {number}", "exec"), namespace)
