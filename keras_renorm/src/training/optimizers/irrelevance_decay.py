"""Irrelevant-weight regularization, as an optimizer around another one."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import numpy as np
from keras import ops

from keras_renorm.src.core import registry, validation
from keras_renorm.src.core.keras_internals import index_in_optimizer, replicas_of, sum_over_replicas
from keras_renorm.src.training.optimizers.wrapper import OptimizerWrapper


@registry.register
class IrrelevanceDecay(OptimizerWrapper):
    """Lets weights decay that are irrelevant to the loss, while another optimizer trains.

    Adds `2 * gamma * w * exp(-|g| / alpha)` to the gradient `g` of the loss. This is the gradient of the penalty
    `gamma * w^2 * exp(-|g| / alpha)` with the exponential held constant. A weight with a large gradient hardly decays; a weight
    with a small gradient decays, and magnitude pruning then removes it. There is no second backward pass, and any loss works.
    The inner optimizer clips, accumulates and applies the sum.

    Source: G. Bonetta, M. Ribero and R. Cancelliere, Regularization-based pruning of irrelevant weights in deep neural
    architectures, arXiv 2204.04977. Deviation: the paper compares `|g|` with `alpha` itself. Here `alpha` is by default a
    multiple of the root mean square of the gradient of the same variable, which does not depend on the scale of the loss. With
    the `alpha` of the paper, 0.1, and the gradients of a mean loss, which are a hundred times smaller, every weight decays:
    this is L2 decay.

    Args:
        optimizer: the optimizer that trains: an instance, a name or a config.
        gamma: strength of the decay. Tune it first. Defaults to 3e-4.
        alpha: temperature: weights with `|g|` well below it decay. With `relative=True`, values below 1 spare weights that
            matter only for the moment, and pruning finds fewer weights to remove. Defaults to 3.
        relative: whether `alpha` is a multiple of the root mean square of the gradient of the variable, and not an absolute
            value. Defaults to `True`.
        decay_steps: number of steps after the last `restart()` over which `gamma` falls linearly to zero; `None` for a constant
            `gamma`. `keras_renorm.methods.prune_iteratively` calls `restart()` after every pruning event. Defaults to `None`.
        exclude: list of regular expressions, such as `["embedding"]`. Variables with a matching path do not decay; variables of
            rank one never do. Defaults to `None`.
        name: name of the wrapper. Defaults to `None`.

    Raises:
        ValueError: if `gamma`, `alpha` or `decay_steps` is not positive.

    Example:

    >>> import keras, numpy as np, keras_renorm as kr
    >>> model = keras.Sequential([keras.Input((1,)), keras.layers.Dense(1, use_bias=False, kernel_initializer="ones")])
    >>> model.compile(kr.optimizers.IrrelevanceDecay(keras.optimizers.SGD(0.5), gamma=0.1), "mse")
    >>> history = model.fit(np.zeros((1, 1)), np.zeros((1, 1)), epochs=1, verbose=0)
    >>> round(float(model.layers[0].kernel[0, 0]), 6)  # the gradient is zero: 1 - 0.5 * 2 * 0.1
    0.9
    """

    def __init__(
        self,
        optimizer: Any,
        gamma: float = 3e-4,
        alpha: float = 3.0,
        relative: bool = True,
        decay_steps: int | None = None,
        exclude: Sequence[str] | None = None,
        name: str | None = None,
    ):
        gamma, alpha = validation.check_positive(gamma, "gamma"), validation.check_positive(alpha, "alpha")
        if decay_steps is not None:
            validation.check_count(decay_steps, "decay_steps")
        super().__init__(optimizer, name=name)
        self.gamma, self.alpha = gamma, alpha
        self.relative = validation.check_choice(relative, (True, False), "relative")
        self.decay_steps = decay_steps
        self.exclude = list(exclude) if exclude else None

    def build(self, variables):
        super().build(variables)
        self._decays = [
            len(variable.shape) > 1 and not any(re.search(pattern, variable.path) for pattern in self.exclude or ())
            for variable in variables
        ]
        self.steps = self.add_variable((), dtype="int", aggregation="only_first_replica", name="steps")

    def before_step(self, gradients, variables):
        replicas = replicas_of(self)
        if replicas > 1:
            # What counts is the gradient of the whole batch, and the inner optimizer will sum over replicas.
            reduced = sum_over_replicas(self, list(zip(gradients, variables)))
            gradients = [gradient / replicas for gradient, _ in reduced]
        strength = 2 * self._present_gamma() / replicas
        result = [
            gradient + self._decay(gradient, variable, strength, replicas)
            if self._decays[index_in_optimizer(self, variable)]
            else gradient
            for gradient, variable in zip(gradients, variables)
        ]
        self.steps.assign_add(1)
        return result

    def _decay(self, gradient, variable, strength, replicas):
        # Squares of half-precision gradients would be lost.
        precise = ops.cast(gradient, "float32")
        alpha = self.alpha / replicas
        if self.relative:
            # Where no weight of a variable has a gradient, none is relevant.
            alpha = ops.maximum(self.alpha * ops.sqrt(ops.mean(ops.square(precise))), np.finfo(np.float32).tiny)
        # As few passes over the weights as it takes: whatever has one value for all of them is computed first.
        decay = ops.exp(ops.abs(precise) * (-1 / alpha)) * ops.cast(variable, "float32") * strength
        return ops.cast(decay, gradient.dtype)

    def _present_gamma(self):
        if self.decay_steps is None:
            return self.gamma
        left = 1 - ops.cast(self.steps, "float32") / self.decay_steps
        return self.gamma * ops.maximum(left, 0.0)

    def restart(self) -> None:
        """Set `gamma` to its full value, from which it falls again over `decay_steps`."""
        self.steps.assign(0)

    def get_config(self):
        return {
            **super().get_config(),
            "gamma": self.gamma,
            "alpha": self.alpha,
            "relative": self.relative,
            "decay_steps": self.decay_steps,
            "exclude": self.exclude,
        }
