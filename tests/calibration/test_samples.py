import itertools
import re

import keras
import numpy as np
import pytest
from keras import ops

from keras_renorm.src.calibration.samples import OutputError, Passes, Samples, observe, warn_of_odd_samples
from tests.pruning.test_conversion import MODELS, Subclassed, batch_for, residual, sequential, shared

L = keras.layers


class Batches(keras.utils.PyDataset):
    def __init__(self, images, size):
        super().__init__()
        self.images, self.size = images, size

    def __len__(self):
        return -(-len(self.images) // self.size)

    def __getitem__(self, index):
        return self.images[index * self.size : (index + 1) * self.size], None


def tf_dataset(images, size):
    import tensorflow as tf

    return tf.data.Dataset.from_tensor_slices((images, np.zeros(len(images)))).batch(size)


# Every way to pass the same samples.
WAYS = {
    "array": lambda images, size: images,
    "list": lambda images, size: [images],
    "dict": lambda images, size: {"images": images},
    "dataset": tf_dataset,
    "PyDataset": Batches,
    "generator": lambda images, size: (images[i : i + size] for i in range(0, len(images), size)),
    "generator of pairs": lambda images, size: ((images[i : i + size], None) for i in range(0, len(images), size)),
    "iterable": lambda images, size: type("Loader", (), {"__iter__": lambda self: iter(np.array_split(images, 3))})(),
}


def small_model():
    inputs = keras.Input((5,), name="images")
    return keras.Model(inputs, L.Dense(3)(L.Dense(4, "relu")(inputs)))


def small_tower():
    return keras.Sequential([keras.Input((6,)), L.Dense(2)])


@pytest.mark.parametrize("way", list(WAYS))
def test_every_way_gives_the_same_samples_again_and_again(way, generator):
    images = generator.standard_normal((10, 5)).astype("float32")
    with Samples(WAYS[way](images, 4), small_model(), batch_size=4) as samples:
        for _ in range(3):
            batches = [keras.tree.flatten(batch)[0] for batch in samples]
            np.testing.assert_array_equal(np.concatenate(batches), images)


def test_several_inputs(generator):
    one, two = generator.standard_normal((2, 9, 6)).astype("float32")
    (first, *_) = Samples([one, two], shared(), 4)
    np.testing.assert_array_equal(first[1], two[:4])
    with Samples(iter([[one, two], [one, two]]), shared(), 4) as pairs:
        assert [len(batch) for batch in pairs] == [2, 2]
    with Samples(iter([([one, two], None)]), shared(), 4) as pairs:
        assert [len(batch) for batch in pairs] == [2]
    with Samples(iter([[one, two]]), small_tower(), 4) as labelled:
        np.testing.assert_array_equal(next(iter(labelled)), one)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (np.ones((0, 5)), "gave no samples"),
        (iter([]), "gave no samples.*make a new one"),
        (np.ones((4, 6)), r"wrong shape for input 'images'.*takes \(None, 5\).*Received: an array of shape \(4, 6\)"),
        (iter([np.ones((4, 5)), np.ones((4, 6))]), "wrong shape"),
        (np.ones(5), "wrong shape"),
        (np.float32(3), "`calibration` must"),
        ([np.ones((4, 5)), np.ones((4, 5))], "one array for each input.*has 1. Received 2 arrays"),
        (np.array([["a"] * 5] * 2), "must hold numbers.*dtype <U1"),
        (np.full((4, 5), np.nan), "NaN or infinity in 4 of 4 samples.*Nothing was changed"),
        ("images", "`calibration` must be an array.*Received: calibration='images'"),
        (7, "`calibration` must be an array"),
        ([], "`calibration` must be an array"),
    ],
)
def test_wrong_samples(data, message):
    with pytest.raises(ValueError, match=message), Samples(data, small_model(), 4) as samples:
        list(samples)


def test_samples_without_end():
    import tensorflow as tf

    with pytest.raises(ValueError, match=r"without an end.*dataset.take"):
        Samples(tf.data.Dataset.from_tensors(np.ones((4, 5))).repeat(), small_model(), 4)
    endless = (np.ones((500_000, 5), "int8") for _ in itertools.count())
    message = r"more than 1,000,000 samples.*itertools.islice"
    with pytest.raises(ValueError, match=message), Samples(endless, small_model(), 4) as samples:
        list(samples)


@pytest.mark.parametrize("batch_size", [0, -1, 2.5, True, None])
def test_wrong_batch_size(batch_size):
    with pytest.raises(ValueError, match="`batch_size` must be a positive integer"):
        Samples(np.ones((4, 5)), small_model(), batch_size)


@pytest.mark.parametrize("memory", [0, 2**20])
def test_output_error_by_hand(memory):
    inputs = keras.Input((1,))
    twice, same = (L.Dense(1, use_bias=False, kernel_initializer=name, name=name)(inputs) for name in ("ones", "zeros"))
    model = keras.Model(inputs, {"twice": twice, "same": same})
    other = keras.models.clone_model(model)
    model.get_layer("ones").kernel.assign([[2.0]])
    other.get_layer("ones").kernel.assign([[3.0]])
    # Outputs 2 and 6 have variance 4; 3 and 9 are off by 1 and 3. What never varies does not count.
    distance = OutputError(model, Samples(np.array([[1.0], [3.0]], "float32"), model, 1), memory)
    assert distance(other) == pytest.approx(((1 + 9) / 2) / 4)
    assert distance(model) == distance(model) == 0
    other.get_layer("ones").kernel.assign([[np.nan]])
    assert np.isnan(distance(other))


def with_normalization(deviation):
    """As trained on inputs of a deviation."""
    model = keras.Sequential([keras.Input((8, 8, 3)), L.Conv2D(4, 3), L.BatchNormalization(name="bn"), L.ReLU()])
    model.get_layer("bn").moving_variance.assign(np.full(4, deviation**2))
    return model


def adapted(deviation):
    return keras.Sequential([keras.Input((8, 8, 3)), L.Normalization(mean=[0.5] * 3, variance=[deviation**2] * 3, name="norm")])


def rescaling(scale):
    return keras.Sequential([keras.Input((8, 8, 3)), L.Rescaling(scale, name="rescaling"), L.Conv2D(4, 3)])


@pytest.mark.parametrize(
    ("model", "factor", "message"),
    [
        (lambda: with_normalization(0.5), 1, None),
        (lambda: with_normalization(0.5), 255, "at layer 'bn' they deviate"),
        (lambda: with_normalization(100.0), 255, None),
        (lambda: with_normalization(100.0), 1, "at layer 'bn' they deviate"),
        (lambda: with_normalization(1.0), 255, None),  # Its statistics are those of a new layer.
        (lambda: adapted(0.3), 1, None),
        (lambda: adapted(0.3), 255, "at layer 'norm' they deviate"),
        (lambda: rescaling(1 / 255), 255, None),
        (lambda: rescaling(1 / 255), 1, "layer 'rescaling' makes numbers of them that differ by 0.0039 at most"),
        (lambda: rescaling(2.0), 1, None),
    ],
)
def test_samples_in_another_scaling_are_warned_of(model, factor, message, generator):
    model = model()
    samples = Samples(factor * generator.random((32, 8, 8, 3)).astype("float32"), model, 32)
    if message is None:
        warn_of_odd_samples(model, samples)
        return
    with pytest.warns(UserWarning, match="not scaled like.*" + message):
        warn_of_odd_samples(model, samples)


def test_constant_samples_are_warned_of(generator):
    varied = generator.random((5, 6)).astype("float32")
    constant = np.ones((5, 6), "float32")
    constant[:, 2] = 7
    model = shared()
    one, two = (tensor.name for tensor in model.inputs)
    for arrays, names in (([varied, constant], [two]), ([constant, constant], [one, two])):
        with pytest.warns(UserWarning, match=re.escape(f"all the same for input {names}")):
            warn_of_odd_samples(model, Samples(arrays, model, 2))
    warn_of_odd_samples(model, Samples([varied, varied], model, 2))
    warn_of_odd_samples(model, Samples([constant[:1], constant[:1]], model, 2))
    late = np.concatenate([constant, varied])
    warn_of_odd_samples(model, Samples([late, late], model, 2))


def test_masks_may_be_the_same_for_all_samples(generator):
    inputs = [keras.Input((4,)), keras.Input((4,), dtype="int32")]
    model = keras.Model(inputs, L.Dense(2)(inputs[0]) + ops.sum(ops.cast(inputs[1], "float32")))
    warn_of_odd_samples(model, Samples([generator.random((5, 4)), np.ones((5, 4), "int32")], model, 2))


def test_observing_shows_pre_activations_and_leaves_no_trace(generator):
    model = small_model()
    images = generator.standard_normal((6, 5)).astype("float32")
    attributes = [sorted(layer.__dict__) for layer in model.layers]
    first, second = observe(lambda: model(images), model.layers[1:])
    kernel, bias = (ops.convert_to_numpy(weight) for weight in model.layers[1].weights)
    np.testing.assert_allclose(ops.convert_to_numpy(first.outputs), images @ kernel + bias, atol=1e-5)
    np.testing.assert_allclose(
        ops.convert_to_numpy(second.inputs), np.maximum(ops.convert_to_numpy(first.outputs), 0), atol=1e-6
    )
    (only,) = observe(lambda: model(images), [model.layers[2]], calls=1, outputs=False)
    assert only.outputs is None
    assert [sorted(layer.__dict__) for layer in model.layers] == attributes
    with pytest.raises(ZeroDivisionError):
        observe(lambda: 1 / 0, model.layers[1:])
    assert [sorted(layer.__dict__) for layer in model.layers] == attributes


def test_observing_a_layer_called_twice_named_twice_and_with_a_call_of_its_own(generator):
    layer, after = L.Dense(4, "relu"), L.Dense(4)
    inputs = keras.Input((4,))
    model = keras.Model(inputs, after(layer(layer(inputs))))
    images = generator.standard_normal((3, 4)).astype("float32")
    doubled = lambda inputs: 2 * inputs  # noqa: E731
    object.__setattr__(after, "call", doubled)
    calls = observe(lambda: model(images), [layer, after, layer])
    assert [call.layer for call in calls] == [layer, layer, after]
    np.testing.assert_allclose(
        ops.convert_to_numpy(calls[1].inputs), np.maximum(ops.convert_to_numpy(calls[0].outputs), 0), atol=1e-6
    )
    np.testing.assert_allclose(ops.convert_to_numpy(calls[2].outputs), 2 * ops.convert_to_numpy(calls[2].inputs))
    assert "call" not in layer.__dict__
    assert after.__dict__["call"] is doubled


def test_an_exception_within_a_layer_leaves_no_trace():
    class Broken(L.Dense):
        def call(self, inputs, training=None):
            raise ZeroDivisionError

    layer = Broken(2, "relu")
    layer.build((None, 3))
    with pytest.raises(ZeroDivisionError):
        observe(lambda: layer(np.ones((1, 3), "float32")), [layer])
    assert "call" not in layer.__dict__
    assert layer.activation is keras.activations.relu


@pytest.mark.parametrize("memory", [0, 1500, 2**30])
@pytest.mark.parametrize("make", [*MODELS, Subclassed], ids=lambda make: make.__name__)
def test_passes_that_resume_are_the_same_as_whole_ones(make, memory):
    model = make()
    if make is Subclassed:
        model.build((None, 6))
        batch = np.random.default_rng(0).standard_normal((4, 6)).astype("float32")
    else:
        batch = batch_for(model)
    layers = [layer for layer in model._flatten_layers() if isinstance(layer, (L.Dense, L.Conv2D, L.DepthwiseConv2D))]
    passes = Passes([model], [batch] * 3, memory)
    for layer in layers:
        wanted = observe(lambda: model(batch, training=False), [layer])
        for (run,) in passes.runs([[layer]]):
            seen = observe(run, [layer], calls=len(wanted))
            assert len(seen) == len(wanted)
            for call, other in zip(seen, wanted):
                np.testing.assert_array_equal(ops.convert_to_numpy(call.inputs), ops.convert_to_numpy(other.inputs))


def test_what_fits_into_memory_is_not_run_again():
    for make in (sequential, residual):
        model = make()
        batch = batch_for(model)
        last = [layer for layer in model._flatten_layers() if isinstance(layer, L.Dense)][-1]
        first = next(layer for layer in model._flatten_layers() if isinstance(layer, (L.Dense, L.Conv2D)))
        passes = Passes([model], [batch])
        for place in (last, last):
            for (run,) in passes.runs([[place]]):
                seen = observe(run, [first, last])
        assert [call.layer for call in seen] == [last]
