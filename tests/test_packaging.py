import configparser
import os
import pathlib
import re
import shutil
import subprocess
import sys
import sysconfig
import zipfile

import pytest

import keras_renorm as kr

ROOT = pathlib.Path(kr.__file__).parents[1]
PIP = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]

pytestmark = pytest.mark.skipif(not (ROOT / "setup.cfg").exists(), reason="needs a checkout")


def test_the_oldest_releases_are_those_of_setup_cfg():
    """What `.ci/run` constrains its second environment to."""
    program = ROOT / ".ci" / "lower_bounds.py"
    lines = subprocess.run([sys.executable, str(program)], capture_output=True, text=True, check=True).stdout.splitlines()
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg")
    required = config["options"]["install_requires"].split()
    assert len(required) >= 4
    assert {requirement.replace(">=", "==") + ".*" for requirement in required} <= set(lines)
    assert all(re.fullmatch(r"[\w-]+==\d+(\.\d+)*\.\*", line) for line in lines)
    # With an upper bound, too.
    assert "mkdocs==1.6.*" in lines


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """A wheel, built from a copy, so that nothing is left in the checkout."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    shutil.copytree(ROOT / "keras_renorm", source / "keras_renorm", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(ROOT / "tests", source / "tests", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("setup.cfg", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    command = [*PIP, "wheel", "--no-deps", "--no-index", "--no-build-isolation", "--wheel-dir", str(folder), str(source)]
    subprocess.run(command, check=True, capture_output=True)
    return next(folder.glob("*.whl"))


def test_the_wheel_holds_the_package_and_nothing_else(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        information = f"keras_renorm-{kr.__version__}.dist-info"
        entry_points = archive.read(f"{information}/entry_points.txt").decode()
        metadata = archive.read(f"{information}/METADATA").decode()
    assert {name.split("/")[0] for name in names} == {"keras_renorm", information}
    modules = {str(path.relative_to(ROOT)) for path in (ROOT / "keras_renorm").rglob("*.py")}
    assert {name for name in names if name.startswith("keras_renorm/")} == {*modules, "keras_renorm/py.typed"}
    assert "keras-renorm = keras_renorm.cli.main:main" in entry_points
    assert f"\nVersion: {kr.__version__}\n" in metadata
    assert "Provides-Extra: plot" in metadata


@pytest.mark.slow
def test_the_wheel_works_in_a_fresh_environment(wheel, tmp_path):
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(tmp_path / "venv")], check=True)
    scripts = tmp_path / "venv" / ("Scripts" if os.name == "nt" else "bin")
    python = scripts / "python"
    site = subprocess.run(
        [python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"], capture_output=True, text=True, check=True
    ).stdout.strip()
    # Its dependencies come from here; what is installed here in place of the wheel does not, as it is not a plain path.
    pathlib.Path(site, "dependencies.pth").write_text(sysconfig.get_path("purelib"))
    subprocess.run([*PIP, "--python", str(python), "install", "--no-deps", "--no-index", str(wheel)], check=True)

    def run(*command):
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
        return done.stdout.strip()

    assert run(scripts / "keras-renorm", "--version") == f"keras-renorm {kr.__version__}"
    program = (
        "import keras, keras_renorm as kr; m = keras.Sequential([keras.Input((4,)), keras.layers.Dense(2)]); m.save('m.keras')"
    )
    assert run(python, "-W", "ignore", "-c", f"{program}; print(kr.__file__)").startswith(site)
    run(scripts / "keras-renorm", "prune", "m.keras", "--sparsity", "0.5", "-o", "p.keras")
    assert "0.5000" in run(scripts / "keras-renorm", "report", "p.keras")
