"""Hidden folders beside a file that is being written."""

from __future__ import annotations

import contextlib
import glob
import os
import pathlib
import shutil
import tempfile
from collections.abc import Iterator

try:
    import fcntl
except ImportError:  # On Windows nothing tells a folder that is in use from one that was left.
    fcntl = None

_SUFFIX = ".keras_renorm"


@contextlib.contextmanager
def folder_beside(path: pathlib.Path) -> Iterator[pathlib.Path]:
    """A hidden folder beside a file, which is removed afterwards. Folders that killed processes left for the same file are
    removed, too.

    A process locks the folder that it uses. The lock ends with the process.

    Raises:
        OSError: if the folder cannot be created.
    """
    prefix = f".{path.name}."
    for left in path.parent.glob(f"{glob.escape(prefix)}*{_SUFFIX}"):
        with _lock(left, wait=False) as held:
            if held:
                shutil.rmtree(left, ignore_errors=True)
    with contextlib.ExitStack() as stack:
        while True:
            try:
                folder = stack.enter_context(tempfile.TemporaryDirectory(_SUFFIX, prefix, path.parent))
            except OSError as error:
                raise OSError(f"'{path}' cannot be written: {error.strerror}.") from error
            stack.enter_context(_lock(folder, wait=True))
            # Before it was locked, another process may have taken it for one that was left.
            if os.path.isdir(folder):
                break
        yield pathlib.Path(folder)


@contextlib.contextmanager
def _lock(folder: str | os.PathLike, wait: bool) -> Iterator[bool]:
    """Lock the folder until the end of the block, and return whether that was possible."""
    with contextlib.ExitStack() as stack:
        held = fcntl is not None
        try:
            if held:
                descriptor = os.open(folder, os.O_RDONLY)
                stack.callback(os.close, descriptor)
                fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except OSError:
            held = False
        yield held
