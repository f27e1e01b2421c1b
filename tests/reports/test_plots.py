import sys

import keras
import numpy as np
import pytest

import keras_renorm as kr
from keras_renorm.src.methods.outcome import Outcome, Round

matplotlib = pytest.importorskip("matplotlib")
matplotlib.use("Agg")
plt = pytest.importorskip("matplotlib.pyplot")

L = keras.layers


@pytest.fixture(autouse=True)
def drawn():
    """Draws what a test made, so that nothing fails only when it is shown."""
    yield
    for number in plt.get_fignums():
        plt.figure(number).canvas.draw()
    plt.close("all")


@pytest.fixture
def model():
    layers = [L.Conv2D(6, 3, activation="relu", name="conv"), L.Flatten(), L.Dense(8, name="fc"), L.Dense(3, name="logits")]
    return keras.Sequential([keras.Input((6, 6, 2)), *layers])


@pytest.fixture
def prunable(model):
    prunable = kr.to_prunable(model, group="unit")
    for name, sparsity in (("conv", 0.5), ("fc", 0.75)):
        prunable.get_layer(name).update_masks(sparsity)
    return prunable


def labels_of(axis):
    return [label.get_text() for label in axis.get_ticklabels()]


def test_sparsity(prunable):
    ax = kr.plots.sparsity(prunable)
    # From the top: the order of the layers.
    assert labels_of(ax.yaxis)[::-1] == ["conv", "fc", "logits"]
    np.testing.assert_allclose([bar.get_width() for bar in ax.patches][::-1], [0.5, 0.75, 0])
    assert [text.get_text() for text in ax.texts][::-1] == ["50%", "75%", "0%"]
    np.testing.assert_allclose(ax.lines[0].get_xdata(), kr.summary(prunable).sparsity)
    assert kr.plots.sparsity(kr.summary(prunable), ax=ax) is ax
    with pytest.raises(ValueError, match="has no kernel whose sparsity"):
        kr.plots.sparsity(keras.Sequential([keras.Input((2,)), L.Activation("relu")]))


def test_sparsity_of_several_kernels_and_of_many_layers():
    lstm = keras.Sequential([keras.Input((3, 2)), L.LSTM(2, name="lstm")])
    assert labels_of(kr.plots.sparsity(lstm).yaxis) == ["lstm: lstm_cell/recurrent_kernel", "lstm: lstm_cell/kernel"]
    many = keras.Sequential([keras.Input((2,)), *(L.Dense(2) for _ in range(70))])
    ax = kr.plots.sparsity(many)
    assert labels_of(ax.yaxis) == []
    assert len(ax.patches) == 70


def test_mask(model, prunable):
    layer = prunable.get_layer("conv")
    ax = kr.plots.mask(layer)
    (image,) = ax.images
    kept = np.asarray(layer.mask).reshape(18, 6)
    np.testing.assert_array_equal(image.get_array(), kept)
    assert ax.get_title() == "conv: 50% zeros"
    assert kr.plots.mask(kr.strip(prunable).get_layer("conv"), ax=ax) is ax
    np.testing.assert_array_equal(ax.images[1].get_array(), kept)
    with pytest.raises(ValueError, match="`kernel` must be less than the number.*which is 0. Received: kernel=0"):
        kr.plots.mask(model.layers[1])
    with pytest.raises(TypeError, match="`layer` must be a Keras layer"):
        kr.plots.mask("conv")


def test_masks_of_units_along_any_axis_and_of_several_kernels():
    layer = L.Conv2DTranspose(5, 3)
    keras.Sequential([keras.Input((4, 4, 2)), layer])
    assert kr.plots.mask(layer).images[0].get_array().shape == (18, 5)
    lstm = L.LSTM(2, name="lstm")
    keras.Sequential([keras.Input((3, 4)), lstm])
    assert kr.plots.mask(lstm, kernel=0).images[0].get_array().shape == (4, 8)
    ax = kr.plots.mask(lstm, kernel=1)
    assert ax.images[0].get_array().shape == (2, 8)
    assert ax.get_title() == "lstm: lstm_cell/recurrent_kernel: 0% zeros"
    with pytest.raises(ValueError, match="which is 2. Received: kernel=2"):
        kr.plots.mask(lstm, kernel=2)


def test_kernels_before_and_after(model, prunable):
    axes = kr.plots.kernels(model, prunable, "fc")
    before, after = (ax.images[0] for ax in axes)
    np.testing.assert_allclose(before.get_array(), np.abs(np.asarray(model.get_layer("fc").kernel)))
    np.testing.assert_allclose(after.get_array(), np.abs(np.asarray(kr.strip(prunable).get_layer("fc").kernel)), rtol=1e-6)
    assert before.get_clim() == after.get_clim()
    assert [ax.get_title() for ax in axes] == ["fc before: 0% zeros", "fc after: 75% zeros"]
    own = plt.subplots(1, 2)[1]
    assert kr.plots.kernels(model, prunable, "fc", ax=own) is own
    with pytest.raises(ValueError, match=r"`layer` names no layer of `before`. Received: 'no'. There are: \['conv'"):
        kr.plots.kernels(model, prunable, "no")
    small = kr.compact(kr.prune(model, {"fc": 0.5}, pattern="unit"))
    with pytest.raises(ValueError, match="another shape before and after"):
        kr.plots.kernels(model, small, "fc")


def test_scores(model, prunable):
    layer = prunable.get_layer("fc")
    ax = kr.plots.scores(layer)
    removed, kept = (text.get_text() for text in ax.get_legend().get_texts())
    assert removed.startswith(f"removed: {layer.kernel.shape[0] * 6}")
    assert kept == f"kept: {layer.kernel.shape[0] * 2}"
    assert ax.get_xscale() == "log"
    assert kr.plots.scores(prunable, ax=ax) is ax
    plain = kr.plots.scores(kr.strip(prunable))
    assert "of them zero" in plain.get_legend().get_texts()[0].get_text()
    # Scores of a criterion of one's own may be negative.
    signed = kr.plots.scores(model, criterion=lambda kernel: kernel)
    assert signed.get_xscale() == "linear"
    assert len(signed.get_legend().get_texts()) == 1
    with pytest.raises(ValueError, match="needs calibration samples"):
        kr.plots.scores(model, criterion="obs")
    with pytest.raises(ValueError, match="has no kernel to draw"):
        kr.plots.scores(model.layers[1])


def test_scales(model, prunable):
    ax = kr.plots.scales(prunable)
    assert labels_of(ax.yaxis) == ["conv", "fc", "logits"]
    shares = np.asarray(ax.collections[0].get_array())
    np.testing.assert_allclose(shares.sum(axis=1), 1)
    assert shares[2].max() == 1
    of_one = kr.plots.scales(prunable.get_layer("fc"))
    assert sum(bar.get_height() for bar in of_one.patches) == pytest.approx(1)
    assert kr.plots.scales(prunable.get_layer("fc"), ax=of_one) is of_one
    with pytest.raises(ValueError, match="has no prunable layers.*before `keras_renorm.strip`"):
        kr.plots.scales(model)


def test_accuracy():
    curves = {"one seed": [0.9, 0.8, 0.5], "three": np.array([[0.9, 0.9, 0.8], [0.9, 0.8, 0.6], [0.9, 0.7, 0.7]])}
    ax = kr.plots.accuracy([0.5, 0.9, 0.995], curves, dense=0.95, ylabel="top 1")
    assert labels_of(ax.xaxis) == ["50%", "90%", "99.5%"]
    assert [line.get_label() for line in ax.lines] == ["dense", "one seed", "three"]
    np.testing.assert_allclose(ax.lines[2].get_ydata(), [0.9, 0.8, 0.7])
    (band,) = ax.collections
    lowest, highest = band.get_datalim(ax.transData).intervaly
    assert (lowest, highest) == (0.6, 0.9)
    assert kr.plots.accuracy([0.5], {"way": [0.9]}, ax=ax) is ax
    with pytest.raises(ValueError, match=r"`curves` must have 2 values in each row of 'way'.*\(3,\)"):
        kr.plots.accuracy([0.5, 0.9], {"way": [1, 2, 3]})


def test_curves_differ_in_print():
    """More ways than styles begin anew; the first eight are told apart without colors."""
    ax = kr.plots.accuracy([0.5, 0.9], {str(way): [1 - 0.1 * way, 0] for way in range(9)})
    looks = [(line.get_linestyle(), line.get_marker()) for line in ax.lines]
    assert len(set(looks[:8])) == 8
    assert looks[8] == looks[0]


def test_history():
    rows = [(0, 0.0, 0.99, True), (1, 0.5, 0.98, True), (2, 0.75, 0.9, False), (3, 0.6, 0.97, True)]
    found = Outcome(None, tuple(Round(n, s, 0.5, m, held, 1, 1.0) for n, s, m, held in rows), "val_accuracy", 0.95)
    ax = kr.plots.history(found)
    np.testing.assert_allclose(ax.lines[0].get_xydata(), [[1, 0.99], [0.5, 0.98], [0.4, 0.97]])
    np.testing.assert_allclose(ax.lines[1].get_xydata(), [[0.25, 0.9]])
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("weights left", "val_accuracy")
    assert ax.xaxis_inverted()
    assert found.plot(ax) is ax


def test_history_of_neural_relief():
    rows = [(0, 100, 0.99, 0.99), (1, 40, 0.98, 0.9), (2, 10, 0.97, 0.8)]
    history = tuple(
        Round(n, 0.0, 1.0, m, True, 1, 1.0, details={"before": before, "parameters": left}) for n, left, m, before in rows
    )
    ax = kr.plots.history(Outcome(None, history, "val_accuracy", None))
    np.testing.assert_allclose(ax.lines[0].get_xydata(), [[1, 0.99], [0.4, 0.98], [0.1, 0.97]])
    np.testing.assert_allclose(ax.lines[1].get_ydata(), [0.99, 0.9, 0.8])
    assert ax.get_xlabel() == "parameters left"
    assert [text.get_text() for text in ax.get_legend().get_texts()] == ["held", "before retraining"]


def test_without_matplotlib(prunable, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)
    with pytest.raises(ImportError, match=r"pip install 'keras-renorm\[plot\]'"):
        kr.plots.sparsity(prunable)
