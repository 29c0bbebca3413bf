from __future__ import annotations

import gc
import json
import re
import sys
from collections.abc import Sequence
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from sora.core import statistics
from sora.core.errors import DiskFull
from sora.core.records import ClipSpec, EvalReport
from sora.judging.report import measure, mistakes, page, plots
from sora.tasks import MULTI, SINGLE
from sora.tasks.task import TEMPERATURES

SPEC = ClipSpec(frames=6, height=16, width=24)


def a_report(labels: list[int], probabilities: np.ndarray, classes: tuple[str, ...], **more: Any) -> EvalReport:
    sha256 = [f"{number:064x}" for number in range(len(labels))]
    paths = more.pop("paths", [f"{classes[label]}/v{number}.mp4" for number, label in enumerate(labels)])
    return measure.report("test", classes, np.array(labels, int), probabilities, sha256=sha256, paths=paths, **more)


def some_report(videos: int = 60, classes: tuple[str, ...] = ("a", "b", "c"), **more: Any) -> EvalReport:
    rng = np.random.default_rng(0)
    labels = np.arange(videos) % len(classes)
    probabilities = rng.dirichlet(np.ones(len(classes)), videos)
    probabilities[np.arange(videos), labels] += 0.7
    return a_report(labels.tolist(), probabilities / probabilities.sum(axis=1, keepdims=True), classes, **more)


class Shards:
    """Clips from an array, as `sora.store.shards.ShardSet` gives them."""

    spec = SPEC

    def __init__(self, report: EvalReport, clips: int = 3) -> None:
        names = [video["sha256"] for video in report.videos for _ in range(clips)]
        self.index = pd.DataFrame({"sha256": names, "clip": np.tile(np.arange(clips), len(report.videos))})

    def read(self, name: str, rows: Any) -> np.ndarray:
        frames = np.arange(SPEC.frames, dtype=np.uint8)[None, :, None, None, None] * 10
        return np.broadcast_to(frames, (len(rows), SPEC.frames, SPEC.height, SPEC.width, 3)).copy()


# ---- measures ----


def test_wilson_against_published_values() -> None:
    # Newcombe 1998, table I: 81 of 263, 15 of 148, 0 of 20, 1 of 29.
    for (hits, trials), expected in {
        (81, 263): (0.2553, 0.3662),
        (15, 148): (0.0624, 0.1605),
        (0, 20): (0.0, 0.1611),
        (1, 29): (0.0061, 0.1718),
    }.items():
        assert statistics.wilson(hits, trials) == pytest.approx(expected, abs=5e-5)
    assert statistics.wilson(0, 0) == (0, 1)
    assert statistics.wilson(5, 5)[1] == 1


def test_a_videos_probabilities_are_the_mean_over_its_clips() -> None:
    logits = np.log(np.array([[0.9, 0.1], [0.5, 0.5], [0.2, 0.8]]))
    found = SINGLE.video_probabilities(logits, np.array([0, 0, 1]), 2)
    np.testing.assert_allclose(found, [[0.7, 0.3], [0.2, 0.8]])
    assert np.isfinite(SINGLE.video_probabilities(logits * 1e4, np.array([0, 0, 1]), 2, 0.25)).all()


@pytest.mark.parametrize("true", [0.5, 1.0, 2.0, 4.0])
def test_the_temperature_is_found_again(true: float) -> None:
    rng = np.random.default_rng(1)
    logits = rng.standard_normal((5000, 4)) * 2
    probabilities = SINGLE.video_probabilities(logits, np.arange(5000), 5000)
    labels = np.array([rng.choice(4, p=p) for p in probabilities])
    assert SINGLE.fit_temperature(logits * true, np.arange(5000), labels) == pytest.approx(true, rel=0.06)


def test_a_temperature_from_little() -> None:
    assert SINGLE.fit_temperature(np.zeros((0, 3)), np.zeros(0, int), np.zeros(0, int)) == 1
    low, high = TEMPERATURES
    perfect = np.eye(3) * 2
    few = SINGLE.fit_temperature(perfect, np.arange(3), np.arange(3))
    assert 0.4 < few < 1  # three right answers are no licence for certainty
    wrong = SINGLE.fit_temperature(np.eye(3)[::-1] * 50.0, np.arange(3), np.arange(3))
    assert low <= wrong <= high
    many = SINGLE.fit_temperature(np.tile(perfect, (200, 1)), np.arange(600), np.tile(np.arange(3), 200))
    assert low <= many < few


def test_calibration_error_by_hand() -> None:
    confidence = np.array([0.95, 0.95, 0.95, 0.95, 0.55, 0.55])
    right = np.array([1, 1, 1, 0, 0, 0], bool)
    expected = 4 / 6 * abs(0.95 - 0.75) + 2 / 6 * 0.55
    assert statistics.expected_calibration_error(confidence, right) == pytest.approx(expected)
    assert statistics.expected_calibration_error(np.array([1.0, 0.0]), np.array([True, False])) == 0
    assert statistics.expected_calibration_error(np.zeros(0), np.zeros(0, bool)) == 0


def test_chance_alone_makes_a_calibration_error() -> None:
    rng = np.random.default_rng(2)
    few, many = (statistics.calibration_noise(rng.uniform(0.5, 1, videos)) for videos in (30, 3000))
    assert 0.1 < few < 0.3 and many < 0.04
    assert statistics.calibration_noise(np.ones(10)) == 0


def test_a_threshold_for_a_wanted_precision() -> None:
    confidence = np.linspace(0.99, 0.5, 50)
    right = np.arange(50) < 40  # the forty most confident ones
    below = statistics.unsure_below(confidence, right, 0.9)
    sure = confidence >= below
    assert 40 <= sure.sum() <= 44 and right[sure].mean() >= 0.9
    assert statistics.unsure_below(confidence, right, 0.5) == confidence[-1]  # all of them: 41 of 52
    found = statistics.selective(confidence, right, below)
    assert found == {"coverage": sure.mean(), "sure_precision": right[sure].mean()}
    # Eight right answers in a row are the least evidence for nine in ten.
    assert (
        statistics.unsure_below(confidence[:7], right[:7], 0.9)
        > 1
        >= statistics.unsure_below(confidence[:8], right[:8], 0.9)
    )
    never = statistics.unsure_below(np.zeros(0), np.zeros(0, bool), 0.9)
    assert never > 1 and json.loads(json.dumps(never)) == never
    assert statistics.selective(np.ones(3), np.ones(3, bool), never) == {"coverage": 0}
    assert statistics.selective(np.zeros(0), np.zeros(0, bool), 0.5) == {}


def test_equal_confidences_are_never_divided() -> None:
    confidence = np.array([0.9] * 10 + [0.6] * 10)
    right = np.array([True] * 10 + [True] * 5 + [False] * 5)
    assert statistics.unsure_below(confidence, right, 0.85) == 0.9


def test_the_report_by_hand() -> None:
    probabilities = np.array([[0.8, 0.2, 0], [0.6, 0.4, 0], [0.1, 0.9, 0], [0.3, 0.7, 0]])
    report = a_report([0, 0, 1, 0], probabilities, ("a", "b", "c"), temperature=2.0, metrics={"latency_ms": 3.0})
    assert report.confusion == [[2, 1, 0], [0, 1, 0], [0, 0, 0]]
    assert report.metrics["accuracy"] == 0.75 and report.metrics["majority"] == 0.75
    assert report.metrics["macro_f1"] == pytest.approx((0.8 + 2 / 3) / 2)  # of a and b: c is neither truth nor answer
    assert report.metrics["log_loss"] == pytest.approx(-np.log([0.8, 0.6, 0.9, 0.3]).mean())
    assert report.metrics["accuracy_low"] < 0.75 < report.metrics["accuracy_high"]
    assert report.per_class["a"]["recall"] == pytest.approx(2 / 3) and report.per_class["a"]["precision"] == 1
    assert report.per_class["c"] == {"support": 0}
    assert report.per_class["b"]["average_precision"] == 1
    assert report.temperature == 2 and report.metrics["latency_ms"] == 3
    assert EvalReport.from_dict(json.loads(json.dumps(report.to_dict(), allow_nan=False))) == report


def several_report(labels: list[list[int]], probabilities: Any, classes: tuple[str, ...], **more: Any) -> EvalReport:
    names = [f"{number:04d}" for number in range(len(labels))]
    hot = np.array(labels, bool).reshape(-1, len(classes))
    return measure.report("test", classes, hot, np.array(probabilities), sha256=names, paths=names, task=MULTI, **more)


def test_several_labels_by_hand() -> None:
    labels = [[1, 1, 0], [1, 0, 0], [0, 1, 0], [1, 0, 0]]
    probabilities = [[0.9, 0.5, 0.1], [0.8, 0.6, 0.1], [0.2, 0.4, 0.3], [0.7, 0.2, 0.1]]
    report = several_report(labels, probabilities, ("b", "a", "c"))
    assert report.multilabel and report.confusion == []
    assert [(video["label"], video["predicted"]) for video in report.videos] == [
        ("a|b", "a|b"), ("b", "a|b"), ("a", ""), ("b", "b"),
    ]  # fmt: skip
    found = report.metrics
    assert found["accuracy"] == 0.5 and found["majority"] == 0.5  # b alone, twice
    assert report.per_class["b"]["recall"] == report.per_class["b"]["precision"] == 1
    assert report.per_class["a"]["recall"] == report.per_class["a"]["precision"] == 0.5
    assert report.per_class["a"]["low"] < 0.5 < report.per_class["a"]["high"] and report.per_class["c"] == {
        "support": 0
    }
    assert found["macro_f1"] == pytest.approx((1 + 0.5) / 2)  # c is neither truth nor answer
    given = np.where(np.array(labels) == 1, probabilities, 1 - np.array(probabilities))
    assert found["log_loss"] == pytest.approx(-np.log(given).sum(axis=1).mean())
    # Of a: 0.6 (not so), 0.5 (so), 0.4 (so), 0.2 (not so). Precision 1/2 and 2/3 where recall grows.
    assert report.per_class["a"]["average_precision"] == pytest.approx((1 / 2 + 2 / 3) / 2)
    assert found["mean_average_precision"] == pytest.approx((1 + 7 / 12) / 2)
    confidence, so = MULTI.decisions(np.array(probabilities), measure.truth(report))
    assert len(confidence) == 12 and so.sum() == 5
    assert found["ece"] == statistics.expected_calibration_error(confidence, so)
    assert EvalReport.from_dict(json.loads(json.dumps(report.to_dict(), allow_nan=False))) == report


def test_one_label_each_is_measured_alike_by_both() -> None:
    """Of videos with one label, and answers of one class, exact match is accuracy, and F1 is F1."""
    rng = np.random.default_rng(0)
    labels, answers = rng.integers(0, 4, 80), rng.integers(0, 4, 80)
    probabilities = np.where(np.arange(4) == answers[:, None], 0.7, 0.1)
    one = a_report(labels.tolist(), probabilities, tuple("abcd")).metrics
    several = several_report((np.arange(4) == labels[:, None]).tolist(), probabilities, tuple("abcd")).metrics
    for name in ("accuracy", "accuracy_low", "macro_f1", "majority"):
        assert one[name] == several[name]


@pytest.mark.parametrize("true", [0.5, 1.0, 3.0])
def test_the_temperature_of_sigmoids_is_found_again(true: float) -> None:
    rng = np.random.default_rng(1)
    logits = rng.normal(0, 2, (4000, 3))
    labels = rng.random((4000, 3)) < MULTI.clip_probabilities(logits)
    assert MULTI.fit_temperature(logits * true, np.arange(4000), labels) == pytest.approx(true, rel=0.06)
    assert MULTI.fit_temperature(np.zeros((0, 3)), np.zeros(0, int), np.zeros((0, 3), bool)) == 1
    extreme = MULTI.video_probabilities(logits * 1e6, np.arange(4000), 4000, 0.25)
    assert ((extreme >= 0) & (extreme <= 1)).all()


@pytest.mark.parametrize("videos", [0, 1, 40])
def test_a_page_of_several_labels(videos: int, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    labels, probabilities = rng.random((videos, 4)) < 0.5, rng.random((videos, 4))
    probabilities[:1], labels[:1] = 0.1, True  # the first is answered with none of its labels
    names = tuple(name.replace("|", "/") for name in HOSTILE)
    report = several_report(labels.tolist(), probabilities, names, facts={"codec": ["h264"] * videos})
    page.write(tmp_path, {"test": report, "val": report}, shards=Shards(report), raw_test=probabilities)
    text = (tmp_path / "index.html").read_text(encoding="utf-8")
    assert "script" not in Elements(text).names and "There is no confusion matrix" in text
    assert not (tmp_path / "confusion.png").exists() and (tmp_path / "recall.png").exists()
    if videos == 40:
        worst = mistakes.worst(report, Shards(report))
        assert worst[0].confidence >= worst[-1].confidence > 0.5 and worst[0].truth == 1 - worst[0].confidence
        assert "none of the classes" in {one.predicted for one in mistakes.worst(report, Shards(report), most=40)}


def test_videos_are_in_the_order_of_sha256() -> None:
    report = measure.report(
        "test", ("a", "b"), np.array([0, 1]), np.array([[0.9, 0.1], [0.8, 0.2]]),
        sha256=["ff", "00"], paths=["late", "early"], facts={"codec": ["h264", "av1"]},
    )  # fmt: skip
    assert [(v["path"], v["label"], v["predicted"]) for v in report.videos] == [("early", "b", "a"), ("late", "a", "a")]
    assert {part["value"]: part["accuracy"] for part in report.slices} == {"av1": 0, "h264": 1}


def test_slices() -> None:
    right = np.array([True] * 20 + [False] * 10)
    facts: dict[str, Sequence[Any]] = {
        "brightness": list(range(30)),
        "duration": [2.0] * 30,
        "codec": ["h264"] * 29 + [None],
        "group": ["g1"] * 14 + ["g2"] * 14 + ["alone", None],
    }
    found = {(part["slice"], part["value"]): part for part in measure.slices(facts, right)}
    assert [key for key in found if key[0] == "brightness"] == [
        ("brightness", "dark (0 to 9)"), ("brightness", "middle (10 to 19)"), ("brightness", "bright (20 to 29)"),
    ]  # fmt: skip
    assert found["brightness", "bright (20 to 29)"]["accuracy"] == 0
    assert [key[1] for key in found if key[0] == "duration"] == ["short (2 to 2 s)"]  # equal values are not split
    assert found["codec", "h264"]["videos"] == 29
    assert [key[1] for key in found if key[0] == "group"] == ["g2", "g1"]  # the worst first, one video is no slice
    for part in found.values():
        assert part["low"] <= part["accuracy"] <= part["high"]
    assert measure.slices({}, right) == []
    assert measure.slices({"brightness": [float("nan")] * 30}, right) == []


def test_only_the_ten_worst_groups() -> None:
    right = np.arange(60) % 3 > 0
    right[:3] = False
    found = measure.slices({"group": [f"g{number // 3:02d}" for number in range(60)]}, right)
    assert len(found) == 10 and found[0]["value"] == "g00"


# ---- mistakes, plots, page ----


def test_the_worst_mistakes_come_first() -> None:
    probabilities = np.array([[0.4, 0.6], [0.05, 0.95], [0.9, 0.1], [0.7, 0.3]])
    report = a_report([0, 0, 0, 1], probabilities, ("a", "b"))
    worst = mistakes.worst(report, Shards(report))
    assert [(m.path, m.confidence) for m in worst] == [("a/v1.mp4", 0.95), ("b/v3.mp4", 0.7), ("a/v0.mp4", 0.6)]
    assert worst[0].truth == 0.05 and worst[0].strip.shape == (SPEC.height, 4 * SPEC.width, 3)
    assert worst[0].strip[0, :: SPEC.width, 0].tolist() == [0, 20, 30, 50]  # frames evenly spread
    assert len(mistakes.worst(report, Shards(report), most=1)) == 1


HOSTILE = ("<script>alert(1)</script>", "price $5 or $\\frac{1}{0}$", "日本語\nclass", 'a"b&c')


def test_names_are_shown_and_never_run(tmp_path: Path) -> None:
    report = some_report(40, HOSTILE, facts={"group": [HOSTILE[0]] * 40, "codec": ["h264"] * 40})
    raw = np.array([video["probabilities"] for video in report.videos])
    history = [{"loss": 1.0, "val_loss": 1.2, "accuracy": 0.5}, {"loss": 0.5, "val_loss": 0.9}]
    made = page.write(
        tmp_path, {"test": report}, shards=Shards(report), raw_test=raw, history=history, title=HOSTILE[0]
    )
    assert all(file.stat().st_size > 500 for file in made)
    text = (tmp_path / "index.html").read_text(encoding="utf-8")
    seen = Elements(text)
    assert "script" not in seen.names and HOSTILE[0] in seen.text
    assert seen.addresses and all(address.startswith("data:image/") for address in seen.addresses)
    assert not re.search(r"https?://", text)
    assert "default-src 'none'" in text


class Elements(HTMLParser):
    def __init__(self, text: str) -> None:
        super().__init__()
        self.names: set[str] = set()
        self.addresses: list[str] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.names.add(tag)
        self.addresses += [value or "" for name, value in attrs if name in ("src", "href", "action", "data", "srcset")]

    def handle_data(self, data: str) -> None:
        self.text += data


@pytest.mark.parametrize("videos", [0, 1, 5])
def test_a_page_of_little(videos: int, tmp_path: Path) -> None:
    probabilities = np.tile([0.9, 0.1], (videos, 1))
    report = a_report([0] * videos, probabilities, ("a", "b"))  # no mistakes, class b without videos
    page.write(tmp_path, {"test": report, "val": report}, shards=Shards(report), raw_test=probabilities)
    text = (tmp_path / "index.html").read_text(encoding="utf-8")
    assert ("There are no test videos" if not videos else "None: every test video") in text
    assert (tmp_path / "mistakes.png").read_bytes().startswith(b"\x89PNG")
    assert (tmp_path / "reliability.png").exists() == bool(videos)


def test_many_classes() -> None:
    report = some_report(400, tuple(f"class number {number}" for number in range(120)))
    for draw in (plots.confusion, plots.recalls, plots.precision_recall):
        assert len(draw(report)) < 1_000_000
    text = page.render({"test": report}, {name: b"" for name in ("confusion", "recall")}, [], title="many")
    assert "class number 119" in text


def test_a_history_with_gaps() -> None:
    assert plots.history([{"loss": 1.0}]) and plots.history([{"seconds": 1.0}, {"val_accuracy": 0.5}])


def test_plots_leave_no_figures_behind() -> None:
    from matplotlib.figure import Figure

    for _ in range(3):
        plots.recalls(some_report())
    gc.collect()
    assert not [thing for thing in gc.get_objects() if isinstance(thing, Figure)]
    assert "matplotlib.pyplot" not in sys.modules or not sys.modules["matplotlib.pyplot"].get_fignums()


def test_long_names_keep_their_ends() -> None:
    assert plots.plain("x" * 50 + "end.mp4", 20).endswith("end.mp4") and len(plots.plain("x" * 57, 20)) <= 20
    assert plots.plain("$5") == r"\$5"


def test_a_full_disk_keeps_the_old_page(tmp_path: Path) -> None:
    report = some_report()
    page.write(tmp_path, {"test": report}, shards=Shards(report))
    before = (tmp_path / "index.html").read_bytes()
    full = Path("/dev/full")
    if not full.exists():
        pytest.skip("needs /dev/full")
    (tmp_path / ".index.html.part").symlink_to(full)  # where the draft goes: every write says ENOSPC
    with pytest.raises(DiskFull):
        page.write(tmp_path, {"test": report}, shards=Shards(report), title="new")
    assert (tmp_path / "index.html").read_bytes() == before
