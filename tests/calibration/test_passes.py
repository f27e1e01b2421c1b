import keras
import numpy as np
import pytest
from keras import ops

from keras_renorm.src.calibration.observing import observe
from keras_renorm.src.calibration.passes import Passes
from tests.pruning.test_conversion import MODELS, Subclassed, batch_for, residual, sequential

L = keras.layers


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
