import itertools

import keras
import numpy as np
import pytest

from keras_renorm.src.calibration.samples import Samples
from tests.pruning.test_conversion import shared

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
        (np.ones((0, 5)), "contains no samples"),
        (iter([]), "contains no samples.*create a new one"),
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

    with pytest.raises(ValueError, match=r"infinite dataset.*dataset.take"):
        Samples(tf.data.Dataset.from_tensors(np.ones((4, 5))).repeat(), small_model(), 4)
    endless = (np.ones((500_000, 5), "int8") for _ in itertools.count())
    message = r"more than 1,000,000 samples.*itertools.islice"
    with pytest.raises(ValueError, match=message), Samples(endless, small_model(), 4) as samples:
        list(samples)


@pytest.mark.parametrize("batch_size", [0, -1, 2.5, True, None])
def test_wrong_batch_size(batch_size):
    with pytest.raises(ValueError, match="`batch_size` must be a positive integer"):
        Samples(np.ones((4, 5)), small_model(), batch_size)


class LabelledBatches(Batches):
    def __getitem__(self, index):
        part = slice(index * self.size, (index + 1) * self.size)
        return self.images[part], np.arange(len(self.images))[part]


WITH_LABELS = {
    "arrays": lambda images, size: (images, np.arange(len(images))),
    "inputs by name": lambda images, size: ({"images": images}, np.arange(len(images))),
    "PyDataset": LabelledBatches,
    "generator": lambda images, size: ((images[i : i + size], np.arange(10)[i : i + size]) for i in range(0, 10, size)),
    "lists": lambda images, size: ([images[i : i + size], np.arange(10)[i : i + size]] for i in range(0, 10, size)),
}


@pytest.mark.parametrize("way", list(WITH_LABELS))
def test_samples_with_labels(way, generator):
    images = generator.standard_normal((10, 5)).astype("float32")
    with Samples(WITH_LABELS[way](images, 4), small_model(), batch_size=4, labels=True) as samples:
        for _ in range(2):
            x, y = zip(*samples.labelled())
            assert [len(one) for one in y] == [4, 4, 2]
            np.testing.assert_array_equal(np.concatenate(y), np.arange(10))
            np.testing.assert_array_equal(np.concatenate([keras.tree.flatten(one)[0] for one in x]), images)
            np.testing.assert_array_equal(keras.tree.flatten(next(iter(samples)))[0], images[:4])


def test_weights_and_several_inputs_with_labels(generator):
    one, two = generator.standard_normal((2, 9, 6)).astype("float32")
    with Samples(([one, two], one, np.arange(9)), shared(), 4, labels=True) as samples:
        ((first, second), y, weights), *_ = samples.labelled()
    np.testing.assert_array_equal(first, one[:4])
    np.testing.assert_array_equal(second, two[:4])
    np.testing.assert_array_equal(y, one[:4])
    np.testing.assert_array_equal(weights, np.arange(4))


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (np.ones((4, 5)), r"must have labels.*`calibration=\(x, y\)`.*Received: ndarray"),
        ([np.ones((4, 5))], "must have labels.*Received: list of length 1"),
        (iter([np.ones((4, 5))]), "must have labels.*Received: ndarray"),
        (iter([(np.ones((4, 5)), None)]), "must have labels.*Received: tuple of length 2"),
        ((np.ones((4, 5)), np.ones(3)), r"as many labels as samples. Received arrays of shapes \[\(4, 5\), \(3,\)\]"),
        ((np.ones((4, 6)), np.ones(4)), "wrong shape for input 'images'"),
    ],
)
def test_labels_that_are_missing_or_do_not_fit(data, message):
    with pytest.raises(ValueError, match=message), Samples(data, small_model(), 4, labels=True) as samples:
        list(samples)
