import keras
import numpy as np
import pytest
from keras import ops

import keras_renorm as kr
from keras_renorm.src.calibration.gathering import gather_statistics, scores_of
from keras_renorm.src.calibration.samples import Samples
from keras_renorm.src.core.statistics import Gradients
from keras_renorm.src.kernels.masks import compute_mask
from keras_renorm.src.layers.kernels import find_kernels
from tests.layers.cases import CASES, model_around
from tests.outputs import outputs
from tests.pruning.test_conversion import MODELS, Subclassed, batch_for

L = keras.layers
PATTERNS = ["unstructured", "block", "n_of_m", "unit"]


def mlp():
    return keras.Sequential(
        [keras.Input((40,)), L.Dense(30, "relu", name="a"), L.Dense(20, "relu", name="b"), L.Dense(4, name="c")]
    )


def zeros(model):
    return {layer.name: int(np.sum(layer.kernel.numpy() == 0)) for layer in model.layers if hasattr(layer, "kernel")}


@pytest.mark.parametrize("make", MODELS, ids=lambda make: make.__name__)
@pytest.mark.parametrize("group", ["layer", "unit"])
@pytest.mark.parametrize("renormalize", ["auto", None, "l1", "l2"])
def test_every_kernel_loses_its_share_and_the_model_is_untouched(make, group, renormalize):
    model = make()
    before = [weight.copy() for weight in model.get_weights()]
    pruned = kr.prune(model, 0.5, group=group, allocation="uniform", renormalize=renormalize)
    for row in kr.summary(pruned).rows:
        if group == "layer":
            assert row.weights - row.kept == round(0.5 * row.weights)
    for old, new in zip(before, model.get_weights(), strict=True):
        np.testing.assert_array_equal(old, new)
    values = keras.tree.flatten(outputs(pruned, batch_for(model)))
    assert all(np.isfinite(one).all() for one in values)


@pytest.mark.parametrize("name", list(CASES))
@pytest.mark.parametrize("pattern", PATTERNS)
def test_every_layer_with_every_pattern(name, pattern):
    make, inputs, kernels, _ = CASES[name]
    pruned = kr.prune(model_around(make(), inputs), 0.5, pattern=pattern, allocation="uniform", renormalize="l2")
    for row, shape in zip(kr.summary(pruned).rows, [*kernels, None]):
        if pattern == "unit" and row.layer == "head":
            # Units that are outputs stay.
            assert row.kept == row.weights
            continue
        # Runs of two channels are not longer than what 2 of 4 keeps.
        assert row.kept < row.weights or (pattern == "n_of_m" and shape[-2] <= 2)


def residual_network():
    keras.utils.set_random_seed(0)
    inputs = keras.Input((8, 8, 3))
    x = stem = L.ReLU()(L.BatchNormalization(name="bn")(L.Conv2D(8, 3, padding="same", use_bias=False, name="stem")(inputs)))
    x = L.ReLU()(L.Conv2D(6, 3, padding="same", name="inner")(x))
    x = L.BatchNormalization(name="bn2")(L.Conv2D(8, 3, padding="same", use_bias=False, name="outer")(x))
    x = L.DepthwiseConv2D(3, padding="same", name="depthwise")(L.Add()([x, stem]))
    model = keras.Model(inputs, L.Dense(5, name="head")(L.GlobalAveragePooling2D()(x)))
    for variable in model.variables:
        if variable.name in ("beta", "bias", "moving_mean"):
            variable.assign(np.random.default_rng(0).standard_normal(variable.shape))
    return model


@pytest.mark.parametrize("calibrated", [False, True])
def test_units_that_meet_in_sums_go_together_and_give_zero(calibrated):
    model = residual_network()
    x = np.random.default_rng(1).standard_normal((64, 8, 8, 3)).astype("float32")
    pruned = kr.prune(model, 0.5, pattern="unit", calibration=x if calibrated else None, allocation="uniform", verbose=0)
    alive = {
        name: (keras.ops.convert_to_numpy(pruned.get_layer(name).kernel) != 0).any(axis=(0, 1, 2))
        for name in ("stem", "inner", "outer")
    }
    depthwise = (keras.ops.convert_to_numpy(pruned.get_layer("depthwise").kernel) != 0).any(axis=(0, 1, 3))
    assert alive["stem"].sum() == 4
    np.testing.assert_array_equal(alive["stem"], alive["outer"])
    np.testing.assert_array_equal(alive["stem"], depthwise)
    assert alive["inner"].sum() == 3
    for name in ("bn", "bn2"):
        between = outputs(keras.Model(pruned.input, pruned.get_layer(name).output), x)
        assert not between[..., ~alive["stem"]].any()
    small = kr.compact(pruned)
    assert {name: small.get_layer(name).filters for name in alive} == {"stem": 4, "inner": 3, "outer": 4}
    np.testing.assert_allclose(outputs(small, x), outputs(pruned, x), atol=1e-5)
    # The outputs are all there.
    assert (keras.ops.convert_to_numpy(pruned.get_layer("head").kernel) != 0).any(axis=0).all()


def test_the_units_of_a_sum_with_the_highest_scores_in_all_of_them_stay():
    inputs = keras.Input((4,))
    one, other = L.Dense(3, use_bias=False, name="one"), L.Dense(3, use_bias=False, name="other")
    model = keras.Model(inputs, L.Dense(2, name="head")(L.Add()([one(inputs), other(inputs)])))
    one.kernel.assign(np.ones((4, 3)) * [4, 3, 5])
    other.kernel.assign(np.ones((4, 3)) * [20, 70, 30])
    # Relative to their means: 1 + 0.5, 0.75 + 1.75, 1.25 + 0.75.
    pruned = kr.prune(model, 1 / 3, pattern="unit", renormalize=None, allocation="uniform")
    for name in ("one", "other"):
        kernel = keras.ops.convert_to_numpy(pruned.get_layer(name).kernel)
        assert (kernel != 0).any(axis=0).tolist() == [False, True, True]


def test_outputs_are_pruned_only_by_name():
    model = keras.Sequential([keras.Input((4,)), L.Dense(6, name="out")])
    with pytest.raises(ValueError, match=r"pattern 'unit'.*all its units are outputs.*`layers=`"):
        kr.prune(model, 0.5, pattern="unit")
    pruned = kr.prune(model, 0.5, pattern="unit", layers="out")
    assert kr.summary(pruned).sparsity == 0.5


@pytest.mark.parametrize("sparsity", [0, 0.3, 0.8, 0.95, 0.999])
def test_exact_count(sparsity):
    assert zeros(kr.prune(mlp(), sparsity, allocation="uniform")) == {
        "a": round(sparsity * 1200),
        "b": round(sparsity * 600),
        "c": round(sparsity * 80),
    }


def test_a_dict_prunes_those_layers_alone():
    assert zeros(kr.prune(mlp(), {"a": 0.5, "[bc]": 0.25})) == {"a": 600, "b": 150, "c": 20}
    assert zeros(kr.prune(mlp(), {"b": 0.5})) == {"a": 0, "b": 300, "c": 0}


def test_a_name_goes_before_a_glob():
    assert zeros(kr.prune(mlp(), {"*": 0.25, "a": 0.5})) == {"a": 600, "b": 150, "c": 20}


def test_a_shared_layer_is_pruned_once():
    inputs = keras.Input((50,))
    layer = L.Dense(50)
    model = keras.Model(inputs, L.Dense(3)(layer(layer(inputs))))
    assert [row.sparsity for row in kr.summary(kr.prune(model, 0.5, criterion="random", allocation="uniform")).rows] == [
        0.5,
        pytest.approx(0.5, abs=0.01),
    ]


def test_a_layer_with_lora_that_was_not_chosen():
    model = mlp()
    model.get_layer("a").enable_lora(2)
    assert np.sum(kr.prune(model, 0.5, layers="b").get_layer("b").kernel.numpy() == 0) == 300


def test_no_layer_was_chosen():
    with pytest.raises(ValueError, match=r"No layer was chosen. Its layers are: \['a', 'b', 'c'\]"):
        kr.prune(mlp(), 0.5, layers=L.Conv2D)


def test_a_kernel_without_inputs():
    model = keras.Sequential([keras.Input((5, 8)), L.EinsumDense("abc,c->abc", output_shape=(5, 8))])
    for pattern in PATTERNS:
        kr.prune(model, 0.5, pattern=pattern)


def test_layers_are_chosen():
    assert zeros(kr.prune(mlp(), 0.5, allocation="uniform", layers=["a", "c"])) == {"a": 600, "b": 0, "c": 40}


def test_by_hand():
    model = keras.Sequential([keras.Input((3,)), L.Dense(2, use_bias=False)])
    model.set_weights([np.array([[3.0, 1.0], [-1.0, -4.0], [0.5, 2.0]])])
    pruned = kr.prune(model, 1 / 3, group="unit", renormalize="l1")
    np.testing.assert_allclose(pruned.get_weights()[0], [[3 * 4.5 / 4, 0], [-4.5 / 4, -4 * 7 / 6], [0, 2 * 7 / 6]], rtol=1e-6)


def test_pruning_again_keeps_zeros_zero():
    once = kr.prune(mlp(), 0.5)
    twice = kr.prune(once, 0.8)
    for layer in once.layers:
        np.testing.assert_array_equal(twice.get_layer(layer.name).kernel.numpy()[layer.kernel.numpy() == 0], 0)
    assert kr.summary(twice).sparsity == pytest.approx(0.8)


def test_same_call_same_result():
    model = mlp()
    for criterion in ("magnitude", kr.criteria.Random(3)):
        first = kr.prune(model, 0.5, criterion=criterion)
        again = kr.prune(model, 0.5, criterion=criterion if criterion == "magnitude" else kr.criteria.Random(3))
        for one, other in zip(first.get_weights(), again.get_weights(), strict=True):
            np.testing.assert_array_equal(one, other)


def test_a_prunable_model_is_stripped_first():
    prunable = kr.to_prunable(mlp())
    pruned = kr.prune(prunable, 0.5, allocation="uniform")
    assert type(pruned.layers[0]) is L.Dense
    assert zeros(pruned) == {"a": 600, "b": 300, "c": 40}


def test_a_subclassed_model():
    model = Subclassed()
    model.build((None, 6))
    pruned = kr.prune(model, 0.5, allocation="uniform")
    assert isinstance(pruned, Subclassed)
    assert np.sum(pruned.first.kernel.numpy() == 0) == 12
    assert np.sum(pruned.rest[0].kernel.numpy() == 0) == 6
    assert not np.any(model.first.kernel.numpy() == 0)


def test_a_unit_keeps_its_last_weight_while_there_are_enough():
    kernel = np.array([[9.0, 0.1], [8.0, 0.2], [7.0, 0.3], [6.0, 0.4]])
    model = keras.Sequential([keras.Input((4,)), L.Dense(2, use_bias=False)])
    model.set_weights([kernel])
    np.testing.assert_allclose(kr.prune(model, 0.75, renormalize=None).get_weights()[0], [[9, 0], [0, 0], [0, 0], [0, 0.4]])
    np.testing.assert_allclose(kr.prune(model, 0.875, renormalize=None).get_weights()[0], [[9, 0], [0, 0], [0, 0], [0, 0]])


def test_a_kernel_that_is_not_finite_is_named():
    model = mlp()
    model.get_layer("b").kernel.assign(np.full((30, 20), np.nan))
    with pytest.raises(ValueError, match=r"b/kernel' of layer 'b' holds 600 values that are NaN"):
        kr.prune(model, 0.5)


@pytest.mark.parametrize("sparsity", [-0.1, 1, 2.5, float("nan"), "0.9", None, {"a": 1.0}])
def test_wrong_sparsity(sparsity):
    with pytest.raises(ValueError, match=r"`sparsity` must be a number in \[0, 1\)"):
        kr.prune(mlp(), sparsity)


def test_a_dict_with_a_wrong_name():
    with pytest.raises(ValueError, match="`sparsity` names no layer.*'d'"):
        kr.prune(mlp(), {"a": 0.5, "d": 0.5})


def test_dict_and_layers():
    with pytest.raises(ValueError, match="not both"):
        kr.prune(mlp(), {"a": 0.5}, layers="a")


APPLICATIONS = {
    "MobileNetV2": keras.applications.MobileNetV2,
    "ResNet50": keras.applications.ResNet50,
    "EfficientNetB0": keras.applications.EfficientNetB0,
    "DenseNet121": keras.applications.DenseNet121,
}


@pytest.mark.slow
@pytest.mark.parametrize("name", list(APPLICATIONS))
def test_keras_applications_end_to_end(name, tmp_path):
    model = APPLICATIONS[name](weights=None, input_shape=(96, 96, 3), classes=10)
    x = np.random.default_rng(0).uniform(0, 255, (2, 96, 96, 3)).astype("float32")
    prunable = kr.to_prunable(model)
    np.testing.assert_allclose(outputs(prunable, x), outputs(model, x), atol=1e-6)
    pruned = kr.prune(model, 0.8, allocation="uniform")
    for layer in pruned._flatten_layers():
        if layer is not pruned and not isinstance(layer, keras.Model):
            for kernel in find_kernels(layer):
                assert abs(np.count_nonzero(np.asarray(kernel.variable) == 0) - 0.8 * kernel.size) <= 1
    assert kr.summary(pruned).sparsity == pytest.approx(0.8, abs=1e-5)
    plain = kr.strip(kr.to_prunable(pruned, from_zeros=True))
    np.testing.assert_allclose(outputs(plain, x), outputs(pruned, x), atol=1e-5)
    plain.save(tmp_path / "plain.keras")
    again = keras.models.load_model(tmp_path / "plain.keras")
    np.testing.assert_allclose(outputs(again, x), outputs(pruned, x), atol=1e-6)
    report = kr.export_tflite(plain, tmp_path / "plain.tflite", samples=x)
    assert report.stored_sparse
    assert report.difference < 1e-4
    assert report.ratio < 0.5


@pytest.mark.parametrize(
    "how", [{}, dict(renormalize="l2"), dict(pattern="unit"), dict(pattern="block"), dict(allocation="lamp")]
)
@pytest.mark.parametrize("size", [1e20, 1e-25])
def test_the_size_of_the_weights_changes_nothing(size, how):
    model = keras.Sequential([keras.Input((6,)), L.Dense(16, name="a"), L.Dense(4)])
    wanted = kr.prune(model, 0.5, **how).get_layer("a").kernel.numpy()
    kernel = model.get_layer("a").kernel
    kernel.assign(kernel.numpy() * np.float32(size))
    np.testing.assert_allclose(kr.prune(model, 0.5, **how).get_layer("a").kernel.numpy() / np.float32(size), wanted, rtol=1e-5)


def test_the_report_says_which_units_cannot_be_taken_out():
    inputs = keras.Input((6,))
    a, b = (keras.layers.Dense(8, name=name)(inputs) for name in "ab")
    x = keras.layers.LayerNormalization(name="ln")(keras.layers.Add()([a, b]))
    x = keras.layers.Dense(8, name="free")(x)
    model = keras.Model(inputs, keras.layers.Dense(4, name="out")(x))
    (note,) = kr.prune(model, 0.5, pattern="unit").pruning_report.notes
    assert (
        note
        == "`keras_renorm.compact` cannot take out the units that ['a', 'b'] lost: their units are inputs or outputs of 'ln'."
    )
    (note,) = kr.prune(model, 0.5, pattern="unit", layers="out").pruning_report.notes
    assert "['out'] lost: their units are outputs of the model." in note
    report = kr.prune(model, 0.5, pattern="unit", layers="free").pruning_report
    assert report.notes == kr.prune(model, 0.5).pruning_report.notes == ()
    attention = keras.layers.MultiHeadAttention(2, 3, name="attention")
    sequence = keras.Input((4, 6))
    model = keras.Model(sequence, keras.layers.Dense(2)(attention(sequence, sequence)))
    report = kr.prune(model, 0.5, pattern="unit").pruning_report
    assert "['attention'] lost: these layers stay whole" in str(report)


def test_units_of_a_model_called_on_its_own_inputs():
    base = keras.Sequential([keras.Input((8,)), keras.layers.Dense(16, name="a"), keras.layers.Dense(16, name="b")])
    (inputs,) = base.inputs
    model = keras.Model(inputs, keras.layers.Dense(4, name="out")(base(inputs)))
    pruned = kr.prune(model, 0.5, pattern="unit", allocation="uniform")
    small = kr.compact(pruned)
    assert [small.get_layer(name).kernel.shape for name in ("a", "b", "out")] == [(8, 8), (8, 8), (8, 4)]
    x = np.random.default_rng(0).standard_normal((5, 8)).astype("float32")
    np.testing.assert_allclose(outputs(pruned, x), outputs(small, x), atol=1e-5)
    assert [row.layer for row in kr.prune(model, 0.5, target="litert").pruning_report.rows] == ["a", "b", "out"]


def test_a_scale_that_leaves_the_range_of_floats_is_refused():
    model = keras.Sequential([keras.Input((4,)), L.Dense(1, name="a")])
    model.get_layer("a").kernel.assign(np.full((4, 1), 3e38))
    with pytest.raises(ValueError, match=r"of layer 'a', scaled by L2\(.*\), holds 2 values that are NaN or infinite"):
        kr.prune(model, 0.5)


def labelled(generator):
    """A trained-like model with its loss, and samples with labels."""
    keras.utils.set_random_seed(0)
    model = keras.Sequential(
        [keras.Input((6, 8)), L.Conv1D(6, 3, activation="relu"), L.LSTM(5, name="lstm"), L.Dense(4, name="head")]
    )
    model.compile(loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    return model, generator.standard_normal((32, 6, 8)).astype("float32"), generator.integers(0, 4, 32)


@pytest.mark.parametrize("renormalize", [None, "lstsq"])
def test_by_the_gradient_of_the_loss(renormalize, generator):
    """All kernels are scored by it, those of recurrent layers too, and all ways to pass labels give the same."""
    model, x, y = labelled(generator)
    how = dict(criterion="taylor", allocation="uniform", renormalize=renormalize, batch_size=8, verbose=0)
    pruned = kr.prune(model, 0.5, calibration=(x, y), **how)
    batches = ((x[start : start + 8], y[start : start + 8]) for start in range(0, 32, 8))
    for one, other in zip(kr.prune(model, 0.5, calibration=batches, **how).get_weights(), pruned.get_weights()):
        np.testing.assert_array_equal(one, other)
    assert {row.criterion for row in pruned.pruning_report.rows} == {"Taylor"}
    with Samples((x, y), model, 8, labels=True) as samples:
        scores = scores_of(gather_statistics(model, samples, Gradients), kr.criteria.Taylor())
    for index, kernel in ((0, model.layers[0].kernel), (1, model.layers[1].cell.recurrent_kernel)):
        weights = next(one for one in pruned.layers[index].weights if one.shape == kernel.shape)
        kept = ops.convert_to_numpy(weights) != 0
        if renormalize is None:
            np.testing.assert_array_equal(kept, compute_mask(scores[id(kernel)], 0.5))


def test_the_gradient_needs_labels_and_a_loss(generator):
    model, x, y = labelled(generator)
    with pytest.raises(ValueError, match=r"must have labels.*`calibration=\(x, y\)`"):
        kr.prune(model, 0.5, criterion="taylor", calibration=x)
    model = keras.Sequential([keras.Input((6, 8)), L.Flatten(), L.Dense(4)])
    with pytest.raises(ValueError, match=r"has no loss.*model.compile\(loss=...\)"):
        kr.prune(model, 0.5, criterion="taylor", calibration=(x, y), verbose=0)
