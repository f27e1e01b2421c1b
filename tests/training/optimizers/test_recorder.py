import keras
import numpy as np
import pytest

import keras_renorm as kr
from tests import fresh

X = np.random.default_rng(0).standard_normal((32, 6)).astype("float32")
Y = np.random.default_rng(1).standard_normal((32, 1)).astype("float32")


def make(optimizer, **arguments):
    keras.utils.set_random_seed(3)
    model = keras.Sequential([keras.Input((6,)), keras.layers.Dense(8, "relu"), keras.layers.Dense(1)])
    model.compile(optimizer, "mse", **arguments)
    return model


def fit(model, epochs=2):
    return model.fit(X, Y, batch_size=8, epochs=epochs, verbose=0, shuffle=False)


def weights(model):
    return [keras.ops.convert_to_numpy(variable) for variable in model.trainable_variables]


def test_sums_by_hand():
    """Loss (w x - y)^2 of one sample a batch: gradients 2 (w x - y) x."""
    model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(1, use_bias=False, kernel_initializer="ones")])
    recorder = kr.optimizers.Recorder(keras.optimizers.SGD(0.1))
    model.compile(recorder, "mse")
    recorder.build(model.trainable_variables)
    recorder.reset_start()
    # w = [1, 1]: error 2 - 1 = 1, gradient [2, -2]; then w = [0.8, 1.2]: error 0.8 - 2 = -1.2, gradient [-2.4, 0].
    x, y = np.array([[1.0, -1.0], [1.0, 0.0]]), np.array([[-1.0], [2.0]])
    model.fit(x, y, batch_size=1, epochs=1, verbose=0, shuffle=False)
    kernel = model.layers[0].kernel
    np.testing.assert_allclose(recorder.gradient(kernel), [[4.4], [2.0]], rtol=1e-6)
    np.testing.assert_array_equal(recorder.start(kernel), [[1.0], [1.0]])
    np.testing.assert_allclose(keras.ops.convert_to_numpy(kernel), [[1.04], [1.2]], rtol=1e-6)
    recorder.reset_gradients()
    recorder.reset_start()
    assert not recorder.gradient(kernel).any()
    np.testing.assert_allclose(recorder.start(kernel), [[1.04], [1.2]], rtol=1e-6)


OPTIMIZERS = {
    "sgd": lambda: keras.optimizers.SGD(0.1, momentum=0.9),
    "adam": lambda: keras.optimizers.Adam(0.01),
    "adamw": lambda: keras.optimizers.AdamW(0.01, weight_decay=0.1),
    "clipped": lambda: keras.optimizers.Adam(0.01, global_clipnorm=0.1),
    "average": lambda: keras.optimizers.Adam(0.01, use_ema=True, ema_overwrite_frequency=3),
    "accumulation": lambda: keras.optimizers.Adam(0.01, gradient_accumulation_steps=2),
    "fixed loss scale": lambda: keras.optimizers.SGD(0.1, loss_scale_factor=64.0),
    "schedule": lambda: keras.optimizers.SGD(keras.optimizers.schedules.ExponentialDecay(0.1, 2, 0.5)),
}
WAYS = {
    "graph": {},
    "xla": dict(jit_compile=True),
    "eager": dict(run_eagerly=True),
    "several steps": dict(steps_per_execution=3),
}


def sum_of_gradients(optimizer):
    """The same, from the gradients that a training loop of its own sees."""
    import tensorflow as tf

    model, total = make(optimizer), 0
    optimizer.build(model.trainable_variables)
    scale = optimizer.loss_scale_factor or 1
    for start in list(range(0, 32, 8)) * 2:
        with tf.GradientTape() as tape:
            loss = tf.reduce_mean((model(X[start : start + 8]) - Y[start : start + 8]) ** 2)
        gradients = tape.gradient(loss, [variable.value for variable in model.trainable_variables])
        optimizer.apply([gradient * scale for gradient in gradients])
        total = total + np.abs(gradients[0])
    return total


@pytest.mark.parametrize("optimizer", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_training_goes_as_without_it_and_the_sums_are_those_of_the_gradients(optimizer):
    plain, recorded = make(optimizer()), make(kr.optimizers.Recorder(optimizer()))
    history, recorded_history = fit(plain), fit(recorded)
    np.testing.assert_allclose(recorded_history.history["loss"], history.history["loss"], rtol=1e-5)
    for one, other in zip(weights(plain), weights(recorded)):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-6)
    assert int(recorded.optimizer.iterations) == int(plain.optimizer.iterations)
    assert float(recorded.optimizer.learning_rate) == pytest.approx(float(plain.optimizer.learning_rate))
    if keras.backend.backend() == "tensorflow":
        recorder = recorded.optimizer
        expected = sum_of_gradients(optimizer())
        np.testing.assert_allclose(recorder.gradient(recorded.layers[0].kernel), expected, rtol=2e-3, atol=1e-4)


@pytest.mark.fresh_optimizer
@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
def test_every_way_to_train(way):
    plain, recorded = make("adam", **way), make(kr.optimizers.Recorder("adam"), **way)
    reference = make(kr.optimizers.Recorder("adam"))
    for model in (plain, recorded, reference):
        fit(model)
    for one, other in zip(weights(plain), weights(recorded)):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-6)
    kernel, same = recorded.layers[0].kernel, reference.layers[0].kernel
    np.testing.assert_allclose(recorded.optimizer.gradient(kernel), reference.optimizer.gradient(same), rtol=1e-3)


def recorder_in(model):
    optimizer = model.optimizer
    return optimizer if isinstance(optimizer, kr.optimizers.Recorder) else optimizer.inner_optimizer


@pytest.mark.parametrize("policy", ["mixed_float16", "mixed_bfloat16"])
def test_mixed_precision_records_unscaled_gradients(policy):
    reference = make(kr.optimizers.Recorder(keras.optimizers.SGD(0.01)))
    fit(reference)
    keras.config.set_dtype_policy(policy)
    try:
        optimizer = kr.optimizers.Recorder(keras.optimizers.SGD(0.01))
        if policy == "mixed_float16":
            optimizer = keras.optimizers.LossScaleOptimizer(optimizer, initial_scale=64.0)
        model = make(optimizer)
        fit(model)
    finally:
        keras.config.set_dtype_policy("float32")
    expected = recorder_in(reference).gradient(reference.layers[0].kernel)
    sums = recorder_in(model).gradient(model.layers[0].kernel)
    assert np.linalg.norm(sums - expected) < 0.05 * np.linalg.norm(expected)


def test_sums_of_half_precision_weights_do_not_stall():
    """A thousand gradients of 1 on a weight in bfloat16, whose numbers end to be whole at 256."""
    layer = keras.layers.Dense(1, use_bias=False, dtype="bfloat16")
    model = keras.Sequential([keras.Input((1,), dtype="bfloat16"), layer])
    recorder = kr.optimizers.Recorder(keras.optimizers.SGD(0.0))
    model.compile(recorder, lambda y_true, y_pred: keras.ops.mean(y_pred, axis=-1))
    model.fit(np.ones((1000, 1)), np.zeros((1000, 1)), batch_size=1, epochs=1, verbose=0)
    assert recorder.gradient(layer.kernel).tolist() == [[1000.0]]


def test_its_variables_are_saved_once(tmp_path):
    plain, recorded = make("adam"), make(kr.optimizers.Recorder("adam", gradients=False, start=False))
    sizes = []
    for model in (plain, recorded):
        fit(model, epochs=1)
        model.save(tmp_path / "m.keras")
        sizes.append((tmp_path / "m.keras").stat().st_size)
    assert len(recorded.optimizer.variables) == len(plain.optimizer.variables) + 3
    assert sizes[1] < 1.2 * sizes[0]


def test_gradients_of_an_embedding():
    """Token 2 comes twice in the batch and token 1 never."""
    model = keras.Sequential([keras.Input((3,), dtype="int32"), keras.layers.Embedding(4, 2), keras.layers.Flatten()])
    recorder = kr.optimizers.Recorder("sgd")
    model.compile(recorder, lambda y_true, y_pred: keras.ops.sum(y_pred, axis=-1))
    model.fit(np.array([[0, 2, 2], [3, 0, 2]]), np.zeros((2, 6)), batch_size=2, epochs=1, verbose=0)
    expected = np.array([2, 0, 3, 1])[:, None] / 2 * np.ones((1, 2))
    np.testing.assert_allclose(recorder.gradient(model.layers[0].embeddings), expected, rtol=1e-6)


def test_learning_rate_can_be_set():
    recorder = kr.optimizers.Recorder(keras.optimizers.SGD(0.5))
    recorder.learning_rate = 0.25
    assert float(recorder.inner_optimizer.learning_rate) == 0.25


def test_config():
    recorder = kr.optimizers.Recorder(keras.optimizers.SGD(0.5, momentum=0.9), gradients=False, name="mine")
    again = keras.optimizers.deserialize(keras.optimizers.serialize(recorder))
    assert again.get_config() == recorder.get_config()
    assert isinstance(again.inner_optimizer, keras.optimizers.SGD)


def test_saved_and_loaded_in_a_fresh_process(tmp_path):
    model = make(kr.optimizers.Recorder("adam"))
    fit(model)
    model.save(tmp_path / "m.keras")
    np.save(tmp_path / "gradient.npy", model.optimizer.gradient(model.layers[0].kernel))
    np.save(tmp_path / "start.npy", model.optimizer.start(model.layers[0].kernel))
    program = f"""
import keras, numpy as np, keras_renorm
model = keras.models.load_model(r"{tmp_path / "m.keras"}")
recorder, kernel = model.optimizer, model.layers[0].kernel
np.testing.assert_array_equal(recorder.gradient(kernel), np.load(r"{tmp_path / "gradient.npy"}"))
np.testing.assert_array_equal(recorder.start(kernel), np.load(r"{tmp_path / "start.npy"}"))
"""
    fresh.run(program)


def test_takes_up_what_its_optimizer_had_saved(tmp_path):
    plain = make("adam")
    fit(plain)
    plain.save_weights(tmp_path / "m.weights.h5")
    recorded = make(kr.optimizers.Recorder("adam"))
    recorded.optimizer.build(recorded.trainable_variables)
    recorded.load_weights(tmp_path / "m.weights.h5")
    for one, other in zip(plain.optimizer.variables, recorded.optimizer.inner_optimizer.variables):
        np.testing.assert_array_equal(keras.ops.convert_to_numpy(one), keras.ops.convert_to_numpy(other))


def test_what_is_not_recorded_is_an_error():
    model = make(kr.optimizers.Recorder("sgd", gradients=False))
    fit(model, epochs=1)
    with pytest.raises(ValueError, match="gradients=False.*Recorder\\(optimizer, gradients=True\\)"):
        model.optimizer.gradient(model.layers[0].kernel)
    with pytest.raises(ValueError, match="rank two or more"):
        model.optimizer.start(model.layers[0].bias)
    with pytest.raises(ValueError, match="not built.*trainable_variables=None"):
        kr.optimizers.Recorder("sgd").apply([np.ones((2, 2))])


def test_bad_arguments():
    with pytest.raises(ValueError, match="LossScaleOptimizer\\(Recorder"):
        kr.optimizers.Recorder(keras.optimizers.LossScaleOptimizer(keras.optimizers.SGD()))
    with pytest.raises(ValueError, match="optimizer"):
        kr.optimizers.Recorder(3)
