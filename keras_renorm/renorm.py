"""Renormalizers change the weights that are kept, to make up for those that are removed."""

from keras_renorm.src.rules.renorm import L1, L2, CalibratedRenormalizer, LeastSquares, MatchMoments, Renormalizer, get

__all__ = ["L1", "L2", "CalibratedRenormalizer", "LeastSquares", "MatchMoments", "Renormalizer", "get"]
