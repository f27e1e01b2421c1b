import numpy as np
import pytest

from keras_renorm import criteria
from keras_renorm.src.rules.criteria import KNOWN

# A row for every criterion: an instance, a kernel, its scores worked out by hand (or None).
ROWS = [
    (criteria.Magnitude(), np.array([[-2.0, 1.0], [0.0, 3.0]]), [[2.0, 1.0], [0.0, 3.0]]),
    (criteria.Random(1), np.ones((2, 3)), None),
]


@pytest.mark.parametrize(("criterion", "kernel", "expected"), ROWS, ids=lambda value: type(value).__name__)
def test_scores(criterion, kernel, expected):
    before = kernel.copy()
    scores = criterion(kernel)
    assert scores.shape == kernel.shape
    assert np.isfinite(scores).all()
    np.testing.assert_array_equal(kernel, before)
    if expected is not None:
        np.testing.assert_array_equal(scores, expected)


def test_every_criterion_has_a_row():
    known = {cls for cls in KNOWN.values() if not issubclass(cls, criteria.CalibratedCriterion)}
    assert {type(row[0]) for row in ROWS} == known


@pytest.mark.parametrize("name", list(KNOWN))
def test_names_configs_and_equality(name):
    criterion = criteria.get(name, calibrated=True)
    again = type(criterion).from_config(criterion.get_config())
    assert again == criterion
    assert criteria.get(criterion, calibrated=True) is criterion


def test_random_is_the_same_for_the_same_seed():
    kernel = np.ones((4, 4))
    np.testing.assert_array_equal(criteria.Random(5)(kernel), criteria.Random(5)(kernel))
    one = criteria.Random(5)
    assert not np.array_equal(one(kernel), one(kernel))


def test_unknown():
    with pytest.raises(ValueError, match=r"`criterion` is not known. Received: criterion='hessian'.*magnitude.*random"):
        criteria.get("hessian")
    with pytest.raises(ValueError, match="`criterion` is not known"):
        criteria.get(criteria.Magnitude)
