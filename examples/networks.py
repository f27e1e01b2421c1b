"""The networks of the examples, as the papers have them; all end in logits."""

from __future__ import annotations

import functools

import keras

L = keras.layers
# Filters and strides of MobileNet's blocks, for large images and for small ones.
MOBILE = ((64, 1), (128, 2), (128, 1), (256, 2), (256, 1), (512, 2), *[(512, 1)] * 5, (1024, 2), (1024, 1))
SMALL_MOBILE = ((64, 1), (128, 2), (128, 1), (256, 2), (256, 1))


def lenet_300_100(shape, classes, regularizer=None):
    """Three fully connected layers (LeCun and others, 1998)."""
    dense = functools.partial(L.Dense, kernel_regularizer=regularizer)
    return keras.Sequential([keras.Input(shape), L.Flatten(), dense(300, "relu"), dense(100, "relu"), dense(classes)])


def lenet_5(shape, classes, regularizer=None):
    """Two convolutions and two fully connected layers (20-50-500-10, as in Caffe)."""
    # Images as small as the digits are padded to what two convolutions and poolings need.
    padding = max(0, 16 - shape[0]) // 2
    conv = functools.partial(L.Conv2D, kernel_size=5, activation="relu", kernel_regularizer=regularizer)
    return keras.Sequential(
        [
            keras.Input(shape),
            *([L.ZeroPadding2D(padding)] if padding else []),
            conv(20),
            L.MaxPooling2D(),
            conv(50),
            L.MaxPooling2D(),
            L.Flatten(),
            L.Dense(500, "relu", kernel_regularizer=regularizer),
            L.Dense(classes, kernel_regularizer=regularizer),
        ]
    )


def vgg(shape, classes, regularizer=None, width=1.0):
    """VGG-16 with batch normalization and one hidden layer of 512, for small images; `width` scales all its layers."""
    layers = [keras.Input(shape)]
    for filters, convolutions in ((64, 2), (128, 2), (256, 3), (512, 3), (512, 3)):
        for _ in range(convolutions):
            layers += _conv(round(width * filters), 3, regularizer=regularizer)
        # Images as small as the digits are not halved to nothing.
        if shape[0] >= 32 or len(layers) < 16:
            layers.append(L.MaxPooling2D())
    layers += [
        L.GlobalAveragePooling2D(),
        L.Dense(round(width * 512), "relu", kernel_regularizer=regularizer),
        L.Dense(classes, kernel_regularizer=regularizer),
    ]
    return keras.Sequential(layers)


def resnet(shape, classes, regularizer=None, depth=20):
    """A residual network for small images (He and others, 2016), of depth `6 n + 2`."""
    x = inputs = keras.Input(shape)
    for layer in _conv(16, 3, regularizer=regularizer):
        x = layer(x)
    for filters in (16, 32, 64):
        for block in range((depth - 2) // 6):
            strides = 2 if filters > 16 and block == 0 else 1
            shortcut = x
            for layer in _conv(filters, 3, strides, regularizer=regularizer):
                x = layer(x)
            for layer in _conv(filters, 3, regularizer=regularizer)[:-1]:
                x = layer(x)
            if strides > 1:
                for layer in _conv(filters, 1, strides, regularizer=regularizer)[:-1]:
                    shortcut = layer(shortcut)
            x = L.ReLU()(L.Add()([x, shortcut]))
    x = L.GlobalAveragePooling2D()(x)
    return keras.Model(inputs, L.Dense(classes, kernel_regularizer=regularizer)(x))


def mobile(shape, classes, regularizer=None, width=1.0, blocks=MOBILE):
    """MobileNet (Howard and others, 2017), padded alike on all sides: so XNNPACK skips the zeros of its 1x1 convolutions."""
    filters = round(32 * width)
    x = inputs = keras.Input(shape)
    if shape[0] < 32:
        x = L.UpSampling2D(32 // shape[0])(x)
    if shape[-1] == 1:
        x = L.Concatenate()([x, x, x])
    x = L.Conv2D(filters, 3, 2, use_bias=False, kernel_regularizer=regularizer)(L.ZeroPadding2D(1)(x))
    x = L.ReLU(6)(L.BatchNormalization(momentum=0.9)(x))
    for filters, strides in blocks:
        x = L.DepthwiseConv2D(3, strides, use_bias=False)(L.ZeroPadding2D(1)(x))
        x = L.ReLU(6)(L.BatchNormalization(momentum=0.9)(x))
        for layer in _conv(round(width * filters), 1, regularizer=regularizer)[:-1]:
            x = layer(x)
        x = L.ReLU(6)(x)
    return keras.Model(inputs, L.Dense(classes)(L.GlobalAveragePooling2D()(x)))


def _conv(filters, size, strides=1, regularizer=None):
    return [
        L.Conv2D(filters, size, strides, padding="same", use_bias=False, kernel_regularizer=regularizer),
        L.BatchNormalization(momentum=0.9),
        L.ReLU(),
    ]
