"""The command line of keras_renorm: what can be asked, and how answers and errors are shown.

It stands beside the package, whose import brings Keras and TensorFlow in: help and wrong use are answered at once.
"""

from __future__ import annotations

import argparse
import contextlib
import errno
import functools
import importlib
import importlib.metadata
import json
import math
import os
import pathlib
import signal
import sys
import textwrap
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

PROGRAM = "keras-renorm"
FAILED, WRONG_USE, INTERRUPTED, TERMINATED = 1, 2, 130, 143

# What the library knows, so that a wrong name is seen before it is imported.
GROUPS = ("layer", "unit")
TARGETS = ("litert", "litert-int8")
QUANTIZE = ("float16", "int8")
STORAGE = ("auto", "full", "sparse")
ALLOCATIONS = ("balanced", "erk", "global", "lamp", "uniform")
PATTERNS = ("block", "n_of_m", "unit", "unstructured")
CRITERIA = ("activation", "activity", "admm", "auto", "magnitude", "obs", "random")
RENORMALIZERS = ("auto", "l1", "l2", "lstsq", "moments", "none")
NEED_SAMPLES = ("activation", "activity", "admm", "lstsq", "moments", "obs")

EXAMPLES = """
examples:
  keras-renorm prune model.keras --sparsity 0.9 --calibration samples.npz -o pruned.keras
  keras-renorm report pruned.keras
  keras-renorm export pruned.keras -o pruned.tflite
  keras-renorm compare model.keras pruned.tflite --data test.npz

`keras-renorm COMMAND --help` says more of each.
Samples come as NumPy writes them:
  np.savez("samples.npz", x=images)
      a few hundred to a few thousand, without labels
  np.savez("test.npz", x=images, y=labels)
      with labels, to measure accuracies
  np.savez("two.npz", left=a, right=b)
      for a model with several inputs: by their names

Exit status: 0 done, 1 failed, 2 wrong use, 130 interrupted, 143 terminated.
"""

PRUNE = """
examples:
  keras-renorm prune model.keras --sparsity 0.9 -o pruned.keras
      without samples: by magnitude, and each layer gets its norm back
  keras-renorm prune model.keras --sparsity 0.9 --calibration samples.npz -o pruned.keras
      with a thousand unlabelled samples: fitted layer by layer, which keeps
      far more accuracy
  keras-renorm prune model.keras --sparsity 'block_*=0.9' --sparsity logits=0.5 -o pruned.keras
      these layers alone, each with its own sparsity
  keras-renorm prune model.keras --sparsity 0.9 --target litert -o pruned.keras
      in the patterns that LiteRT runs faster
  keras-renorm prune model.keras --sparsity 0.5 --pattern unit --compact -o smaller.keras
      whole units, which are taken out: faster on every device
"""

REPORT = """
examples:
  keras-renorm report pruned.keras
      layer by layer: weights, kept, sparsity
  keras-renorm report pruned.tflite
      tensor by tensor: stored sparse or not, zeros skipped or not, and why
  keras-renorm report pruned.keras --explain
      the same of what an export would write
  keras-renorm report pruned.keras --json | jq .sparsity
"""

EXPORT = """
examples:
  keras-renorm export pruned.keras -o pruned.tflite
  keras-renorm export pruned.keras --quantize float16 -o half.tflite
  keras-renorm export pruned.keras --quantize int8 -o weights_only.tflite
  keras-renorm export pruned.keras --quantize int8 --representative-data samples.npz -o integers.tflite
  keras-renorm export pruned.keras --quantize int8 --representative-data samples.npz --storage full --integer-io -o board.tflite
      for TensorFlow Lite for Microcontrollers

The file is loaded again and compared with the Keras model before it takes its
name.
"""

COMPARE = """
examples:
  keras-renorm compare model.keras pruned.tflite
      how far apart the outputs are, on random inputs
  keras-renorm compare model.keras pruned.tflite --data test.npz
      on samples; with labels `y`, the accuracy of both
  keras-renorm compare dense.tflite pruned.tflite --threads 4

Latencies are taken in turns, of one sample (the first of --data, in its size):
a .tflite in LiteRT, a .keras with `model.predict_on_batch`, which says little
of what a phone would take.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Do what the arguments say; returns the exit status.

    Args:
        argv: the arguments; `None` for those of the process.
    """
    parser = make_parser()
    arguments = parser.parse_args(argv)
    if contradiction := _contradiction(arguments):
        parser.error(contradiction)
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


def make_parser() -> argparse.ArgumentParser:
    """The parser of all commands."""
    parser = argparse.ArgumentParser(
        prog=PROGRAM,
        description="Prune trained Keras models, give them their accuracy back,\nand ship them as small .tflite files.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"%(prog)s {_version()}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND", title="commands")

    prune = _command(commands, "prune", "prune a trained model in one shot, without labels and without training", PRUNE)
    prune.add_argument("model", type=_model(".keras"), metavar="MODEL.keras")
    _add_output(prune, ".keras")
    prune.add_argument(
        "--sparsity",
        required=True,
        action=_PerLayer,
        type=_setting(_share),
        metavar="[LAYER=]SHARE",
        help="fraction of the weights to remove, in [0, 1), such as 0.9; or LAYER=0.9, once for each layer (or glob) to prune",
    )
    prune.add_argument(
        "--calibration", type=_file(".npz", ".npy"), metavar="X.npz", help="a few hundred to a few thousand unlabelled samples"
    )
    prune.add_argument(
        "--renormalize",
        type=_name(RENORMALIZERS),
        default="auto",
        metavar="HOW",
        help="what is done to the weights that stay: l1, l2 or none; with --calibration also lstsq or moments "
        "(default: lstsq with --calibration, else what measures best without)",
    )
    prune.add_argument(
        "--criterion",
        type=_name(CRITERIA),
        default="auto",
        metavar="NAME",
        help="what scores the weights: magnitude or random; with --calibration also activation, activity, obs or admm "
        "(default: admm with --calibration, else magnitude)",
    )
    prune.add_argument(
        "--pattern",
        action=_PerLayer,
        type=_setting(_pattern),
        default=("unstructured", ()),
        metavar="[LAYER=]NAME",
        help="which weights go together: unstructured (default), unit, block:4,1 (inputs,units) or n_of_m:2,4; or "
        "LAYER=unit, once for each layer (or glob)",
    )
    prune.add_argument("--group", choices=GROUPS, default="layer", help="which weights compete (default: %(default)s)")
    prune.add_argument(
        "--allocation",
        choices=ALLOCATIONS,
        default="balanced",
        metavar="NAME",
        help="how the sparsity is divided among layers: %(choices)s (default: %(default)s)",
    )
    prune.add_argument("--target", choices=TARGETS, help="choose each layer's pattern for a runtime that is to be fast")
    prune.add_argument(
        "--layer", action="append", metavar="LAYER", help="prune this layer (or glob); repeat it for more (default: all)"
    )
    prune.add_argument("--compact", action="store_true", help="take units without weights out of the network")
    prune.add_argument("--batch-size", type=_count, default=128, metavar="N", help="samples at once (default: %(default)s)")

    report = _command(commands, "report", "what is pruned in a file, layer by layer", REPORT)
    report.add_argument("file", type=_model(".keras", ".tflite"), metavar="FILE", help="a .keras or a .tflite file")
    report.add_argument(
        "--explain", action="store_true", help="of a .keras file: export it to see what LiteRT makes of its zeros"
    )

    export = _command(commands, "export", "write a .tflite file that is smaller because it is sparse", EXPORT)
    export.add_argument("model", type=_model(".keras"), metavar="MODEL.keras")
    _add_output(export, ".tflite")
    export.add_argument("--quantize", choices=QUANTIZE, help="float16, or int8 (default: float32)")
    export.add_argument(
        "--representative-data",
        type=_file(".npz", ".npy"),
        metavar="X.npz",
        help="a few hundred typical inputs for --quantize int8: activations become integers too, not only weights",
    )
    export.add_argument(
        "--samples", type=_file(".npz", ".npy"), metavar="X.npz", help="inputs to compare outputs on (default: random ones)"
    )
    export.add_argument(
        "--smallest", action="store_true", help="store integers sparse also where the runtime is slower with them"
    )
    export.add_argument(
        "--storage",
        choices=STORAGE,
        default="auto",
        help="sparse: for LiteRT; full: for TensorFlow Lite for Microcontrollers, too (default: full up to 256 kB of weights)",
    )
    export.add_argument(
        "--integer-io", action="store_true", help="integer inputs and outputs, as boards want them; with --representative-data"
    )

    compare = _command(commands, "compare", "two files side by side: accuracy or outputs, bytes, latency", COMPARE)
    for name in ("a", "b"):
        compare.add_argument(name, type=_model(".keras", ".tflite"), metavar=name.upper(), help="a .keras or a .tflite file")
    compare.add_argument("--data", type=_file(".npz", ".npy"), metavar="X.npz", help="samples `x`, and labels `y` if there are")
    compare.add_argument("--runs", type=_count, default=50, metavar="N", help="inferences to time (default: %(default)s)")
    compare.add_argument("--threads", type=_count, default=1, metavar="N", help="of the runtime (default: %(default)s)")

    for command in (prune, report, export, compare):
        _add_common(command)
    return parser


def _command(commands: Any, name: str, purpose: str, examples: str) -> argparse.ArgumentParser:
    """Add a command."""
    return commands.add_parser(
        name,
        help=purpose,
        description=f"{purpose[0].upper()}{purpose[1:]}.",
        epilog=examples,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )


def _add_common(parser: argparse.ArgumentParser) -> None:
    """Add the options that all commands have."""
    parser.add_argument("--json", action="store_true", help="print the result as JSON")
    parser.add_argument(
        "--import",
        dest="modules",
        action="append",
        default=[],
        metavar="MODULE",
        help="import a module that registers layers, criteria or functions of your own; it may lie in this directory",
    )
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error and what TensorFlow logs")


def _add_output(parser: argparse.ArgumentParser, suffix: str) -> None:
    parser.add_argument("-o", "--output", required=True, type=_file(suffix), metavar=f"OUT{suffix}", help="where to write")
    parser.add_argument("--force", action="store_true", help="write over a file that is there")


def _file(*suffixes: str) -> Any:
    """A type of argument: a path with one of these endings."""

    def path(text: str) -> pathlib.Path:
        if not text.endswith(suffixes):
            raise argparse.ArgumentTypeError(f"must end in {' or '.join(suffixes)}, but is {text!r}")
        return pathlib.Path(text)

    return path


def _model(*suffixes: str) -> Any:
    """A type of argument: the path of a model, with one of these endings."""

    def path(text: str) -> pathlib.Path:
        old = pathlib.Path(text)
        if old.suffix in (".h5", ".hdf5"):
            convert = f"keras.models.load_model({text!r}, compile=False).save({str(old.with_suffix('.keras'))!r})"
            raise argparse.ArgumentTypeError(f"must end in {' or '.join(suffixes)}: convert it in Python with `{convert}`")
        return _file(*suffixes)(text)

    return path


class _PerLayer(argparse.Action):
    """One value for all layers, or a dict of layer to value, one an option."""

    def __call__(self, parser, namespace, value, option_string=None):
        layer, one = value
        before = getattr(namespace, self.dest)
        given = before is not self.default
        if isinstance(before, dict) and layer in before:
            raise argparse.ArgumentError(self, f"{layer!r} is given twice")
        if layer is None and not given:
            setattr(namespace, self.dest, one)
        elif layer is not None and (not given or isinstance(before, dict)):
            setattr(namespace, self.dest, {**(before if given else {}), layer: one})
        else:
            raise argparse.ArgumentError(self, "give one value for all layers, or LAYER=value for each")


def _setting(kind: Callable[[str], Any]) -> Callable[[str], tuple[str | None, Any]]:
    """A type of argument: a value, or `LAYER=value`."""

    def setting(text: str) -> tuple[str | None, Any]:
        layer, _, value = text.rpartition("=")
        return layer or None, kind(value)

    return setting


def _share(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 <= value < 1:
        raise argparse.ArgumentTypeError(f"must be a number in [0, 1), such as 0.9 for 90%, but is {text!r}")
    return value


def _pattern(text: str) -> tuple[str, tuple[int, ...]]:
    """The name of a pattern and its numbers."""
    name, colon, numbers = text.partition(":")
    sides = tuple(int(side) if side.isdecimal() else 0 for side in numbers.split(",")) if colon else ()
    if colon and (name not in ("block", "n_of_m") or len(sides) != 2 or 0 in sides):
        raise argparse.ArgumentTypeError(f"must be like block:4,1 or n_of_m:2,4, but is {text!r}")
    if name == "n_of_m" and sides and sides[0] >= sides[1]:
        raise argparse.ArgumentTypeError(f"must keep fewer than all, such as n_of_m:2,4, but is {text!r}")
    return _name(PATTERNS)(name), sides


def _name(known: Sequence[str]) -> Callable[[str], str]:
    """A type of argument: a name that the library knows, or one of a module of the user's, `PACKAGE>NAME`."""

    def name(text: str) -> str:
        if text not in known and ">" not in text:
            raise argparse.ArgumentTypeError(
                f"must be one of {', '.join(known)}, or, in quotes, 'PACKAGE>NAME' with --import, but is {text!r}"
            )
        return text

    return name


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be an integer of at least 1, but is {text!r}")
    return int(text)


def _contradiction(arguments: argparse.Namespace) -> str | None:
    """What is wrong with arguments that are right one by one."""
    if arguments.command == "export" and arguments.representative_data and arguments.quantize != "int8":
        return "--representative-data goes with --quantize int8"
    if arguments.command == "export" and arguments.integer_io and not arguments.representative_data:
        return "--integer-io goes with --quantize int8 and --representative-data"
    if arguments.command != "prune":
        return None
    if arguments.layer and isinstance(arguments.sparsity, dict):
        return "give either --layer or --sparsity LAYER=SHARE, which names the layers"
    if arguments.target and isinstance(arguments.pattern, tuple) and arguments.pattern[0] != "unstructured":
        return "--target chooses the patterns: leave --pattern out, or give it as LAYER=NAME"
    for option, value in (("--criterion", arguments.criterion), ("--renormalize", arguments.renormalize)):
        if value in NEED_SAMPLES and not arguments.calibration:
            return f"{option} {value} needs samples: --calibration X.npz"
    return None


def _version() -> str:
    try:
        return importlib.metadata.version("keras-renorm")
    except importlib.metadata.PackageNotFoundError:
        # A checkout that is not installed.
        return importlib.import_module("keras_renorm.version").__version__


def _check_files(arguments: argparse.Namespace) -> None:
    """What can be said of files before the work begins."""
    for value in vars(arguments).values():
        if isinstance(value, pathlib.Path) and value is not getattr(arguments, "output", None):
            if value.is_dir():
                raise IsADirectoryError(f"'{value}' is a folder, not a file.")
            if value.exists() and not value.is_file():
                raise OSError(f"'{value}' is a pipe or a device, not a file. Write what comes out of it to a file first.")
            with open(value, "rb"):
                pass
    if "output" in arguments:
        _check_output(arguments.output, arguments.force)


def _check_output(path: pathlib.Path, force: bool) -> None:
    """Raise `OSError` if a file cannot be written, or is there and must not be written over."""
    if path.is_dir() or not path.parent.is_dir():
        what = "is a folder" if path.is_dir() else "cannot be written: its folder does not exist"
        raise OSError(f"'{path}' {what}.")
    if path.exists() and not path.is_file():
        raise OSError(f"'{path}' is a pipe or a device, not a file. Pass another -o.")
    if path.exists() and not force:
        raise FileExistsError(f"'{path}' is there already. Pass --force to write over it, or another -o.")
    if not os.access(path.parent, os.W_OK):
        raise PermissionError(f"'{path}' cannot be written: its folder is closed to you.")


class _Terminated(KeyboardInterrupt):
    """SIGTERM came."""


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
    """Keep standard output for the answer, and standard error free of what TensorFlow logs when it starts.

    TensorFlow and LiteRT write to the file descriptor, past Python. Warnings go to standard error, and progress bars if it is a
    terminal.
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
    """Standard error past the descriptor that is silenced; never closed, as loggers keep what they find."""
    return open(os.dup(2), "w", buffering=1, encoding=sys.stderr.encoding, errors="backslashreplace")


def _plain(data: Any) -> Any:
    """What JSON can say: `null` for what is not finite."""
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
    """An error that names a file: the one whose option it is about, else the first."""
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


if __name__ == "__main__":
    sys.exit(main())
