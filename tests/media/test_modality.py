"""The port of media: what every modality promises, and that naming one costs nothing."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import asdict, fields
from pathlib import Path

import numpy as np
import pytest

from sora.core.records import ClipSpec, VideoRecord
from sora.core.tensors import TensorSpec
from sora.media import MODALITIES, MODALITY, Modality
from tests.videos import make_video

SPEC = ClipSpec(frames=4, height=32, width=32, sampling="window", window_seconds=0.5, max_clips=2)


@pytest.mark.parametrize("modality", MODALITIES.values(), ids=MODALITIES)
def test_a_reader_gives_what_its_modality_promises(modality: Modality, tmp_path: Path) -> None:
    path = make_video(tmp_path / "a.mp4", frames=24, fps=12)
    reader = modality.reader()
    reader.prepare(clips=True)
    with path.open("rb") as file:
        facts = reader.facts(file.fileno(), {})
        known = (facts["frames"], facts["fps"])
        reading = reader.clips(file.fileno(), SPEC, known, {})
    assert {name: type(facts[name]) for name in modality.facts} == {
        name: type(nothing) for name, nothing in modality.facts.items()
    }
    assert facts["truncated"] == ""
    clips = len(modality.windows(*known, SPEC))
    assert clips == 2 and reading.spans is not None and len(reading.spans) == clips
    promised = modality.tensors(SPEC)
    assert list(reading.tensors) == list(promised)
    for name, tensor in promised.items():
        assert reading.tensors[name].dtype == np.dtype(tensor.dtype)
        assert reading.tensors[name].shape == (clips, *tensor.shape)
        assert reading.tensors[name].nbytes == clips * tensor.bytes


def test_facts_of_video_are_columns_of_the_manifest() -> None:
    assert set(MODALITY.facts) < {field.name for field in fields(VideoRecord)}


def test_naming_a_modality_loads_nothing_heavy() -> None:
    code = "import sys, sora.media.pool; print([n for n in ('av', 'cv2', 'numpy', 'pandas') if n in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_a_tensor_survives_json() -> None:
    tensor = TensorSpec("video", "uint8", (4, 32, 32, 3))
    assert TensorSpec.from_dict(tensor.to_dict()) == tensor and asdict(tensor)["name"] == "video"
    assert tensor.bytes == 4 * 32 * 32 * 3 and TensorSpec("features", "float16", (8,)).bytes == 16


@pytest.mark.parametrize("value", [("v", "object", (1,)), ("v", "uint8", (0,)), ("v", "uint8", (True,))])
def test_a_tensor_of_no_sense_is_refused(value: tuple[str, str, tuple[int, ...]]) -> None:
    with pytest.raises(ValueError, match="the tensor 'v'"):
        TensorSpec(*value)
