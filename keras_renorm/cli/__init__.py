"""The command `keras-renorm`: `main.py` and `parser.py` take the arguments, and each command is one module.

The module of a command has a function `run(arguments)`, which returns the answer as text, and as data for JSON.
"""
