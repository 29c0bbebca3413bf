"""Validation: every rule fires on what it is about and on nothing else."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from sora.config import Settings
from sora.core.errors import NotTrainable, ServiceError
from sora.core.records import VideoRecord
from sora.dataset.quality import Finding, ValidationReport, docs, judge
from sora.dataset.quality.rules import FIXES, REJECTING
from tests.dataset.rows import manifest, row

GOOD = [row(f"{label}/{i:02d}.mp4", group=f"{label}{i}") for label in ("jump", "wave") for i in range(20)]


def settings(**changes: Any) -> Settings:
    return Settings.model_validate({"classes": ["jump", "wave"], "validate": changes})


def judged(
    *more: VideoRecord,
    table: pd.DataFrame | None = None,
    rules: Settings | None = None,
    reference: dict[str, int] | None = None,
    pages: Path | None = None,
) -> ValidationReport:
    judgement = judge(manifest([*GOOD, *more]) if table is None else table, rules or settings(), reference=reference)
    if pages is not None:
        docs.write(pages, judgement)
    return judgement.report


def finding(report: ValidationReport, name: str) -> Finding:
    return next(entry for entry in report.expectations if entry.name == name)


def test_good_videos_pass_every_rule() -> None:
    report = judged()
    assert (report.ok, report.videos, report.accepted, report.rejected) == (True, 40, 40, [])
    assert report.failed == 0 and report.passed == len(report.expectations) > 15
    assert report.counts == {"jump": 20, "wave": 20}
    assert report.contract() == {
        "ok": True,
        "videos": 40,
        "accepted": 40,
        "rejected": [],
        "expectations": {"passed": report.passed, "failed": 0},
    }
    report.require()


BAD = {
    "symlink": row("jump/link.mp4", error="symlink", frames=0, sha256="", detail="links to ../x.mp4"),
    "not_a_video": row("jump/text.mp4", error="not_a_video", frames=0, detail="no video format is recognised in it"),
    "unreadable": row("jump/broken.mp4", error="unreadable", frames=0, detail="no frame decodes"),
    "truncated": row("jump/cut.mp4", error="truncated", detail="1.2 s decode of 3 s announced"),
    "unlabelled": row("stray.mp4"),
    "unknown_label": row("dance/1.mp4"),
    "too_short": row("jump/short.mp4", frames=5),
    "too_small": row("jump/small.mp4", width=320, height=24),
    "odd_frame_rate": row("jump/fast.mp4", fps=1000.0),
    "duplicate": row("wave/zz_copy.mp4", sha256=GOOD[-1].sha256, signature=GOOD[-1].signature),
}
SAYS = {
    "symlink": "links to ../x.mp4",
    "not_a_video": "no video format",
    "unreadable": "no frame decodes",
    "truncated": "1.2 s decode of 3 s",
    "unlabelled": "no class folder",
    "unknown_label": "'dance' is not one of the 2 classes (jump, wave)",
    "too_short": "5 decodable frames, at least 8 are needed",
    "too_small": "320x24 pixels, the shorter side must have at least 32",
    "odd_frame_rate": "1000 frames a second, allowed are 4 to 240",
    "duplicate": "the same bytes as wave/19.mp4",
}


@pytest.fixture(scope="module")
def all_bad(tmp_path_factory: pytest.TempPathFactory) -> tuple[ValidationReport, Path]:
    pages = tmp_path_factory.mktemp("docs") / "below" / "docs"
    return judged(*BAD.values(), pages=pages, rules=settings(max_rejected=0.5)), pages


@pytest.mark.parametrize("rule", BAD)
def test_each_rule_names_what_was_received_and_what_is_allowed(
    all_bad: tuple[ValidationReport, Path], rule: str
) -> None:
    report, _ = all_bad
    assert report.ok and report.accepted == 40
    rejection = next(r for r in report.rejected if r.path == BAD[rule].path)
    assert rejection.rule == rule and SAYS[rule] in rejection.detail
    assert rejection.sha256 == BAD[rule].sha256
    failed = [entry for entry in report.expectations if entry.rule == rule and not entry.success]
    assert len(failed) == 1 and failed[0].observed == 1 and failed[0].severity == "quarantine"


def test_every_rejection_has_a_fix(all_bad: tuple[ValidationReport, Path]) -> None:
    report, _ = all_bad
    assert len(report.rejected) == len(BAD) and {r.rule for r in report.rejected} <= REJECTING.keys()
    assert [r.path for r in report.rejected] == sorted(r.path for r in report.rejected)
    assert {entry.rule for entry in report.expectations} <= FIXES.keys()


def test_the_same_bytes_under_two_labels_reject_all_copies() -> None:
    copies = [row(p, sha256="c" * 64, signature="") for p in ("jump/a.mp4", "jump/b.mp4", "wave/a.mp4")]
    report = judged(*copies)
    assert {(r.path, r.rule) for r in report.rejected} == {(c.path, "label_conflict") for c in copies}
    assert "jump (jump/a.mp4) and wave (wave/a.mp4)" in report.rejected[0].detail


def test_a_copy_outside_the_classes_takes_nothing_from_the_labelled_one() -> None:
    report = judged(*(row(p, sha256=GOOD[0].sha256) for p in ("copy.mp4", "dance/copy.mp4")))
    assert {(r.path, r.rule) for r in report.rejected} == {
        ("copy.mp4", "unlabelled"),
        ("dance/copy.mp4", "unknown_label"),
    }


def test_of_duplicates_the_first_by_path_stays_and_empty_files_are_no_duplicates() -> None:
    copies = [row(f"jump/copy{i}.mp4", sha256="d" * 64, signature="") for i in range(3)]
    empty = [row(f"wave/e{i}.mp4", sha256="e" * 64, error="not_a_video", frames=0, detail="empty") for i in range(2)]
    report = judged(*copies, *empty)
    assert {(r.path, r.rule) for r in report.rejected} == {
        ("jump/copy1.mp4", "duplicate"),
        ("jump/copy2.mp4", "duplicate"),
        ("wave/e0.mp4", "not_a_video"),
        ("wave/e1.mp4", "not_a_video"),
    }
    assert finding(report, "duplicate").observed == 2
    off = judged(*copies, rules=settings(duplicates=False))
    assert not off.rejected and "near_duplicates" not in {entry.name for entry in off.expectations}


def test_several_broken_rules_give_one_rejection_that_names_all() -> None:
    report = judged(row("dance/x.mp4", frames=1, duration=0.04, width=8, height=8, fps=1000.0))
    assert len(report.rejected) == 1 and report.rejected[0].rule == "unknown_label"
    detail = report.rejected[0].detail
    assert all(
        text in detail for text in ("too_short: 1 decodable frame,", "lasts 0.04 s", "too_small:", "1000 frames")
    )


def test_near_duplicates_across_groups_warn_and_stay() -> None:
    twin = f"{int(GOOD[0].signature, 16) ^ 0b1011:048x}"
    same_group = judged(row("jump/twin.mp4", group="jump0", signature=twin))
    assert same_group.failed == 0
    other = judged(row("wave/twin.mp4", group="elsewhere", signature=twin))
    assert other.ok and not other.rejected
    assert [entry.name for entry in other.findings("warn")] == ["near_duplicates", "near_duplicate_labels"]
    text = "jump/00.mp4 (jump, group jump0) ~ wave/twin.mp4 (wave, group elsewhere)"
    assert finding(other, "near_duplicates").detail == text


def test_set_rules_stop_and_say_the_fix() -> None:
    one_class = judged(table=manifest(GOOD[:20]))
    assert {e.rule for e in one_class.findings("stop")} == {"too_few_classes", "class_too_rare"}
    with pytest.raises(NotTrainable, match="class wave has 0, at least 3 are needed") as caught:
        one_class.require()
    assert caught.value.exit_code == 1 and "add videos" in caught.value.fix

    rare = judged(table=manifest(GOOD[:22]))
    assert [e.rule for e in rare.findings("stop")] == ["class_too_rare"]

    bad = [row(f"jump/bad{i}.mp4", frames=2) for i in range(14)]
    assert judged(*bad[:13]).ok  # 13 of 53 is within a quarter
    many = judged(*bad)
    assert many.findings("stop")[0].detail == "14 of 54 videos are rejected, at most 13 may be"
    assert judged(*bad, rules=settings(max_rejected=0.3)).ok


def test_rejected_videos_do_not_count_for_their_class() -> None:
    rows = [*GOOD[:22], *(row(f"wave/cut{i}.mp4", error="truncated", detail="cut") for i in range(3))]
    report = judged(table=manifest(rows))
    assert report.counts == {"jump": 20, "wave": 2} and not report.ok


def test_without_classes_every_label_is_one() -> None:
    report = judged(row("dance/1.mp4"), row("dance/2.mp4"), row("dance/3.mp4"), rules=Settings.model_validate({}))
    assert report.ok and report.counts == {"dance": 3, "jump": 20, "wave": 20}


@pytest.mark.parametrize(
    ("reference", "success", "moved"),
    [
        ({"jump": 10, "wave": 10}, True, 0.0),
        ({"jump": 7, "wave": 3}, True, 0.2),
        ({"jump": 71, "wave": 29}, False, 0.21),
        ({"jump": 5, "wave": 5, "gone": 5}, False, 1 / 3),
        ({"jump": 20}, False, 0.5),
    ],
)
def test_a_shifted_balance_warns(reference: dict[str, int], success: bool, moved: float) -> None:
    report = judged(reference=reference)
    shift = finding(report, "balance_shifted")
    assert report.ok and shift.success is success and shift.severity == "warn"
    assert shift.observed == pytest.approx(moved, abs=1e-5)


def test_no_videos_is_an_answer_not_a_crash(tmp_path: Path) -> None:
    report = judged(table=manifest([]), pages=tmp_path)
    assert (report.ok, report.videos, report.accepted, report.counts) == (False, 0, 0, {"jump": 0, "wave": 0})
    with pytest.raises(NotTrainable, match="no_videos: 0 videos found"):
        report.require()
    assert "no_videos" in (tmp_path / "index.html").read_text()


def test_all_rejected_is_an_answer_not_a_crash() -> None:
    report = judged(table=manifest(row(f"jump/{i}.mp4", frames=1) for i in range(4)))
    assert not report.ok and report.accepted == 0


def test_the_report_survives_json_and_is_the_same_every_time() -> None:
    first, second = (judged(*BAD.values(), reference={"jump": 1, "wave": 1}).to_dict() for _ in range(2))
    text = json.dumps(first)
    assert text == json.dumps(second)
    restored = ValidationReport.from_dict(json.loads(text))
    assert restored.to_dict() == first and restored.contract()["rejected"][0].keys() == {"path", "rule", "detail"}


# ------------------------------------------------------------------------------------------------------- Data Docs


def test_data_docs_list_every_rejected_video(all_bad: tuple[ValidationReport, Path]) -> None:
    _, docs = all_bad
    assert sorted(p.name for p in docs.iterdir()) == ["classes.html", "index.html", "videos.html"]
    index, videos = (docs / "index.html").read_text(), (docs / "videos.html").read_text()
    for bad in BAD.values():
        assert bad.path in index
    assert "jump/short.mp4" in videos and "At least 8 frames decode." in videos
    assert "is rejected" not in index and 'href="videos.html"' in index


def test_data_docs_ask_no_other_address_and_run_nothing(all_bad: tuple[ValidationReport, Path]) -> None:
    for page in all_bad[1].iterdir():
        text = page.read_text()
        assert "http://" not in text and "https://" not in text and "url(" not in text
        assert "<script" not in text and "<link" not in text and "<img" not in text
        assert "default-src 'none'" in text.split("</head>")[0]


def test_names_are_shown_not_run(tmp_path: Path) -> None:
    names = ["jump/<img src=x onerror=alert(1)>.mp4", "jump/$error ${x} %s {{7*7}}.mp4", "jump/ü n\u202eï 走.mp4"]
    rules = Settings.model_validate({"classes": ["jump", "wave", "<b>$class"]})
    judged(*(row(name, frames=2) for name in names), rules=rules, pages=tmp_path)
    for page in ("index.html", "videos.html", "classes.html"):
        text = (tmp_path / page).read_text()
        assert ("<img" not in text and "<b>$" not in text and "alert(1)&gt;" in text) or page == "classes.html"
        assert "{{7*7}}" in text or page == "classes.html"


def test_data_docs_that_can_not_be_written_say_so(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(ServiceError, match="can't write"):
        judged(pages=tmp_path / "file" / "docs")
