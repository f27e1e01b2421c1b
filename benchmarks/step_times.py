"""How long the steps of a training take."""

import time

import keras


def step_times(base=keras.callbacks.Callback):
    """A callback with the `seconds` of the steps of an epoch, and of what callbacks before it do in them.

    Args:
        base: the class of callbacks: Keras 3's, or that of `tf_keras`.
    """

    class StepTimes(base):
        def on_epoch_begin(self, epoch, logs=None):
            self.seconds = []

        def on_train_batch_begin(self, batch, logs=None):
            self.started = time.perf_counter()

        def on_train_batch_end(self, batch, logs=None):
            self.seconds.append(time.perf_counter() - self.started)

    return StepTimes()
