import keras
import numpy as np
import pytest

import keras_renorm as kr
from tests import fresh

IrrelevanceDecay = kr.optimizers.IrrelevanceDecay
X = np.random.default_rng(0).standard_normal((32, 6)).astype("float32")
Y = np.random.default_rng(1).standard_normal((32, 1)).astype("float32")


def linear(optimizer, weights, **arguments):
    """y = w x; with the loss (y - 0)^2 / 2, the gradient is y x."""
    model = keras.Sequential([keras.Input((len(weights),)), keras.layers.Dense(1, use_bias=False, name="fc")])
    model.compile(optimizer, lambda y_true, y_pred: keras.ops.mean(y_pred**2 / 2, axis=-1), **arguments)
    model.layers[0].kernel.assign(np.reshape(weights, (-1, 1)))
    return model


def train(model, x, steps=1):
    x = np.array([x] * steps, "float32")
    model.fit(x, np.zeros((steps, 1)), batch_size=1, epochs=1, verbose=0, shuffle=False)
    return keras.ops.convert_to_numpy(model.layers[0].kernel)[:, 0]


def formula(weights, x, gamma, alpha, relative, learning_rate):
    """One step of gradient descent, as in the paper."""
    weights, x = np.array(weights), np.array(x)
    gradient = (weights @ x) * x
    if relative:
        alpha = alpha * np.sqrt(np.mean(gradient**2))
    return weights - learning_rate * (gradient + 2 * gamma * weights * np.exp(-np.abs(gradient) / alpha))


@pytest.mark.parametrize("relative", [True, False])
@pytest.mark.fresh_optimizer
@pytest.mark.parametrize("way", [{}, dict(jit_compile=True), dict(run_eagerly=True)], ids=["graph", "xla", "eager"])
def test_one_step_by_hand(relative, way):
    weights, x = [1.0, -2.0, 3.0], [1.0, 0.0, 0.5]
    optimizer = IrrelevanceDecay(keras.optimizers.SGD(0.1), gamma=0.2, alpha=0.7, relative=relative)
    new = train(linear(optimizer, weights, **way), x)
    np.testing.assert_allclose(new, formula(weights, x, 0.2, 0.7, relative, 0.1), rtol=1e-5)
    # The numbers themselves: y = 2.5, g = (2.5, 0, 1.25), so w_2 decays fully, by 2 * 0.1 * 0.2 of itself.
    assert new[1] == pytest.approx(-2 * 0.96)


@pytest.mark.parametrize("scale", [None, 128.0])
def test_the_loss_scale_of_the_inner_optimizer_does_not_count(scale):
    weights, x = [1.0, -2.0, 3.0], [1.0, 0.0, 0.5]
    optimizer = IrrelevanceDecay(keras.optimizers.SGD(0.1, loss_scale_factor=scale), gamma=0.2, alpha=0.7, relative=False)
    np.testing.assert_allclose(train(linear(optimizer, weights), x), formula(weights, x, 0.2, 0.7, False, 0.1), rtol=1e-5)


def test_the_sum_is_clipped():
    """Norm of the sum, not of the gradient alone."""
    weights, x = [1.0, -2.0, 3.0], [1.0, 0.0, 0.5]
    optimizer = IrrelevanceDecay(keras.optimizers.SGD(1.0, clipnorm=0.5), gamma=0.2, alpha=0.7)
    step = train(linear(optimizer, weights), x) - weights
    assert np.linalg.norm(step) == pytest.approx(0.5, rel=1e-5)
    assert abs(step[1]) > 0.05


def test_accumulated_gradients_have_their_decay():
    weights, x = [1.0, -2.0, 3.0], [1.0, 0.0, 0.5]
    inner = keras.optimizers.SGD(0.1, gradient_accumulation_steps=2)
    new = train(linear(IrrelevanceDecay(inner, gamma=0.2, alpha=0.7), weights), x, steps=2)
    np.testing.assert_allclose(new, formula(weights, x, 0.2, 0.7, True, 0.1), rtol=1e-5)


def test_without_any_gradient_everything_decays():
    optimizer = IrrelevanceDecay(keras.optimizers.SGD(0.5), gamma=0.1)
    new = train(linear(optimizer, [1.0, -2.0, 3.0]), [0.0, 0.0, 0.0])
    np.testing.assert_allclose(new, [0.9, -1.8, 2.7], rtol=1e-6)


def test_gamma_goes_down_until_the_restart():
    optimizer = IrrelevanceDecay(keras.optimizers.SGD(0.5), gamma=0.1, decay_steps=4)
    model = linear(optimizer, [1.0])
    values = [float(train(model, [0.0])[0]) for _ in range(6)]
    factors = np.array(values) / np.array([1.0, *values[:-1]])
    np.testing.assert_allclose(factors, [0.9, 0.925, 0.95, 0.975, 1, 1], rtol=1e-6)
    optimizer.restart()
    assert float(train(model, [0.0])[0]) == pytest.approx(0.9 * values[-1])


def make(optimizer, **arguments):
    keras.utils.set_random_seed(3)
    model = keras.Sequential(
        [keras.Input((6,)), keras.layers.Dense(8, "relu", name="first"), keras.layers.Dense(1, name="second")]
    )
    model.compile(optimizer, "mse", **arguments)
    return model


def weights_after(optimizer, **arguments):
    model = make(optimizer, **arguments)
    model.fit(X, Y, batch_size=8, epochs=2, verbose=0, shuffle=False)
    return [keras.ops.convert_to_numpy(variable) for variable in model.trainable_variables]


def test_which_variables_decay():
    """With a temperature that leaves no gradient any relevance, this is plain L2 decay of the kernels it touches."""
    plain = weights_after("sgd")
    everywhere = weights_after(IrrelevanceDecay("sgd", gamma=0.5, alpha=1e9))
    excluded = weights_after(IrrelevanceDecay("sgd", gamma=0.5, alpha=1e9, exclude=["second"]))
    first, second = 0, 2
    for index, decayed, spared in ((first, everywhere, plain), (second, everywhere, plain), (first, excluded, plain)):
        assert np.linalg.norm(decayed[index]) < 0.95 * np.linalg.norm(spared[index])
    assert np.linalg.norm(excluded[second]) > 0.98 * np.linalg.norm(plain[second])
    one_step = linear(IrrelevanceDecay(keras.optimizers.SGD(0.5), gamma=0.1, exclude=["fc/kernel"]), [1.0])
    assert train(one_step, [0.0]).tolist() == [1.0]


def test_biases_do_not_decay():
    model = keras.Sequential([keras.Input((1,)), keras.layers.Dense(2, bias_initializer="ones")])
    model.compile(IrrelevanceDecay(keras.optimizers.SGD(0.5), gamma=0.1), lambda y_true, y_pred: 0 * y_pred[:, 0])
    model.fit(np.zeros((1, 1)), np.zeros((1, 1)), verbose=0)
    assert keras.ops.convert_to_numpy(model.layers[0].bias).tolist() == [1, 1]


@pytest.mark.parametrize("inner", ["adam", "rmsprop", "adamw", "lion"])
def test_any_optimizer_and_several_steps_an_execution(inner):
    expected = weights_after(IrrelevanceDecay(inner, gamma=0.1))
    assert any(not np.allclose(one, other, rtol=1e-3) for one, other in zip(expected, weights_after(inner)))
    for arguments in (dict(steps_per_execution=4), dict(jit_compile=True))[: 2 if inner == "adam" else 1]:
        for one, other in zip(expected, weights_after(IrrelevanceDecay(inner, gamma=0.1), **arguments)):
            np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("policy", ["mixed_float16", "mixed_bfloat16"])
def test_mixed_precision(policy):
    expected = weights_after(IrrelevanceDecay(keras.optimizers.SGD(0.1), gamma=0.1, alpha=0.5))
    keras.config.set_dtype_policy(policy)
    try:
        optimizer = IrrelevanceDecay(keras.optimizers.SGD(0.1), gamma=0.1, alpha=0.5)
        if policy == "mixed_float16":
            optimizer = keras.optimizers.LossScaleOptimizer(optimizer, initial_scale=64.0)
        weights = weights_after(optimizer)
    finally:
        keras.config.set_dtype_policy("float32")
    for one, other in zip(expected, weights):
        np.testing.assert_allclose(one, other, atol=0.05)


def test_pruned_weights_stay_pruned():
    model = keras.Sequential([keras.Input((6,)), kr.layers.PrunableDense(8), keras.layers.Dense(1)])
    model.compile(IrrelevanceDecay("adam", gamma=0.1), "mse")
    model.layers[0].update_masks(0.5)
    model.fit(X, Y, epochs=2, verbose=0)
    assert np.mean(keras.ops.convert_to_numpy(kr.strip(model).layers[0].kernel) == 0) == 0.5


def test_config_and_a_fresh_process(tmp_path):
    optimizer = IrrelevanceDecay(
        keras.optimizers.Adam(0.01), gamma=0.1, alpha=2.0, relative=False, decay_steps=7, exclude=["second"], name="mine"
    )
    again = keras.optimizers.deserialize(keras.optimizers.serialize(optimizer))
    assert again.get_config() == optimizer.get_config()
    model = make(optimizer)
    model.fit(X, Y, batch_size=8, epochs=1, verbose=0, shuffle=False)
    model.save(tmp_path / "m.keras")
    model.fit(X, Y, batch_size=8, epochs=1, verbose=0, shuffle=False)
    np.save(tmp_path / "kernel.npy", keras.ops.convert_to_numpy(model.layers[0].kernel))
    np.savez(tmp_path / "data.npz", x=X, y=Y)
    program = f"""
import keras, numpy as np, keras_renorm
model = keras.models.load_model(r"{tmp_path / "m.keras"}")
data = np.load(r"{tmp_path / "data.npz"}")
assert int(model.optimizer.steps) == 4
model.fit(data["x"], data["y"], batch_size=8, epochs=1, verbose=0, shuffle=False)
np.testing.assert_allclose(
    keras.ops.convert_to_numpy(model.layers[0].kernel), np.load(r"{tmp_path / "kernel.npy"}"), rtol=1e-5, atol=1e-7
)
"""
    fresh.run(program)


def test_two_replicas_do_as_one():
    if keras.backend.backend() != "tensorflow":
        pytest.skip("tf.distribute")
    program = """
import contextlib
import tensorflow as tf
cpu = tf.config.list_physical_devices("CPU")[0]
tf.config.set_logical_device_configuration(cpu, [tf.config.LogicalDeviceConfiguration()] * 2)
import keras, numpy as np, keras_renorm as kr
x = np.random.default_rng(0).standard_normal((64, 6)).astype("float32")
def run(strategy, wrap):
    keras.utils.set_random_seed(0)
    with strategy.scope() if strategy else contextlib.nullcontext():
        model = keras.Sequential([keras.Input((6,)), keras.layers.Dense(8, "relu"), keras.layers.Dense(1)])
        optimizer = wrap(keras.optimizers.SGD(0.1, momentum=0.9))
        model.compile(optimizer, "mse")
    model.fit(x, x[:, :1], epochs=3, batch_size=16, verbose=0, shuffle=False)
    weights = model.get_weights()
    if isinstance(optimizer, kr.optimizers.Recorder):
        weights.append(optimizer.gradient(model.layers[0].kernel))
    return weights
for wrap in (lambda inner: kr.optimizers.IrrelevanceDecay(inner, gamma=0.1), kr.optimizers.Recorder):
    for one, other in zip(run(None, wrap), run(tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"]), wrap)):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-6)
"""
    fresh.run(program)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(gamma=0), "`gamma`.*gamma=0"),
        (dict(gamma=float("nan")), "`gamma`.*gamma=nan"),
        (dict(alpha=-1.0), "`alpha`.*alpha=-1.0"),
        (dict(decay_steps=0), "`decay_steps`.*decay_steps=0"),
        (dict(relative="yes"), "`relative`.*'yes'"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        IrrelevanceDecay("adam", **arguments)
