"""A model that was pruned on one backend loads on the others, in a fresh process, with the same outputs."""

import importlib.util
import os
import subprocess
import sys

import keras
import numpy as np
import pytest

import keras_renorm as kr

OTHERS = [
    name
    for name in ("tensorflow", "jax", "torch")
    if name != keras.backend.backend() and importlib.util.find_spec(name) is not None
]
LOAD = """
import sys
import keras, numpy as np
import keras_renorm as kr
model = keras.models.load_model(sys.argv[1])
data = np.load(sys.argv[2])
print(keras.backend.backend(), np.abs(keras.ops.convert_to_numpy(model(data["x"])) - data["outputs"]).max())
print(*(layer.sparsity for layer in model.layers if hasattr(layer, "sparsity")))
"""


@pytest.mark.skipif(not OTHERS, reason="no other backend is installed")
@pytest.mark.parametrize("other", OTHERS)
def test_a_pruned_model_loads_on_other_backends(other, tmp_path, generator):
    layers = [
        kr.layers.PrunableConv2D(4, 3, padding="same", activation="relu"),
        keras.layers.Reshape((16, 4)),
        kr.layers.RenormalizedPruning(keras.layers.LSTM(8), pattern=kr.patterns.Block((4, 1))),
        kr.layers.PrunableDense(3, group="unit"),
    ]
    model = keras.Sequential([keras.Input((4, 4, 2)), *layers])
    for layer in model.layers:
        if hasattr(layer, "update_masks"):
            layer.update_masks(0.5)
    x = generator.standard_normal((5, 4, 4, 2)).astype("float32")
    outputs = keras.ops.convert_to_numpy(model(x))
    model.save(tmp_path / "model.keras")
    np.savez(tmp_path / "data.npz", x=x, outputs=outputs)
    loaded = subprocess.run(
        [sys.executable, "-c", LOAD, tmp_path / "model.keras", tmp_path / "data.npz"],
        env={**os.environ, "KERAS_BACKEND": other},
        capture_output=True,
        text=True,
    )
    assert loaded.returncode == 0, loaded.stderr[-3000:]
    backend, difference, *sparsities = loaded.stdout.split()
    assert backend == other
    assert float(difference) < 1e-5
    assert [float(one) for one in sparsities] == [layer.sparsity for layer in model.layers if hasattr(layer, "sparsity")]
