import functools
import importlib.metadata
import os
import warnings

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras
import numpy as np
import pytest


def pytest_report_header():
    """The releases that a result is about."""
    names = ("keras", "numpy", "tensorflow", "ai-edge-litert", "tensorflow-model-optimization", "jax", "torch")
    there = {distribution.name: distribution.version for distribution in importlib.metadata.distributions()}
    return "with " + ", ".join(f"{name} {there[name]}" for name in names if name in there)


def pytest_collection_modifyitems(items):
    if keras.backend.backend() == "torch":
        for item in items:
            if "several steps" in item.name or "several_steps" in item.name or "steps_per_execution" in item.name:
                item.add_marker(pytest.mark.skip(reason="Keras on PyTorch takes one step at a time"))


@pytest.fixture(autouse=True)
def fixed_seeds():
    keras.utils.clear_session(free_memory=False)
    keras.utils.set_random_seed(7)


@pytest.fixture(autouse=True)
def optimizers_are_built(request, monkeypatch):
    """On TensorFlow Keras traces a training step twice if the optimizer makes its variables in the first one.

    Tests marked `fresh_optimizer` leave that to Keras; so do all programs in processes of their own.
    """
    if keras.backend.backend() != "tensorflow" or request.node.get_closest_marker("fresh_optimizer"):
        return
    fit = keras.Model.fit

    @functools.wraps(fit)
    def fit_built(self, *args, **kwargs):
        if self.compiled and self.built and not self.optimizer.built:
            with self.distribute_strategy.scope():
                self.optimizer.build(self.trainable_variables)
        return fit(self, *args, **kwargs)

    monkeypatch.setattr(keras.Model, "fit", fit_built)


@pytest.fixture
def tf():
    """TensorFlow, in tests that look at tensors of the backend with it."""
    if keras.backend.backend() != "tensorflow":
        pytest.skip("TensorFlow is not the backend")
    return importlib.import_module("tensorflow")


@pytest.fixture
def eager():
    """No tracing, which takes longer than the few steps of a small test."""
    if keras.backend.backend() != "tensorflow":
        yield
        return
    tensorflow = importlib.import_module("tensorflow")
    tensorflow.config.run_functions_eagerly(True)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Even though the `tf.config.experimental_run_functions_eagerly` option")
        yield
    tensorflow.config.run_functions_eagerly(False)


@pytest.fixture
def generator():
    return np.random.default_rng(7)
