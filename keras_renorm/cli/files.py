"""Models and samples from files, and files that are written as a whole or not at all."""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import pathlib
import sys
import zipfile
from collections.abc import Iterator, Sequence
from typing import Any

import keras
import numpy as np

import keras_renorm.api  # noqa: F401 (registers the classes of saved models)
from keras_renorm.src.export.beside import folder_beside

_KERAS_FUNCTIONS = ("activations", "constraints", "initializers", "losses", "metrics", "ops", "regularizers")


def import_modules(names: Sequence[str]) -> None:
    """Import modules that register classes and functions. They may be in the directory where the command runs.

    Raises:
        ValueError: if a module cannot be imported.
    """
    if names and os.getcwd() not in sys.path:
        # Last, so that nothing that happens to lie there takes the place of an installed module.
        sys.path.append(os.getcwd())
    for name in names:
        try:
            importlib.import_module(name)
        except Exception as error:
            raise ValueError(
                f"--import {name}: {type(error).__name__}: {error}. Pass the name of a module, without '.py', that is "
                "installed or in this directory."
            ) from error


def check_backend() -> None:
    """Raise `ValueError` if the backend cannot export, before the work begins."""
    backend = keras.backend.backend()
    if backend != "tensorflow":
        raise ValueError(
            f"Export to .tflite needs Keras on TensorFlow. Received: the {backend} backend. Run the command again with "
            "KERAS_BACKEND=tensorflow: .keras files are the same on every backend."
        )


def load_model(path: pathlib.Path) -> keras.Model:
    """Load a `.keras` file, without running code from it and without its loss, metrics and optimizer.

    Raises:
        ValueError: if it is not a complete Keras model, or holds objects that are not registered.
    """
    if not zipfile.is_zipfile(path):
        with open(path, "rb") as file:
            cut = file.read(2) == b"PK"
        what = "begins like a Keras model, but is cut off. Copy or save" if cut else "is not a Keras model. Save one there with"
        raise ValueError(f"'{path}' {what} {'it again' if cut else '`model.save(path)`'}.")
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
    except Exception as error:
        # What a damaged archive makes of its reader is of many kinds.
        raise ValueError(f"'{path}' is not a complete Keras model: {_first_line(error)}. Copy or save it again.") from error
    if damaged:
        raise ValueError(f"'{path}' is damaged in its part '{damaged}'. Copy or save it again.")
    try:
        return keras.models.load_model(path, compile=False, safe_mode=True)
    except Exception as error:
        raise ValueError(f"'{path}' cannot be loaded. {_reason(path, error)}") from error


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0].rstrip(".") or type(error).__name__


def _reason(path: pathlib.Path, error: Exception) -> str:
    """Why a file cannot be loaded, and what to do."""
    try:
        with zipfile.ZipFile(path) as archive:
            config = json.loads(archive.read("config.json"))
    except (KeyError, ValueError) as damage:
        return f"It is not a complete Keras model: {str(damage).strip(chr(34))}. Copy or save it again."
    config.pop("compile_config", None)
    if unknown := list(dict.fromkeys(_unregistered(config))):
        return (
            f"It holds objects that are not Keras' own: {', '.join(unknown)}. Pass `--import MODULE`, a module that defines "
            'them with `@keras.saving.register_keras_serializable("PACKAGE")`, where they are called PACKAGE>NAME.'
        )
    if code := list(dict.fromkeys(_with_code(config))):
        return (
            f"It holds Python code, which is not run: the function in {', '.join(code)}. Write that layer as a class, or its "
            "function as one that is registered with `@keras.saving.register_keras_serializable()`, and pass `--import "
            "MODULE`; or, if you trust the file, work with it in Python: `keras.models.load_model(path, safe_mode=False)`."
        )
    # Keras writes the whole config before the reason.
    reason = str(error).rpartition("Exception encountered: ")[2].strip()
    return reason.splitlines()[0] if reason else type(error).__name__


def _unregistered(config: Any) -> Iterator[str]:
    """Names of classes and functions in the config of a model that are not registered."""
    if isinstance(config, dict):
        name = config.get("registered_name")
        own = str(config.get("module")).partition(".")[0] == "keras"
        if name == "function":
            name = config.get("config")
            own = any(hasattr(getattr(keras, module), str(name)) for module in _KERAS_FUNCTIONS)
        if isinstance(name, str) and not own and keras.saving.get_registered_object(name) is None:
            yield name
    for part in config.values() if isinstance(config, dict) else config if isinstance(config, list) else ():
        yield from _unregistered(part)


def _with_code(config: Any, layer: str = "a layer") -> Iterator[str]:
    """The layers in the config of a model that hold code of anonymous functions."""
    if isinstance(config, dict):
        inner = config.get("config")
        if config.get("class_name") == "__lambda__":
            yield layer
        if isinstance(inner, dict) and "name" in inner:
            layer = f"layer '{inner['name']}' ({config.get('class_name')})"
    for part in config.values() if isinstance(config, dict) else config if isinstance(config, list) else ():
        yield from _with_code(part, layer)


def load_arrays(path: pathlib.Path) -> dict[str, np.ndarray]:
    """The arrays of an `.npz` file by name. The array of an `.npy` file is called `x`.

    Raises:
        ValueError: if the file is damaged, or holds Python objects, which could run code.
    """
    try:
        with open(path, "rb") as file:
            loaded = np.load(file, allow_pickle=False)
            arrays = {"x": loaded} if isinstance(loaded, np.ndarray) else {name: loaded[name] for name in loaded.files}
    except Exception as error:
        # What a damaged file makes of NumPy's readers is of many kinds.
        if "pickle" not in str(error):
            raise ValueError(
                f"'{path}' cannot be read as NumPy's arrays: {_first_line(error)}. Copy it again, or write it with `np.savez`."
            ) from error
        raise ValueError(
            f"'{path}' does not hold plain arrays. It may hold Python objects, which could run code and are not "
            "loaded. Save arrays of numbers: `np.savez('samples.npz', x=np.asarray(images, 'float32'))`."
        ) from error
    if single := [name for name, array in arrays.items() if np.ndim(array) == 0]:
        raise ValueError(
            f"'{path}' must hold arrays whose first axis is the sample. It holds a single value as `{single[0]}`: leave it "
            "out, or save an array."
        )
    return arrays


def samples_of(arrays: dict[str, np.ndarray], names: Sequence[str], path: pathlib.Path) -> list[np.ndarray]:
    """The arrays for the inputs of a model, in their order.

    Args:
        arrays: the arrays of the file.
        names: names of the inputs. The array of a single input may also be called `x`, or be the only array beside labels `y`.
        path: the file, for the error message.

    Raises:
        ValueError: if arrays are missing.
    """
    if all(name in arrays for name in names):
        return [arrays[name] for name in names]
    others = [name for name in arrays if name != "y"]
    if len(names) == 1 and ("x" in arrays or len(others) == 1):
        return [arrays["x" if "x" in arrays else others[0]]]
    wanted = "`x`" if len(names) == 1 else f"one array for each input of the model: {list(names)}"
    raise ValueError(f"'{path}' must hold {wanted}. It holds {sorted(arrays)}.")


def inputs_from(path: pathlib.Path | None, model: keras.Model) -> list[np.ndarray] | None:
    """The samples of a file, one array for each input of the model."""
    if path is None:
        return None
    # A subclassed model does not name its inputs.
    names = [tensor.name for tensor in getattr(model, "inputs", None) or []] or ["x"]
    return samples_of(load_arrays(path), names, path)


@contextlib.contextmanager
def written_whole(path: pathlib.Path) -> Iterator[pathlib.Path]:
    """Another path to write to. The file takes its name when it is complete, and is removed if writing fails."""
    with folder_beside(path) as folder:
        partial = folder / path.name
        try:
            yield partial
            os.replace(partial, path)
        except OSError as error:
            raise OSError(
                f"'{path}' cannot be written: {error.strerror or error}. Make room in its folder, or pass another -o."
            ) from error
