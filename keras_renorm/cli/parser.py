"""The arguments of the command line. Neither Keras nor TensorFlow is imported, so help and errors are shown at once."""

from __future__ import annotations

import argparse
from typing import Any

from keras_renorm.cli import argument_types as types
from keras_renorm.src.core import names
from keras_renorm.version import __version__

PROGRAM = "keras-renorm"

CRITERIA = sorted(["auto", *names.CRITERIA, *names.CALIBRATED_CRITERIA, *names.LABELLED_CRITERIA])
RENORMALIZERS = sorted(["auto", "none", *names.RENORMALIZERS, *names.CALIBRATED_RENORMALIZERS])
ALLOCATIONS = sorted(names.ALLOCATIONS)
NEED_SAMPLES = [*names.CALIBRATED_CRITERIA, *names.CALIBRATED_RENORMALIZERS]

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
  keras-renorm prune model.keras --sparsity 0.9 --calibration samples.npz --recover -o pruned.keras
      then the dense model teaches the pruned one: minutes, more accuracy
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


def make_parser() -> argparse.ArgumentParser:
    """The parser of all commands."""
    parser = argparse.ArgumentParser(
        prog=PROGRAM,
        description="Prune trained Keras models, give them their accuracy back,\nand ship them as small .tflite files.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND", title="commands")
    for add in (_add_prune, _add_report, _add_export, _add_compare):
        _add_common(add(commands))
    return parser


def _add_prune(commands: Any) -> argparse.ArgumentParser:
    command = _command(commands, "prune", "prune a trained model in one shot, without labels and without training", PRUNE)
    command.add_argument("model", type=types.model_file(".keras"), metavar="MODEL.keras")
    _add_output(command, ".keras")
    _add_weights_to_remove(command)
    _add_repair(command)
    return command


def _add_weights_to_remove(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--sparsity",
        required=True,
        action=types.PerLayer,
        type=types.setting(types.share),
        metavar="[LAYER=]SHARE",
        help="fraction of the weights to remove, in [0, 1), such as 0.9; or LAYER=0.9, once for each layer (or glob) to prune",
    )
    command.add_argument(
        "--criterion",
        type=types.name_among(CRITERIA),
        default="auto",
        metavar="NAME",
        help="what scores the weights: magnitude or random; with --calibration also activation, activity, obs or admm "
        "(default: admm with --calibration, else magnitude)",
    )
    command.add_argument(
        "--pattern",
        action=types.PerLayer,
        type=types.setting(types.pattern),
        default=("unstructured", ()),
        metavar="[LAYER=]NAME",
        help="which weights go together: unstructured (default), unit, block:4,1 (inputs,units) or n_of_m:2,4; or "
        "LAYER=unit, once for each layer (or glob)",
    )
    command.add_argument("--group", choices=names.GROUPS, default="layer", help="which weights compete (default: %(default)s)")
    command.add_argument(
        "--allocation",
        choices=ALLOCATIONS,
        default="balanced",
        metavar="NAME",
        help="how the sparsity is divided among layers: %(choices)s (default: %(default)s)",
    )
    command.add_argument("--target", choices=names.TARGETS, help="choose each layer's pattern for a runtime that is to be fast")
    command.add_argument(
        "--layer", action="append", metavar="LAYER", help="prune this layer (or glob); repeat it for more (default: all)"
    )


def _add_repair(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--calibration",
        type=types.file(".npz", ".npy"),
        metavar="X.npz",
        help="a few hundred to a few thousand unlabelled samples",
    )
    command.add_argument(
        "--renormalize",
        type=types.name_among(RENORMALIZERS),
        default="auto",
        metavar="HOW",
        help="what is done to the weights that stay: l1, l2 or none; with --calibration also lstsq or moments "
        "(default: lstsq with --calibration, else what measures best without)",
    )
    command.add_argument(
        "--recover",
        action="store_true",
        help="let the dense model teach the pruned one on the samples of --calibration (minutes)",
    )
    command.add_argument(
        "--augment",
        action="append",
        choices=tuple(names.AUGMENTATIONS),
        metavar="NAME",
        help="with --recover, change images at random: %(choices)s; repeat it for more",
    )
    command.add_argument("--compact", action="store_true", help="take units without weights out of the network")
    command.add_argument(
        "--batch-size", type=types.count, default=128, metavar="N", help="samples at once (default: %(default)s)"
    )


def _add_report(commands: Any) -> argparse.ArgumentParser:
    command = _command(commands, "report", "what is pruned in a file, layer by layer", REPORT)
    command.add_argument("file", type=types.model_file(".keras", ".tflite"), metavar="FILE", help="a .keras or a .tflite file")
    command.add_argument(
        "--explain", action="store_true", help="of a .keras file: export it to see what LiteRT makes of its zeros"
    )
    return command


def _add_export(commands: Any) -> argparse.ArgumentParser:
    command = _command(commands, "export", "write a .tflite file that is smaller because it is sparse", EXPORT)
    command.add_argument("model", type=types.model_file(".keras"), metavar="MODEL.keras")
    _add_output(command, ".tflite")
    command.add_argument("--quantize", choices=names.QUANTIZE, help="float16, or int8 (default: float32)")
    command.add_argument(
        "--representative-data",
        type=types.file(".npz", ".npy"),
        metavar="X.npz",
        help="a few hundred typical inputs for --quantize int8: activations become integers too, not only weights",
    )
    command.add_argument(
        "--samples",
        type=types.file(".npz", ".npy"),
        metavar="X.npz",
        help="inputs to compare outputs on (default: random ones)",
    )
    command.add_argument(
        "--smallest", action="store_true", help="store integers sparse also where the runtime is slower with them"
    )
    command.add_argument(
        "--storage",
        choices=names.STORAGE,
        default="auto",
        help="sparse: for LiteRT; full: for TensorFlow Lite for Microcontrollers, too (default: full up to 256 kB of weights)",
    )
    command.add_argument(
        "--integer-io", action="store_true", help="integer inputs and outputs, as boards want them; with --representative-data"
    )
    return command


def _add_compare(commands: Any) -> argparse.ArgumentParser:
    command = _command(commands, "compare", "two files side by side: accuracy or outputs, bytes, latency", COMPARE)
    for name in ("a", "b"):
        command.add_argument(
            name, type=types.model_file(".keras", ".tflite"), metavar=name.upper(), help="a .keras or a .tflite file"
        )
    command.add_argument(
        "--data", type=types.file(".npz", ".npy"), metavar="X.npz", help="samples `x`, and labels `y` if there are"
    )
    command.add_argument("--runs", type=types.count, default=50, metavar="N", help="inferences to time (default: %(default)s)")
    command.add_argument("--threads", type=types.count, default=1, metavar="N", help="of the runtime (default: %(default)s)")
    return command


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
    parser.add_argument("-o", "--output", required=True, type=types.file(suffix), metavar=f"OUT{suffix}", help="where to write")
    parser.add_argument("--force", action="store_true", help="write over a file that is there")


def contradiction(arguments: argparse.Namespace) -> str | None:
    """What is wrong with arguments that are valid one by one; `None` if nothing is."""
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
    if arguments.recover and not arguments.calibration:
        return "--recover needs samples: --calibration X.npz"
    if arguments.augment and not arguments.recover:
        return "--augment goes with --recover"
    if arguments.criterion in names.LABELLED_CRITERIA:
        return f"--criterion {arguments.criterion} needs labels and the loss of the model: call `keras_renorm.prune` in Python"
    for option, value in (("--criterion", arguments.criterion), ("--renormalize", arguments.renormalize)):
        if value in NEED_SAMPLES and not arguments.calibration:
            return f"{option} {value} needs samples: --calibration X.npz"
    return None
