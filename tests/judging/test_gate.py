from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from scipy.stats import binomtest

from sora.config import Gate
from sora.core.records import Decision, EvalReport
from sora.judging.gate import clearly_worse, decide, mcnemar, mode_of, passes
from sora.judging.report import measure
from sora.tasks import MULTI

GATE = Gate()


def report(
    answers: str,
    truth: str | None = None,
    classes: tuple[str, ...] = ("a", "b"),
    confidence: float = 0.9,
    **metrics: float,
) -> EvalReport:
    """A letter a video: what was answered; `truth`: what it is (or a and b by turns)."""
    truth = truth or "ab" * (len(answers) // 2) + "a" * (len(answers) % 2)
    labels = [classes.index(letter) for letter in truth]
    probabilities = np.full((len(answers), len(classes)), (1 - confidence) / max(1, len(classes) - 1))
    probabilities[np.arange(len(answers)), [classes.index(letter) for letter in answers]] = confidence
    names = [f"{number:04d}" for number in range(len(answers))]
    result = measure.report("test", classes, np.array(labels), probabilities, sha256=names, paths=names)
    result.metrics.update({"ece": 0.05, "ece_noise": 0.0, "latency_ms": 10.0, **metrics})
    return result


def with_wrong(videos: int, wrong: set[int]) -> EvalReport:
    """Classes a and b by turns, wrong at these videos."""
    return report("".join("ab"[(number % 2) ^ (number in wrong)] for number in range(videos)))


def judge(candidate: EvalReport, champion: EvalReport | None = None, gate: Gate = GATE, **more: Any) -> Decision:
    return decide(candidate, champion, gate, **{"new_data": True, **more})


def said(decision: Decision, words: str) -> bool:
    return any(words in reason for reason in decision.reasons)


# ---- arithmetic ----


@pytest.mark.parametrize(("wins", "losses"), [(0, 0), (1, 0), (0, 5), (8, 1), (17, 9), (300, 250)])
def test_mcnemar_is_the_exact_binomial_test(wins: int, losses: int) -> None:
    expected = binomtest(wins, wins + losses, alternative="greater").pvalue if wins + losses else 1
    assert mcnemar(wins, losses) == pytest.approx(expected)
    assert mcnemar(np.int64(wins), np.int64(losses)) == mcnemar(wins, losses)


def test_modes() -> None:
    assert mode_of(GATE, new_data=True) == "not_worse" and mode_of(GATE, new_data=False) == "better"
    for mode in ("better", "not_worse"):
        assert mode_of(Gate(mode=mode), new_data=True) == mode_of(Gate(mode=mode), new_data=False) == mode


def test_the_margin_is_met_exactly() -> None:
    assert passes("not_worse", 0, 2, 100, GATE) and not passes("not_worse", 0, 3, 100, GATE)


# ---- the first model ----


def test_the_first_model_must_beat_the_majority_class() -> None:
    truth = "a" * 30 + "b" * 10
    refused = judge(report("a" * 40, truth))
    assert not refused.promote
    assert "accuracy 0.750 against 0.750 for always answering 'a' on the same 40 test videos" in refused.reasons[0]
    assert judge(report("a" * 31 + "b" * 9, truth)).promote  # 39 of 40
    assert refused.evidence["majority"] == 0.75


def test_too_little_evidence_serves_the_first_model_and_says_so() -> None:
    decision = judge(report("ab"))
    assert decision.promote and "too little evidence (2 test videos, 30 needed)" in decision.reasons[0]
    assert said(judge(report("a")), "too little evidence (1 test video, 30 needed)")
    assert judge(report("b", "a")).promote  # one wrong answer is no evidence either


def test_but_not_one_that_is_clearly_worse_than_the_majority() -> None:
    decision = judge(report("b" * 20, "a" * 18 + "bb"))
    assert not decision.promote and said(decision, "clearly worse than the majority class")


def test_no_test_videos_at_all() -> None:
    empty = measure.report("test", ("a", "b"), np.zeros(0, int), np.zeros((0, 2)), sha256=[], paths=[])
    assert judge(empty).promote and said(judge(empty), "0 test videos")
    assert not judge(empty, empty).promote


# ---- against a champion ----


def test_too_little_evidence_keeps_the_champion_unless_forced() -> None:
    old, new = with_wrong(20, {1, 2, 3}), with_wrong(20, {1})
    assert not judge(new, old).promote
    assert said(judge(new, old), "too little evidence (20 test videos, 30 needed)")
    assert judge(new, old, forced=True).promote
    assert not judge(with_wrong(20, set(range(10))), old, forced=True).promote  # lifts no other rule


def test_not_worse_with_new_data() -> None:
    old = with_wrong(100, set(range(10)))
    assert judge(with_wrong(100, set(range(10, 22))), old).promote  # 2 points, the margin
    refused = judge(with_wrong(100, set(range(10, 23))), old)
    assert not refused.promote
    assert refused.reasons[0].startswith("worse than the champion: accuracy 0.870 against the champion's 0.900")
    assert "10 won, 13 lost; margin 0.020" in refused.reasons[0]


def test_better_without_new_data() -> None:
    old = with_wrong(100, set(range(10)))
    assert not judge(old, old, new_data=False).promote
    five = judge(with_wrong(100, set(range(5))), old, new_data=False)
    assert five.promote and five.evidence["p"] == pytest.approx(1 / 32)
    four = judge(with_wrong(100, set(range(6))), old, new_data=False)
    assert not four.promote and "p = 0.062, at most 0.050 needed" in four.reasons[0]


def test_one_class_may_not_pay_for_another() -> None:
    # Of 100 videos the even ones are a, the odd ones b. The total is better; b has become much worse.
    old = with_wrong(100, set(range(0, 60, 2)))
    new = with_wrong(100, set(range(1, 41, 2)))
    decision = judge(new, old)
    assert not decision.promote and decision.evidence["difference"] > 0
    assert decision.reasons[0].startswith(
        "class 'b' is clearly worse: recall fell by 0.400 on 50 videos (0 won, 20 lost"
    )


def test_a_class_of_few_videos_is_not_judged_by_chance() -> None:
    assert not clearly_worse(0, 3, 4, classes=6, gate=GATE)  # recall fell from 0.75 to 0, which luck may do
    assert clearly_worse(0, 8, 20, classes=6, gate=GATE)
    assert not clearly_worse(0, 8, 20, classes=27, gate=GATE)  # the more classes, the more chances for chance
    assert not clearly_worse(0, 10, 100, classes=2, gate=GATE)  # clear, but within max_class_drop
    assert not clearly_worse(0, 0, 0, classes=2, gate=GATE)


def test_only_videos_that_both_answered_count() -> None:
    new, old = with_wrong(60, set()), with_wrong(50, set(range(5)))
    assert judge(new, old).evidence["pairs"] == 50
    assert judge(new, old).evidence["wins"] == 5


def test_new_classes_are_reported_apart() -> None:
    truth = "ab" * 20 + "c" * 10
    old = report("ab" * 20, "ab" * 20)
    new = report("ab" * 19 + "cb" + "c" * 8 + "aa", truth, classes=("a", "b", "c", "d"))
    # One video of a was answered c: asked as the champion is (a or b?), it says a.
    index = next(
        number for number, video in enumerate(new.videos) if video["label"] == "a" and video["predicted"] == "c"
    )
    new.videos[index]["probabilities"] = [0.3, 0.1, 0.6, 0.0]
    decision = judge(new, old)
    assert decision.promote and decision.evidence["pairs"] == 40 and decision.evidence["losses"] == 0
    assert said(decision, "new class 'c', not part of the comparison: recall 0.800 on 10 test videos")
    assert said(decision, "new class 'd', not part of the comparison: no test videos yet")


def test_classes_that_went_away() -> None:
    old = report("ab" * 20 + "c" * 5, "ab" * 20 + "c" * 5, classes=("c", "a", "b"))
    decision = judge(report("ab" * 20), old)
    assert decision.promote and said(decision, "no longer a class, not part of the comparison: 'c'")


def test_nothing_in_common() -> None:
    old = report("xy" * 20, "xy" * 20, classes=("x", "y"))
    decision = judge(report("ab" * 20), old, forced=True)
    assert not decision.promote and said(decision, "can't be compared")


# ---- the other rules ----


def test_calibration_within_budget_and_its_noise() -> None:
    good = "ab" * 20
    assert not judge(report(good, ece=0.3)).promote
    assert said(judge(report(good, ece=0.3)), "calibration error 0.300 above the 0.250 allowed")
    assert judge(report(good, ece=0.3, ece_noise=0.32)).promote  # what a perfectly calibrated model may show
    assert judge(report(good, ece=0.25)).promote


def test_latency_within_budget() -> None:
    decision = judge(report("ab" * 20, latency_ms=2001.0))
    assert not decision.promote and decision.reasons[0] == "2001.0 ms per clip, above the 2000 ms allowed"


@pytest.mark.parametrize("forced", [False, True])
def test_a_version_that_was_rolled_back_is_never_promoted_by_itself(forced: bool) -> None:
    decision = judge(report("ab" * 20), None, rolled_back=True, forced=forced)
    assert not decision.promote and "rolled back" in decision.reasons[0]


def test_how_often_this_split_has_judged() -> None:
    first, later = judge(report("ab" * 30)), judge(report("ab" * 30), times_judged=99)
    assert said(later, "times that this test split has judged before: 99")
    assert later.evidence["accuracy_low_for_looks"] < first.evidence["accuracy_low_for_looks"] < 1


def test_refusals_come_first() -> None:
    decision = judge(report("ab" * 20, latency_ms=9999.0), with_wrong(40, {1}))
    assert "above" in decision.reasons[0] and "not worse" in decision.reasons[1]


# ---- the simulation ----


def test_the_simulation_uses_the_real_gate(repository: Path) -> None:
    """Its verdicts on counts are those of `decide` on reports with these counts."""
    gate = _benchmark()
    rng = np.random.default_rng(0)
    for mode in ("better", "not_worse"):
        for _ in range(30):
            videos = 60
            old = set(np.flatnonzero(rng.random(videos) < 0.2).tolist())
            new = {number for number in range(videos) if (number in old) ^ (rng.random() < rng.choice([0.05, 0.3]))}
            counts = [
                (len({n for n in old - new if n % 2 == half}), len({n for n in new - old if n % 2 == half}))
                for half in (0, 1)
            ]
            wins, losses = (sum(pair) for pair in zip(*counts, strict=True))
            simulated = gate.accepts(mode, wins, losses, videos) and not any(
                gate.spoils(w, lost, 30, 2) for w, lost in counts
            )
            real = judge(with_wrong(videos, new), with_wrong(videos, old), Gate(mode=mode))
            assert real.promote == simulated


def test_equals_disagree_as_the_simulation_states(repository: Path) -> None:
    gate = _benchmark()
    won, lost = gate.disagreement(0.8, 0.8, 0.7)
    assert won == pytest.approx(lost) and won + lost == pytest.approx(0.174, abs=0.002)
    won, lost = gate.disagreement(0.8, 0.85, 0.7)
    assert won - lost == pytest.approx(0.05)


def _benchmark() -> ModuleType:
    from benchmarks.accuracy import gate

    return gate


def test_the_benchmark_runs(repository: Path, tmp_path: Path) -> None:
    command = [
        sys.executable,
        "-m",
        "benchmarks.accuracy.gate",
        "--nights",
        "3",
        "--trials",
        "40",
        "--json",
        str(tmp_path / "r" / "g.json"),
    ]
    done = subprocess.run(
        [*command, "--plot", str(tmp_path / "g.png")], cwd=repository, capture_output=True, text=True, check=True
    )
    assert "| `not_worse`: within 0.02 | 60 |" in done.stdout
    assert (tmp_path / "r" / "g.json").exists() and (tmp_path / "g.png").exists()


def test_deciding_needs_nothing_heavy() -> None:
    heavy = "{'sklearn', 'scipy', 'matplotlib', 'keras', 'pandas'}"
    code = f"import sys, sora.judging.gate, sora.judging.evaluation; print(sorted({heavy} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


# ---- several labels a video ----


def several(answers: list[str], truth: list[str], classes: str = "abc") -> EvalReport:
    """Letters a video: what was answered, and what it has."""

    def hot(words: list[str]) -> np.ndarray:
        return np.array([[letter in word for letter in classes] for word in words])

    names = [f"{number:04d}" for number in range(len(answers))]
    probabilities = np.where(hot(answers), 0.9, 0.1)
    result = measure.report("test", tuple(classes), hot(truth), probabilities, sha256=names, paths=names, task=MULTI)
    result.metrics.update({"ece": 0.05, "ece_noise": 0.0, "latency_ms": 10.0})
    return result


TRUTH = ["ab", "a", "bc", "c"] * 10


def test_of_several_labels_an_exact_match_is_right() -> None:
    nearly = ["ab", "a", "b", "c"] * 10  # of every fourth video one label is missed
    decision = judge(several(TRUTH, TRUTH), several(nearly, TRUTH), new_data=False)
    assert decision.promote and decision.evidence["wins"] == 10 and decision.evidence["pairs"] == 40
    assert decision.evidence["champion_accuracy"] == 0.75
    worse = judge(several(nearly, TRUTH), several(TRUTH, TRUTH))
    assert not worse.promote and said(worse, "worse than the champion: accuracy 0.750")
    assert said(worse, "class 'c' is clearly worse: recall fell by 0.500 on 20 videos")
    assert not said(worse, "class 'b'")  # which was answered


def test_a_label_too_many_costs_the_match_but_no_recall() -> None:
    more = [word if number % 2 else "abc" for number, word in enumerate(TRUTH)]
    decision = judge(several(more, TRUTH), several(TRUTH, TRUTH))
    assert not decision.promote and said(decision, "20 lost") and not said(decision, "clearly worse")


def test_the_first_of_several_labels_must_beat_the_most_frequent_set() -> None:
    assert judge(several(TRUTH, TRUTH)).promote
    refused = judge(several(["ab"] * 40, TRUTH))
    assert not refused.promote and said(refused, "accuracy 0.250 against 0.250 for always answering 'a'")


def test_a_new_class_of_several_labels_is_reported_apart() -> None:
    truth = [word + "d" for word in TRUTH]
    decision = judge(several(truth, truth, "abcd"), several(TRUTH, TRUTH))
    assert decision.promote and decision.evidence["pairs"] == 40 and decision.evidence["losses"] == 0
    assert said(decision, "new class 'd'")


def test_one_label_and_several_are_not_compared() -> None:
    for candidate, champion in ((several(TRUTH, TRUTH), report("ab" * 20)), (report("ab" * 20), several(TRUTH, TRUTH))):
        decision = judge(candidate, champion)
        assert not decision.promote and said(decision, "can't be compared; `sora promote VERSION`")
