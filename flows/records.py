"""What one night's steps pass to each other: frozen records, with their JSON if they are stored or printed."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sora.config import Project, Settings
from sora.core import provenance
from sora.core.ledger import Recorded
from sora.core.records import EvalReport, Outcome, Recipe
from sora.registry import JudgedRun, RegistryPort

if TYPE_CHECKING:
    from sora.judging.evaluation import EvalOutcome


@dataclass(frozen=True, slots=True)
class Night:
    """Where a night works: the project, its settings at the start of the night, and its registry."""

    project: Project
    settings: Settings
    registry: RegistryPort


@dataclass(frozen=True, slots=True)
class RunKey:
    """What decides whether anything changed since the last judged run: data, parameters, code."""

    data_version: str
    params_hash: str
    code_hash: str

    @classmethod
    def of(cls, settings: Settings, data_version: str) -> RunKey:
        params = json.dumps(settings.of_learning(), sort_keys=True)
        return cls(data_version, hashlib.sha256(params.encode()).hexdigest()[:16], provenance.LEARNING)

    @property
    def name(self) -> str:
        """The key of the work folder for every try of this run."""
        return hashlib.sha256(json.dumps(self.to_tags(), sort_keys=True).encode()).hexdigest()[:16]

    def is_of(self, judged: JudgedRun) -> bool:
        """Whether that run had the same data, parameters and code."""
        return all(judged.tags.get(name) == value for name, value in self.to_tags().items())

    def to_tags(self) -> dict[str, str]:
        """The tags of the run."""
        return asdict(self)


@dataclass(frozen=True, slots=True)
class Past:
    """What was judged before this run: the last judged run, its split ledger, and what is not known, in words."""

    judged: JudgedRun | None
    recorded: Recorded | None
    doubts: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class SplitFacts:
    """The table of splits in numbers (of videos) and digests."""

    videos: int
    rejected: int
    train: int
    val: int
    test: int
    counts: Mapping[str, int]  # of each class
    digest: str  # which video is in which split under which label
    test_digest: str  # the same for the test split alone

    def metrics(self) -> dict[str, float]:
        """The numbers as they are logged with the run."""
        names = ("videos", "rejected", "train", "val", "test")
        return {f"data/{name}": getattr(self, name) for name in names}


@dataclass(frozen=True, slots=True)
class Case:
    """What this night's candidate is made from and judged against; known before it is trained."""

    key: RunKey
    facts: SplitFacts
    judged: JudgedRun | None
    forced: bool

    @property
    def new_data(self) -> bool:
        """Whether the data differs from that of the last judged run."""
        return self.judged is None or self.judged.data_version != self.key.data_version


@dataclass(frozen=True, slots=True)
class Evaluation:
    """Candidate and champion on the same current splits. The champion's fields are None if there is none yet."""

    candidate: EvalOutcome
    champion: EvalOutcome | None
    champion_version: int | None

    def test_metrics(self) -> dict[str, float]:
        """The candidate's metrics on the test split, as `test/<metric>`."""
        return {f"test/{name}": value for name, value in self.candidate.reports["test"].metrics.items()}

    def to_dict(self) -> dict[str, Any]:
        champion = {"champion": self.champion.to_dict()} if self.champion else {}
        return {"candidate": self.candidate.to_dict(), **champion, "champion_version": self.champion_version}

    @classmethod
    def from_dict(cls, value: dict[str, Any]) -> Evaluation:
        champion = _outcome(value["champion"]) if "champion" in value else None
        return cls(_outcome(value["candidate"]), champion, value["champion_version"])


def _outcome(value: dict[str, Any]) -> EvalOutcome:
    from sora.judging.evaluation import EvalOutcome

    reports = {split: EvalReport.from_dict(report) for split, report in value["reports"].items()}
    return EvalOutcome(Recipe.from_dict(value["recipe"]), reports, Path(value["folder"]))


@dataclass(frozen=True, slots=True)
class NightResult:
    """The result of a night. `to_dict` is what `sora run --json` prints."""

    outcome: Outcome
    data_version: str
    run_id: str
    version: int | None
    reasons: tuple[str, ...]
    metrics: Mapping[str, float]
    pages: tuple[str, ...] = ()  # none where nothing was judged: there is nothing new to see

    def to_dict(self) -> dict[str, Any]:
        return {
            "outcome": self.outcome,
            "data_version": self.data_version,
            "run_id": self.run_id,
            "version": self.version,
            "reasons": list(self.reasons),
            "metrics": dict(self.metrics),
            "pages": list(self.pages),
        }
