"""The state of a run on disk: written as a whole, checked before use, and used by one run at a time."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import pathlib
import re
import threading
from collections.abc import Callable, Iterable, Sequence
from typing import Any, BinaryIO, NoReturn

import numpy as np

try:
    import fcntl
except ImportError:  # Windows
    import msvcrt

    fcntl = None

_RECORD, _LOCK = "run.json", "run.lock"
_ARRAYS = re.compile(r"(partial-)?round-\d{4,}\.npz")

# Locks of `fcntl` tell processes apart, but not the threads of one.
_held: set[pathlib.Path] = set()
_guard = threading.Lock()


class RunFolder:
    """A folder with a record (JSON) and its arrays. As a context manager it locks the folder against other runs.

    Every file is first written under another name, so that a kill at any moment leaves a complete state. The record holds a
    digest of itself and a digest of the file of arrays: a file that is cut off, changed, or left by another run is never used.

    Args:
        path: the folder, which is created if it does not exist.
        run: whatever makes it another run if it changes, in JSON types.

    Raises:
        ValueError: if the folder cannot be used, or another run uses it.
    """

    def __init__(self, path: str | os.PathLike, run: Any):
        self.path = pathlib.Path(path)
        self._fingerprint = _digest_of_json(run)
        self._arrays: dict[str, Any] = {}
        self._lock = -1

    def __enter__(self) -> RunFolder:
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self._key = self.path.resolve()
            with _guard:
                if self._key in _held:
                    self._refuse_second()
                self._lock = self._locked()
                _held.add(self._key)
            for partial in self.path.glob("partial-*"):
                if partial.name == f"partial-{_RECORD}" or _ARRAYS.fullmatch(partial.name):
                    partial.unlink()
        except OSError as error:
            raise ValueError(
                f"Argument `directory` must be a folder, or the path of a new one, in which files can be written. Received: "
                f"directory={str(self.path)!r} ({error.strerror}). Pass another one."
            ) from error
        return self

    def __exit__(self, *_: Any) -> None:
        with _guard:
            _held.discard(self._key)
            if fcntl:
                (self.path / _LOCK).unlink(missing_ok=True)
            os.close(self._lock)

    def read(self) -> tuple[dict, list[np.ndarray]] | None:
        """Read the record and its arrays; `None` if there are none.

        Raises:
            ValueError: if they belong to another run, or are damaged.
        """
        record = self.path / _RECORD
        if not record.exists():
            return None
        try:
            content = json.loads(record.read_bytes() if record.is_file() else b"")
            if content.pop("digest") != _digest_of_json(content):
                raise ValueError
            fingerprint, state, self._arrays = content["fingerprint"], content["state"], content["arrays"]
            file = self._file(self._arrays["number"])
        except Exception as error:
            self._refuse(record, "cannot be read, or was not written by this version of keras_renorm", error)
        if fingerprint != self._fingerprint:
            raise ValueError(
                f"Argument `directory` holds the state of another run: of another model or optimizer, or with other arguments. "
                f"Received: directory={str(self.path)!r}. Pass an empty directory, or delete that one if its run is no longer "
                "needed."
            )
        if not file.is_file():
            self._refuse(file, "is missing")
        try:
            if _digest_of(file) != self._arrays["digest"]:
                raise ValueError
            with np.load(file, allow_pickle=False) as arrays:
                return state, [arrays[str(index)] for index in range(len(arrays.files))]
        except Exception as error:
            self._refuse(file, "was cut or changed, or belongs to another run", error)

    def write(self, state: dict, number: int, arrays: Sequence[np.ndarray]) -> None:
        """Replace the state.

        Args:
            state: the record, in JSON types.
            number: number of the arrays. Arrays that were written with the same number before are taken to be the same.
            arrays: the arrays of the record.

        Raises:
            OSError: if a file cannot be written. The previous state remains.
        """
        file = self._file(number)
        if self._arrays.get("number") != number:
            self._write(file, lambda out: np.savez(out, **{str(index): array for index, array in enumerate(arrays)}))
            self._arrays = {"number": number, "digest": _digest_of(file)}
        content = {"fingerprint": self._fingerprint, "arrays": self._arrays, "state": state}
        record = json.dumps({"digest": _digest_of_json(content), **content}, indent=1)
        self._write(self.path / _RECORD, lambda out: out.write(record.encode()))
        for other in self.path.glob("round-*.npz"):
            if other != file and _ARRAYS.fullmatch(other.name):
                other.unlink()

    def _file(self, number: int) -> pathlib.Path:
        return self.path / f"round-{number:04d}.npz"

    def _write(self, path: pathlib.Path, write: Callable[[BinaryIO], Any]) -> None:
        partial = path.with_name(f"partial-{path.name}")
        try:
            with open(partial, "wb") as file:
                write(file)
                file.flush()
                os.fsync(file.fileno())
            os.replace(partial, path)
        except BaseException as error:
            partial.unlink(missing_ok=True)
            if isinstance(error, OSError):
                raise OSError(
                    f"'{path}' cannot be written: {error.strerror or error}. The state before it is whole: the same call goes "
                    "on from there when there is room."
                ) from error
            raise

    def _locked(self) -> int:
        """Open and lock the lock file. The lock ends with the process, however that ends."""
        path = self.path / _LOCK
        while True:
            file = os.open(path, os.O_RDWR | os.O_CREAT)
            try:
                if fcntl:
                    # Not `flock`, which a child of this process would hold beyond its end.
                    fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                else:
                    msvcrt.locking(file, msvcrt.LK_NBLCK, 1)
            except OSError as error:
                if error.errno in (errno.EACCES, errno.EAGAIN, errno.EDEADLK):
                    os.close(file)
                    self._refuse_second()
                # A file system without locks, as some of clusters are: there nobody can tell.
                return file
            if path.exists() and os.path.samestat(os.fstat(file), path.stat()):
                return file
            # Another run ended, and took the file with it, after it was opened here.
            os.close(file)

    def _refuse_second(self) -> NoReturn:
        raise ValueError(
            f"Argument `directory` is in use by another run. Received: directory={str(self.path)!r}. Wait until that run has "
            "ended, or pass another directory."
        )

    def _refuse(self, file: pathlib.Path, what: str, error: Exception | None = None) -> NoReturn:
        raise ValueError(
            f"Argument `directory` holds a damaged state: '{file}' {what}. Received: directory={str(self.path)!r}. Put a whole "
            "copy of that folder in its place, or delete it (or pass another one) to start again."
        ) from error


def digest(parts: Iterable[bytes]) -> str:
    """A hexadecimal digest of bytes."""
    whole = hashlib.sha256()
    for part in parts:
        whole.update(part)
    return whole.hexdigest()


def _digest_of_json(content: Any) -> str:
    return digest([json.dumps(content).encode()])


def _digest_of(path: pathlib.Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
