"""The command `keras-renorm`: how results and errors are shown.

The module of a command, and with it Keras and TensorFlow, is imported after the arguments are checked.
"""

from __future__ import annotations

import argparse
import contextlib
import errno
import functools
import importlib
import json
import math
import os
import pathlib
import signal
import sys
import textwrap
import traceback
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

from keras_renorm.cli.parser import PROGRAM, contradiction, make_parser

FAILED, WRONG_USE, INTERRUPTED, TERMINATED = 1, 2, 130, 143


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command.

    Args:
        argv: the arguments. Defaults to `None`: those of the process.

    Returns:
        The exit status.
    """
    parser = make_parser()
    arguments = parser.parse_args(argv)
    if wrong := contradiction(arguments):
        parser.error(wrong)
    try:
        with _terminable(), _quiet(arguments.debug):
            _check_files(arguments)
            text, data = importlib.import_module(f"keras_renorm.cli.{arguments.command}").run(arguments)
        print(json.dumps(_plain(data), indent=1) if arguments.json else text, flush=True)
        return 0
    except _Terminated:
        print(f"{PROGRAM}: terminated", file=sys.stderr)
        return TERMINATED
    except KeyboardInterrupt:
        print(f"{PROGRAM}: interrupted", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:
        # Who read the output has seen enough; Python would complain when it closes it.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return FAILED
    except Exception as error:
        if arguments.debug:
            traceback.print_exc()
        print(f"{PROGRAM}: error: {_with_file(_in_one_line(error), arguments)}", file=sys.stderr)
        return FAILED


def _check_files(arguments: argparse.Namespace) -> None:
    """Check files before the work begins."""
    for value in vars(arguments).values():
        if isinstance(value, pathlib.Path) and value is not getattr(arguments, "output", None):
            if value.is_dir():
                raise IsADirectoryError(f"'{value}' is a folder, not a file.")
            if value.exists() and not value.is_file():
                raise OSError(f"'{value}' is a pipe or a device, not a file. Write its contents to a file first.")
            with open(value, "rb"):
                pass
    if "output" in arguments:
        _check_output(arguments.output, arguments.force)


def _check_output(path: pathlib.Path, force: bool) -> None:
    """Raise `OSError` if a file cannot be written, or exists and must not be overwritten."""
    if path.is_dir() or not path.parent.is_dir():
        what = "is a folder" if path.is_dir() else "cannot be written: its folder does not exist"
        raise OSError(f"'{path}' {what}.")
    if path.exists() and not path.is_file():
        raise OSError(f"'{path}' is a pipe or a device, not a file. Pass another -o.")
    if path.exists() and not force:
        raise FileExistsError(f"'{path}' exists already. Pass --force to write over it, or another -o.")
    if not os.access(path.parent, os.W_OK):
        raise PermissionError(f"'{path}' cannot be written: you have no permission to write to its folder.")


class _Terminated(KeyboardInterrupt):
    """The process received SIGTERM."""


@contextlib.contextmanager
def _terminable() -> Iterator[None]:
    """Let SIGTERM clean up as Ctrl-C does."""

    def terminate(*_: Any) -> None:
        raise _Terminated

    before = signal.signal(signal.SIGTERM, terminate)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@contextlib.contextmanager
def _quiet(debug: bool) -> Iterator[None]:
    """Keep standard output for the result, and standard error free of the messages of TensorFlow.

    TensorFlow and LiteRT write to the file descriptor directly. Warnings are written to standard error, and progress bars if it
    is a terminal.
    """
    with contextlib.ExitStack() as stack:
        nowhere = stack.enter_context(open(os.devnull, "w"))
        stack.enter_context(warnings.catch_warnings())
        warnings.showwarning = _show_warning
        if not debug:
            # What one library tells another.
            warnings.simplefilter("ignore", FutureWarning)
            if sys.stderr is sys.__stderr__:
                stack.enter_context(contextlib.redirect_stderr(_standard_error()))
            descriptor = os.dup(2)
            stack.callback(os.close, descriptor)
            stack.callback(os.dup2, descriptor, 2)
            os.dup2(nowhere.fileno(), 2)
        stack.enter_context(contextlib.redirect_stdout(sys.stderr if debug or sys.stderr.isatty() else nowhere))
        yield


@functools.cache
def _standard_error() -> Any:
    """Standard error beside the silenced descriptor. It is never closed, since loggers keep it."""
    return open(os.dup(2), "w", buffering=1, encoding=sys.stderr.encoding, errors="backslashreplace")


def _plain(data: Any) -> Any:
    """Data that JSON can represent: `null` for numbers that are not finite."""
    if isinstance(data, dict):
        return {key: _plain(value) for key, value in data.items()}
    if isinstance(data, (list, tuple)):
        return [_plain(value) for value in data]
    if isinstance(data, float) and not math.isfinite(data):
        return None
    return str(data) if isinstance(data, pathlib.Path) else data


def _show_warning(message: Any, category: type, *_: Any) -> None:
    print(f"{PROGRAM}: warning: {_in_one_line(message)}", file=sys.stderr)


def _with_file(text: str, arguments: argparse.Namespace) -> str:
    """An error with the name of a file: the file of its option, else the first."""
    paths = {name: str(value) for name, value in vars(arguments).items() if isinstance(value, pathlib.Path)}
    about = [path for name, path in paths.items() if f"`{name}`" in text] or list(paths.values())
    return text if text.startswith("--") or any(path in text for path in about) else f"'{about[0]}': {text}"


def _in_one_line(error: Any) -> str:
    if isinstance(error, OSError) and error.errno == errno.ENOSPC:
        where = "" if error.filename is None else f"'{error.filename}': "
        return f"{where}{error.strerror}. Make room where the output goes and in the folder for temporary files (TMPDIR)."
    if isinstance(error, OSError) and error.strerror and error.filename is not None:
        return f"'{error.filename}': {error.strerror}"
    text = textwrap.shorten(str(error), 1000, placeholder=" ...")
    plain = not isinstance(error, Exception) or isinstance(error, (ValueError, TypeError, OSError, RuntimeError, Warning))
    return text if plain and text else f"{type(error).__name__}: {text}"
