"""Small Keras models such as a user could give as backbones."""

from __future__ import annotations

import keras

SCALE = 1 / 64  # the harness of layers gives any pixels bytes


def of_pictures(height: int | None = None, width: int | None = None) -> keras.Model:
    """Two levels, of 6 and 8 channels, with a normalisation."""
    pictures = keras.Input((height, width, 3))
    first = keras.layers.Conv2D(6, 3, padding="same")(keras.layers.Rescaling(SCALE)(pictures))
    second = keras.layers.Conv2D(8, 3, strides=2, padding="same", activation="gelu")(first)
    second = keras.layers.BatchNormalization()(second)
    return keras.Model(pictures, [keras.layers.GlobalAveragePooling2D()(level) for level in (first, second)])


def of_videos(time: int | None = None, *, moments: bool = False) -> keras.Model:
    """One vector of 6 channels; `moments`: one for every second frame."""
    videos = keras.Input((time, None, None, 3))
    x = keras.layers.Conv3D(6, 3, strides=(2, 1, 1), padding="same")(keras.layers.Rescaling(SCALE)(videos))
    if not moments:
        return keras.Model(videos, keras.layers.GlobalAveragePooling3D()(x))
    return keras.Model(videos, keras.ops.mean(x, axis=(2, 3)))
