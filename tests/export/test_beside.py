import os
import pathlib
import subprocess
import sys

import pytest

from keras_renorm.src.export import beside
from keras_renorm.src.export.beside import folder_beside

needs_locks = pytest.mark.skipif(beside.fcntl is None, reason="no locks on folders here")
KILLED = """
import os, pathlib, sys
from keras_renorm.src.export.beside import folder_beside
with folder_beside(pathlib.Path(sys.argv[1])) as folder:
    (folder / "half.tflite").write_bytes(b"half")
    os._exit(9)
"""


@needs_locks
def test_what_a_killed_process_left_goes_with_the_next(tmp_path):
    path = tmp_path / "model[1].tflite"
    root = pathlib.Path(beside.__file__).parents[2]
    subprocess.run([sys.executable, "-c", KILLED, str(path)], env=dict(os.environ, PYTHONPATH=str(root)), check=False)
    mine = [".model[1].tflite.backup", ".model2.tflite.abc.keras_renorm"]
    for name in mine:
        (tmp_path / name).mkdir()
    assert len(os.listdir(tmp_path)) == 3
    with folder_beside(path) as folder:
        assert sorted(os.listdir(tmp_path)) == sorted([*mine, folder.name])
    assert sorted(os.listdir(tmp_path)) == sorted(mine)


def test_what_is_in_use_stays(tmp_path):
    path = tmp_path / "model.tflite"
    with folder_beside(path) as first:
        (first / "half.tflite").write_bytes(b"half")
        with folder_beside(path) as second:
            assert first != second
            assert (first / "half.tflite").exists()
        assert first.is_dir()
    assert os.listdir(tmp_path) == []


@needs_locks
def test_a_folder_that_was_taken_away_is_made_again(tmp_path, monkeypatch):
    """Another process may remove it before it is locked."""
    original, removed = beside.fcntl.flock, []

    def flock(descriptor, how):
        if not removed:
            removed.extend(tmp_path.iterdir())
            removed[0].rmdir()
        return original(descriptor, how)

    monkeypatch.setattr(beside.fcntl, "flock", flock)
    with folder_beside(tmp_path / "model.tflite") as folder:
        assert folder.is_dir()
        assert folder != removed[0]


def test_a_folder_that_cannot_be_made(tmp_path):
    with (
        pytest.raises(OSError, match="model.tflite' cannot be written: No such file"),
        folder_beside(tmp_path / "no/model.tflite"),
    ):
        pass
