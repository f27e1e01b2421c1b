"""Prune Keras models and give them their accuracy back."""

import importlib as _importlib
import pathlib as _pathlib
import sys as _sys

from keras_renorm.version import __version__ as __version__

_STARTED = _sys.argv[0] if _sys.argv else ""

# The command imports Keras and TensorFlow once its arguments are known to be right: help and wrong use are answered at once.
if _pathlib.Path(_STARTED).stem == "keras-renorm" or (_STARTED == "-m" and "keras_renorm" in _sys.orig_argv):

    def __getattr__(name):
        return getattr(_importlib.import_module("keras_renorm.api"), name)
else:
    from keras_renorm.api import *  # noqa: F403
    from keras_renorm.api import __all__ as __all__
