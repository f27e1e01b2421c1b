import inspect

import keras
import numpy as np
import pytest

import keras_renorm as kr

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning:tensorboard"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning:google"),
]
L = keras.layers
X, Y = np.ones((32, 6), "float32"), np.ones((32, 1), "float32")


@pytest.fixture
def model():
    inner = keras.Sequential([keras.Input((8,)), L.Dense(8, "relu", name="fc")], name="inner")
    outer = [
        L.Dense(8, "relu", name="fc"),
        inner,
        L.Reshape((1, 8)),
        L.SeparableConv1D(3, 1, name="two"),
        L.Flatten(),
        L.Dense(1),
    ]
    model = kr.to_prunable(keras.Sequential([keras.Input((6,)), *outer], name="net"), layers=["fc", "two"])
    model.compile("sgd", "mse", metrics=["mae"])
    return model


def read(folder):
    """What TensorBoard would show: tag -> values by step."""
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    from tensorboard.util import tensor_util

    events = accumulator.EventAccumulator(str(folder), size_guidance={accumulator.TENSORS: 0})
    events.Reload()
    return {
        tag: {event.step: tensor_util.make_ndarray(event.tensor_proto) for event in events.Tensors(tag)}
        for tag in events.Tags()["tensors"]
    }


def fit(model, callbacks, **arguments):
    return model.fit(X, Y, batch_size=8, epochs=3, verbose=0, callbacks=callbacks, **arguments)


def test_what_a_layer_has_is_written_every_epoch(model, tmp_path):
    # An event after each epoch of four batches.
    schedule = kr.schedules.PolynomialDecay(0.0, 0.75, begin_step=4, end_step=12, frequency=4)
    seen = []
    look = keras.callbacks.LambdaCallback(
        on_epoch_end=lambda epoch, logs: seen.append(
            {layer.path: layer.sparsity for layer in kr.src.layers.prunable.prunable_layers(model)}
        )
    )
    history = fit(model, [kr.callbacks.UpdatePruning(schedule), kr.callbacks.PruningSummaries(tmp_path), look])
    written = read(tmp_path / "train")
    layers = {layer.path: layer for layer in kr.src.layers.prunable.prunable_layers(model)}
    assert {"net/fc", "inner/fc"} < set(layers)
    assert len(layers) == 3
    for path, layer in layers.items():
        values = written[f"epoch_sparsity/{path}"]
        np.testing.assert_allclose([values[epoch] for epoch in range(3)], [one[path] for one in seen], rtol=1e-6)
        scales = np.concatenate([np.ravel(kernel.scale) for kernel in layer.masked_kernels])
        np.testing.assert_allclose(written[f"epoch_scale_mean/{path}"][2], scales.mean(), rtol=1e-5)
        np.testing.assert_allclose(written[f"epoch_scale_max/{path}"][2], scales.max(), rtol=1e-5)
    assert written["epoch_sparsity"][2] == pytest.approx(history.history["sparsity"][-1])
    assert {"epoch_loss", "epoch_mae", "epoch_learning_rate"} < set(written)
    assert set(history.history) == {"loss", "mae", "sparsity"}


def test_the_order_of_callbacks_does_not_matter(model, tmp_path):
    schedule = kr.schedules.ConstantSparsity(0.5, begin_step=0)
    fit(model, [kr.callbacks.PruningSummaries(tmp_path), kr.callbacks.UpdatePruning(schedule)])
    assert read(tmp_path / "train")["epoch_sparsity"][0] == pytest.approx(0.5, abs=0.01)


def test_what_tensorboard_does_is_left_as_it_is(model, tmp_path):
    callback = kr.callbacks.PruningSummaries(str(tmp_path), histogram_freq=1, update_freq="batch")
    fit(model, [callback], validation_data=(X, Y))
    train, validation = read(tmp_path / "train"), read(tmp_path / "validation")
    assert any("scale" in tag and tag.endswith("/histogram") for tag in train)
    assert sorted(train["batch_loss"]) == list(range(1, 13))
    assert sorted(train["epoch_sparsity/net/fc"]) == [0, 1, 2]
    assert "epoch_loss" in validation
    assert not any("sparsity" in tag for tag in validation)
    assert inspect.signature(kr.callbacks.PruningSummaries) == inspect.signature(keras.callbacks.TensorBoard)


def test_a_model_without_prunable_layers(tmp_path):
    plain = keras.Sequential([keras.Input((6,)), L.Dense(1)], name="plain")
    plain.compile("sgd", "mse")
    with pytest.raises(ValueError, match="'plain' has no prunable layers.*to_prunable"):
        fit(plain, [kr.callbacks.PruningSummaries(tmp_path)])
