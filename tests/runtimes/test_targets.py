import keras
import numpy as np
import pytest
from keras import ops

import keras_renorm as kr
from keras_renorm.src.runtimes import targets
from tests.runtimes.test_xnnpack import mobile

L = keras.layers


def conv_net():
    layers = [
        L.Conv2D(16, 3, activation="relu", name="first"),
        L.Conv2D(32, 1, activation="relu", name="pointwise"),
        L.GlobalAveragePooling2D(),
        L.Dense(12, "relu", name="hidden"),
        L.Dense(10, name="last"),
    ]
    return keras.Sequential([keras.Input((12, 12, 3)), *layers])


def shape_of_zeros(kernel):
    """What goes together in a kernel: a name."""
    matrix = np.asarray(kernel).reshape(-1, kernel.shape[-1]) != 0
    if (matrix.any(axis=0) == matrix.all(axis=0)).all():
        return "unit"
    for block in (16, 4):
        if len(matrix) % block == 0:
            cells = matrix.reshape(-1, block, matrix.shape[1])
            if (cells.any(axis=1) == cells.all(axis=1)).all():
                return block
    return "single"


@pytest.mark.parametrize("calibrated", [False, True])
@pytest.mark.parametrize(
    ("target", "expected"),
    [
        ("litert", dict(first="unit", pointwise="unit", hidden=4, last=4)),
        ("litert-int8", dict(first="unit", pointwise="unit", hidden=16, last="single")),
    ],
)
def test_patterns_in_a_network_without_a_sparse_path(target, expected, calibrated, generator):
    samples = generator.standard_normal((64, 12, 12, 3)).astype("float32") if calibrated else None
    pruned = kr.prune(conv_net(), 0.5, target=target, calibration=samples, renormalize=None, verbose=0)
    assert {name: shape_of_zeros(pruned.get_layer(name).kernel) for name in expected} == expected


def test_single_weights_where_the_sparse_path_holds():
    pruned = kr.prune(mobile(), 0.8, target="litert")
    kinds = {layer.name: shape_of_zeros(layer.kernel) for layer in pruned.layers if type(layer) is L.Conv2D}
    first, *pointwise = kinds.values()
    assert (first, set(pointwise)) == ("unit", {"single"})
    assert not (np.asarray(next(layer for layer in pruned.layers if type(layer) is L.Conv2D).kernel) == 0).any()
    depthwise = [layer for layer in pruned.layers if type(layer) is L.DepthwiseConv2D]
    assert all(np.count_nonzero(layer.kernel) == np.asarray(layer.kernel).size for layer in depthwise)
    # Integers have no such path.
    pruned = kr.prune(mobile(), 0.5, target="litert-int8")
    kinds = [shape_of_zeros(layer.kernel) for layer in pruned.layers if type(layer) is L.Conv2D]
    assert set(kinds) == {"unit"}


def test_a_dict_goes_before_the_target():
    pruned = kr.prune(conv_net(), 0.5, target="litert", pattern={"first": "unstructured", "hid*": "unit"})
    kinds = [shape_of_zeros(pruned.get_layer(name).kernel) for name in ("first", "pointwise", "hidden", "last")]
    assert kinds == ["single", "unit", "unit", 4]


def test_a_dict_alone():
    pruned = kr.prune(conv_net(), 0.5, pattern={"hidden": kr.patterns.Block((4, 1))})
    kinds = [shape_of_zeros(pruned.get_layer(name).kernel) for name in ("first", "pointwise", "hidden", "last")]
    assert kinds == ["single", "single", 4, "single"]
    total = sum(row.weights for row in pruned.pruning_report.rows)
    assert sum(row.kept for row in pruned.pruning_report.rows) == pytest.approx(total / 2, abs=4)


def test_n_of_m_for_one_layer_caps_it():
    pruned = kr.prune(conv_net(), 0.7, pattern={"hidden": kr.patterns.NOfM(2, 4)})
    rows = {row.layer: row for row in pruned.pruning_report.rows}
    assert rows["hidden"].sparsity == 0.5
    assert pruned.pruning_report.sparsity == pytest.approx(0.7, abs=0.01)


@pytest.mark.parametrize("target", ["litert", "litert-int8"])
def test_layers_that_are_prunable(target):
    model = kr.to_prunable(conv_net(), target=target)
    assert model.get_layer("hidden").pattern == kr.patterns.Block((16 if target == "litert-int8" else 4, 1))
    assert model.get_layer("first").pattern == kr.patterns.Unit()
    model = kr.to_prunable(conv_net(), pattern={"last": kr.patterns.Unit()})
    assert model.get_layer("hidden").pattern == kr.patterns.Unstructured()
    assert model.get_layer("last").pattern == kr.patterns.Unit()


@pytest.mark.parametrize(
    "function", [lambda model, **a: kr.prune(model, 0.5, **a), kr.to_prunable], ids=["prune", "to_prunable"]
)
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(target="tflite"), "`target` must be one of"),
        (dict(target="litert", pattern="unit"), "Pass `target` or a pattern for all layers"),
        (dict(pattern={"missing": "unit"}), "`pattern` names no layer to prune. Received: 'missing'"),
        (dict(pattern={"first": "units"}), "`pattern` is not known. Received: pattern=.units."),
    ],
)
def test_wrong_arguments(function, arguments, message):
    with pytest.raises(ValueError, match=message):
        function(conv_net(), **arguments)


def test_a_target_that_leaves_all_whole():
    model = keras.Sequential([keras.Input((8, 8, 4)), L.DepthwiseConv2D(3, name="only")])
    for function in (lambda: kr.prune(model, 0.5, target="litert"), lambda: kr.to_prunable(model, target="litert")):
        with pytest.raises(ValueError, match="no use for zeros in any of the layers .'only'.*Received: target='litert'"):
            function()


def towers():
    def tower(name):
        return keras.Sequential([keras.Input((8,)), L.Dense(8, name="fc1"), L.Dense(4, name="fc2")], name=name)

    one, other = keras.Input((8,)), keras.Input((8,))
    x = L.Concatenate()([tower("user")(one), tower("item")(other)])
    return keras.Model([one, other], L.Dense(2, name="out")(x))


def zeros(model, tower, layer):
    return 1 - np.count_nonzero(ops.convert_to_numpy(model.get_layer(tower).get_layer(layer).kernel)) / 64


def test_two_towers_of_equal_names():
    model = towers()
    pruned = kr.prune(model, {"user/fc1": 0.75, "fc1": 0.25, "item/*": 0.5})
    assert [zeros(pruned, tower, "fc1") for tower in ("user", "item")] == [0.75, 0.25]
    rows = {row.layer: row.sparsity for row in pruned.pruning_report.rows}
    assert rows == {"user/fc1": 0.75, "item/fc1": 0.25, "item/fc2": 0.5}
    assert [row.layer for row in kr.summary(pruned).rows] == ["user/fc1", "user/fc2", "item/fc1", "item/fc2", "out"]
    pruned = kr.prune(model, 0.5, layers="user/fc1", pattern={"user/fc1": "unit"})
    assert [zeros(pruned, tower, "fc1") for tower in ("user", "item")] == [0.5, 0]
    prunable = kr.to_prunable(model, pattern={"item/*": "n_of_m"})
    found = [prunable.get_layer(tower).get_layer("fc1").pattern for tower in ("user", "item")]
    assert found == [kr.patterns.Unstructured(), kr.patterns.NOfM()]
    with pytest.raises(ValueError, match="names no layer"):
        kr.prune(model, {"shop/fc1": 0.5})


def test_names_of_layers_in_models_within_models():
    inner = keras.Sequential([keras.Input((3,)), L.Dense(3, name="fc")], name="inner")
    outer = keras.Sequential([keras.Input((3,)), inner, L.Dense(3, name="fc")], name="outer")
    model = keras.Sequential([keras.Input((3,)), outer, L.Dense(2, name="fc")], name="model")
    names = targets.names_of(model)
    assert names[id(inner.layers[0])] == ["outer/inner/fc", "inner/fc", "fc"]
    assert targets.by_name({"fc": 1, "inner/fc": 2, "outer/*": 3}, names[id(inner.layers[0])]) == 2
    assert targets.by_name({"outer/*": 3, "*": 4}, names[id(outer.layers[1])]) == 3
    unique = targets.unique_names(model)
    assert [unique[id(layer)] for layer in (inner.layers[0], outer.layers[1], model.layers[1])] == [
        "inner/fc",
        "outer/fc",
        "fc",
    ]
