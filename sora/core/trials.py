"""What a search for hyper-parameters found: its trials, what it proposes, and how sure that is."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

Setting = bool | int | float | str | tuple[int, ...]  # a value of params.yaml that a search may change
Metric = Literal["log_loss", "accuracy"]
TrialState = Literal["complete", "pruned", "failed"]
Ended = Literal["trials", "minutes"]  # which bound ended a search


def plain(value: Setting) -> Any:
    """The value as JSON and YAML have it: a list, not a tuple."""
    return list(value) if isinstance(value, tuple) else value


def better(metric: Metric) -> int:
    """1 where more is better, -1 where less is."""
    return 1 if metric == "accuracy" else -1


@dataclass(frozen=True, slots=True)
class Trial:
    """One set of values, judged on the folds one after the other."""

    number: int  # from 0
    state: TrialState
    values: Mapping[str, Setting]  # `section.name` → value
    folds: tuple[float, ...]  # the metric's mean over the first 1, 2, … folds; fewer than all for a pruned trial
    baseline: bool = False  # the project's present settings
    seconds: float = 0.0

    @property
    def score(self) -> float | None:
        """The metric's mean over the finished folds."""
        return self.folds[-1] if self.folds else None

    def to_dict(self) -> dict[str, Any]:
        return {
            "number": self.number,
            "state": self.state,
            "score": self.score,
            "folds": list(self.folds),
            "values": {name: plain(value) for name, value in self.values.items()},
            "baseline": self.baseline,
            "seconds": round(self.seconds, 1),
        }


@dataclass(frozen=True, slots=True)
class Proposal:
    """A change of params.yaml, or none. `gain` is that of the best trial over the present settings, in the metric's
    own unit (nats, or a share of videos); positive is better. It and the bounds are None where nothing is compared."""

    changes: Mapping[str, Setting]  # `section.name` → new value; empty: nothing is proposed
    words: str  # the verdict, for people
    gain: float | None = None
    low: float | None = None
    high: float | None = None
    compared: int = 0  # trials that could have been the best; the interval allows for so many
    diff: str = ""  # of params.yaml, unified

    def to_dict(self) -> dict[str, Any]:
        return {
            "changes": {name: plain(value) for name, value in self.changes.items()},
            "words": self.words,
            "gain": self.gain,
            "low": self.low,
            "high": self.high,
            "compared": self.compared,
            "diff": self.diff,
        }


@dataclass(frozen=True, slots=True)
class Found:
    """The result of a search so far. `to_dict` is what `sora tune --json` prints."""

    study: str
    metric: Metric
    trials: tuple[Trial, ...]  # finished ones, by number
    best: Trial | None  # among the complete ones
    baseline: Trial | None
    importance: Mapping[str, float]  # share of the variance that each setting explains; empty: too few trials
    proposal: Proposal
    page: str  # file
    ended: Ended
    applied: bool = False

    def to_dict(self) -> dict[str, Any]:
        return {
            "study": self.study,
            "metric": self.metric,
            "ended": self.ended,
            "trials": [trial.to_dict() for trial in self.trials],
            "best": self.best.to_dict() if self.best else None,
            "baseline": self.baseline.to_dict() if self.baseline else None,
            "importance": dict(self.importance),
            "proposal": self.proposal.to_dict(),
            "applied": self.applied,
            "page": self.page,
        }
