import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys

import numpy as np
import pytest

from keras_renorm.src.core import run_folder
from keras_renorm.src.core.run_folder import RunFolder

RUN = {"seed": 1}
STATE = {"step": 0.1, "metrics": [0.5, float("nan")], "note": "ä"}
ARRAYS = [np.arange(6, dtype="float32").reshape(2, 3), np.array(7)]


@pytest.fixture
def path(tmp_path):
    """A folder with a state."""
    with RunFolder(tmp_path / "run", RUN) as folder:
        assert folder.read() is None
        folder.write(STATE, 2, ARRAYS)
    return tmp_path / "run"


def read(path, run=RUN):
    with RunFolder(path, run) as folder:
        return folder.read()


def names(path):
    return sorted(os.listdir(path))


def test_what_was_written_is_read(path):
    state, arrays = read(path)
    assert json.dumps(state) == json.dumps(STATE)
    for one, other in zip(arrays, ARRAYS, strict=True):
        assert one.dtype == other.dtype
        np.testing.assert_array_equal(one, other)
    assert names(path) == ["round-0002.npz", "run.json"]


def test_a_later_state_takes_the_place_of_an_earlier_one(path):
    with RunFolder(path, RUN) as folder:
        folder.read()
        folder.write({"step": 0.05}, 2, [])  # Of the same number: its arrays are there already.
        assert len(folder.read()[1]) == 2
        folder.write({"step": 0.05}, 3, ARRAYS[:1])
    assert [len(part) for part in read(path)] == [1, 1]
    assert names(path) == ["round-0003.npz", "run.json"]


def test_files_of_others_stay(path):
    others = ["data.npz", "round-best.npz", "partial-notes.txt", "round-12.npz"]
    for name in others:
        (path / name).write_text("precious")
    for name in ("partial-run.json", "partial-round-0007.npz"):
        (path / name).write_text("left behind by a kill")
    with RunFolder(path, RUN) as folder:
        folder.read()
        folder.write(STATE, 3, ARRAYS)
    assert names(path) == sorted([*others, "round-0003.npz", "run.json"])


def test_the_state_of_another_run_is_refused(path):
    before = {name: (path / name).read_bytes() for name in names(path)}
    with pytest.raises(ValueError, match="`directory` holds the state of another run.*Pass an empty directory"):
        read(path, {"seed": 2})
    assert {name: (path / name).read_bytes() for name in names(path)} == before


def test_arrays_without_a_record_are_not_trusted(path):
    """A run was killed between the two; another one begins there, and has a first state of the same number."""
    (path / "run.json").unlink()
    with RunFolder(path, {"seed": 2}) as folder:
        assert folder.read() is None
        folder.write(STATE, 2, [np.ones(3)])
    np.testing.assert_array_equal(read(path, {"seed": 2})[1], [np.ones(3)])


def _edit(change):
    def damage(path):
        record = json.loads((path / "run.json").read_text())
        change(record)
        (path / "run.json").write_text(json.dumps(record))

    return damage


def _flip(name, share):
    def damage(path):
        data = bytearray((path / name).read_bytes())
        data[int(share * (len(data) - 1))] ^= 1
        (path / name).write_bytes(data)

    return damage


def _cut(name):
    return lambda path: (path / name).write_bytes((path / name).read_bytes()[:-30])


def _folder_in_place_of(name):
    def damage(path):
        (path / name).unlink()
        (path / name).mkdir()

    return damage


def _arrays_of_another_run(path):
    with RunFolder(path.parent / "other", {"seed": 2}) as folder:
        folder.write(STATE, 2, [array + 1 for array in ARRAYS])
    shutil.copy(path.parent / "other" / "round-0002.npz", path)


DAMAGES = {
    "record empty": ("run.json", lambda path: (path / "run.json").write_bytes(b"")),
    "record cut": ("run.json", _cut("run.json")),
    "record of bytes": ("run.json", lambda path: (path / "run.json").write_bytes(bytes(range(256)))),
    "record a list": ("run.json", lambda path: (path / "run.json").write_text("[1, 2]")),
    "record of others": ("run.json", lambda path: (path / "run.json").write_text('{"name": "x", "values": "a.npz"}')),
    "record without a key": ("run.json", _edit(lambda record: record.pop("state"))),
    "record changed": ("run.json", _edit(lambda record: record["state"].update(step=0.2))),
    "record that points elsewhere": ("run.json", _edit(lambda record: record["arrays"].update(number="../x"))),
    "record before digests": ("run.json", _edit(lambda record: record.pop("digest"))),
    **{f"record flipped at {share}": ("run.json", _flip("run.json", share)) for share in (0, 0.2, 0.5, 0.8)},
    "record a folder": ("run.json", _folder_in_place_of("run.json")),
    "arrays missing": ("round-0002.npz", lambda path: (path / "round-0002.npz").unlink()),
    "arrays empty": ("round-0002.npz", lambda path: (path / "round-0002.npz").write_bytes(b"")),
    "arrays cut": ("round-0002.npz", _cut("round-0002.npz")),
    **{f"arrays flipped at {share}": ("round-0002.npz", _flip("round-0002.npz", share)) for share in (0, 0.3, 0.7, 1)},
    "arrays of another run": ("round-0002.npz", _arrays_of_another_run),
    "arrays a folder": ("round-0002.npz", _folder_in_place_of("round-0002.npz")),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_states(damage, path):
    """One kind of error, which names the file and what to do, and nothing is changed."""
    name, change = DAMAGES[damage]
    change(path)
    before = names(path)
    with pytest.raises(ValueError, match="damaged state") as error:
        read(path)
    assert str(error.value).startswith(f"Argument `directory` holds a damaged state: '{path / name}' ")
    assert "or delete it (or pass another one) to start again" in str(error.value)
    assert names(path) == before


def test_what_is_no_folder(tmp_path):
    (tmp_path / "file").write_text("precious")
    impossible = [tmp_path / "file", tmp_path / "file" / "run", *map(pathlib.Path, filter(os.path.exists, ["/proc/self"]))]
    for path in impossible:
        with pytest.raises(ValueError, match="`directory` must be a folder.*Received: directory=.*Pass another one"):
            read(path)
    assert (tmp_path / "file").read_text() == "precious"


@pytest.mark.parametrize("number", [2, 3])
def test_a_state_that_cannot_be_written_leaves_the_one_before(path, number, monkeypatch):
    def full(*arguments, **more):
        raise OSError(28, "No space left on device")

    before = {name: (path / name).read_bytes() for name in names(path)}
    with RunFolder(path, RUN) as folder:
        folder.read()
        monkeypatch.setattr(run_folder.os, "fsync", full)
        file = "run.json" if number == 2 else "round-0003.npz"
        with pytest.raises(
            OSError, match=rf"{file}' cannot be written: No space left on device\. The state before it is whole"
        ):
            folder.write({"step": 0.05}, number, ARRAYS)
    assert {name: (path / name).read_bytes() for name in names(path)} == before


# One run at a time.

IN_USE = "`directory` is in use by another run.*Wait until that run has ended, or pass another directory"
HOLD = """
import os, runpy, sys, time
RunFolder = runpy.run_path(sys.argv[1])["RunFolder"]
with RunFolder(sys.argv[2], {"seed": 1}):
    if sys.argv[3] == "with a child" and os.fork() == 0:
        print(os.getpid(), flush=True)
        time.sleep(60)
    if sys.argv[3] == "alone":
        print(os.getpid(), flush=True)
    time.sleep(60)
"""


def test_one_run_at_a_time_in_a_process(path):
    with RunFolder(path, RUN):
        with pytest.raises(ValueError, match=IN_USE):
            read(path.parent / "." / "run")
        assert "run.lock" in names(path)
        with pytest.raises(ValueError, match=IN_USE):
            read(path)
    assert read(path)
    with pytest.raises(KeyboardInterrupt), RunFolder(path, RUN):
        raise KeyboardInterrupt
    assert read(path)
    assert names(path) == ["round-0002.npz", "run.json"]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs processes that fork")
@pytest.mark.parametrize("company", ["alone", "with a child"])
def test_a_killed_process_leaves_no_lock(path, company):
    command = [sys.executable, "-c", HOLD, run_folder.__file__, str(path), company]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        last = int(process.stdout.readline())
        try:
            with pytest.raises(ValueError, match=IN_USE):
                read(path)
            process.kill()
            process.wait()
            assert read(path)
        finally:
            process.kill()
            if last != process.pid:
                os.kill(last, signal.SIGKILL)


def test_a_lock_that_vanished_is_taken_anew(path, monkeypatch):
    """The other run ended between opening and locking: its file is no longer the one of that name."""
    lock, seen = run_folder.fcntl.lockf, []

    def lockf(file, flags):
        if not seen:
            (path / "run.lock").unlink()
        seen.append(file)
        lock(file, flags)

    monkeypatch.setattr(run_folder.fcntl, "lockf", lockf)
    with RunFolder(path, RUN):
        assert len(seen) == 2
        assert "run.lock" in names(path)


def test_a_file_system_without_locks(path, monkeypatch):
    def lockf(file, flags):
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr(run_folder.fcntl, "lockf", lockf)
    assert read(path)
