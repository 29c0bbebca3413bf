"""Names of the code that makes facts and clips: what was made by other code is not reused."""

from __future__ import annotations

import hashlib
from importlib import metadata
from pathlib import Path


def facts() -> str:
    """Of what finds a video's facts."""
    return _tag("decode.py", "signature.py")


def clips() -> str:
    """Of what makes a video's clips."""
    return _tag("clips.py", "decode.py", "seek.py", "transform.py")


def _tag(*sources: str) -> str:
    digest = hashlib.sha256()
    for source in sources:
        digest.update((Path(__file__).parent / source).read_bytes())
    for package in ("av", "opencv-python-headless"):
        digest.update(metadata.version(package).encode())
    return digest.hexdigest()[:16]
