"""The gate: two reports and the settings in, a decision with its reasons out. Pure, and standard library only,
except for the interval of `sora.judging.report.measure`.

Candidate and champion answered the *same* videos of the current test split, so the comparison is paired: only videos
that one had right and the other wrong count. `wins` are the candidate's, `losses` the champion's. What each rule costs
and catches is measured in `benchmarks/accuracy/gate.py`. For multi-label models a video is right if all its labels are,
and the rule on one class is about the videos that have it: whether it was among the answers.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from math import comb
from typing import Literal

from sora import tasks
from sora.config import Gate
from sora.core.records import Decision, EvalReport
from sora.core.statistics import wilson

Mode = Literal["better", "not_worse"]


@lru_cache(maxsize=100_000)
def mcnemar(wins: int, losses: int) -> float:
    """Exact one-sided p-value (McNemar 1947) of `wins` or more out of `wins + losses` if either were as likely."""
    wins, trials = int(wins), int(wins + losses)  # numpy's integers would overflow below
    p: float = sum(comb(trials, k) for k in range(wins, trials + 1)) / 2**trials
    return p


def mode_of(gate: Gate, new_data: bool) -> Mode:
    """`auto` is `not_worse` with new data, since new data is a reason to move, and `better` without."""
    if gate.mode == "auto":
        return "not_worse" if new_data else "better"
    return gate.mode


def passes(mode: Mode, wins: int, losses: int, videos: int, gate: Gate) -> bool:
    """The rule on accuracy alone.

    `not_worse` compares the point estimates. A lower confidence bound (a non-inferiority test proper) would promote a
    retrained equal one night in nine at 60 test videos and one in five at 300, so that new data hardly reached
    production. The price: a model that is 5 points worse passes one time in three at 60 videos, one in seven at 300.
    """
    if mode == "better":
        return mcnemar(wins, losses) <= 1 - gate.confidence
    return losses - wins <= gate.margin * videos + 1e-9


def clearly_worse(wins: int, losses: int, support: int, classes: int, gate: Gate) -> bool:
    """The rule on one class of several: recall fell by more than `max_class_drop`, and not by chance.

    With five videos per class, recall moves by 0.2 when one answer changes; so the paired test must be clear too. Its
    level is shared among the classes (Bonferroni): else a quarter of retrained equals is refused at 27 classes and 1000
    videos.
    """
    drop = (losses - wins) / support if support else 0.0
    return drop > gate.max_class_drop + 1e-9 and mcnemar(losses, wins) <= (1 - gate.confidence) / classes


@dataclass(frozen=True, slots=True)
class _Pairs:
    """Both models on the same videos: (wins, losses, videos) of all of them and of every class that both know."""

    total: tuple[int, int, int]
    by_class: dict[str, tuple[int, int, int]]
    champion_right: int


def _found(report: EvalReport, classes: tuple[str, ...]) -> dict[str, tuple[bool, dict[str, bool]]]:
    """sha256 → (answered correctly, for each label whether it was answered) of the videos that have one of `classes`,
    when only `classes` may be answered. Several labels of a video are right when all are and no other is answered."""
    task = tasks.of(report.multilabel)
    index = {name: report.classes.index(name) for name in classes}
    result = {}
    for video in report.videos:
        truth = {name for name in task.names(video["label"]) if name in index}
        if truth:
            given = task.answer_among(video, index)
            result[video["sha256"]] = given == truth, {name: name in given for name in truth}
    return result


def _pair(candidate: EvalReport, champion: EvalReport) -> _Pairs:
    """On the classes that both know: both get the same question about the same videos."""
    common = tuple(name for name in candidate.classes if name in champion.classes)
    new, old = _found(candidate, common), _found(champion, common)
    same = new.keys() & old.keys()
    by_class = dict.fromkeys(common, (0, 0, 0))
    for key in same:
        for name, now in new[key][1].items():
            by_class[name] = _counted(by_class[name], now, old[key][1][name])
    total = (0, 0, 0)
    for key in same:
        total = _counted(total, new[key][0], old[key][0])
    return _Pairs(total, by_class, sum(old[key][0] for key in same))


def _counted(counts: tuple[int, int, int], now: bool, before: bool) -> tuple[int, int, int]:
    wins, losses, videos = counts
    return wins + (now and not before), losses + (before and not now), videos + 1


class _Verdicts:
    """Collects the rules' verdicts; one refusal is enough to refuse."""

    def __init__(self) -> None:
        self.refusals: list[str] = []
        self.remarks: list[str] = []

    def say(self, ok: bool, words: str) -> None:
        (self.remarks if ok else self.refusals).append(words)


def decide(
    candidate: EvalReport,
    champion: EvalReport | None,
    gate: Gate,
    *,
    new_data: bool,
    times_judged: int = 0,
    forced: bool = False,
    rolled_back: bool = False,
) -> Decision:
    """Whether the candidate becomes the champion.

    Below `gate.min_test` videos nothing is certain: the first model is served unless it is clearly worse than the
    majority class, later ones are refused unless `forced`. With enough videos, the first model must beat the
    majority class, and a later one must pass the paired rules. `forced` only lifts the need for evidence: a
    model that the rules refuse is moved by hand (`sora promote VERSION`) or not at all.

    Args:
        candidate, champion: reports on the same, current test split; None without a champion. When classes were added
            (or removed) they are compared on those that both know, and the new ones are reported separately.
        new_data: the data version differs from the champion's.
        times_judged: how often this test split was used to judge before; counted by the caller.
        rolled_back: this very model was the champion once and was rolled back.

    Returns:
        The decision. Reasons begin with what refused; the numbers are in `evidence`.
    """
    verdicts = _Verdicts()
    videos = len(candidate.videos)
    evidence: dict[str, float] = {"videos": videos, "times_judged": times_judged}
    if videos:
        evidence["accuracy"] = candidate.metrics["accuracy"]
    if rolled_back:
        never = "this model was rolled back before and is never promoted automatically again"
        verdicts.say(False, f"{never}; `sora promote VERSION` does it by hand")
    if champion is None:
        _first(verdicts, evidence, candidate, gate)
    else:
        _against_champion(verdicts, evidence, candidate, champion, gate, mode_of(gate, new_data), forced)
    _budgets(verdicts, candidate, gate)
    if videos:
        # Bonferroni over the looks: nights that chose among noisy scores leave the claim too high (see RESULTS.md).
        right = round(candidate.metrics["accuracy"] * videos)
        low, _ = wilson(right, videos, 1 - 0.05 / (times_judged + 1))
        evidence["accuracy_low_for_looks"] = low
        times = f"times that this test split has judged before: {times_judged}"
        verdicts.say(True, f"{times}; allowing for them, accuracy {right / videos:.3f} means at least {low:.3f}")
    return Decision(not verdicts.refusals, tuple(verdicts.refusals + verdicts.remarks), evidence)


def _enough(videos: int, gate: Gate) -> str | None:
    """None, or the reason if there are too few videos."""
    if videos >= gate.min_test:
        return None
    return f"too little evidence ({videos} test video{'' if videos == 1 else 's'}, {gate.min_test} needed)"


def _first(verdicts: _Verdicts, evidence: dict[str, float], candidate: EvalReport, gate: Gate) -> None:
    if not candidate.videos:
        verdicts.say(True, f"{_enough(0, gate)}; there is no champion yet, so it may be served")
        return
    truth = [video["label"] for video in candidate.videos]
    common = max(sorted(set(truth)), key=truth.count)
    right = [video["predicted"] == video["label"] for video in candidate.videos]
    accuracy, majority = sum(right) / len(truth), truth.count(common) / len(truth)
    evidence |= {"majority": majority}
    both = f"accuracy {accuracy:.3f} against {majority:.3f} for always answering {common!r}"
    both += f" on the same {len(truth)} test videos"
    little = _enough(len(truth), gate)
    if little:
        losses = sum(label == common and not ok for label, ok in zip(truth, right, strict=True))
        wins = sum(label != common and ok for label, ok in zip(truth, right, strict=True))
        verdicts.say(True, f"{little}; there is no champion yet, so it may be served")
        worse = mcnemar(losses, wins) <= 1 - gate.confidence
        verdicts.say(not worse, f"{'clearly worse' if worse else 'not clearly worse'} than the majority class: {both}")
    else:
        beats = accuracy > majority
        verdicts.say(beats, f"first model {'beats' if beats else 'does not beat'} the majority class: {both}")


def _against_champion(
    verdicts: _Verdicts,
    evidence: dict[str, float],
    candidate: EvalReport,
    champion: EvalReport,
    gate: Gate,
    mode: Mode,
    forced: bool,
) -> None:
    if candidate.multilabel != champion.multilabel:
        only = "only one of candidate and champion answers with several labels per video"
        verdicts.say(False, f"{only}, so they can't be compared; `sora promote VERSION` moves the champion by hand")
        return
    pairs = _pair(candidate, champion)
    wins, losses, videos = pairs.total
    new = [name for name in candidate.classes if name not in champion.classes]
    gone = [name for name in champion.classes if name not in candidate.classes]
    if len(pairs.by_class) < 2:
        shared = f"candidate and champion share fewer than two classes ({len(pairs.by_class)})"
        verdicts.say(False, f"{shared}, so they can't be compared; `sora promote VERSION` moves the champion by hand")
        return
    evidence |= {"pairs": videos, "wins": wins, "losses": losses}
    little = _enough(videos, gate)
    if little:
        verdicts.say(forced, f"{little}{'; forced anyway' if forced else ''}")
    if videos:
        old = pairs.champion_right / videos
        difference = (wins - losses) / videos
        p = mcnemar(wins, losses)
        evidence |= {"champion_accuracy": old, "difference": difference, "p": p}
        ok = passes(mode, wins, losses, videos, gate)
        score = f"accuracy {old + difference:.3f} against the champion's {old:.3f} on the same {videos} test videos"
        score += f" ({wins} won, {losses} lost"
        if mode == "better":
            chance = f"one-sided McNemar p = {p:.3f}, at most {1 - gate.confidence:.3f} needed)"
            verdicts.say(ok, f"{'better' if ok else 'not clearly better'} than the champion: {score}; {chance}")
        else:
            verdicts.say(ok, f"{'not worse' if ok else 'worse'} than the champion: {score}; margin {gate.margin:.3f})")
    for name, (wins, losses, support) in pairs.by_class.items():
        if clearly_worse(wins, losses, support, len(pairs.by_class), gate):
            drop = f"recall fell by {(losses - wins) / support:.3f} on {support} videos ({wins} won, {losses} lost"
            verdicts.say(False, f"class {name!r} is clearly worse: {drop}; at most {gate.max_class_drop:.3f} allowed)")
    for name in new:
        recall, support = candidate.per_class[name].get("recall"), int(candidate.per_class[name]["support"])
        known = f"recall {recall:.3f} on {support} test videos" if recall is not None else "no test videos yet"
        verdicts.say(True, f"new class {name!r}, not part of the comparison: {known}")
    if gone:
        verdicts.say(True, f"no longer a class, not part of the comparison: {', '.join(map(repr, gone))}")


def _budgets(verdicts: _Verdicts, candidate: EvalReport, gate: Gate) -> None:
    """Calibration and latency; a missing measure has no verdict."""
    ece, noise = candidate.metrics.get("ece"), candidate.metrics.get("ece_noise", 0.0)
    if ece is not None:
        ok = ece <= max(gate.max_ece, noise)
        words = f"calibration error {ece:.3f} {'within' if ok else 'above'} the {gate.max_ece:.3f} allowed"
        if noise > gate.max_ece:
            words += f" or due to chance on so few videos ({noise:.3f})"
        verdicts.say(ok, words)
    latency = candidate.metrics.get("latency_ms")
    if latency is not None:
        ok = latency <= gate.max_latency_ms
        verdicts.say(
            ok, f"{latency:.1f} ms per clip, {'within' if ok else 'above'} the {gate.max_latency_ms:.0f} ms allowed"
        )
