"""`python -m keras_renorm` is the command `keras-renorm`."""

import sys

from keras_renorm.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
