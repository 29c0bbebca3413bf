"""The bank: what a frozen backbone sees in every frame of every clip, computed once.

Heads read it in training (`sora.model.probes`). The model that is served holds the backbone itself, so it takes clips.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from sora.core.records import ClipSpec
from sora.core.tensors import VIDEO, Clips, TensorSpec

if TYPE_CHECKING:
    import keras

BATCH = 4  # clips
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
        # Always as many: another number would be traced again, for seconds.
        padded = clips.padded(-(-len(clips) // BATCH) * BATCH).video
        parts = [self._model.predict_on_batch(padded[start : start + BATCH]) for start in range(0, len(padded), BATCH)]
        return {APPEARANCE: np.concatenate(parts)[: len(clips)].astype(np.float16)}

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
