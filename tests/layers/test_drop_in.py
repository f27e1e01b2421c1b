"""Laws of the drop-in layers: PrunableDense and PrunableConv2D are Dense and Conv2D, with masks."""

import inspect

import keras
import numpy as np
import pytest
from keras import ops

import keras_renorm as kr

LAYERS = pytest.mark.parametrize("cls", [kr.layers.PrunableDense, kr.layers.PrunableConv2D])

SETTINGS = {
    kr.layers.PrunableDense: [
        dict(units=5),
        dict(units=5, activation="relu", use_bias=False, kernel_initializer="he_normal"),
        dict(units=5, kernel_regularizer="l2", bias_regularizer="l1", activity_regularizer="l2", kernel_constraint="non_neg"),
        dict(units=5, dtype="float16", name="mine", trainable=False),
        dict(units=5, dtype="mixed_bfloat16"),
    ],
    kr.layers.PrunableConv2D: [
        dict(filters=6, kernel_size=3),
        dict(filters=6, kernel_size=(3, 2), strides=2, padding="same", activation="tanh", use_bias=False),
        dict(filters=6, kernel_size=3, groups=2, bias_initializer="ones"),
        dict(filters=6, kernel_size=2, dilation_rate=2, dtype="mixed_float16"),
        dict(filters=6, kernel_size=1, data_format="channels_first", kernel_regularizer="l1"),
    ],
}
CASES = pytest.mark.parametrize(("cls", "arguments"), [(cls, arguments) for cls in SETTINGS for arguments in SETTINGS[cls]])


def inputs_for(cls):
    shape = (4, 3, 8) if cls is kr.layers.PrunableDense else (2, 4, 8, 4)
    return np.random.default_rng(0).standard_normal(shape).astype("float32")


@LAYERS
def test_signature_is_keras_own(cls):
    ours, keras_own = inspect.signature(cls).parameters, inspect.signature(cls.plain_class).parameters
    shared = [(name, parameter.default) for name, parameter in ours.items() if name in keras_own and name != "kwargs"]
    assert shared == [(name, parameter.default) for name, parameter in keras_own.items() if name != "kwargs"]
    assert list(ours)[: len(shared)] == [name for name, _ in shared]
    added = [parameter for name, parameter in ours.items() if name not in keras_own]
    assert all(parameter.kind is parameter.KEYWORD_ONLY for parameter in added)
    calls = [inspect.signature(layer.call) for layer in (cls, cls.plain_class)]
    assert list(calls[0].parameters) == list(calls[1].parameters)


@CASES
def test_same_outputs_as_keras_own(cls, arguments):
    if arguments.get("data_format") == "channels_first" and keras.backend.backend() == "tensorflow":
        arguments = {**arguments, "data_format": "channels_last"}
    layer, plain = cls(**arguments), cls.plain_class(**arguments)
    x = inputs_for(cls)
    layer(x)
    plain(x)
    plain.set_weights(layer.get_weights()[: len(plain.weights)])
    outputs, expected = layer(x), plain(x)
    assert outputs.dtype == expected.dtype
    np.testing.assert_array_equal(ops.convert_to_numpy(outputs), ops.convert_to_numpy(expected))
    np.testing.assert_allclose([float(x) for x in layer.losses], [float(x) for x in plain.losses], rtol=1e-6)
    assert layer.compute_output_shape(x.shape) == plain.compute_output_shape(x.shape)
    assert layer.trainable == plain.trainable


@CASES
def test_config_round_trip(cls, arguments):
    layer = cls(**arguments, pattern="unit", renormalize="l1", pruning_schedule=kr.schedules.ConstantSparsity(0.5, 3))
    again = cls.from_config(layer.get_config())
    assert again.get_config() == layer.get_config()


@CASES
def test_save_and_load_keeps_masks_and_scales(cls, arguments, tmp_path):
    if arguments.get("data_format") == "channels_first":
        arguments = {**arguments, "data_format": "channels_last"}
    x = inputs_for(cls)
    model = keras.Sequential([keras.Input(x.shape[1:]), cls(**arguments, group="unit")])
    model.layers[0].update_masks(0.5)
    model.save(tmp_path / "model.keras")
    again = keras.models.load_model(tmp_path / "model.keras")
    for one, other in zip(model.variables, again.variables, strict=True):
        np.testing.assert_array_equal(ops.convert_to_numpy(one), ops.convert_to_numpy(other))
    np.testing.assert_array_equal(model.predict_on_batch(x), again.predict_on_batch(x))
    model.save_weights(tmp_path / "model.weights.h5")
    again.layers[0].update_masks(0.9)
    again.load_weights(tmp_path / "model.weights.h5")
    np.testing.assert_array_equal(model.predict_on_batch(x), again.predict_on_batch(x))


@LAYERS
def test_mask_and_scale_are_not_trainable(cls):
    layer = cls(4) if cls is kr.layers.PrunableDense else cls(4, 3)
    # PyTorch puts words of its own in place of those of a property.
    words = "no attribute" if keras.backend.backend() == "torch" else "build it"
    with pytest.raises(AttributeError, match=words):
        layer.mask  # noqa: B018
    layer(inputs_for(cls))
    assert layer.mask.dtype == "bool"
    assert layer.mask.shape == layer.kernel.shape
    assert tuple(layer.scale.shape) == (4,)
    assert [variable.name for variable in layer.trainable_variables] == ["kernel", "bias"]
    assert {variable.name for variable in layer.non_trainable_variables} == {"mask", "scale", "pruning_step"}


@pytest.mark.fresh_optimizer
@LAYERS
@pytest.mark.parametrize("jit_compile", [False, True])
@pytest.mark.parametrize("optimizer", ["sgd", "adam", "adamw"])
def test_training_leaves_pruned_weights_out(cls, jit_compile, optimizer):
    x = inputs_for(cls)
    layer = cls(4, kernel_regularizer="l2") if cls is kr.layers.PrunableDense else cls(4, 3, kernel_regularizer="l2")
    model = keras.Sequential([keras.Input(x.shape[1:]), layer, keras.layers.Flatten(), keras.layers.Dense(1)])
    model.compile(optimizer, "mse", jit_compile=jit_compile)
    layer.update_masks(0.75)
    mask, kernel = layer.mask.numpy(), layer.kernel.numpy()
    model.fit(x, np.ones((len(x), 1)), epochs=2, verbose=0)
    np.testing.assert_array_equal(layer.mask.numpy(), mask)
    moved = layer.kernel.numpy() != kernel
    assert moved[mask].all()
    if optimizer != "adamw":
        assert not moved[~mask].any()


@LAYERS
def test_the_regularizer_sees_the_effective_kernel(cls):
    layer = cls(4, kernel_regularizer="l2") if cls is kr.layers.PrunableDense else cls(4, 3, kernel_regularizer="l2")
    layer(inputs_for(cls))
    layer.update_masks(0.5)
    layer.scale.assign(2 * np.ones(4))
    effective = layer.kernel.numpy() * layer.mask.numpy() * 2
    assert float(layer.losses[0]) == pytest.approx(0.01 * np.sum(effective**2), rel=1e-5)


@LAYERS
def test_lora_is_refused(cls):
    arguments = (4,) if cls is kr.layers.PrunableDense else (4, 3)
    with pytest.raises(ValueError, match=r"does not take LoRA.*keras_renorm.strip"):
        cls(*arguments, lora_rank=2)
    layer = cls(*arguments)
    layer(inputs_for(cls))
    with pytest.raises(ValueError, match="does not take LoRA"):
        layer.enable_lora(2)
