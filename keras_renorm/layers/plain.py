from __future__ import annotations

from keras_renorm.layers.masked import PRUNING_ARGUMENTS


class PlainSubclass:
    """Mix-in for masked layers that extend one Keras layer, `plain_class`, with a single kernel."""

    @property
    def mask(self):
        return self._masked_kernel().mask

    @property
    def scale(self):
        return self._masked_kernel().scale

    def _masked_kernel(self):
        if not self.masked_kernels:
            raise AttributeError(f"Layer '{self.name}' has no mask and no scale yet: build it, or call it on data, first.")
        return self.masked_kernels[0]

    def plain_layer(self):
        config = {name: value for name, value in self.get_config().items() if name not in PRUNING_ARGUMENTS}
        return self.plain_class.from_config(config)
