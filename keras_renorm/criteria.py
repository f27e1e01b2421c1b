"""Criteria give each weight a score: what scores highest is kept."""

from keras_renorm.src.rules.criteria import get
from keras_renorm.src.rules.criteria.activation import Activation
from keras_renorm.src.rules.criteria.activity import Activity
from keras_renorm.src.rules.criteria.admm import ADMM
from keras_renorm.src.rules.criteria.base import CalibratedCriterion, Criterion
from keras_renorm.src.rules.criteria.magnitude import Magnitude
from keras_renorm.src.rules.criteria.obs import OBS
from keras_renorm.src.rules.criteria.random import Random
from keras_renorm.src.rules.criteria.taylor import Taylor

__all__ = ["ADMM", "OBS", "Activation", "Activity", "CalibratedCriterion", "Criterion", "Magnitude", "Random", "Taylor", "get"]
