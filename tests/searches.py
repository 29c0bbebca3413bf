"""A project for tests of `sora tune`: its videos have splits, and training is made up."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import yaml

from sora.config import Project, Settings
from sora.dataset import manifest, splits
from sora.learning import crossval
from tests.videos import make_video

CLASSES = ("dark", "bright")


@dataclass
class Trained:
    """Tables and settings of what was asked to be trained."""

    tables: list[pd.DataFrame]
    settings: list[Settings]


@pytest.fixture(scope="session")
def _split_template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """40 videos of 20 cameras with their splits, as a run leaves them; the shards are empty."""
    root = tmp_path_factory.mktemp("tuning") / "project"
    rows = ["path,label,group"]
    for group in range(20):
        for which, level in enumerate((50, 190)):
            name = f"g{group:02d}_{which}.mp4"
            make_video(root / "data" / "all" / name, frames=8, brightness=level, seed=10 * group + which)
            rows.append(f"all/{name},{CLASSES[which]},camera{group}")
    (root / "data" / "labels.csv").write_text("\n".join(rows) + "\n")
    params = {"name": "tuned", "classes": list(CLASSES), "split": {"test": 0.25}, "train": {"learning_rate": 0.001}}
    (root / "params.yaml").write_text("# mine\n" + yaml.safe_dump(params))
    project = Project(root)
    project.shards.mkdir(parents=True)
    built = manifest.build(project.data, project.settings(), workers=1)
    manifest.write(built, project.manifest)
    project.quarantine.write_text("[]")
    splits.append(project.splits_file, splits.assign(built, splits.read(project.splits_file), project.settings()))
    return root


@pytest.fixture
def split_project(_split_template: Path, tmp_path: Path) -> Project:
    """The videos themselves are left behind: a search reads clips."""
    shutil.copytree(_split_template, tmp_path / "project", ignore=shutil.ignore_patterns("data"))
    return Project(tmp_path / "project")


@pytest.fixture
def made_up(monkeypatch: pytest.MonkeyPatch) -> Iterator[Trained]:
    """Training is made up: videos are right with a probability that is best at a learning rate of 0.006."""
    seen = Trained([], [])

    def answers(folder: Path, shards: Path, table: pd.DataFrame, settings: Settings, **_: Any) -> dict[str, Any]:
        file = folder / crossval.FOLD_FILE
        if file.exists():
            known: dict[str, Any] = json.loads(file.read_text())
            return known
        seen.tables.append(table)
        seen.settings.append(settings)
        right = 0.95 - 0.2 * abs(math.log(settings.train.learning_rate / 0.006))
        videos = []
        for one in table[table["split"] == "test"].itertuples():
            p = min(max(right + 0.04 * (int(one.sha256[:4], 16) / 65536 - 0.5), 0.02), 0.98)
            probabilities = [p, 1 - p] if one.label == "dark" else [1 - p, p]
            predicted = CLASSES[int(np.argmax(probabilities))]
            videos.append(
                {"sha256": one.sha256, "label": one.label, "predicted": predicted, "probabilities": probabilities}
            )
        losses = [-math.log(one["probabilities"][CLASSES.index(one["label"])]) for one in videos]
        hits = [one["label"] == one["predicted"] for one in videos]
        result = {"videos": videos, "metrics": {"log_loss": float(np.mean(losses)), "accuracy": float(np.mean(hits))}}
        folder.mkdir(parents=True)
        file.write_text(json.dumps(result))
        return result

    monkeypatch.setattr(crossval, "answers", answers)
    yield seen
