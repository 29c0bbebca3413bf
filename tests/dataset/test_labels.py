"""Several labels of one video: read, joined, counted, judged, divided."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd

from sora.config import Settings, parse
from sora.core import provenance
from sora.dataset import splits
from sora.dataset import table as tables
from sora.dataset.quality import validate
from sora.dataset.scan import scan
from sora.tasks import MULTI
from tests.dataset.rows import manifest, row

SEVERAL = parse("model: {head: multilabel}\nclasses: [carry, run, walk]")


def labelled(folder: Path, rows: dict[str, str]) -> Path:
    for name in rows:
        (folder / name).write_bytes(name.encode())
    text = "path,label\n" + "".join(f"{name},{label}\n" for name, label in rows.items())
    (folder / "labels.csv").write_text(text, encoding="utf-8")
    return folder


def test_a_table_may_join_labels_only_with_the_head(tmp_path: Path) -> None:
    rows = {"a.mp4": "walk | carry", "b.mp4": "walk", "c.mp4": "walk|swim", "d.mp4": "|"}
    labelled(tmp_path, rows)
    found = {one.path: (one.label, one.problem) for one in scan(tmp_path, SEVERAL)}
    assert found == {
        "a.mp4": ("carry|walk", None),
        "b.mp4": ("walk", None),
        "c.mp4": ("swim|walk", "unknown_label"),
        "d.mp4": (None, "unlabelled"),
    }
    [unknown] = [one.detail for one in scan(tmp_path, SEVERAL) if one.path == "c.mp4"]
    assert unknown.startswith("'swim' is none of")
    assert {one.path: one.label for one in scan(tmp_path, Settings())} == rows  # as it was


def test_a_folder_gives_one_label(tmp_path: Path) -> None:
    for name in ("walk", "walk|carry"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "a.mp4").write_bytes(name.encode())
    plain, parted = scan(tmp_path, SEVERAL)
    assert (plain.label, plain.problem) == ("walk", None)
    assert (parted.label, parted.problem) == (None, "unlabelled") and "gives one label" in parted.detail
    assert [one.label for one in scan(tmp_path, Settings())] == ["walk", "walk|carry"]


def test_rules_count_single_labels() -> None:
    rows = [row(f"{number}.mp4", label="carry|walk") for number in range(3)]
    rows += [row("run.mp4", label="run"), row("swim.mp4", label="swim|walk")]
    report = validate(manifest(rows), SEVERAL)
    assert report.counts == {"carry": 3, "run": 1, "walk": 3} and report.accepted == 4
    [rejected] = report.rejected
    assert (rejected.path, rejected.rule) == ("swim.mp4", "unknown_label") and "'swim'" in rejected.detail
    failed = {found.rule: found for found in report.expectations if not found.success}
    assert set(failed) == {"unknown_label", "class_too_rare"} and "class run has 1" in failed["class_too_rare"].detail
    [many] = [found for found in report.expectations if found.rule == "too_many_rejected"]
    assert many.observed == 1  # a rejected video counts once, however many labels it has


def test_without_classes_every_single_label_is_one() -> None:
    report = validate(
        manifest(row(f"{number}.mp4", label="carry|walk") for number in range(3)), parse("model: {head: multilabel}")
    )
    assert report.ok and report.counts == {"carry": 3, "walk": 3}


def test_the_same_bytes_with_other_labels_conflict() -> None:
    same = {"sha256": "a" * 64, "signature": ""}
    rows = [row("a.mp4", label="carry|walk", **same), row("b.mp4", label="walk", **same)]
    report = validate(manifest(rows), SEVERAL)
    assert [one.rule for one in report.rejected] == ["label_conflict"] * 2


def test_every_class_is_in_every_split_though_combinations_are_rare() -> None:
    """Sixty videos with one to three of eight labels each: most combinations are there once."""
    rng = np.random.default_rng(0)
    names = [f"label{number}" for number in range(8)]
    rows = [
        row(f"{number:02}.mp4", label=MULTI.join(rng.choice(names, rng.integers(1, 4), replace=False)))
        for number in range(60)
    ]
    table = manifest(rows)
    settings = parse("model: {head: multilabel}")
    given = splits.assign(table, splits.read(Path("/nonexistent")), settings)
    split = dict(zip(given.ledger["sha256"], given.ledger["split"], strict=True))
    single = MULTI.single(table["label"])
    found = pd.crosstab(single, table["sha256"].map(split).loc[single.index].to_numpy())
    assert (found > 0).all(axis=None) and len(found) == 8 and len(given.notes) == 1  # that no groups are known
    shares = found.div(found.sum(axis=1), axis=0)
    assert (shares["train"].between(0.5, 0.85)).all()
    again = splits.assign(table.sample(frac=1, random_state=1), splits.read(Path("/nonexistent")), settings)
    assert again.ledger.equals(given.ledger)


def test_a_note_names_the_single_label_that_is_too_rare() -> None:
    rows = [row(f"{number}.mp4", label="carry|walk") for number in range(9)] + [row("x.mp4", label="run|walk")]
    given = splits.assign(manifest(rows), splits.read(Path("/nonexistent")), SEVERAL)
    assert any("class run has no video in val and test" in note for note in given.notes)


def test_counts_of_a_table() -> None:
    table = pd.DataFrame({"label": ["carry|walk", "walk"]})
    assert tables.counts(table, MULTI) == {"carry": 1, "walk": 2}
    assert tables.counts(table) == {"carry|walk": 1, "walk": 1}


def test_the_head_is_part_of_the_code_behind_stages_that_read_labels() -> None:
    plain, several = provenance.stages(), provenance.stages(MULTI.stage_suffix)
    assert [stage for stage in plain if plain[stage] != several[stage]] == ["manifest", "validate"]
