"""The layers of probes, and that the model answers from clips what the solution answered from the bank."""

from __future__ import annotations

from pathlib import Path

import keras
import numpy as np
import pytest

from sora.config import Model
from sora.core.records import ClipSpec
from sora.core.tensors import FLOW, VIDEO, Clips
from sora.learning import probing
from sora.media.video.clips import FLOW_LENGTH
from sora.model import attribution, classifier, probes
from sora.model.bank import APPEARANCE, Bank
from sora.tasks import SINGLE

CLIP = ClipSpec(frames=4, height=32, width=32, flow=4)
MODEL = Model(preset="probes")


@pytest.fixture(scope="module")
def clips() -> Clips:
    chance = np.random.default_rng(0)
    video = chance.integers(0, 256, (12, 4, 32, 32, 3), np.uint8)
    video[6:] //= 2
    return Clips({VIDEO: video, FLOW: chance.random((12, FLOW_LENGTH), np.float32).astype(np.float16)})


@pytest.fixture(scope="module")
def features(clips: Clips) -> dict[str, np.ndarray]:
    bank = Bank("efficientnet-lite0", CLIP)
    seen = bank.compute(clips)[APPEARANCE]
    assert seen.dtype == np.float16 and seen.shape == (12, *bank.tensors[APPEARANCE].shape)
    return {"appearance": probes.over_time(seen), "motion": clips.tensors[FLOW].astype(np.float32)}


def solved(features: dict[str, np.ndarray], *names: str) -> list[probes.Branch]:
    targets = np.repeat([0, 1], 6)
    bases = [probing.basis(name, features[name]) for name in names]
    return [probing.solve(base, targets, 2, SINGLE, 0.1, class_weights=True) for base in bases]


@pytest.mark.parametrize("names", [("appearance",), ("motion",), ("appearance", "motion")])
def test_the_model_answers_as_the_solution(
    names: tuple[str, ...], clips: Clips, features: dict[str, np.ndarray], tmp_path: Path
) -> None:
    branches = solved(features, *names)
    model = probes.assemble(MODEL, CLIP, branches)
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras", compile=False, safe_mode=True)
    assert classifier.misfit(loaded, CLIP, 2) == ""
    logits = loaded.predict_on_batch(classifier.fed(loaded, clips.tensors))
    expected = np.sum([branch(features[name]) for name, branch in zip(names, branches, strict=True)], axis=0)
    assert np.abs(SINGLE.clip_probabilities(logits) - SINGLE.clip_probabilities(expected)).max() < 5e-3
    vectors = classifier.embedding_model(loaded).predict_on_batch(classifier.fed(loaded, clips.tensors))
    assert vectors.shape == (12, sum(branch.embedding.kernel.shape[1] for branch in branches))


def test_a_model_says_which_tensor_is_missing(clips: Clips, features: dict[str, np.ndarray]) -> None:
    model = probes.assemble(MODEL, CLIP, solved(features, "motion"))
    with pytest.raises(ValueError, match="asks for the tensor 'flow'"):
        classifier.fed(model, {VIDEO: clips.video})
    assert "flow" in classifier.misfit(model, ClipSpec(frames=4, height=32, width=32), 2)
    assert "3 classes" in classifier.misfit(model, CLIP, 3)


@pytest.mark.parametrize("frames", [2, 3, 8])
def test_statistics_over_time_are_those_of_the_bank(frames: int) -> None:
    levels = [np.random.default_rng(n).random((3, frames, 4 + n), np.float32) for n in range(2)]
    layer = probes.OverTime()(levels)
    assert np.allclose(layer, probes.over_time(np.concatenate(levels, axis=-1)), atol=1e-5)


def test_appearance_can_be_explained_and_motion_alone_can_not(features: dict[str, np.ndarray]) -> None:
    from sora.core.errors import ServiceError

    both = attribution.split(probes.assemble(MODEL, CLIP, solved(features, "appearance", "motion")))
    assert both.others == (FLOW,) and both.key_frames == CLIP.frames
    with pytest.raises(ServiceError, match="can't tell moments apart"):
        attribution.split(probes.assemble(MODEL, CLIP, solved(features, "motion")))
