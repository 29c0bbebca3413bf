"""`sora data audit`: planted wrong labels are found, a second audit trains nothing, labels come out escaped."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import yaml

from sora.cli.failures import run_verb
from sora.config import Project
from sora.core.errors import InputError
from sora.dataset import manifest
from sora.learning import audit, training
from sora.store import building
from tests.videos import make_video

CLASSES = ("<i>dark</i>", "bright")  # the first must never become markup


def answers(labels: list[int], probabilities: np.ndarray) -> list[dict[str, Any]]:
    return [
        {"sha256": f"{n:064x}", "path": f"{n}.mp4", "label": "abc"[label], "probabilities": p.tolist()}
        for n, (label, p) in enumerate(zip(labels, probabilities, strict=True))
    ]


def test_planted_errors_come_first() -> None:
    """Answers of a model that is right in two of three videos; every tenth label is wrong."""
    rng = np.random.default_rng(0)
    truth = rng.integers(0, 3, 300)
    given = truth.copy()
    planted = rng.choice(300, 30, replace=False)
    given[planted] = (truth[planted] + rng.integers(1, 3, 30)) % 3
    logits = rng.normal(0, 1, (300, 3))
    logits[np.arange(300), truth] += 2.0
    p = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    found = audit.rank(answers(given.tolist(), p), "abc")
    names = {f"{n}.mp4" for n in planted}
    top = [finding.path in names for finding in found[:30]]
    assert np.mean(top) > 0.6  # by chance 0.1
    assert len(found) == 300 and all(finding.suggested != finding.label for finding in found)
    suspects = [finding.suspect for finding in found]
    assert suspects == sorted(suspects, reverse=True) and 20 < sum(suspects) < 90


def test_confident_learning_by_hand() -> None:
    p = np.array([[0.9, 0.1, 0], [0.7, 0.3, 0], [0.2, 0.8, 0], [0.6, 0.4, 0]])
    found = {one.path: one for one in audit.rank(answers([0, 0, 1, 1], p), "abc")}
    # Averages: a 0.8, b 0.6. Video 3 is likelier a, but not by as much as a's own are: not suspect.
    assert not any(one.suspect for one in found.values())
    p[3] = [0.85, 0.15, 0]
    found = {one.path: one for one in audit.rank(answers([0, 0, 1, 1], p), "abc")}
    assert [name for name, one in found.items() if one.suspect] == ["3.mp4"]
    assert found["3.mp4"].suggested == "a" and found["3.mp4"].margin == pytest.approx(0.7)
    assert next(iter(found)) == "3.mp4"
    assert audit.rank([], "abc") == []


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """16 videos of 8 cameras, dark or bright; two of them lie in the wrong folder. Prepared as the stages would."""
    root = tmp_path_factory.mktemp("audit") / "project"
    rows = ["path,label,group"]
    for group in range(8):
        for which, level in enumerate((50, 190)):
            name = f"g{group:02d}_{which}.mp4"
            make_video(root / "data" / "all" / name, frames=8, brightness=level, seed=10 * group + which)
            wrong = (group, which) in ((1, 0), (5, 1))
            rows.append(f"all/{name},{CLASSES[which != wrong]},camera{group}")
    (root / "data" / "labels.csv").write_text("\n".join(rows) + "\n")
    params = {
        "name": "audited",
        "classes": list(CLASSES),
        "clip": {"frames": 4, "height": 32, "width": 32},
        "model": {"low_filters": [16], "high_filters": [16], "key_frames": 2, "embedding": 16},
        "train": {"epochs": 8, "batch": 4, "jitter": False, "patience": 8},
    }
    (root / "params.yaml").write_text(yaml.safe_dump(params))
    project = Project(root)
    project.prepared.mkdir()
    built = manifest.build(project.data, project.settings(), workers=1)
    manifest.write(built, project.manifest)
    project.quarantine.write_text("[]")
    building.build(built, (), project.data, project.shards, project.settings().clip.spec(), buckets=2, workers=1)
    seen: list[tuple[int, int]] = []
    result = audit.audit(project, folds=2, progress=lambda done, total, note="": seen.append((done, total)))
    return SimpleNamespace(project=project, result=result, seen=seen)


def test_planted_wrong_labels_are_found(world: SimpleNamespace) -> None:
    found = world.result["findings"]
    assert world.result["videos"] == 16 and world.result["accuracy"] > 0.6
    assert {one["path"] for one in found[:2]} == {"all/g01_0.mp4", "all/g05_1.mp4"}
    assert all(one["suspect"] for one in found[:2])
    assert world.seen[-1] == (16, 16) and [done for done, _ in world.seen] == sorted(done for done, _ in world.seen)


def test_the_page_shows_frames_and_escapes_labels(world: SimpleNamespace) -> None:
    text = Path(world.result["page"]).read_text(encoding="utf-8")
    assert "all/g01_0.mp4" in text and "data:image/jpeg;base64," in text
    assert "&lt;i&gt;dark&lt;/i&gt;" in text and "<i>dark" not in text and "<script" not in text


def test_what_is_done_is_not_done_again(
    world: SimpleNamespace, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def never(*_: object, **__: object) -> None:
        raise AssertionError("trained again")

    monkeypatch.setattr(training, "run", never)
    code = run_verb(["data", "audit", "--folds", "2", "--json", "--project", str(world.project.root)])
    assert code == 0 and json.loads(capsys.readouterr().out) == world.result
    assert run_verb(["data", "audit", "--folds", "2", "--project", str(world.project.root)]) == 0
    assert "labels are suspect" in capsys.readouterr().out
    with pytest.raises(AssertionError, match="trained again"):
        audit.audit(world.project, folds=3)


def test_nothing_prepared_and_too_many_folds(world: SimpleNamespace, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="8 groups"):
        audit.audit(world.project, folds=9)
    (tmp_path / "params.yaml").write_text("name: empty\n")
    with pytest.raises(InputError, match="nothing is prepared"):
        audit.audit(Project(tmp_path))
