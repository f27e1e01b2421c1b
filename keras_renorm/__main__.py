"""`python -m keras_renorm` is the command `keras-renorm`.

Python imports the package first, with TensorFlow and what it logs; `python -m keras_renorm_cli` begins without them.
"""

import sys

from keras_renorm_cli import main

if __name__ == "__main__":
    sys.exit(main())
