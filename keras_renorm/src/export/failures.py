"""Why a model could not be traced, converted or run: the layer, the cause and the remedy."""

from __future__ import annotations

import contextlib
import errno
import pathlib
import re
import tempfile
import traceback
from collections.abc import Iterable, Iterator

import keras

_LENGTH = 300


def first_line(error: Exception) -> str:
    """An error in short."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0][:_LENGTH] if lines else type(error).__name__


def reason(error: Exception, layers: frozenset[str] = frozenset()) -> str:
    """The cause of an error of Keras or of TensorFlow's converter.

    Args:
        error: the error.
        layers: names of the layers of the Keras model.
    """
    text = str(error)
    if operations := [
        name for names in re.findall(r"^(?:Custom|Flex) ops: (.+)$", text, re.MULTILINE) for name in names.split(", ")
    ]:
        places = re.findall(r'"([^"@]+/[^"@]+)@', text)
        return unknown_operations(operations, [layer_of(place, layers) or place for place in places])
    if "argument names for SavedModel signature" in text:
        return f"{_cause(error)}. Give inputs names of letters, digits and underscores that differ in more than case."
    found = _failing_call(error)
    if found is None:
        return _cause(error)
    layer, outer, where = found
    name = f"'{layer.name}' ({type(layer).__name__})" + "".join(f" of '{one.name}'" for one in reversed(outer))
    return f"Layer {name} fails in its `call`{where}: {_cause(error)}. {_remedy(layer, error)}"


def unknown_operations(operations: Iterable[str], places: Iterable[str]) -> str:
    """A sentence on operations that TFLite does not have."""
    where = ", ".join(f"'{place}'" for place in dict.fromkeys(places)) or "the model"
    names = ", ".join(dict.fromkeys(name.removeprefix("Flex") for name in operations))
    return (
        f"TFLite has no operation {names} (in {where}). Write that layer with operations that it has, or do its work "
        "outside of the exported model: before it, as with lookups of words, or after it."
    )


def layer_of(scope: str, layers: frozenset[str]) -> str | None:
    """The layer of a Keras model that the name of an operation, such as `"model_1/dense_1/MatMul"`, belongs to."""
    for part in reversed(scope.split("/")):
        # Keras counts how often it has traced a layer.
        for layer in (part.rpartition("_")[0], part):
            if layer in layers:
                return layer
    return None


@contextlib.contextmanager
def full_disk_told(path: pathlib.Path) -> Iterator[None]:
    """Tell the user if an error is caused by a disk without space, for the file or for temporary files of the converter."""
    try:
        yield
    except Exception as error:
        if not _disk_is_full(error):
            raise
        raise OSError(
            f"'{path}' was not written: no space is left in its folder, or in the temporary folder '{tempfile.gettempdir()}', "
            "where TensorFlow converts. Make room, or name another temporary folder in the environment variable TMPDIR."
        ) from error


def _disk_is_full(error: BaseException | None) -> bool:
    """Whether an error, or its cause, is a disk without space."""
    while error is not None:
        if getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT) or "No space left on device" in str(error):
            return True
        error = error.__cause__ or error.__context__
    return False


@contextlib.contextmanager
def whole_tracebacks() -> Iterator[None]:
    """Let Keras keep the calls of layers in the tracebacks of errors."""
    filtered = keras.config.is_traceback_filtering_enabled()
    keras.config.disable_traceback_filtering()
    try:
        yield
    finally:
        if filtered:
            keras.config.enable_traceback_filtering()


def _failing_call(error: Exception) -> tuple[keras.Layer, list[keras.Layer], str] | None:
    """The innermost layer whose `call` raised an error, the layers around it, and the line of code."""
    calls = []
    for frame, line in traceback.walk_tb(error.__traceback__):
        layer = frame.f_locals.get("self")
        if frame.f_code.co_name == "call" and isinstance(layer, keras.Layer):
            place = f" (line {line} of {pathlib.Path(frame.f_code.co_filename).name})"
            calls.append((layer, "" if _is_of_keras(layer) else place))
    layers = list(dict.fromkeys(layer for layer, _ in calls if not isinstance(layer, (keras.Model, keras.Sequential))))
    if not layers:
        return None
    return layers[-1], layers[:-1], next(where for layer, where in reversed(calls) if layer is layers[-1])


def _is_of_keras(layer: keras.Layer) -> bool:
    return type(layer).__module__.startswith("keras.")


def _cause(error: Exception) -> str:
    text = str(error.args[0]) if isinstance(error, KeyError) and error.args else str(error)
    text = re.sub(r"\x1b\[\d+m", "", text)
    if wrapped := re.search(r"^Exception encountered when calling .*?\n\n(.*?)\n\nArguments received by", text, re.DOTALL):
        text = wrapped[1]
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    if lines and lines[0] == "in user code:":
        # TensorFlow's tracer writes the code before the reason.
        lines = [line for line in lines[1:] if re.match(r"[A-Za-z]+(Error|Exception)\b", line)] or lines[-1:]
    # The first sentence; the second is advice for other cases.
    text = re.split(r"\.\s", lines[0])[0][:_LENGTH].rstrip(".") if lines else ""
    named = isinstance(error, (RuntimeError, ValueError, TypeError, OSError)) and text
    return text if named else f"{type(error).__name__}: {text}".rstrip(": ")


def _remedy(layer: keras.Layer, error: Exception) -> str:
    if _is_of_keras(layer):
        return "Give it other inputs or arguments, or export the part of the model before it."
    text = str(error)
    if "NoneType" in text or "None of type" in text:
        return "It takes a size for known that is not: read sizes with `keras.ops.shape`, or give `keras.Input` all of them."
    if "Python `bool`" in text:
        return "Choose with `keras.ops.where` or `keras.ops.cond` in place of Python's `if`."
    return (
        "It has to work on tensors without values, too: write it with `keras.ops` in place of NumPy and Python's own, or "
        "export the part of the model before it."
    )
