"""How a file becomes named tensors and facts: a folder for each modality, and confined decoders that run them."""

from sora.media.modality import Modality
from sora.media.video import MODALITY

__all__ = ["MODALITIES", "MODALITY", "Modality"]

# `MODALITY` is the default modality.
MODALITIES: dict[str, Modality] = {MODALITY.name: MODALITY}
