"""What the commands of `keras-renorm` do; `keras_renorm_cli`, beside the package, says what can be asked of them.

A command is a module with a function `run(arguments)`, which returns its answer as text and as data for JSON.
"""
