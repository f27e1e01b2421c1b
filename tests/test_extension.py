"""A criterion, a pattern, a renormalizer and a method from outside of the package: without an edit in it."""

import importlib
import json

import keras
import numpy as np
import pytest

import keras_renorm as kr
from keras_renorm.cli import main as cli
from tests import fresh

L = keras.layers

EXTENSION = '''
import keras
import numpy as np

import keras_renorm as kr

register = keras.saving.register_keras_serializable(package="extension")


@register
class OfItsUnit(kr.criteria.Criterion):
    """The size of a weight, as a share of the largest of its unit."""

    def __init__(self, power=1.0):
        self.power = power

    def __call__(self, kernel):
        sizes = np.abs(kernel) ** self.power
        return sizes / sizes.max(axis=tuple(range(kernel.ndim - 1)), keepdims=True)


@register
class Inputs(kr.patterns.Pattern):
    """Whole inputs: rows of a Dense kernel."""

    units_per_cell = None

    def cells(self, scores):
        return super().cells(scores).sum(axis=1, keepdims=True)

    def any(self, flags):
        return super().any(flags).any(axis=1, keepdims=True)

    def expand(self, kept, shape):
        return np.broadcast_to(kept, (kept.shape[0], shape[-1])).reshape(shape).copy()


@register
class ToOne(kr.renorm.Renormalizer):
    """Every unit gets the norm 1."""

    def __call__(self, before, after, input_axes):
        norm = np.sqrt(np.sum(after**2, axis=input_axes, keepdims=True))
        return np.where(norm > 0, 1 / np.maximum(norm, 1e-12), 1.0)


class Halve(keras.callbacks.Callback):
    """A method: after every epoch each layer loses half of what it has left."""

    def on_epoch_end(self, epoch, logs=None):
        for layer in self.model.layers:
            if hasattr(layer, "update_masks"):
                layer.update_masks(1 - (1 - layer.sparsity) / 2)
'''

GO_ON = """
import sys, keras, numpy as np, extension
model = keras.models.load_model(sys.argv[1])
layer = model.get_layer("hidden")
assert layer.criterion == extension.OfItsUnit(power=2.0), layer.criterion
assert layer.pattern == extension.Inputs() and layer.renormalize == extension.ToOne()
before = np.asarray(layer.mask)
model.fit(np.ones((16, 16)), np.ones((16, 4)), verbose=0, callbacks=[extension.Halve()])
after = np.asarray(layer.mask)
assert (after <= before).all()
print(layer.sparsity)
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("extension")
    (folder / "extension.py").write_text(EXTENSION)
    return folder


@pytest.fixture
def extension(folder, monkeypatch):
    monkeypatch.syspath_prepend(folder)
    return importlib.import_module("extension")


@pytest.fixture
def model():
    model = keras.Sequential([keras.Input((16,)), L.Dense(8, "relu", name="hidden"), L.Dense(4, name="logits")])
    model.compile("sgd", "mse")
    return model


def test_in_one_shot(extension, model):
    rules = dict(criterion=extension.OfItsUnit(), pattern=extension.Inputs(), renormalize=extension.ToOne())
    pruned = kr.prune(model, 0.5, allocation="uniform", **rules)
    for layer, inputs in zip(pruned.layers, (16, 8)):
        kernel = np.asarray(layer.kernel)
        kept = (kernel != 0).any(axis=1)
        assert kept.sum() == inputs // 2
        assert (kernel[kept] != 0).all()
        np.testing.assert_allclose(np.linalg.norm(kernel, axis=0), 1, rtol=1e-5)
    assert {(row.criterion, row.renormalize) for row in pruned.pruning_report.rows} == {("OfItsUnit", "ToOne")}


def test_by_registered_name(extension, model):
    by_name = kr.prune(model, 0.5, criterion="extension>OfItsUnit", pattern="extension>Inputs")
    by_instance = kr.prune(model, 0.5, criterion=extension.OfItsUnit(), pattern=extension.Inputs())
    for one, other in zip(by_name.get_weights(), by_instance.get_weights()):
        np.testing.assert_array_equal(one, other)


def test_while_training_and_in_a_fresh_process(extension, model, folder, tmp_path):
    rules = dict(criterion=extension.OfItsUnit(power=2.0), pattern=extension.Inputs(), renormalize=extension.ToOne())
    prunable = kr.to_prunable(model, layers="hidden", **rules)
    prunable.fit(np.ones((16, 16)), np.ones((16, 4)), epochs=2, verbose=0, callbacks=[extension.Halve()])
    assert prunable.get_layer("hidden").sparsity == 0.75
    prunable.save(tmp_path / "prunable.keras")
    assert float(fresh.run(GO_ON, tmp_path / "prunable.keras", path=(folder,))) == 0.875


def test_in_rounds(extension, model, generator):
    x = generator.standard_normal((64, 16)).astype("float32")
    fit = dict(x=x, y=x[:, :4], epochs=1)
    rules = dict(criterion=extension.OfItsUnit(), pattern=extension.Inputs(), renormalize=extension.ToOne())
    found = kr.methods.prune_iteratively(
        model, fit, metric="loss", floor=1e3, step=0.5, max_rounds=2, allocation="uniform", verbose=0, **rules
    )
    assert [row.held for row in found.history] == [True, True, True]
    assert found.sparsity == 0.75


def test_on_the_command_line(extension, model, folder, tmp_path, monkeypatch, capsys):
    model.save(tmp_path / "model.keras")
    monkeypatch.chdir(tmp_path)
    rules = ["--criterion", "extension>OfItsUnit", "--pattern", "extension>Inputs", "--renormalize", "extension>ToOne"]
    assert (
        cli.main(["prune", "model.keras", "--sparsity", "0.5", "--import", "extension", *rules, "-o", "p.keras", "--json"]) == 0
    )
    assert {row["criterion"] for row in json.loads(capsys.readouterr().out)["rows"]} == {"OfItsUnit"}
