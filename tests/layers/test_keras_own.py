"""Keras' own tests of Dense and convolutions pass with the prunable layers in their place, but for the numbers of variables."""

import importlib.util
import re
import types

import keras
import pytest
from keras.src import testing

import keras_renorm as kr

if importlib.util.find_spec("keras.src.layers.core.dense_test") is None:
    pytest.skip("this release of Keras comes without its tests", allow_module_level=True)

pytestmark = pytest.mark.filterwarnings("default")

PRUNABLE = {"Dense": kr.layers.PrunableDense, "Conv2D": kr.layers.PrunableConv2D}
# Mask, scale and step.
ADDED = 3

# Tests of what the prunable layers refuse -> the sentence that the user gets.
LORA = "does not take LoRA .*`keras_renorm.strip` this model and enable LoRA on the result"
QUANTIZED = "is not quantized: .*`keras_renorm.strip\\(model\\)` first, and quantize the result|prune before quantizing"
REFUSED = {
    r"DenseTest.test_enable_lora.*": LORA,
    r"DenseTest.test_lora_.*": LORA,
    # Not those of a mode that is none, and of a layer that is not built, which Keras refuses before it asks the layer.
    r"DenseTest.test_quantize_(?!invalid_mode|on_unbuilt_layer).*": f"{QUANTIZED}|{LORA}",
    r"DenseTest.test_dense_quantize_config_.*": QUANTIZED,
    r"DenseTest.test_dense_int[48]_.*": QUANTIZED,
    r"DenseTest.test_int4_.*": QUANTIZED,
    r"DenseTest.test_(gptq|awq)_.*": QUANTIZED,
    # After its part without quantization.
    r"DenseTest.test_legacy_load_own_variables": QUANTIZED,
    r"ConvBasicTest.test_enable_lora_conv2d_.*": LORA,
    r"ConvBasicTest.test_enable_lora_with_alpha": LORA,
    r"ConvBasicTest.test_lora_.*": LORA,
}


class _Layers(types.SimpleNamespace):
    """`keras.layers`, with the prunable ones in the place of Dense and Conv2D."""

    def __getattr__(self, name):
        return getattr(keras.layers, name)


def _run_layer_test(self, layer_cls, *args, **expected):
    if layer_cls in PRUNABLE.values():
        for name in ("expected_num_non_trainable_weights", "expected_num_non_trainable_variables"):
            if expected.get(name) is not None:
                expected[name] += ADDED
    testing.TestCase.run_layer_test(self, layer_cls, *args, **expected)


def _refused(test, sentence):
    def run(self):
        # An AssertionError where Keras expected a sentence of its own.
        with pytest.raises((ValueError, NotImplementedError, AssertionError), match=sentence):
            test(self)

    return run


def _with_prunable(module_name, class_name):
    """A test class of Keras, made anew among the prunable layers."""
    spec = importlib.util.find_spec(module_name)
    module = importlib.util.module_from_spec(spec)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(keras.src, "layers", _Layers(**PRUNABLE))
        spec.loader.exec_module(module)
    cls = getattr(module, class_name)
    changes = {"run_layer_test": _run_layer_test, "__module__": __name__}
    for name in dir(cls):
        if re.match("test.*conv(1d|3d)", name):
            changes[name] = None
        sentence = next((REFUSED[known] for known in REFUSED if re.fullmatch(known, f"{class_name}.{name}")), None)
        if sentence is not None:
            changes[name] = _refused(getattr(cls, name), sentence)
    return type(class_name, (cls,), changes)


DenseTest = _with_prunable("keras.src.layers.core.dense_test", "DenseTest")
ConvBasicTest = _with_prunable("keras.src.layers.convolutional.conv_test", "ConvBasicTest")
ConvCorrectnessTest = _with_prunable("keras.src.layers.convolutional.conv_test", "ConvCorrectnessTest")
