"""What sparsity gains in a `.tflite` file: bytes against the information in them, latency, and instructions on Arm.

- dense: two Dense layers of 4096, pruned in blocks, beside the dense export, on this machine.
- mobile: a MobileNet that qualifies for XNNPACK's sparse path, and those of keras.applications as they are and repaired. This
  path is for Arm: with `--count`, a command that prints `FILE<tab>NUMBER ...` for a file, instructions are counted.
- size: bytes of weights against the entropy of their masks and the values that are kept.
- accuracy: a network for images pruned in blocks and in single weights, with calibration.

    python benchmarks/edge.py
    python benchmarks/edge.py --part mobile --count "path/to/counter"
    python benchmarks/edge.py --part accuracy --dataset fashion_mnist
"""

from __future__ import annotations

import argparse
import os
import pathlib
import shlex
import subprocess
import sys
import tempfile

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
sys.path.insert(0, str(pathlib.Path(__file__).parents[1] / "examples"))

import datasets
import keras
import networks
import numpy as np

import keras_renorm as kr

L = keras.layers
BITS = {"float32": 32, "float16": 16, "int8": 8}


def dense(arguments, folder):
    print("\nTwo Dense layers of 4096, batch of one, one thread, on this machine")
    model = keras.Sequential([keras.Input((4096,)), L.Dense(4096, "relu"), L.Dense(4096)])
    cases = [
        (pattern, sparsity, None)
        for pattern in (kr.patterns.Block((4, 1)), kr.patterns.Unstructured())
        for sparsity in (0.9, 0.95)
    ]
    cases += [(pattern, 0.9, "int8") for pattern in (kr.patterns.Block((16, 1)), kr.patterns.Unstructured())]
    for pattern, sparsity, quantize in cases:
        kr.export_tflite(model, folder / "dense.tflite", quantize=quantize)
        pruned = kr.prune(model, sparsity, pattern=pattern, allocation="uniform")
        report = kr.export_tflite(pruned, folder / "pruned.tflite", quantize=quantize, smallest=True, storage="sparse")
        times = kr.export.benchmark(folder / "pruned.tflite", folder / "dense.tflite", runs=arguments.runs)
        print(
            f"{pattern!r:18} {sparsity:.0%} {quantize or 'float32':7}  {1e3 * times.rows[1].median:.2f} -> "
            f"{1e3 * times.rows[0].median:.2f} ms ({1 / times.ratio:.2f} times as fast)  file {report.ratio:.3f} of dense",
            flush=True,
        )


def mobile(arguments, folder):
    print("\nMobileNets, 224x224, 1x1 convolutions pruned to 90%: instructions of one inference")
    shape = (224, 224, 3)
    models = {"own": networks.mobile(shape, 1000)}
    for name in ("MobileNet", "MobileNetV2"):
        models[name] = getattr(keras.applications, name)(weights=None, input_shape=shape)
    for name, model in models.items():
        variants = {"dense": model}
        pointwise = [layer.name for layer in model.layers if type(layer) is L.Conv2D and layer.kernel_size == (1, 1)]
        variants["90%"] = pruned = kr.prune(model, 0.9, layers=pointwise, allocation="uniform", renormalize=None)
        if name != "own":
            variants["90%, repaired"] = kr.export.repair(pruned)
        first = None
        for kind, variant in variants.items():
            report = kr.export_tflite(variant, folder / "model.tflite", storage="sparse")
            path = kr.export.explain(report.path).sparse_path
            count = counted(arguments.count, report.path)
            first = first or count
            gain = f"{count / 1e6:7.1f} million ({first / count:.2f} times fewer)" if count else "not counted (--count)"
            print(f"{name:12} {kind:14} {report.bytes / 1e6:5.1f} MB  sparse path: {path!s:5}  {gain}", flush=True)


def counted(command, path):
    if not command:
        return None
    told = subprocess.run([*shlex.split(command), str(path)], capture_output=True, text=True, check=True).stdout
    return int(told.split("\t")[1].split()[0])


def size(arguments, folder):
    print("\nBytes of the weights over the entropy of the masks and the values kept (and of the whole file)")
    generator = np.random.default_rng(0)
    samples = generator.standard_normal((64, 1024)).astype("float32")
    model = keras.Sequential([keras.Input((1024,)), L.Dense(1024, "relu"), L.Dense(512)])
    image = generator.standard_normal((64, 32, 32, 3)).astype("float32")
    rows = [("Dense", model, samples), ("ResNet-20", networks.resnet((32, 32, 3), 10), image)]
    for name, model, data in rows:
        for quantize, full in ((None, False), ("float16", False), ("int8", True)):
            line = f"{name:10} {quantize or 'float32':8}"
            for sparsity in (0.8, 0.9, 0.95):
                pruned = kr.prune(model, sparsity, renormalize=None)
                settings = dict(quantize=quantize, smallest=True, representative_data=data if full else None, storage="sparse")
                report = kr.export_tflite(pruned, folder / "model.tflite", **settings)
                told = sum(information(tensor) for tensor in report.tensors)
                weights = sum(tensor.bytes for tensor in report.tensors)
                line += f"  {sparsity:.0%}: {weights / told:.2f} ({report.bytes / told:.2f})"
            print(line, flush=True)


def information(tensor):
    """Bytes: the entropy of the mask, and the values kept."""
    zeros, count = tensor.sparsity, np.prod(tensor.shape)
    entropy = -sum(share * np.log2(share) for share in (zeros, 1 - zeros) if share > 0)
    return count * (entropy + (1 - zeros) * BITS[tensor.dtype]) / 8


def accuracy(arguments, folder):
    train, test = datasets.load(arguments.dataset, arguments.data_dir)
    print(f"\nAccuracy on {arguments.dataset} of 512-256-{int(train[1].max()) + 1}, one shot with 2048 samples, three seeds")
    rows = {}
    for seed in range(3):
        keras.utils.set_random_seed(seed)
        layers = [L.Flatten(), L.Dense(512, "relu"), L.Dense(256, "relu"), L.Dense(int(train[1].max()) + 1)]
        model = keras.Sequential([keras.Input(train[0].shape[1:]), *layers])
        model.compile("adam", keras.losses.SparseCategoricalCrossentropy(from_logits=True))
        model.fit(*train, batch_size=128 if len(train[0]) > 5000 else 16, epochs=5 if len(train[0]) > 5000 else 20, verbose=0)
        for sparsity in (0.8, 0.9, 0.95):
            for pattern in (kr.patterns.Unstructured(), kr.patterns.Block((4, 1)), kr.patterns.Block((16, 1))):
                pruned = kr.prune(model, sparsity, pattern=pattern, calibration=train[0][:2048], verbose=0)
                rows.setdefault((repr(pattern), sparsity), []).append(share_right(pruned, test))
        rows.setdefault(("dense", 0.0), []).append(share_right(model, test))
    for (pattern, sparsity), values in sorted(rows.items(), key=lambda item: (item[0][1], item[0][0])):
        print(f"{sparsity:4.0%} {pattern:18} {np.mean(values):.4f} ({min(values):.4f} to {max(values):.4f})", flush=True)


def share_right(model, data):
    images, labels = data
    return float(np.mean(model.predict(images, batch_size=500, verbose=0).argmax(axis=-1) == labels))


PARTS = {"dense": dense, "mobile": mobile, "size": size, "accuracy": accuracy}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    datasets.add_arguments(parser)
    parser.add_argument("--part", nargs="*", choices=PARTS, default=list(PARTS))
    parser.add_argument("--runs", type=int, default=50)
    parser.add_argument("--count", help="command that counts the instructions of an inference on Arm")
    arguments = parser.parse_args()
    keras.utils.set_random_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        for part in arguments.part:
            PARTS[part](arguments, pathlib.Path(folder))


if __name__ == "__main__":
    main()
