"""What pruning costs: training steps, mask updates, one-shot pruning as models grow, calibration, export and import.

- step: training steps of a dense and of a convolutional network without masks, with prunable layers, with the wrapper, and with
  tfmot's `prune_low_magnitude` on `tf_keras`; in the dense one masks are updated never, every 100, 10 or 1 steps. Trained in
  turns; ratios to dense.
- update: choosing the mask of one kernel, by pattern and group, beside numpy's partition and the sort that tfmot does.
- prune: one-shot pruning by magnitude with l1 renormalization, time and peak memory, from 1 to 300 million weights.
- copy: `to_prunable`, `strip` and `compact` of ResNet50 beside Keras' own copy of a model.
- calibrate, export: one-shot pruning with samples; a `.tflite` file beside Keras' own export of the dense model.
- import: what `import keras_renorm` adds to `import keras`.

Prints tables, and writes speed.json (with machine and versions) and speed.png.

    python benchmarks/speed.py
    python benchmarks/speed.py --part step --network dense --every --runs 15
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import multiprocessing
import os
import pathlib
import platform
import subprocess
import sys
import tempfile
import time

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras
import numpy as np
from step_times import step_times

import keras_renorm as kr
from keras_renorm.src.kernels.masks import compute_mask

BATCH = 128
SPARSITY = 0.9


def in_turns(functions: dict, runs: int) -> dict:
    """Seconds of each run of each function, as it says or as it takes; a first turn is not counted."""
    times = {name: [] for name in functions}
    for _ in range(runs + 1):
        for name, function in functions.items():
            started = time.perf_counter()
            answer = function()
            times[name].append(answer if isinstance(answer, float) else time.perf_counter() - started)
    return {name: np.array(values[1:]) for name, values in times.items()}


def medians(functions: dict, runs: int) -> dict:
    return {name: float(np.median(values)) for name, values in in_turns(functions, runs).items()}


def dense_network(library, dense, conv):
    return library.Sequential([dense(2048, activation="relu"), dense(2048, activation="relu"), dense(10)]), (784,)


def conv_network(library, dense, conv):
    layers = [conv(filters, 3, activation="relu", padding="same", strides=strides) for filters, strides in CONVOLUTIONS]
    return library.Sequential([*layers, library.layers.GlobalAveragePooling2D(), dense(10)]), (32, 32, 3)


CONVOLUTIONS = ((32, 1), (64, 2), (64, 1), (128, 2), (128, 1))
NETWORKS = {"dense": dense_network, "conv": conv_network}


def wrapped(layer):
    return lambda *args, **kwargs: kr.layers.RenormalizedPruning(layer(*args, **kwargs))


LAYERS = {
    "dense": (keras.layers.Dense, keras.layers.Conv2D),
    "prunable": (kr.layers.PrunableDense, kr.layers.PrunableConv2D),
    # Without the callback, which spares them a pass.
    "in full": (kr.layers.PrunableDense, kr.layers.PrunableConv2D),
    "wrapper": (wrapped(keras.layers.Dense), wrapped(keras.layers.Conv2D)),
}


def training(network, kind, every, change, steps):
    """A function that trains for an epoch and answers the seconds of a step, callbacks included: the mean."""
    keras.utils.set_random_seed(0)
    if kind == "tfmot":
        import tensorflow_model_optimization as tfmot
        import tf_keras as library

        sparse = tfmot.sparsity.keras
        model, shape = NETWORKS[network](library, library.layers.Dense, library.layers.Conv2D)
        model.build((None, *shape))
        schedule = sparse.ConstantSparsity(SPARSITY, begin_step=0, end_step=-1, frequency=every or 10**9)
        model = sparse.prune_low_magnitude(model, pruning_schedule=schedule)
        callbacks = [sparse.UpdatePruningStep()]
    else:
        library = keras
        model, shape = NETWORKS[network](keras, *LAYERS[kind])
        model.build((None, *shape))
        schedule = kr.schedules.ConstantSparsity(SPARSITY, begin_step=0, end_step=-1, frequency=every or 10**9)
        if change:
            schedule = kr.schedules.PolynomialDecay(0.5, 0.95, begin_step=0, end_step=10**4, power=1, frequency=every)
        callbacks = [] if kind in ("dense", "in full") else [kr.callbacks.UpdatePruning(schedule)]
    model.compile(optimizer=library.optimizers.Adam(), loss=library.losses.SparseCategoricalCrossentropy(from_logits=True))
    x = np.random.default_rng(0).random((BATCH * steps, *shape), np.float32)
    y = np.arange(len(x)) % 10
    times = step_times(library.callbacks.Callback)

    def train():
        model.fit(x, y, batch_size=BATCH, verbose=0, callbacks=[*callbacks, times])
        # An epoch begins with ten steps that apply masks in full.
        return float(np.mean(times.seconds[10:]))

    return train


def step(arguments):
    rows = []
    cases = [("dense", None, False), ("dense again", None, False)]
    cases += [(kind, None, False) for kind in ("prunable", "in full", "wrapper", "tfmot")]
    updates = [("prunable", every, change) for every in arguments.every for change in (False, True)]
    updates += [("tfmot", every, False) for every in arguments.every]
    for network in arguments.network:
        shown = cases + updates if network == "dense" else cases
        functions = {
            case: training(network, case[0].removesuffix(" again"), *case[1:], 110 if case[1] in (None, 100) else 30)
            for case in shown
        }
        seconds = in_turns(functions, arguments.runs)
        # Twice, to see how far two that are the same lie apart.
        plain = (seconds[cases[0]] + seconds[cases[1]]) / 2
        print(f"\n{network} network, Adam, batch {BATCH}: a step without masks takes {1e3 * np.median(plain):.1f} ms")
        for kind, every, change in shown:
            when = "no update" if every is None else f"update every {every} steps" + (", masks change" if change else "")
            ratio = float(np.median(seconds[kind, every, change] / plain))
            print(f"  {kind:12} {when:36} {ratio:6.2f}x", flush=True)
            rows.append(
                dict(
                    network=network,
                    layers=kind,
                    update=when,
                    ratio=ratio,
                    milliseconds=1e3 * float(np.median(seconds[kind, every, change])),
                )
            )
    return rows


def selections(scores, rivals):
    """Ways to choose the mask of a kernel."""
    import tensorflow as tf

    half = compute_mask(scores, 0.5)
    ours = {
        "unstructured": lambda: compute_mask(scores, SPARSITY),
        "unstructured, half are gone": lambda: compute_mask(scores, SPARSITY, mask=half),
    }
    if not rivals:
        return ours
    return ours | {
        "group='unit'": lambda: compute_mask(scores, SPARSITY, group="unit"),
        "Block((4, 1))": lambda: compute_mask(scores, SPARSITY, kr.patterns.Block((4, 1))),
        "NOfM(2, 4)": lambda: compute_mask(scores, 0.5, kr.patterns.NOfM(2, 4)),
        "unit": lambda: compute_mask(scores, SPARSITY, "unit"),
        "numpy.partition alone": lambda: np.partition(scores.reshape(-1), int(SPARSITY * scores.size)),
        "tf.math.top_k of all (tfmot)": lambda: tf.math.top_k(scores.reshape(-1), scores.size),
    }


def update(arguments):
    rows = []
    for millions in arguments.millions:
        side = round((millions * 1e6) ** 0.5)
        scores = np.abs(np.random.default_rng(0).standard_normal((side, side), np.float32))
        print(f"\nmask of {millions} million weights")
        seconds = medians(selections(scores, rivals=millions <= 30), arguments.runs if millions <= 30 else 3)
        for name, one in seconds.items():
            rows.append(dict(millions=millions, mask=name, nanoseconds=1e9 * one / scores.size))
            print(f"  {name:32} {rows[-1]['nanoseconds']:7.2f} ns a weight", flush=True)
    return rows


def _memory(field):
    return 1024 * int(next(line for line in open("/proc/self/status") if line.startswith(field)).split()[1])


def _prune_alone(millions):
    """In a process of its own, whose peak is this model's."""
    side = min(4096, int((millions * 1e6 / 3) ** 0.5))
    layers = [keras.layers.Dense(side, use_bias=False) for _ in range(round(millions * 1e6 / side**2))]
    model = keras.Sequential([keras.Input((side,)), *layers])
    pathlib.Path("/proc/self/clear_refs").write_text("5")
    size, before = 4 * model.count_params(), _memory("VmRSS")
    started = time.perf_counter()
    kr.prune(model, SPARSITY, renormalize="l1")
    return time.perf_counter() - started, 1 + (_memory("VmHWM") - before) / size


def prune(arguments):
    rows = []
    print("\none-shot pruning of Dense layers of up to 4096x4096, magnitude, l1; peak memory beside the weights of the model")
    for millions in arguments.millions:
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            seconds, peak = pool.apply(_prune_alone, (millions,))
        rows.append(dict(millions=millions, seconds=seconds, nanoseconds=1e3 * seconds / millions, peak=peak))
        print(f"  {millions:4} million  {seconds:6.2f} s  {1e3 * seconds / millions:6.1f} ns a weight  {peak:.2f}x", flush=True)
    return rows


def _network_to_ship():
    model, shape = conv_network(keras, keras.layers.Dense, keras.layers.Conv2D)
    model.build((None, *shape))
    return model, np.random.default_rng(0).random((1024, *shape), np.float32)


def calibrate(arguments):
    model, samples = _network_to_ship()
    functions = {
        "the model on the samples": lambda: model.predict(samples, batch_size=BATCH, verbose=0),
        "renormalize='lstsq'": lambda: kr.prune(model, SPARSITY, "magnitude", calibration=samples, verbose=0),
        "criterion='admm' (default)": lambda: kr.prune(model, SPARSITY, calibration=samples, verbose=0),
    }
    return _beside(functions, "one-shot pruning with 1024 samples, convolutional network", 3)


def copy(arguments):
    """Copies that are run beside their originals, in turns with Keras' own copy by config, which is not."""
    model = keras.applications.ResNet50(weights=None)
    prunable = kr.to_prunable(model)

    def by_keras():
        keras.models.clone_model(model).set_weights(model.get_weights())

    functions = {
        "clone_model and set_weights": by_keras,
        "to_prunable": lambda: kr.to_prunable(model),
        "strip": lambda: kr.strip(prunable),
        "compact": lambda: kr.compact(model),
    }
    return _beside(functions, "copies of ResNet50", arguments.runs)


def export(arguments):
    model, _ = _network_to_ship()
    pruned = kr.prune(model, SPARSITY)
    with tempfile.TemporaryDirectory() as folder:
        functions = {
            "Keras' export of the dense model": lambda: model.export(f"{folder}/a.tflite", format="litert", verbose=False),
            "export_tflite of the pruned model": lambda: kr.export_tflite(pruned, f"{folder}/b.tflite"),
        }
        return _beside(functions, "export of the convolutional network, with loading and comparing", 3)


def _beside(functions, title, runs):
    seconds = medians(functions, runs)
    first = next(iter(seconds.values()))
    print(f"\n{title}")
    for name, one in seconds.items():
        print(f"  {name:36} {one:6.2f} s  {one / first:5.1f}x", flush=True)
    return [dict(what=name, seconds=one, ratio=one / first) for name, one in seconds.items()]


def import_(arguments):
    program = "import time; a = time.perf_counter(); import keras; b = time.perf_counter(); import keras_renorm; "
    program += "print(b - a, time.perf_counter() - b)"
    with tempfile.TemporaryDirectory() as compiled:
        # As after `pip install`, which leaves compiled modules: the first run compiles them and is not counted.
        environment = {**os.environ, "PYTHONPYCACHEPREFIX": compiled, "PYTHONDONTWRITEBYTECODE": ""}
        command = [sys.executable, "-c", program]
        answers = [subprocess.run(command, capture_output=True, text=True, env=environment).stdout for _ in range(10)]
    keras_alone, added = np.median(np.array([answer.split() for answer in answers[1:]], float), axis=0)
    print(f"\nimport keras {keras_alone:.2f} s, then keras_renorm {added:.3f} s")
    return [dict(keras=keras_alone, keras_renorm=added)]


PARTS = {
    "step": step,
    "update": update,
    "prune": prune,
    "calibrate": calibrate,
    "copy": copy,
    "export": export,
    "import": import_,
}


def machine():
    names = ("keras", "keras-renorm", "tensorflow", "tf-keras", "tensorflow-model-optimization", "numpy")
    lines = pathlib.Path("/proc/cpuinfo").read_text().splitlines()
    return dict(
        processor=next(line.split(":")[1].strip() for line in lines if "model name" in line),
        cores=os.cpu_count(),
        python=platform.python_version(),
        **{name: importlib.metadata.version(name) for name in names},
    )


def picture(results, path):
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    parts = [part for part in ("step", "update", "prune") if results.get(part)]
    if not parts:
        return
    figure, axes = plt.subplots(1, len(parts), figsize=(6 * len(parts), 4.5), squeeze=False, layout="constrained")
    for ax, part in zip(axes[0], parts):
        rows = results[part]
        if part == "step":
            shown = [row for row in rows if row["network"] == rows[0]["network"] and row["layers"] != "dense"]
            ax.barh([f"{row['layers']}, {row['update']}" for row in shown], [row["ratio"] for row in shown], color="0.5")
            ax.axvline(1, color="black", linewidth=0.8)
            ax.invert_yaxis()
            ax.set(xscale="log", xlabel="training step, times a dense one", title=f"{rows[0]['network']} network")
        elif part == "update":
            for name, marker in zip(dict.fromkeys(row["mask"] for row in rows), "osv^Dx+*"):
                line = [(row["millions"], row["nanoseconds"]) for row in rows if row["mask"] == name]
                ax.plot(*zip(*line), marker=marker, label=name)
            ax.set(xscale="log", yscale="log", xlabel="million weights", ylabel="ns a weight", title="one mask")
            ax.legend(fontsize=7)
        else:
            ax.plot([row["millions"] for row in rows], [row["seconds"] for row in rows], "o-", color="black", label="seconds")
            ax.set(xscale="log", yscale="log", xlabel="million weights", ylabel="seconds", title="one-shot pruning")
            memory = ax.twinx()
            memory.plot([row["millions"] for row in rows], [row["peak"] for row in rows], "s--", color="0.5")
            memory.set(ylabel="peak memory, times the weights (dashed)", ylim=(0, None))
    figure.savefig(path, dpi=120)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--network", nargs="+", choices=NETWORKS, default=list(NETWORKS), help="of part step")
    parser.add_argument(
        "--millions", nargs="+", type=int, default=[1, 3, 10, 30, 100, 300], help="weights, of update and prune"
    )
    parser.add_argument(
        "--every", nargs="*", type=int, default=[100, 10, 1], help="steps between updates, of part step; none to leave them out"
    )
    parser.add_argument("--runs", type=int, default=7)
    parser.add_argument(
        "--out", default=str(pathlib.Path(__file__).parent / "results"), help="folder of the JSON and the picture"
    )
    arguments = parser.parse_args()
    out = pathlib.Path(arguments.out)
    out.mkdir(parents=True, exist_ok=True)
    results = {"machine": machine()}
    print("  ".join(f"{key} {value}" for key, value in results["machine"].items()), flush=True)
    for part in arguments.part:
        results[part] = PARTS[part](arguments)
        (out / "speed.json").write_text(json.dumps(results, indent=1))
    picture(results, out / "speed.png")


if __name__ == "__main__":
    main()
