import keras
import numpy as np
import pytest

import keras_renorm as kr

L = keras.layers


def model():
    return keras.Sequential(
        [
            keras.Input((8, 8, 2)),
            L.Conv2D(4, 3, name="conv"),
            L.BatchNormalization(),
            L.Flatten(),
            L.Dense(5, name="fc"),
        ]
    )


def test_rows_of_a_prunable_model():
    prunable = kr.to_prunable(model(), layers="fc", group="unit")
    prunable.get_layer("fc").update_masks(0.75)
    summary = kr.summary(prunable)
    assert [(row.layer, row.kernel, row.weights, row.kept) for row in summary.rows] == [
        ("conv", "kernel", 72, 72),
        ("fc", "kernel", 720, 180),
    ]
    assert summary.rows[1].sparsity == 0.75
    assert summary.rows[1].pattern == "Unstructured()"
    scale = prunable.get_layer("fc").scale.numpy()
    assert summary.rows[1].scale == (pytest.approx(scale.min()), pytest.approx(scale.max()))
    assert summary.sparsity == pytest.approx(540 / 792)
    assert summary.notes == ()


def test_rows_of_a_plain_model():
    summary = kr.summary(kr.prune(model(), 0.5, allocation="uniform"))
    assert [row.sparsity for row in summary.rows] == [0.5, 0.5]
    assert summary.sparsity == 0.5


def test_the_table():
    text = str(kr.summary(kr.prune(model(), 0.5, allocation="uniform")))
    assert text.splitlines()[0].split() == ["layer", "kernel", "pattern", "weights", "kept", "sparsity", "scale"]
    assert text.splitlines()[-1].split() == ["total", "792", "396", "0.5000"]
    assert repr(kr.summary(model())) == str(kr.summary(model()))


def test_what_cannot_be_pruned_is_noted():
    lora = model()
    lora.get_layer("fc").enable_lora(2)
    summary = kr.summary(lora)
    assert [row.layer for row in summary.rows] == ["conv"]
    assert "layer 'fc' uses LoRA" in summary.notes[0]


def test_kernels_of_a_layer_with_several():
    attention = kr.layers.RenormalizedPruning(L.MultiHeadAttention(2, 4), name="attention")
    x = keras.Input((5, 8))
    summary = kr.summary(keras.Model(x, attention(x, x)))
    assert {row.kernel.split("/")[-2] for row in summary.rows} == {"query", "key", "value", "attention_output"}


def test_it_counts_zeros_of_a_mask_not_of_the_kernel():
    prunable = kr.to_prunable(model())
    layer = prunable.get_layer("fc")
    layer.kernel.assign(np.zeros(layer.kernel.shape))
    assert kr.summary(prunable).sparsity == 0
