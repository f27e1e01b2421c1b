import keras
import numpy as np
import pytest

from keras_renorm.src.calibration.output_error import OutputError
from keras_renorm.src.calibration.samples import Samples

L = keras.layers


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
