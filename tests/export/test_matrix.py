"""Every kind of network, quantization and pattern: the file loads, runs and agrees.

With a command in KERAS_RENORM_COUNT that prints `FILE<tab>NUMBER ...`, or `FILE<tab>failed ...`, for a file (a counter of
instructions on Arm, for instance), that must run it, too.
"""

import os
import shlex
import subprocess

import keras
import pytest

import keras_renorm as kr

pytest.importorskip("tensorflow")
if keras.backend.backend() != "tensorflow":
    pytest.skip("export needs TensorFlow", allow_module_level=True)

L = keras.layers


def sequential(shape, *layers):
    return keras.Sequential([keras.Input(shape), *layers])


def attention():
    inputs = keras.Input((8, 16))
    x = inputs + L.MultiHeadAttention(2, 16)(inputs, inputs)
    return keras.Model(inputs, L.Dense(4)(L.LayerNormalization()(L.Dense(32, "gelu")(x))))


def nested():
    inner = sequential((16,), L.Dense(64, "relu"), L.Dense(32, "relu"))
    inputs = keras.Input((16,))
    return keras.Model(inputs, L.Dense(4)(inner(inputs)))


def two_inputs():
    inputs = [keras.Input((32,), name="one"), keras.Input((8, 8, 4), name="other")]
    x = [L.Dense(64, "relu")(inputs[0]), L.Flatten()(L.Conv2D(16, 3, activation="relu")(inputs[1]))]
    return keras.Model(inputs, [L.Dense(3)(L.Concatenate()(x)), L.Dense(2)(x[0])])


NETWORKS = {
    "Dense": lambda: sequential((64,), L.Dense(128, "relu"), L.Dense(64, "relu"), L.Dense(4)),
    "Conv2D": lambda: sequential((12, 12, 3), L.Conv2D(16, 3, activation="relu"), L.Conv2D(32, 3), L.Flatten(), L.Dense(4)),
    "depthwise": lambda: sequential((12, 12, 8), L.DepthwiseConv2D(3), L.Conv2D(64, 1), L.GlobalAveragePooling2D(), L.Dense(4)),
    "separable": lambda: sequential((12, 12, 8), L.SeparableConv2D(64, 3), L.GlobalMaxPooling2D(), L.Dense(4)),
    "LSTM": lambda: sequential((6, 16), L.LSTM(32), L.Dense(4)),
    "GRU": lambda: sequential((6, 16), L.GRU(32), L.Dense(4)),
    "attention": attention,
    "Embedding": lambda: keras.Sequential(
        [keras.Input((6,), dtype="int32"), L.Embedding(100, 32), L.GlobalAveragePooling1D(), L.Dense(4)]
    ),
    "nested": nested,
    "two inputs": two_inputs,
}
PATTERNS = {
    "unstructured": ("unstructured", 0.8),
    "block": (kr.patterns.Block((4, 1)), 0.8),
    "n_of_m": (kr.patterns.NOfM(2, 4), 0.5),
    "unit": ("unit", 0.5),
}
QUANTIZATIONS = [None, "float16", "int8", "full int8"]
# Half floats that are unpacked before rows of them are looked up come out as zeros. When this fails, the runtime was mended.
FALL_BACK = {("Embedding", "float16")}
CASES = [(network, quantize, pattern) for network in NETWORKS for quantize in QUANTIZATIONS for pattern in PATTERNS]
# One of each in the quick suite: all networks, all patterns, all quantizations.
QUICK = {(network, QUANTIZATIONS[i % 4], list(PATTERNS)[(i + i // 4) % 4]) for i, network in enumerate(NETWORKS)}


def samples_for(model, generator):
    arrays = []
    for tensor in model.inputs:
        shape = (32, *tensor.shape[1:])
        is_integer = tensor.dtype == "int32"
        arrays.append(generator.integers(0, 100, shape) if is_integer else generator.standard_normal(shape))
    return [array.astype(tensor.dtype) for array, tensor in zip(arrays, model.inputs)]


@pytest.mark.parametrize(
    ("network", "quantize", "pattern"),
    [pytest.param(*case, marks=[] if case in QUICK else pytest.mark.slow, id="-".join(map(str, case))) for case in CASES],
)
def test_the_file_loads_runs_and_agrees(network, quantize, pattern, tmp_path, generator):
    model = NETWORKS[network]()
    pattern, sparsity = PATTERNS[pattern]
    pruned = kr.prune(model, sparsity, pattern=pattern)
    samples = samples_for(model, generator)
    full = dict(representative_data=samples) if quantize == "full int8" else {}
    report = kr.export_tflite(
        pruned, tmp_path / "model.tflite", quantize=quantize and quantize.removeprefix("full "), samples=samples, **full
    )
    tolerance = {None: 1e-5, "float16": 5e-3, "int8": 0.05, "full int8": 0.25}[quantize]
    assert report.difference <= tolerance * report.output_range
    assert report.bytes <= report.dense_bytes
    fell_back = any("does not run them sparse" in note for note in report.notes)
    assert fell_back == ((network, quantize) in FALL_BACK), report.notes
    told = kr.export.explain(report.path)
    assert sum(row.bytes for row in told.rows) < report.bytes
    assert all(0 <= row.density <= 1 for row in told.rows)
    if command := os.environ.get("KERAS_RENORM_COUNT"):
        told = subprocess.run([*shlex.split(command), str(report.path)], capture_output=True, text=True, check=True).stdout
        assert "failed" not in told
