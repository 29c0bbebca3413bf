"""Versions of what computes. Results of another version are not reused; results of the same version are.

Each constant below names what one part of Sora computes. **Give it a new name when its output changes, and only then**:
a new `FACTS` decodes every video of every project again, a new `LEARNING` trains every project again. A change that
leaves the output as it is (an import, a message, a plot's colour) leaves the name as it is, so nobody pays for it.
`tests/test_provenance.py` computes every output from footage in this repository and fails when one changed and its name
did not.

The first names are those that earlier versions of Sora computed from their source, so that their results are still
valid. New names are words: `facts-2`.
"""

from __future__ import annotations

import hashlib
from importlib import metadata
from typing import Literal

Stage = Literal["manifest", "validate", "shards", "features"]

# A video's facts: one row of the manifest, less its path and label (`sora.media.video.ffmpeg.inspect`).
FACTS = "af61f5b0f8efdbea"
# A video's clips (`sora.media.video.transform.prepare_clips`).
CLIPS = "04c4a1d68573b206"
# What each stage of dvc.yaml writes: also the defaults of the settings that it reads.
STAGES: dict[Stage, str] = {
    "manifest": "manifest-2",  # it remembers the limits under which a file was refused
    "validate": "validate-2",  # too_large, too_slow, bad_name
    "shards": "shards-2",  # the index holds digests
    "features": "features-1",
}
# Which video is in which split (`sora.dataset.splits`), what training makes of them, and how the result is judged.
LEARNING = "a968980f0982c29a"

# The decoders under which the names above were given. Others may decode the same bytes to other pixels.
DECODERS = {"av": "18.1.0", "opencv-python-headless": "5.0.0.93"}


def facts() -> str:
    """The name of what finds a video's facts: `FACTS`, with the decoders if they differ from `DECODERS`."""
    return _with_decoders(FACTS)


def clips() -> str:
    """The name of what makes a video's clips: `CLIPS`, with the decoders if they differ from `DECODERS`."""
    return _with_decoders(CLIPS)


def stages(suffix: str = "", bounds: str = "", backbone: str | None = None) -> dict[Stage, str]:
    """Stage of dvc.yaml → the name of what it computes; this is what preprocessing.lock holds.

    Args:
        suffix: of the two stages that read labels; each task has its own. It is in the name, since the dvc.yaml of
            older projects can't depend on `model.head`, which they do not have.
        bounds: what a video may cost, if that differs from the default. It is in the name for the same
            reason.
        backbone: whose features are kept; "": none are; None: the project has no such stage.
    """
    names = dict(STAGES)
    if backbone is None:
        del names["features"]
    else:
        names["features"] = features(backbone) if backbone else "none"
    names["manifest"] = _with_decoders(names["manifest"])
    names["shards"] = _with_decoders(names["shards"])
    for stage in ("manifest", "validate"):
        names[stage] += suffix
    if bounds:
        names["manifest"] += f"-{hashlib.sha256(bounds.encode()).hexdigest()[:8]}"
    return names


def features(backbone: str) -> str:
    """The name of what computes a bank of this backbone's features."""
    return f"{STAGES['features']}-{backbone}"


def _with_decoders(name: str) -> str:
    others = [
        f"{package}-{installed}"
        for package, expected in DECODERS.items()
        if (installed := metadata.version(package)) != expected
    ]
    return "+".join([name, *others])
