"""What Sora computes from footage in this repository, held against what it computed when its parts got their names.

A test here that fails says: this output changed. If that is meant, rename the part in `sora/core/provenance.py` and
write the new values with `python -m tests.test_provenance`; otherwise the change is a fault. Old names' values stay
in the file, as a record.
"""

from __future__ import annotations

import functools
import hashlib
import json
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from sora.config import NOT_OF_LEARNING, Settings, parse
from sora.core import provenance
from sora.core.records import ClipSpec
from sora.dataset import manifest, splits, table
from sora.dataset.quality import validate
from sora.store import building
from sora.store.shards import ShardSet

REPOSITORY = Path(__file__).resolve().parent.parent
GOLDEN = REPOSITORY / "tests" / "golden" / "provenance.json"
VIDEOS = 24
SPEC = ClipSpec(frames=8, height=32, width=32)
PARTS = ("facts", "clips", "manifest", "validate", "shards", "learning")
_LOSS_TOLERANCE = 2e-3  # processors differ in the last bits of a sum, and two epochs let that grow


def names() -> dict[str, str]:
    """Part → its name today."""
    return {
        "facts": provenance.FACTS,
        "clips": provenance.CLIPS,
        **{str(stage): name for stage, name in provenance.STAGES.items()},
        "learning": provenance.LEARNING,
    }


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()[:16]


def _footage(folder: Path) -> None:
    """Some of the demo's videos, from the DVC remote in this repository, and files that are rejected."""
    objects = REPOSITORY / "demo" / "remote" / "files" / "md5"
    listed = json.loads((objects / "a0" / "0af52d39af0781171c625afca60302.dir").read_text())
    for entry in sorted(listed, key=lambda one: one["md5"])[:VIDEOS]:
        target = folder / entry["relpath"]
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes((objects / entry["md5"][:2] / entry["md5"][2:]).read_bytes())
    first = sorted(folder.rglob("*.mp4"))[0]
    first.with_name("again.mp4").write_bytes(first.read_bytes())  # a duplicate
    first.with_name("cut.mp4").write_bytes(first.read_bytes()[:-2000])
    first.with_name("text.mp4").write_text("ffconcat version 1.0\nfile other.mp4\n")
    (folder / "stray.mp4").write_bytes(sorted(folder.rglob("*.mp4"))[1].read_bytes() + b"\0")


@functools.cache
def _computed() -> dict[str, Any]:
    """Part → what it computes from the footage."""
    with tempfile.TemporaryDirectory() as temporary:
        work = Path(temporary)
        data, out = work / "data", work / "shards"
        _footage(data)
        given = parse((REPOSITORY / "params.yaml").read_text())
        classes = tuple(sorted(folder.name for folder in data.iterdir() if folder.is_dir()))
        settings = given.model_copy(update={"classes": classes})
        rows = manifest.build(data, settings, workers=1)
        report = validate(rows, settings)
        rejected = {one.path for one in report.rejected}
        building.build(rows, rejected, data, out, SPEC, buckets=2, workers=1)
        opened = ShardSet.open(out)
        accepted = rows[~rows["path"].isin(rejected)]
        ledger = splits.assign(accepted, splits.read(work / "splits.csv"), settings).ledger
        joined = table.join(rows, rejected, ledger)
        facts = rows.drop(columns=["path", "label", "group"]).drop_duplicates("sha256").sort_values("sha256")
        return {
            "facts": _digest(facts.round(6).to_dict("records")),
            "clips": hashlib.sha256(opened.read("video", range(len(opened))).tobytes()).hexdigest()[:16],
            "manifest": _digest([rows.round(6).to_dict("records"), _defaults("split")]),
            "validate": _digest([sorted((r.path, r.rule) for r in report.rejected), _defaults("validate")]),
            "shards": _digest(
                [{file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in out.glob("*.npy")}, _clip()]
            ),
            "learning": {
                "splits": _digest(joined[["sha256", "split", "label"]].to_dict("records")),
                "settings": _digest(Settings().of_learning()),
                "losses": _losses(work, out, joined, classes),
            },
        }


def _defaults(section: str) -> dict[str, Any]:
    found: dict[str, Any] = Settings().of_learning()[section]
    return found


def _clip() -> list[Any]:
    return [_defaults("clip"), Settings().shards.buckets]


def _losses(work: Path, out: Path, joined: pd.DataFrame, classes: tuple[str, ...]) -> list[float]:
    """Losses of two tiny epochs, in a child as ever: it alone imports TensorFlow."""
    from sora.config import Model, Train
    from sora.learning import jobs, training
    from tests.clips import SMALL

    joined.to_csv(work / "table.csv", index=False)
    job = jobs.TrainJob(
        shards=str(out),
        table=str(work / "table.csv"),
        classes=list(classes),
        model=Model(**SMALL).model_dump(mode="json"),
        train=Train(epochs=2, batch=4, min_steps=1).model_dump(mode="json"),
        clip=SPEC.to_dict(),
        out=str(work / "fit"),
    )
    seen: list[dict[str, Any]] = []
    training.run(replace(job), seen.append)
    epochs = [event["metrics"] for event in seen if event["event"] == "epoch"]
    return [round(epoch[name], 6) for epoch in epochs for name in ("loss", "val_loss")]


@pytest.fixture(scope="module")
def golden() -> dict[str, dict[str, Any]]:
    found: dict[str, dict[str, Any]] = json.loads(GOLDEN.read_text())
    return found


@pytest.mark.parametrize("part", PARTS)
def test_what_a_part_computes_changes_only_with_its_name(part: str, golden: dict[str, dict[str, Any]]) -> None:
    name = names()[part]
    assert name in golden[part], f"{part} has the new name {name}: run `python -m tests.test_provenance`"
    then, now = golden[part][name], _computed()[part]
    if part == "learning":
        then_losses, now_losses = then.pop("losses"), now["losses"]
        assert now_losses == pytest.approx(then_losses, rel=_LOSS_TOLERANCE), (
            "training computes something else: give provenance.LEARNING a new name, or fix the change"
        )
        now = {name: value for name, value in now.items() if name != "losses"}
    assert now == then, f"{part} computes something else: rename it in sora/core/provenance.py, or fix the change"


def test_settings_that_no_model_depends_on_change_nothing() -> None:
    before = Settings().of_learning()
    assert not set(NOT_OF_LEARNING) & set(before)
    changed = Settings.model_validate({"serve": {"port": 1}, "schedule": {"cron": "1 1 * * *"}})
    assert changed.of_learning() == before
    assert Settings.model_validate({"train": {"epochs": 3}}).of_learning() != before


def test_an_added_setting_counts_only_where_it_differs_from_its_default(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sora.config.settings.ADDED", frozenset({"train.ema"}))
    assert "ema" not in Settings().of_learning()["train"]
    assert Settings.model_validate({"train": {"ema": 0.9}}).of_learning()["train"]["ema"] == 0.9


def test_other_decoders_have_other_names(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(provenance.DECODERS, "av", "0.1")
    assert provenance.facts().startswith(f"{provenance.FACTS}+av-")
    assert provenance.clips() != provenance.CLIPS
    assert provenance.stages()["shards"] != provenance.STAGES["shards"]
    assert provenance.stages()["validate"] == provenance.STAGES["validate"]


def _write() -> None:
    known: dict[str, dict[str, Any]] = json.loads(GOLDEN.read_text()) if GOLDEN.exists() else {}
    for part, name in names().items():
        entry = known.setdefault(part, {})
        if name in entry:
            continue  # what a name stood for is never rewritten: a changed output needs a new name
        entry[name] = _computed()[part]
        print(f"{part}: {name} written", file=sys.stderr)
    GOLDEN.parent.mkdir(exist_ok=True)
    GOLDEN.write_text(json.dumps(known, indent=1, sort_keys=True) + "\n")


if __name__ == "__main__":
    _write()
