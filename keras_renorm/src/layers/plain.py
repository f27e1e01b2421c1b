"""The mix-in of prunable layers that replace one Keras layer."""

from __future__ import annotations


class PlainSubclass:
    """Mix-in for prunable layers that extend one Keras layer, `plain_class`, with a single kernel."""

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
