"""A training with pruning in a process of its own: what the tests of distribution start.

    python train_distributed.py one|mirrored|workers|data_parallel RESULT.npz

Writes masks and kernels as every replica of this process has them.
"""

import os
import sys

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras
import numpy as np


def strategy_of(way):
    """The scope to build in, and a function from a variable to its values on all replicas of this process."""
    if way == "mirrored":
        import tensorflow as tf

        (processor,) = tf.config.list_physical_devices("CPU")
        tf.config.set_logical_device_configuration(processor, [tf.config.LogicalDeviceConfiguration()] * 2)
        strategy = tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"])
    elif way == "workers":
        import tensorflow as tf

        strategy = tf.distribute.MultiWorkerMirroredStrategy()
    elif way == "data_parallel":
        keras.distribution.set_distribution(keras.distribution.DataParallel())
        assert keras.distribution.distribution().device_mesh.devices.size == 2
        return None, lambda variable: [np.asarray(shard.data) for shard in variable.value.addressable_shards]
    else:
        return None, lambda variable: [keras.ops.convert_to_numpy(variable)]
    return strategy, lambda variable: [
        value.numpy() for value in strategy.experimental_local_results(getattr(variable, "value", variable))
    ]


def trained():
    import keras_renorm as kr

    keras.utils.set_random_seed(0)
    layers = [
        kr.layers.PrunableConv2D(6, 3, activation="relu"),
        keras.layers.Flatten(),
        kr.layers.PrunableDense(16, activation="tanh"),
        kr.layers.RenormalizedPruning(keras.layers.Dense(3)),
    ]
    model = keras.Sequential([keras.Input((8, 8, 1)), *layers])
    model.compile(keras.optimizers.SGD(0.05, momentum=0.9), "mse")
    return model, kr.callbacks.UpdatePruning(kr.schedules.PolynomialDecay(0.2, 0.8, begin_step=4, end_step=20, frequency=4))


def train_by_hand(strategy, model, pruning, x, y, batch, epochs):
    """What `fit` does: that of Keras 3 does not run under `MultiWorkerMirroredStrategy`."""
    import tensorflow as tf

    with strategy.scope():
        model.optimizer.build(model.trainable_variables)

    def replica_step(x, y):
        with tf.GradientTape() as tape:
            loss = tf.reduce_sum((model(x, training=True) - y) ** 2) / (batch * y.shape[-1])
        gradients = tape.gradient(loss, model.trainable_weights)
        # Keras' optimizer adds up the gradients of all replicas.
        model.optimizer.apply_gradients(zip(gradients, model.trainable_weights))

    @tf.function
    def train_step(x, y):
        strategy.run(replica_step, args=(x, y))

    data = strategy.experimental_distribute_dataset(tf.data.Dataset.from_tensor_slices((x, y)).batch(batch))
    pruning.set_model(model)
    for _ in range(epochs):
        for one_batch in data:
            train_step(*one_batch)
            pruning.step()


def main():
    way, path = sys.argv[1:]
    strategy, values_of = strategy_of(way)
    generator = np.random.default_rng(0)
    x = generator.standard_normal((320, 8, 8, 1)).astype("float32")
    y = np.stack([x[:, 0, 0, 0], x[:, 3, 3, 0] * x[:, 4, 4, 0], x[:, 5, 5, 0] ** 2], 1)
    if strategy is None:
        model, pruning = trained()
    else:
        with strategy.scope():
            model, pruning = trained()
    # Ten batches an epoch; after two nothing is pruned any more, and kernels settle.
    if way == "workers":
        train_by_hand(strategy, model, pruning, x, y, batch=32, epochs=4)
    else:
        model.fit(x, y, batch_size=32, epochs=4, shuffle=False, verbose=0, callbacks=[pruning])
    result = {}
    for layer in model.layers:
        for kernel in getattr(layer, "masked_kernels", ()):
            for replica, (mask, values) in enumerate(zip(values_of(kernel.mask), values_of(kernel.variable))):
                result[f"{layer.name} mask {replica}"], result[f"{layer.name} kernel {replica}"] = mask, values * mask
    np.savez(path, **result)


if __name__ == "__main__":
    main()
