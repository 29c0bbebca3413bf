"""The bank: what a frozen backbone sees in every frame of every clip, computed once.

Heads read it in training (`sora.model.probes`). The model that is served holds the backbone itself, so it takes clips.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from sora.core.records import ClipSpec
from sora.core.tensors import VIDEO, Clips, TensorSpec

if TYPE_CHECKING:
    import keras

APPEARANCE = "appearance"  # the tensor: `(frames, channels) float16`, all levels side by side


class Bank:
    """A frozen backbone for clips of one spec. The first use of either member loads Keras and the weights.

    Arguments:
        backbone: its name, see `backbone.stream`.
        clip: the clips to come.
        project: the project's folder, for a backbone that is a file in it.

    Raises, at the first use:
        InputError, ServiceError: the backbone or its weights are missing, damaged or can't be downloaded.
    """

    def __init__(self, backbone: str, clip: ClipSpec, project: Path | None = None) -> None:
        self.backbone, self.clip, self.project = backbone, clip, project

    @property
    def tensors(self) -> dict[str, TensorSpec]:
        """What is kept for each clip."""
        return {APPEARANCE: TensorSpec(APPEARANCE, "float16", tuple(self._model.output_shape[1:]))}

    def compute(self, clips: Clips) -> Mapping[str, np.ndarray]:
        """The features of some clips."""
        return {APPEARANCE: self._call(clips.video)}

    @cached_property
    def _model(self) -> keras.Model:
        import keras

        from sora.model import pretrained
        from sora.model.backbone import BackboneStream, stream
        from sora.model.streams import KeyFrames

        clip = self.clip
        video = keras.Input((clip.frames, clip.height, clip.width, 3), dtype="uint8", name=VIDEO)
        layer = stream(self.backbone, trainable=False, project=self.project, name="high")
        levels = keras.tree.flatten(layer(KeyFrames(clip.frames, name="key_frames")(video)))
        if isinstance(layer, BackboneStream):
            pretrained.give(layer)
        return keras.Model(video, keras.layers.Concatenate()(levels) if len(levels) > 1 else levels[0])

    @cached_property
    def _call(self) -> Callable[[np.ndarray], np.ndarray]:
        return _compiled(self._model)


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
