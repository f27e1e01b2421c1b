import inspect

import keras
import numpy as np
import pytest

import keras_renorm as kr
from keras_renorm.src.layers.arguments import PRUNING_ARGUMENTS
from keras_renorm.src.layers.plain_variables import plain_values, plain_variables, reset_masks
from keras_renorm.src.layers.prunable import (
    NEVER,
    prunable_layers,
    sparsity_of,
)
from keras_renorm.src.layers.prunable_kernel import asking_flags, flag_of
from keras_renorm.src.models.rebuilding import exchange_variable
from keras_renorm.src.rules import schedules


def dense(kernel, **pruning):
    kernel = np.asarray(kernel, "float32")
    layer = kr.layers.PrunableDense(kernel.shape[1], use_bias=False, **pruning)
    layer.build((None, kernel.shape[0]))
    layer.kernel.assign(kernel)
    return layer


def test_an_event_by_hand():
    layer = dense([[3.0, 1.0], [-1.0, -4.0], [0.5, 2.0]], group="unit", renormalize="l1")
    layer.update_masks(1 / 3)
    np.testing.assert_array_equal(layer.mask.numpy(), [[True, False], [True, True], [False, True]])
    np.testing.assert_allclose(layer.scale.numpy(), [4.5 / 4, 7 / 6], rtol=1e-6)
    outputs = layer(np.array([[1.0, 1.0, 1.0]], "float32"))
    np.testing.assert_allclose(keras.ops.convert_to_numpy(outputs), [[2 * 4.5 / 4, -2 * 7 / 6]], rtol=1e-6)


def test_the_second_event_keeps_the_norm_of_what_was_there_just_before():
    layer = dense([[3.0], [2.0], [1.0], [0.5]], group="unit", renormalize="l1")
    layer.update_masks(0.25)
    np.testing.assert_allclose(layer.scale.numpy(), [6.5 / 6], rtol=1e-6)
    # Training shrinks the weights; the hidden one is not what it was either.
    layer.kernel.assign([[1.5], [1.0], [0.5], [9.0]])
    layer.update_masks(0.5)
    np.testing.assert_array_equal(layer.mask.numpy()[:, 0], [True, True, False, False])
    np.testing.assert_allclose(layer.scale.numpy(), [3.0 * (6.5 / 6) / 2.5], rtol=1e-6)


def test_a_removed_weight_stays_out_or_may_return():
    for regrow, expected in ((False, [True, False]), (True, [False, True])):
        layer = dense([[2.0], [1.0]], regrow=regrow, renormalize=None)
        layer.update_masks(0.5)
        layer.kernel.assign([[2.0], [5.0]])
        layer.update_masks(0.5)
        np.testing.assert_array_equal(layer.mask.numpy()[:, 0], expected)


def test_less_sparsity_brings_nothing_back_without_regrow():
    layer = dense(np.arange(1.0, 11).reshape(10, 1))
    layer.update_masks(0.8)
    layer.update_masks(0.3)
    assert layer.sparsity == pytest.approx(0.8)


def test_sparsity_is_exact_where_hidden_values_are_large(generator):
    layer = dense(generator.standard_normal((20, 5)))
    layer.update_masks(0.5)
    layer.kernel.assign(np.where(layer.mask.numpy(), layer.kernel.numpy(), 100))
    layer.update_masks(0.66)
    assert layer.count_kept() == (34, 100)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_kernel_that_is_not_finite_changes_nothing(bad):
    layer = dense([[1.0, 2.0], [bad, 4.0]], name="fc")
    with pytest.raises(ValueError, match=r"of layer 'fc' holds 1 values that are NaN or infinite.*Nothing was changed"):
        layer.update_masks(0.5)
    assert layer.mask.numpy().all()


def test_a_hidden_value_may_be_infinite():
    layer = dense([[1.0], [2.0], [3.0], [4.0]])
    layer.update_masks(0.25)
    layer.kernel.assign([[np.inf], [2.0], [3.0], [4.0]])
    layer.update_masks(0.5)
    np.testing.assert_array_equal(layer.mask.numpy()[:, 0], [False, False, True, True])
    assert np.isfinite(keras.ops.convert_to_numpy(layer(np.ones((1, 4), "float32")))).all()


@pytest.mark.parametrize("sparsity", [-0.5, 1.0, float("nan")])
def test_wrong_sparsity_changes_nothing(sparsity):
    layer = dense([[1.0, 2.0]])
    with pytest.raises(ValueError, match="`sparsity` must be a number"):
        layer.update_masks(sparsity)
    assert layer.mask.numpy().all()


def test_a_criterion_of_ones_own():
    layer = dense([[1.0, 2.0], [3.0, 4.0]], criterion=lambda kernel: -kernel)
    layer.update_masks(0.5)
    np.testing.assert_array_equal(layer.mask.numpy(), [[True, True], [False, False]])


def test_a_criterion_of_the_wrong_shape():
    layer = dense([[1.0, 2.0], [3.0, 4.0]], criterion=lambda kernel: kernel.sum(axis=0))
    with pytest.raises(ValueError, match=r"one score for each weight.*shape \(2,\) for a kernel of shape \(2, 2\)"):
        layer.update_masks(0.5)


def test_masks_take_a_quarter_of_the_kernels_memory():
    layer = dense(np.ones((64, 64)))
    mask, kernel = (keras.ops.convert_to_numpy(variable) for variable in (layer.mask, layer.kernel))
    assert mask.nbytes * 4 == kernel.nbytes


def test_gradient_reaches_kept_weights_times_their_scale(tf):
    layer = dense([[3.0], [1.0]], group="unit", renormalize="l1")
    layer.update_masks(0.5)
    with tf.GradientTape() as tape:
        outputs = tf.reduce_sum(layer(np.array([[5.0, 7.0]], "float32")))
    np.testing.assert_allclose(tape.gradient(outputs, layer.kernel.value), [[5 * 4 / 3], [0]], rtol=1e-6)


def test_remat_gives_the_same_gradients(tf):
    gradients = []
    for mode in (None, "full"):
        keras.utils.set_random_seed(1)
        with keras.RematScope(mode=mode):
            layer = kr.layers.RenormalizedPruning(keras.layers.Dense(4, "tanh"))
            layer.build((None, 6))
        layer.update_masks(0.5)
        with tf.GradientTape() as tape:
            outputs = tf.reduce_sum(layer(np.ones((2, 6), "float32")) ** 2)
        gradients.append(tape.gradient(outputs, layer.layer.kernel.value).numpy())
    np.testing.assert_allclose(*gradients, rtol=1e-6)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_norms_of_half_precision_kernels(dtype, generator):
    layer = kr.layers.PrunableDense(4, dtype=dtype, group="unit", renormalize="l2")
    layer.build((None, 2048))
    layer.kernel.assign(generator.standard_normal((2048, 4)) * 1e-2)
    kernel = keras.ops.convert_to_numpy(keras.ops.cast(layer.kernel, "float32"))
    layer.update_masks(0.5)
    expected = np.linalg.norm(kernel, axis=0) / np.linalg.norm(kernel * layer.mask.numpy(), axis=0)
    np.testing.assert_allclose(layer.scale.numpy(), expected, rtol=1e-4)
    assert (expected > 1.01).all()


@pytest.mark.parametrize("answer", [np.float32(1), np.ones(2), np.full((1, 2), np.nan)])
def test_a_renormalizer_that_answers_wrongly_changes_nothing(answer):
    layer = dense([[1.0, 2.0], [3.0, 4.0]], renormalize=lambda before, after, input_axes: answer)
    with pytest.raises(ValueError, match=r"`renormalize` must return one finite scale for each unit.*\(1, 2\)"):
        layer.update_masks(0.5)
    assert layer.mask.numpy().all()


def pruned(kernel):
    """A layer whose masked values are not zero."""
    layer = dense(kernel, renormalize=None)
    layer.update_masks(0.5)
    return layer


def outputs_of(layer, training):
    inputs = np.eye(layer.kernel.shape[0], dtype="float32")
    return keras.ops.convert_to_numpy(layer(inputs, training=training))


def test_masks_are_applied_in_full_where_nothing_is_trained():
    layer = pruned([[1.0, 2.0], [3.0, 4.0]])
    for training in (False, None):
        np.testing.assert_array_equal(outputs_of(layer, training), [[0, 0], [3, 4]])
    np.testing.assert_array_equal(keras.ops.convert_to_numpy(layer.masked_kernels[0].effective()), [[0, 0], [3, 4]])


def test_masks_that_change_are_applied():
    layer = pruned([[1.0, 2.0], [3.0, 4.0]])
    mask, scale = np.array([[True, False], [False, True]]), np.ones(2)
    assert layer.assign_masks([(mask, scale)])
    np.testing.assert_array_equal(outputs_of(layer, training=True), [[1, 0], [0, 4]])
    assert not layer.assign_masks([(mask, scale)])
    assert layer.assign_masks([(mask, 2 * scale)])
    np.testing.assert_array_equal(outputs_of(layer, training=True), [[2, 0], [0, 8]])


def test_masks_that_are_loaded_are_applied(tmp_path):
    model = keras.Sequential([keras.Input((2,)), pruned([[1.0, 2.0], [3.0, 4.0]])])
    other = keras.Sequential([keras.Input((2,)), dense([[5.0, 6.0], [7.0, 8.0]])])
    other.layers[0].mask.assign([[True, False], [False, True]])
    other.save_weights(tmp_path / "other.weights.h5")
    model.load_weights(tmp_path / "other.weights.h5")
    np.testing.assert_array_equal(outputs_of(model.layers[0], training=True), [[5, 0], [0, 8]])


def test_sparsity_is_the_mean_over_weights():
    """Not over layers or kernels: 2 of 4 and 2 of 12 are 4 of 16."""
    model = keras.Sequential([keras.Input((2,)), dense(np.ones((2, 2))), dense(np.ones((2, 6)))])
    for layer in model.layers:
        mask = np.ones(layer.mask.shape, bool)
        mask[0, :2] = False
        layer.mask.assign(mask)
    assert [layer.sparsity for layer in model.layers] == [0.5, 1 - 10 / 12]
    assert [layer.count_kept() for layer in model.layers] == [(2, 4), (10, 12)]
    assert sparsity_of(model) == 0.25
    recurrent = kr.layers.RenormalizedPruning(keras.layers.SimpleRNN(2))
    recurrent.build((None, 3, 4))
    # A kernel of 4 x 2 and a recurrent one of 2 x 2.
    recurrent.masked_kernels[0].mask.assign(np.zeros((4, 2), bool))
    assert recurrent.count_kept() == (4, 12)
    assert recurrent.sparsity == 1 - 4 / 12


def test_what_belongs_to_the_plain_layer():
    layer = kr.layers.PrunableDense(2)
    layer.build((None, 3))
    layer.kernel.assign([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]])
    layer.mask.assign([[True, False], [True, True], [False, True]])
    layer.scale.assign([2.0, -1.0])
    assert [variable.name for variable in plain_variables(layer)] == ["kernel", "bias"]
    assert len(layer.variables) == 5
    kernel, bias = map(keras.ops.convert_to_numpy, plain_values(layer))
    np.testing.assert_array_equal(kernel, [[2, 0], [6, -4], [0, -6]])
    np.testing.assert_array_equal(bias, [0, 0])
    assert prunable_layers(layer) == [layer]
    assert prunable_layers(kr.layers.PrunableDense(2)) == []  # not built


def test_one_sparsity_for_each_kernel():
    recurrent = kr.layers.RenormalizedPruning(keras.layers.SimpleRNN(4))
    recurrent.build((None, 3, 4))
    masks = [mask for mask, _ in recurrent.compute_pruning_masks([0.25, 0.5])]
    assert [np.count_nonzero(~mask) for mask in masks] == [4, 8]
    assert recurrent.count_kept() == (32, 32)  # nothing was assigned
    with pytest.raises(ValueError, match="zip"):
        recurrent.compute_pruning_masks([0.25])
    scores = {id(kernel.variable): np.arange(16.0).reshape(4, 4) for kernel in recurrent.masked_kernels}
    for mask, _ in recurrent.compute_pruning_masks(0.5, scores=scores):
        np.testing.assert_array_equal(mask, np.arange(16).reshape(4, 4) >= 8)


def test_units_that_nothing_reads_lose_their_weights_first():
    layer = dense([[4.0, 1.0], [3.0, 2.0]])
    ((mask, _),) = layer.compute_pruning_masks(0.5, read=np.array([False, True]))
    np.testing.assert_array_equal(mask, [[False, True], [False, True]])


@pytest.mark.parametrize(("written", "restored", "saved"), [(False, None, 7), (True, None, 7), (False, 3, 3), (True, 3, 3)])
def test_the_step_is_written_when_asked_and_when_saved(written, restored, saved, tmp_path):
    model = keras.Sequential([keras.Input((2,)), dense(np.ones((2, 2)))])
    (layer,) = model.layers
    assert int(layer.pruning_step) == -1
    layer.count_steps(5, write=True)
    layer.count_steps(7, write=written)
    assert int(layer.pruning_step) == (7 if written else 5)
    if restored is not None:  # as by restoring the best weights
        layer.pruning_step.assign(restored)
    model.save_weights(tmp_path / "model.weights.h5")
    assert int(layer.pruning_step) == saved
    layer.pruning_step.assign(0)
    model.load_weights(tmp_path / "model.weights.h5")
    assert int(layer.pruning_step) == saved


def test_defaults_and_config():
    layer = kr.layers.PrunableDense(2)
    assert (layer.group, layer.regrow, layer.pruning_schedule) == ("layer", False, None)
    config = layer.get_config()
    assert {config[name] for name in ("group", "regrow")} == {"layer", False}
    assert set(PRUNING_ARGUMENTS) <= set(config)
    assert layer.renormalize == kr.renorm.L2(max_scale=2.0)
    assert kr.layers.PrunableDense(2, group="unit").renormalize == kr.renorm.L2()
    with pytest.raises(ValueError, match="`group` must be one of"):
        kr.layers.PrunableDense(2, group="filter")
    with pytest.raises(ValueError, match="`regrow` must be one of"):
        kr.layers.PrunableDense(2, regrow="yes")


def test_a_schedule_that_the_pattern_cannot_give():
    with pytest.raises(ValueError, match="removes 50% of the weights at most"):
        kr.layers.PrunableDense(2, pattern="n_of_m", pruning_schedule=kr.schedules.PolynomialDecay(0, 0.8, 0, 6))


def test_gradient_of_sparse_inputs_is_sparse(tf):
    layer = dense([[3.0, 1.0], [1.5, 2.0], [4.0, 5.0]], renormalize=None)
    layer.update_masks(1 / 6)
    layer.scale.assign([2.0, 3.0])
    with tf.GradientTape() as tape:
        outputs = tf.reduce_sum(layer(tf.sparse.from_dense([[5.0, 0.0, 7.0]])))
    gradient = tape.gradient(outputs, layer.kernel.value)
    assert isinstance(gradient, tf.IndexedSlices)
    np.testing.assert_array_equal(tf.convert_to_tensor(gradient), [[10, 0], [0, 0], [14, 21]])


def values_of(variable):
    return keras.ops.convert_to_numpy(variable)


def recurrent(**arguments):
    """A wrapped recurrent layer: two kernels of 3 x 2 and 2 x 2, half of the weights of each removed."""
    layer = kr.layers.RenormalizedPruning(keras.layers.SimpleRNN(2, **arguments), renormalize="l1", name="recurrent")
    layer.build((2, 4, 3))
    layer.update_masks(0.5)
    return layer


def test_names_of_masks_scales_and_steps():
    layer = dense(np.ones((3, 2)))
    assert [variable.name for variable in layer.variables[1:]] == ["mask", "scale", "pruning_step"]
    assert [tuple(variable.shape) for variable in layer.variables[1:]] == [(3, 2), (2,), ()]
    names = {variable.name for variable in recurrent().variables if "mask" in variable.name or "scale" in variable.name}
    assert len(names) == 4
    assert sorted(name.rsplit("_", 1)[-1] for name in names) == ["mask", "mask", "scale", "scale"]
    assert all("kernel" in name for name in names)


def test_the_scale_has_one_number_for_each_unit():
    wrapped = kr.layers.RenormalizedPruning(keras.layers.DepthwiseConv2D(3, depth_multiplier=2))
    wrapped.build((None, 8, 8, 1))
    assert tuple(wrapped.masked_kernels[0].scale.shape) == (2,)
    single = dense(np.ones((1, 1)))
    assert tuple(single.scale.shape) == (1,)


def test_a_layer_without_kernels_has_nothing_to_prune():
    layer = kr.layers.RenormalizedPruning(keras.layers.BatchNormalization(name="norm"))
    with pytest.raises(ValueError, match=r"'norm' \(of type BatchNormalization\) has nothing to prune"):
        layer.build((None, 4))


def test_lora_is_refused_in_the_constructor():
    with pytest.raises(ValueError, match="does not take LoRA"):
        kr.layers.PrunableDense(2, lora_rank=1)


def test_penalties_are_those_of_each_effective_kernel():
    layer = recurrent(kernel_regularizer=keras.regularizers.L2(0.5), recurrent_regularizer=keras.regularizers.L1(0.25))
    first, second = (values_of(kernel.effective()) for kernel in layer.masked_kernels)
    penalties = sorted(float(value) for value in layer.losses)
    np.testing.assert_allclose(penalties, sorted([0.5 * np.sum(first**2), 0.25 * np.sum(np.abs(second))]), rtol=1e-5)


def test_states_that_a_call_changes_are_changed():
    layer = recurrent(stateful=True)
    plain = keras.layers.SimpleRNN(2, stateful=True)
    plain.build((2, 4, 3))
    for variable, value in zip(plain.weights, plain_values(layer)):
        variable.assign(value)
    inputs = np.random.default_rng(0).standard_normal((2, 4, 3)).astype("float32")
    for _ in range(2):
        np.testing.assert_allclose(values_of(layer(inputs)), values_of(plain(inputs)), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(values_of(layer.layer.states[0]), values_of(plain.states[0]), rtol=1e-5, atol=1e-6)
    assert values_of(layer.layer.states[0]).any()


@keras.saving.register_keras_serializable("tests")
class Reader(keras.layers.Layer):
    """Multiplies by the kernel of a prunable layer inside it, and by a kernel of its own."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.inner = kr.layers.PrunableDense(3, use_bias=False, renormalize="l1")

    def build(self, shape):
        self.inner.build(shape)
        self.own = self.add_weight(shape=(3, 3), name="own")

    def call(self, inputs):
        return keras.ops.matmul(keras.ops.matmul(self.inner(inputs), self.inner.kernel), self.own)


def test_a_kernel_that_a_layer_around_reads_is_masked_and_scaled_once():
    layer = kr.layers.RenormalizedPruning(Reader())
    layer.build((None, 3))
    assert len(layer.masked_kernels) == 1  # the other has masks already
    layer.layer.inner.update_masks(0.5)
    kernel = values_of(layer.layer.inner.masked_kernels[0].effective())
    inputs = np.random.default_rng(0).standard_normal((4, 3)).astype("float32")
    expected = inputs @ kernel @ kernel @ values_of(layer.layer.own)
    np.testing.assert_allclose(values_of(layer(inputs)), expected, rtol=1e-4, atol=1e-5)


def test_a_kernel_that_is_no_longer_there():
    layer = kr.layers.RenormalizedPruning(keras.layers.Dense(2, use_bias=False, name="fc"))
    layer.build((None, 3))
    exchange_variable(layer.layer, layer.layer.kernel, keras.Variable(np.ones((3, 2), "float32")))
    with pytest.raises(ValueError, match="'fc' no longer has the kernels that its masks were made for"):
        layer(np.ones((1, 3), "float32"))


def test_only_kernels_with_a_flag_are_asked():
    (one,), (other,) = dense(np.ones((2, 2))).masked_kernels, dense(np.ones((2, 2))).masked_kernels
    flags = [{id(kernel.variable): object()} for kernel in (one, other)]
    assert flag_of(one) is None
    with asking_flags(flags[0]):
        assert flag_of(one) is flags[0][id(one.variable)]
        assert flag_of(other) is None
        with asking_flags(flags[1]):
            assert flag_of(other) is flags[1][id(other.variable)]
            assert flag_of(one) is None
        assert flag_of(one) is not None
    assert flag_of(one) is None


@pytest.mark.skipif(keras.backend.backend() != "tensorflow", reason="kernels settle on TensorFlow only")
@pytest.mark.parametrize("settled", [False, True])
def test_masks_of_settled_kernels_are_left_out_in_training_only(settled):
    layer = pruned([[1.0, 2.0], [3.0, 4.0]])
    masked, filled = [[0, 0], [3, 4]], [[1, 2], [3, 4]]
    with asking_flags({id(layer.kernel): keras.Variable(settled, dtype="bool")}):
        np.testing.assert_array_equal(outputs_of(layer, training=True), filled if settled else masked)
        np.testing.assert_array_equal(outputs_of(layer, training=False), masked)
    np.testing.assert_array_equal(outputs_of(layer, training=True), masked)


def test_plain_values_keep_all_weights_and_begin_anew():
    layer = dense([[1.0, 2.0], [3.0, 4.0]], renormalize="l1")
    layer.update_masks(0.5)
    layer.count_steps(7, write=True)
    reset_masks(layer, [])
    assert layer.sparsity == 0.5
    assert int(values_of(layer.pruning_step)) == 7
    reset_masks(layer, [layer.kernel])
    assert layer.sparsity == 0
    np.testing.assert_array_equal(values_of(layer.scale), [1, 1])
    assert int(values_of(layer.pruning_step)) == NEVER


def test_zeros_become_masks_beside_those_that_are_there():
    layer = dense([[1.0, 0.0], [3.0, 4.0]])
    layer.mask.assign([[True, True], [False, True]])
    layer.mask_zeros()
    np.testing.assert_array_equal(values_of(layer.mask), [[True, False], [False, True]])


def test_a_step_that_was_restored():
    layer = dense(np.ones((2, 2)))
    assert not layer.was_restored
    layer.count_steps(4, write=True)
    layer.count_steps(6, write=False)
    assert not layer.was_restored  # what is written is what was written
    layer.pruning_step.assign(2)
    assert layer.was_restored
    layer.pruning_step.assign(6)
    assert not layer.was_restored


def test_signatures_are_those_of_keras_with_the_pruning_arguments_behind():
    assert PRUNING_ARGUMENTS == ("pruning_schedule", "criterion", "pattern", "group", "renormalize", "regrow")
    own = inspect.signature(kr.layers.PrunableDense).parameters
    plain = inspect.signature(keras.layers.Dense).parameters
    named = [name for name, parameter in plain.items() if parameter.kind is not parameter.VAR_KEYWORD]
    assert list(own) == [*named, *PRUNING_ARGUMENTS, "kwargs"]
    assert all(own[name].kind is inspect.Parameter.KEYWORD_ONLY for name in PRUNING_ARGUMENTS)


@pytest.mark.parametrize(
    ("stored", "message"),
    [
        ({"0": np.ones((3, 2), "float32")}, r"expected shape \(2, 2\) for 'kernel', but \(3, 2\) is stored"),
        ({"0": np.ones((2, 2), "int8")}, "expected values of type float32 for 'kernel', but int8 is stored"),
    ],
)
def test_plain_values_that_do_not_fit_change_nothing(stored, message):
    layer = dense([[1.0, 2.0], [3.0, 4.0]])
    layer.update_masks(0.5)
    with pytest.raises(ValueError, match=message):
        layer.load_own_variables(stored)
    np.testing.assert_array_equal(values_of(layer.kernel), [[1, 2], [3, 4]])
    assert layer.sparsity == 0.5
    layer.load_own_variables({"0": np.full((2, 2), 5, "float16")})
    np.testing.assert_array_equal(values_of(layer.kernel), np.full((2, 2), 5))
    assert layer.sparsity == 0


def test_the_goal_is_saved_with_the_layer(tmp_path):
    layer = dense([[1.0, 2.0], [3.0, 4.0]])
    layer.goal = schedules.Goal(0.75, 8, 0.5, 10, 3)
    store = {}
    layer.save_own_variables(store)
    other = dense(np.ones((2, 2)))
    other.load_own_variables(store)
    assert other.goal == layer.goal
