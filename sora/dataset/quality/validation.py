"""Validation: the rules of `sora.dataset.quality.rules` over a manifest, judged by Great Expectations.

Two suites. `videos` has one row per video: a row that breaks a rule is quarantined with it, or only reported if the
rule says "warn". `classes` has one row per class, counted over what was not quarantined: a rule that fails there stops
the run or warns.

The report holds no time and no arbitrary order, so the same manifest gives the same bytes.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np
import pandas as pd

from sora.config import Settings
from sora.core.errors import NotTrainable
from sora.core.records import Rejection
from sora.dataset.quality.expectations import Answer, Judge, Question, Severity
from sora.dataset.quality.rules import (
    CLASS_RULES,
    FIXES,
    NO_VIDEOS,
    VIDEO_RULES,
    Classes,
    Condition,
    Rule,
    Subject,
    Videos,
    counted,
)

_SHOWN = 5  # examples in a finding's detail


@dataclass(frozen=True)
class Finding:
    """The result of one condition of a rule.

    `observed` is the number of rows that break it, or the value that it is about; `detail` says so in words.
    """

    name: str
    rule: str
    success: bool
    severity: Severity
    says: str
    observed: float
    detail: str


@dataclass(frozen=True)
class ValidationReport:
    """The result of validation. `rejected` is sorted by path; `counts` has the accepted videos of each class."""

    ok: bool
    videos: int
    accepted: int
    rejected: list[Rejection]
    expectations: list[Finding]
    counts: dict[str, int] = field(default_factory=dict)

    @property
    def passed(self) -> int:
        return sum(finding.success for finding in self.expectations)

    @property
    def failed(self) -> int:
        return len(self.expectations) - self.passed

    def findings(self, severity: Severity) -> list[Finding]:
        """The conditions of that severity that do not hold."""
        return [finding for finding in self.expectations if not finding.success and finding.severity == severity]

    def require(self) -> None:
        """Raises:
        NotTrainable: a rule about the whole set does not hold; the message names each, with its fix.
        """
        if not self.ok:
            stops = self.findings("stop")
            raise NotTrainable(
                "not trainable: " + "; ".join(f"{finding.rule}: {finding.detail}" for finding in stops),
                fix="; ".join(FIXES[finding.rule] for finding in stops),
            )

    def stopped(self, rule: Rule[Any], detail: str) -> ValidationReport:
        """This report with one more rule that was judged elsewhere, does not hold and stops runs."""
        finding = Finding(rule.name, rule.name, False, "stop", says="", observed=1, detail=detail)
        return replace(self, ok=False, expectations=[*self.expectations, finding])

    def contract(self) -> dict[str, Any]:
        """What `sora check --json` prints."""
        return {
            "ok": self.ok,
            "videos": self.videos,
            "accepted": self.accepted,
            "rejected": [{"path": r.path, "rule": r.rule, "detail": r.detail} for r in self.rejected],
            "expectations": {"passed": self.passed, "failed": self.failed},
        }

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, value: dict[str, Any]) -> ValidationReport:
        return cls(
            **{
                **value,
                "rejected": [Rejection(**entry) for entry in value["rejected"]],
                "expectations": [Finding(**entry) for entry in value["expectations"]],
            }
        )


@dataclass(frozen=True)
class Judgement:
    """A report with Great Expectations' own result of each suite, from which `docs.write` makes pages."""

    report: ValidationReport
    results: list[Any]


def validate(
    manifest: pd.DataFrame, settings: Settings, *, reference: dict[str, int] | None = None
) -> ValidationReport:
    """Judges a manifest: the report of `judge`."""
    return judge(manifest, settings, reference=reference).report


def judge(manifest: pd.DataFrame, settings: Settings, *, reference: dict[str, int] | None = None) -> Judgement:
    """Judges a manifest.

    Args:
        manifest: one row per file, the columns of `records.VideoRecord`.
        settings: `validate`, `classes` and `model.head` are used; without classes every label that occurs is a class.
        reference: accepted videos of each class in the last data version; None: no rule about the balance.
    """
    classes = list(settings.classes) or sorted(settings.task.single(manifest["label"].dropna()).unique())
    judge_suite = Judge()
    rules = VIDEO_RULES if len(manifest) else (NO_VIDEOS,)
    videos = _table("videos", "path", Videos(manifest, settings, classes), rules)
    verdicts, result = _verdicts(judge_suite, videos)
    results = [result]
    rejected = _rejections(verdicts)
    findings = [_finding(verdict) for verdict in verdicts]
    accepted = manifest[~manifest["path"].isin({entry.path for entry in rejected})]
    each = settings.task.single(accepted["label"]).value_counts()
    counts = {name: int(number) for name, number in each.reindex(classes, fill_value=0).items()}
    if len(manifest):
        subject = Classes(manifest, counts, rejected, settings, reference)
        verdicts, result = _verdicts(judge_suite, _table("classes", "class", subject, CLASS_RULES))
        results.append(result)
        findings += [_finding(verdict) for verdict in verdicts]
    report = ValidationReport(
        ok=all(finding.success or finding.severity != "stop" for finding in findings),
        videos=len(manifest),
        accepted=len(accepted),
        rejected=rejected,
        expectations=findings,
        counts=counts,
    )
    return Judgement(report, results)


# ---- from rules to verdicts ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Check:
    rule: Rule[Any]
    condition: Condition

    @property
    def name(self) -> str:
        aspect = self.condition.aspect
        return f"{self.rule.name}.{aspect}" if aspect else self.rule.name


@dataclass(frozen=True)
class _Table:
    """What one suite judges: `frame` is what Great Expectations sees, `facts` has the subject's own columns."""

    suite: str
    key: str  # the column that names a row
    frame: pd.DataFrame
    facts: pd.DataFrame
    checks: list[_Check]


@dataclass(frozen=True)
class _Verdict:
    """`broken` holds the rows that break the condition, with the columns for its message, but not the spared ones."""

    check: _Check
    success: bool
    broken: pd.DataFrame
    value: float | None


def _table(suite: str, key: str, subject: Subject, rules: Iterable[Rule[Subject]]) -> _Table:
    facts = subject.facts if key in subject.facts else subject.facts.assign(**{key: subject.facts["name"]})
    checks = [_Check(rule, condition) for rule in rules if rule.conditions for condition in rule.conditions(subject)]
    frame = pd.DataFrame({key: facts[key]})
    for check in checks:
        if check.condition.expectation.column is not None:
            frame[check.condition.expectation.column] = check.condition.values
    return _Table(suite, key, frame, facts, checks)


def _verdicts(judge_suite: Judge, table: _Table) -> tuple[list[_Verdict], Any]:
    questions = [
        Question(check.name, check.rule.severity, check.condition.says, check.condition.expectation)
        for check in table.checks
    ]
    answers, result = judge_suite(table.suite, table.frame, table.key, questions)
    return [_verdict(table, check, answer) for check, answer in zip(table.checks, answers, strict=True)], result


def _verdict(table: _Table, check: _Check, answer: Answer) -> _Verdict:
    inside = table.facts[table.key].isin(answer.broken)
    broken = table.facts[inside].assign(**{name: values[inside] for name, values in check.condition.facts.items()})
    stays = [not check.condition.spared(row) for row in broken.itertuples(index=False)]
    return _Verdict(check, answer.success, broken.loc[np.array(stays, bool)], answer.value)


def _rejections(verdicts: Iterable[_Verdict]) -> list[Rejection]:
    """One rejection per video: the gravest of the rules that it breaks; the detail also names the others."""
    broken: dict[str, list[tuple[int, str, str]]] = {}
    sha256: dict[str, str] = {}
    for verdict in verdicts:
        rule, explain = verdict.check.rule, verdict.check.condition.explain
        if rule.severity == "quarantine" and explain is not None:
            for row in verdict.broken.itertuples(index=False):
                broken.setdefault(row.path, []).append((rule.gravity, rule.name, explain(row)))
                sha256[row.path] = str(row.sha256)
    rejections = []
    for path, entries in sorted(broken.items()):
        entries.sort(key=lambda entry: entry[0])
        _, name, detail = entries[0]
        others = (text if other == name else f"{other}: {text}" for _, other, text in entries[1:] if text != detail)
        rejections.append(Rejection(path, name, "; ".join(dict.fromkeys([detail, *others])), sha256[path]))
    return rejections


def _finding(verdict: _Verdict) -> Finding:
    rule, condition = verdict.check.rule, verdict.check.condition
    observed: float
    if condition.explain is None:
        observed = verdict.value or 0.0
        detail = condition.observed(observed)
    else:
        observed = count = len(verdict.broken)
        if verdict.success:
            detail = condition.says
        elif rule.severity == "quarantine":
            detail = f"{counted(count, 'video')}: {rule.fix}"
        else:
            lines = dict.fromkeys(condition.explain(row) for row in verdict.broken.head(_SHOWN).itertuples(index=False))
            detail = "; ".join(lines) + (f" and {count - _SHOWN} more" if count > _SHOWN else "")
    return Finding(verdict.check.name, rule.name, verdict.success, rule.severity, condition.says, observed, detail)
