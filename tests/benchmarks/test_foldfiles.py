"""Files of finished folds: read as written, refused when damaged, used for the question that they answer."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from benchmarks.accuracy import foldfiles
from benchmarks.accuracy.foldfiles import Answer, FoldRecord
from sora.core.errors import InputError, ServiceError

RECORD = FoldRecord(
    set="made", seed=1, fold=2, configuration="c1", table="t1", commit="abc", seconds=1.5, train=4, val=1,
    parameters=10, best_epoch=3, clips_per_second=7.5, classes=("a", "ä b"),
    answers=(Answer("0" * 16, "a", "a", (0.75, 0.25)), Answer("1" * 16, "ä b", "a", (0.5001, 0.4999))),
)  # fmt: skip


def test_what_is_written_is_read(tmp_path: Path) -> None:
    file = foldfiles.write(tmp_path / "made" / "default", RECORD)
    assert file == tmp_path / "made" / "default" / "1-2.json" and foldfiles.read(file) == RECORD
    assert [one.right for one in RECORD.answers] == [True, False]
    assert len([line for line in file.read_text("utf-8").splitlines() if '"sha256"' in line]) == 2  # an answer a line
    other = replace(RECORD, parameters=None, best_epoch=None, clips_per_second=None)
    assert foldfiles.read(foldfiles.write(file.parent, other)) == other
    assert [one.name for one in file.parent.iterdir()] == ["1-2.json"]


def test_answers_are_cut_to_what_a_file_needs() -> None:
    videos = [
        {"sha256": f"{n:x}" * 64, "label": "a", "predicted": "b", "probabilities": [1 / 3, 2 / 3]} for n in (1, 2)
    ]
    training = {"seconds": 1, "parameters": 5, "best_epoch": 2, "clips_per_second": 3.0, "history": []}
    of: dict[str, Any] = {"set": "s", "seed": 0, "fold": 0, "configuration": "c", "table": "t", "commit": "x"}
    record = foldfiles.from_answered({"videos": videos, "training": training}, classes=("a", "b"), **of)
    assert record.answers[0] == Answer("1" * 16, "a", "b", (0.3333, 0.6667))
    assert (record.seconds, record.parameters, record.train) == (1.0, 5, 0)
    with pytest.raises(InputError, match="same first 16 digits"):
        foldfiles.answers_of([videos[0], {**videos[1], "sha256": "1" * 17 + "2" * 47}])


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (lambda text: text[: len(text) // 2], "is no finished fold"),
        (lambda text: "", "is no finished fold"),
        (lambda text: "[]", "it lacks"),
        (lambda text: "3", "is no finished fold"),
        (lambda text: text.replace('"seed": 1', '"seed": 7'), "it holds fold 2 of seed 7"),
        (lambda text: text.replace('"table"', '"tables"'), "it lacks, or has too many: table, tables"),
        (lambda text: text.replace("[0.75, 0.25]", "[1.0]"), "not a probability a class"),
        (lambda text: text.replace('"predicted": "a", ', "", 1), "'predicted'"),
        (lambda text: json.dumps({**json.loads(text), "answers": []}), "it has no answers"),
        (lambda text: json.dumps({**json.loads(text), "answers": None}), "is no finished fold"),
    ],
)
def test_a_damaged_file_is_refused(tmp_path: Path, damage: Any, says: str) -> None:
    file = foldfiles.write(tmp_path, RECORD)
    file.write_text(damage(file.read_text("utf-8")), "utf-8")
    with pytest.raises(InputError, match=says) as caught:
        foldfiles.stored(tmp_path, {(1, 2): ("c1", "t1")}, None)
    assert str(file) in str(caught.value) and "from git again" in caught.value.fix


def test_only_what_answers_the_question_counts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    others = (replace(RECORD, configuration="c2"), replace(RECORD, table="t2"), replace(RECORD, commit="def"))
    for fold, record in enumerate((RECORD, *others)):
        foldfiles.write(tmp_path, replace(record, fold=fold))
    wanted = {(1, fold): ("c1", "t1") for fold in range(6)}
    assert [one.fold for one in foldfiles.stored(tmp_path, wanted, None)] == [0, 3]
    assert "2 folds are of another configuration or other videos" in capsys.readouterr().err
    assert [one.fold for one in foldfiles.stored(tmp_path, wanted, "def")] == [3]
    assert foldfiles.stored(tmp_path / "none", wanted, None) == []


def test_names_of_folders(tmp_path: Path) -> None:
    assert foldfiles.folder_of(tmp_path, "steps27", "ema-0.8") == tmp_path / "steps27" / "ema-0.8"
    assert foldfiles.plain("EMA 0.8, crops/é") == "EMA-0.8-crops" and foldfiles.plain("../..") == ""
    for wrong in ("", "..", "a/b", ".hidden", "a b"):
        with pytest.raises(InputError, match="can't name a folder"):
            foldfiles.folder_of(tmp_path, "steps27", wrong)


def test_a_place_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ServiceError, match="can't write"):
        foldfiles.write(tmp_path / "file" / "below", RECORD)
