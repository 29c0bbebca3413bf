"""The bank: what a frozen backbone sees in every frame of every clip, computed once.

Heads read it in training (`sora.model.probes`). The model that is served holds the backbone itself, so it takes clips.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cached_property
from typing import Any

import numpy as np

from sora.core.records import ClipSpec
from sora.core.tensors import VIDEO, Clips, TensorSpec
from sora.model.widths import WIDTHS

APPEARANCE = "appearance"  # the tensor: `(frames, channels) float16`, all levels side by side


class Bank:
    """A frozen backbone for clips of one spec. Importing and making it is light; `compute` loads Keras.

    Arguments:
        backbone: its name, as in `model.backbone`.
        clip: the clips to come.
    """

    def __init__(self, backbone: str, clip: ClipSpec) -> None:
        self.backbone, self.clip = backbone, clip

    @property
    def tensors(self) -> dict[str, TensorSpec]:
        """What is kept for each clip."""
        return {APPEARANCE: TensorSpec(APPEARANCE, "float16", (self.clip.frames, sum(WIDTHS[self.backbone])))}

    def compute(self, clips: Clips) -> Mapping[str, np.ndarray]:
        """The features of some clips.

        Raises:
            InputError, ServiceError: the backbone's weights are missing, damaged or can't be downloaded.
        """
        return {APPEARANCE: self._call(clips.video)}

    @cached_property
    def _call(self) -> Callable[[np.ndarray], np.ndarray]:
        import keras

        from sora.model import pretrained
        from sora.model.backbone import BackboneStream
        from sora.model.streams import KeyFrames

        clip = self.clip
        video = keras.Input((clip.frames, clip.height, clip.width, 3), dtype="uint8", name=VIDEO)
        stream = BackboneStream(self.backbone, trainable=False, name="high")
        levels = stream(KeyFrames(clip.frames, name="key_frames")(video))
        model = keras.Model(video, keras.layers.Concatenate()(levels))
        pretrained.load(model)
        return _compiled(model)


def _compiled(model: Any) -> Callable[[np.ndarray], np.ndarray]:
    import keras

    if keras.config.backend() != "tensorflow":
        return lambda clips: np.asarray(model.predict_on_batch(clips), np.float16)
    import tensorflow as tf

    signature = [tf.TensorSpec((None, *model.input_shape[1:]), tf.uint8)]

    @tf.function(input_signature=signature, autograph=False)  # type: ignore[untyped-decorator]  # TensorFlow has no types
    def call(clips: Any) -> Any:
        return tf.cast(model(clips, training=False), tf.float16)

    function = call.get_concrete_function()
    return lambda clips: np.asarray(function(tf.constant(clips)))
