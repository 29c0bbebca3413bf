"""What good data is: rules over the manifest, judged by Great Expectations.

Two suites. `videos` has one row a video: a row that breaks an expectation is quarantined with its rule
(`records.RULES`), or only reported where the rule says "warn". `classes` has one row a class, counted over what was
not quarantined: an expectation that fails there stops the run or warns (`SET_RULES`). Pixels are not looked at:
decoding found the facts already.

The report holds no time and no order of its own, so the same manifest gives the same bytes.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd

from sora.config import Settings
from sora.core import labels
from sora.core.errors import NotTrainable
from sora.core.processes import QUIET_ENV
from sora.core.records import RULES, Rejection
from sora.dataset import ledger
from sora.dataset.similar import near_duplicates

Severity = Literal["quarantine", "stop", "warn"]

SET_RULES: dict[str, str] = {
    # rule about the whole set → the fix that is printed with it
    "bad_name": RULES["bad_name"],
    "splits_lost": f"{ledger.RESTORE}; {ledger.ANEW}",
    "no_videos": "put videos into data/<class>/",
    "too_few_classes": "add videos of another class, or fix those that were rejected",
    "class_too_rare": "add videos of that class, take it out of `classes`, or lower validate.min_videos_per_class",
    "too_many_rejected": "fix or remove the rejected videos, or raise validate.max_rejected",
    "balance_shifted": "look at what was added or removed; raise validate.max_balance_shift if it is meant",
    "near_duplicates": "nothing to do: they are kept in one split; give them one group if they are of one source",
    "near_duplicate_labels": "look at both videos: one of the two labels may be wrong",
}
# Which of several broken rules a rejected video carries: the first of these.
_ORDER = (
    "bad_name", "symlink", "not_a_video", "unreadable", "too_large", "too_slow", "unlabelled", "unknown_label",
    "label_conflict", "truncated", "too_short", "too_small", "odd_frame_rate", "duplicate",
)  # fmt: skip
_DECODING = (
    "bad_name", "symlink", "not_a_video", "unreadable", "too_large", "too_slow", "truncated", "unlabelled",
    "unknown_label",
)  # fmt: skip
_SHOWN = 5  # examples in a finding's detail


@dataclass(frozen=True)
class ValidationReport:
    """What validation found. `rejected` is sorted by path; `counts` has the accepted videos of each class.

    `expectations` holds one dictionary each: `name`, `rule`, `success`, `severity` (quarantine | stop | warn),
    `observed` (a number: rows that break it, or the value that it is about), `detail` (in words).
    """

    ok: bool
    videos: int
    accepted: int
    rejected: list[Rejection]
    expectations: list[dict[str, Any]]
    counts: dict[str, int] = field(default_factory=dict)

    @property
    def passed(self) -> int:
        return sum(found["success"] for found in self.expectations)

    @property
    def failed(self) -> int:
        return len(self.expectations) - self.passed

    def findings(self, severity: Severity) -> list[dict[str, Any]]:
        """The failed expectations of that severity."""
        return [found for found in self.expectations if not found["success"] and found["severity"] == severity]

    def require(self) -> None:
        """Raises:
        NotTrainable: a rule about the whole set does not hold; the message names each, with its fix.
        """
        if not self.ok:
            stops = self.findings("stop")
            raise NotTrainable(
                "not trainable: " + "; ".join(f"{found['rule']}: {found['detail']}" for found in stops),
                fix="; ".join(SET_RULES[found["rule"]] for found in stops),
            )

    def stopped(self, rule: str, detail: str) -> ValidationReport:
        """This report with a rule more that stops runs and does not hold (`SET_RULES`)."""
        finding = {"name": rule, "rule": rule, "success": False, "severity": "stop", "says": "", "observed": 1}
        return replace(self, ok=False, expectations=[*self.expectations, {**finding, "detail": detail}])

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
        return cls(**{**value, "rejected": [Rejection(**entry) for entry in value["rejected"]]})


@dataclass(frozen=True)
class _Check:
    """One expectation: `expectation` is a class of great_expectations.expectations, `options` its arguments.

    `explain` says what a row (of `_Table.facts`) that breaks it has and what is allowed; without it, `observed` does
    so for the table as a whole.
    """

    name: str
    rule: str
    severity: Severity
    says: str
    expectation: str
    options: dict[str, Any]
    explain: Callable[[Any], str] | None = None
    observed: Callable[[float], str] = "{:g}".format


@dataclass(frozen=True)
class _Table:
    """What one suite judges: `frame` is what Great Expectations sees, `facts` has the columns for explanations."""

    name: str
    frame: pd.DataFrame
    facts: pd.DataFrame
    key: str  # the column that names a row
    checks: list[_Check]


@dataclass(frozen=True)
class _Verdict:
    check: _Check
    success: bool
    broken: list[str]  # keys of the rows that break it
    value: float | None  # what was observed, where the expectation is about the table


def validate(
    manifest: pd.DataFrame,
    settings: Settings,
    *,
    reference: dict[str, int] | None = None,
    docs: Path | None = None,
) -> ValidationReport:
    """Judges a manifest.

    Args:
        manifest: one row a file, the columns of `records.VideoRecord`.
        settings: `validate`, `classes` and `model.head` are used; without classes every label found is one.
        reference: accepted videos of each class in the last data version; None: no balance rule.
        docs: where to write the Data Docs (HTML); its content is replaced.

    Raises:
        DiskFull: no room for the Data Docs.
    """
    classes = list(settings.classes) or sorted(labels.single(manifest["label"].dropna(), settings.multilabel).unique())
    if len(manifest):
        videos = _videos(manifest, settings, classes)
    else:
        videos = _Table("videos", manifest[["path"]], manifest, "path", [_NO_VIDEOS])
    context = _context()
    verdicts, result = _judge(context, videos)
    suites = [result]
    rejected = _rejections(videos, verdicts)
    findings = [_finding(videos, verdict) for verdict in verdicts]
    accepted = manifest[~manifest["path"].isin({entry.path for entry in rejected})]
    each = labels.single(accepted["label"], settings.multilabel).value_counts()
    counts = {name: int(number) for name, number in each.reindex(classes, fill_value=0).items()}
    if len(manifest):
        table = _classes(manifest, counts, rejected, settings, reference)
        verdicts, result = _judge(context, table)
        suites.append(result)
        findings += [_finding(table, verdict) for verdict in verdicts]
    report = ValidationReport(
        ok=all(found["success"] or found["severity"] != "stop" for found in findings),
        videos=len(manifest),
        accepted=len(accepted),
        rejected=rejected,
        expectations=findings,
        counts=counts,
    )
    if docs is not None:
        from sora.dataset.quality import docs as pages

        pages.write(docs, report, suites)
    return report


# ------------------------------------------------------------------------------------------------ the suite "videos"

_NO_VIDEOS = _Check(
    "no_videos", "no_videos", "stop", "There is at least one video.", "ExpectTableRowCountToBeBetween",
    {"min_value": 1}, observed=lambda n: f"{n:.0f} videos found",
)  # fmt: skip


def _videos(manifest: pd.DataFrame, settings: Settings, classes: list[str]) -> _Table:
    rules = settings.validate_
    facts = manifest.reset_index(drop=True).copy()
    decoded = facts["frames"] > 0
    facts["foremost"] = facts["label"].map(lambda label: _foremost(label, classes, settings.multilabel)).astype(object)
    known = facts["foremost"].isin(classes)
    foreign = facts["error"].notna() & ~facts["error"].isin(_DECODING)
    frame = pd.DataFrame(
        {
            "path": facts["path"],
            "problem": facts["error"].mask(foreign, "unreadable").astype(object),
            "label": facts["foremost"],
            "frames": facts["frames"].where(decoded | facts["error"].isna()).astype(float),
            "seconds": facts["duration"].where(decoded).astype(float),
            "shorter side": facts[["width", "height"]].min(axis=1).where(decoded).astype(float),
            "frames a second": facts["fps"].where(decoded).astype(float),
        }
    )
    checks = [
        *(
            _Check(rule, rule, "quarantine", says, "ExpectColumnValuesToNotBeInSet",
                   {"column": "problem", "value_set": [rule]}, _as_decoded)
            for rule, says in _DECODED.items()
        ),
        # Not only rejected: DVC versions the folder as a whole, and can't with such a name in it.
        _Check("bad_name.anywhere", "bad_name", "stop", "DVC can version every name.",
               "ExpectColumnValuesToNotBeInSet", {"column": "problem", "value_set": ["bad_name"]},
               lambda v: f"{v.path}: {v.detail}"),
        _Check("unlabelled", "unlabelled", "quarantine", "Every video has a label.", "ExpectColumnValuesToNotBeNull",
               {"column": "label"}, lambda v: v.detail or "it lies in no class folder and labels.csv does not name it"),
        _Check("unknown_label", "unknown_label", "quarantine", "Every label is one of the classes.",
               "ExpectColumnValuesToBeInSet", {"column": "label", "value_set": classes},
               lambda v: f"its label {v.foremost!r} is none of the {len(classes)} classes ({_some(classes)})"),
        _Check("too_short.frames", "too_short", "quarantine", f"At least {rules.min_frames} frames decode.",
               "ExpectColumnValuesToBeBetween", {"column": "frames", "min_value": rules.min_frames},
               lambda v: f"{_count(v.frames, 'decodable frame')}, at least {rules.min_frames} are needed"),
        _Check("too_short.seconds", "too_short", "quarantine", f"It lasts at least {rules.min_seconds:g} s.",
               "ExpectColumnValuesToBeBetween", {"column": "seconds", "min_value": rules.min_seconds},
               lambda v: f"it lasts {v.duration:.2f} s, at least {rules.min_seconds:g} s are needed"),
        _Check("too_small", "too_small", "quarantine", f"The shorter side has at least {rules.min_side} pixels.",
               "ExpectColumnValuesToBeBetween", {"column": "shorter side", "min_value": rules.min_side},
               lambda v: f"it is {v.width}x{v.height} pixels, the shorter side must have at least {rules.min_side}"),
        _Check("odd_frame_rate", "odd_frame_rate", "quarantine",
               f"The frame rate is between {rules.min_fps:g} and {rules.max_fps:g} a second.",
               "ExpectColumnValuesToBeBetween",
               {"column": "frames a second", "min_value": rules.min_fps, "max_value": rules.max_fps},
               lambda v: f"it has {v.fps:.4g} frames a second, allowed are {rules.min_fps:g} to {rules.max_fps:g}"),
    ]  # fmt: skip
    usable = facts["sha256"].where(known & decoded & facts["error"].isna())
    frame["labels of these bytes"] = facts["label"].groupby(usable).transform("nunique")
    facts["copies"] = _label_of_copies(facts, usable, frame["labels of these bytes"] > 1)
    checks.append(
        _Check("label_conflict", "label_conflict", "quarantine", "The same bytes carry one label only.",
               "ExpectColumnValuesToBeBetween", {"column": "labels of these bytes", "max_value": 1},
               lambda v: f"the same bytes are labelled {v.copies}")
    )  # fmt: skip
    usable = usable.mask(frame["labels of these bytes"] > 1)
    if rules.duplicates:
        facts["first"] = facts["path"].groupby(usable).transform("min")  # the copy that stays
        frame["sha256"] = usable.astype(object)
        checks.append(
            _Check("duplicate", "duplicate", "quarantine", "No video is there twice (the first by path stays).",
                   "ExpectColumnValuesToBeUnique", {"column": "sha256"}, lambda v: f"the same bytes as {v.first}")
        )  # fmt: skip
        _scenes(frame, facts, usable.notna() & ~usable.duplicated(), rules.near_duplicate_bits)
        checks += [
            _Check("near_duplicates", "near_duplicates", "warn", "Near-duplicates belong to one group.",
                   "ExpectColumnValuesToBeBetween", {"column": "groups of this scene", "max_value": 1},
                   lambda v: v.pair),
            _Check("near_duplicate_labels", "near_duplicate_labels", "warn",
                   "Near-duplicates across groups carry one label.",
                   "ExpectColumnValuesToBeBetween", {"column": "labels of this scene", "max_value": 1},
                   lambda v: v.pair),
        ]  # fmt: skip
    return _Table("videos", frame, facts, "path", checks)


_DECODED = {
    "bad_name": "Every name is UTF-8.",
    "symlink": "Every video is a file of its own, not a link.",
    "not_a_video": "Every file is a video.",
    "unreadable": "Every video decodes.",
    "too_large": "Every video keeps within the limits of bytes, pixels, frames, seconds and memory.",
    "too_slow": "Every video decodes in the time that one may take.",
    "truncated": "Every video decodes to its end.",
}


def _foremost(label: Any, classes: list[str], multilabel: bool) -> Any:
    """The label that the rule about classes looks at: of several one that is no class, if there is one."""
    if not isinstance(label, str):
        return None
    found = labels.names(label, multilabel)
    return next((name for name in found if name not in classes), found[0])


def _as_decoded(video: Any) -> str:
    return video.detail or f"decoding says {video.error}"


def _label_of_copies(facts: pd.DataFrame, usable: pd.Series, conflict: pd.Series) -> pd.Series:
    """For rows in a conflict: "fight (fight/a.mp4) and noFight (noFight/b.mp4)"; "" elsewhere."""
    texts = pd.Series("", index=facts.index)
    for _, rows in facts[conflict].groupby(usable[conflict]):
        firsts = rows.drop_duplicates("label").sort_values("path")
        texts[rows.index] = " and ".join(f"{row.label} ({row.path})" for row in firsts.itertuples())
    return texts


def _scenes(frame: pd.DataFrame, facts: pd.DataFrame, distinct: pd.Series, bits: int) -> None:
    """Adds what near-duplicates have in common: groups and labels of a scene (a chain of near-duplicates).

    A video without a group is a group of its own, as it is when splits are assigned.
    """
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    rows = np.flatnonzero(distinct)
    pairs = near_duplicates(facts.iloc[rows], bits)
    graph = coo_array((np.ones(len(pairs), bool), (pairs[:, 0], pairs[:, 1])), shape=(len(rows), len(rows)))
    scene = pd.Series(np.nan, index=facts.index)
    if len(rows):
        number = connected_components(graph, directed=False)[1]
        scene.iloc[rows] = np.where(np.bincount(number)[number] > 1, number, np.nan)  # of one video: none
    group = facts["group"].where(facts["group"].fillna("") != "", facts["path"])
    frame["groups of this scene"] = group.groupby(scene).transform("nunique")
    across = frame["groups of this scene"] > 1  # one person or camera looks alike in every class
    frame["labels of this scene"] = facts["label"].groupby(scene).transform("nunique").where(across)
    names = [
        f"{row.path} ({row.label}{f', group {row.group}' if isinstance(row.group, str) and row.group else ''})"
        for row in facts.iloc[np.unique(rows[pairs])].itertuples()
    ]
    name = dict(zip(np.unique(rows[pairs]).tolist(), names, strict=True))
    texts = [""] * len(facts)
    for left, right in rows[pairs].tolist():
        texts[left] = texts[right] = f"{name[left]} ~ {name[right]}"
    facts["pair"] = texts


def _rejections(table: _Table, verdicts: Iterable[_Verdict]) -> list[Rejection]:
    """One rejection a video: the gravest of the rules that it breaks; the detail names the others, too."""
    facts = table.facts.set_index("path", drop=False)
    broken: dict[str, list[tuple[int, str, str]]] = {}
    for verdict in verdicts:
        check = verdict.check
        if check.severity != "quarantine" or not verdict.broken:
            continue
        for row in facts.loc[verdict.broken].itertuples():
            if check.rule == "duplicate" and row.path == row.first:
                continue  # Great Expectations names every copy; this one stays
            entry = (_ORDER.index(check.rule), check.rule, check.explain(row))  # type: ignore[misc]
            broken.setdefault(row.path, []).append(entry)
    rejections = []
    for path, entries in sorted(broken.items()):
        entries.sort(key=lambda entry: entry[0])
        rule, detail = entries[0][1:]
        others = (text if other == rule else f"{other}: {text}" for _, other, text in entries[1:] if text != detail)
        details = dict.fromkeys([detail, *others])
        rejections.append(Rejection(path, rule, "; ".join(details), str(facts.at[path, "sha256"])))
    return rejections


# ----------------------------------------------------------------------------------------------- the suite "classes"


def _classes(
    manifest: pd.DataFrame,
    counts: dict[str, int],
    rejected: list[Rejection],
    settings: Settings,
    reference: dict[str, int] | None,
) -> _Table:
    """One row a class, and one for each other label that was rejected ("" for none), which has no `videos`."""
    rules = settings.validate_
    # Several labels of one video stay one here: each rejected video counts once.
    lost = manifest.set_index("path")["label"].reindex([entry.path for entry in rejected]).fillna("").value_counts()
    names = [*counts, *sorted(set(lost.index) - counts.keys())]
    frame = pd.DataFrame(
        {
            "class": names,
            "videos": [float(counts[name]) if name in counts else math.nan for name in names],
            "rejected": [int(lost.get(name, 0)) for name in names],
            "present": pd.Series([name if counts.get(name) else None for name in names], dtype=object),
        }
    )
    allowed = math.floor(rules.max_rejected * len(manifest) + 1e-9)
    checks = [
        _Check("too_few_classes", "too_few_classes", "stop", f"At least {rules.min_classes} classes have videos.",
               "ExpectColumnUniqueValueCountToBeBetween", {"column": "present", "min_value": rules.min_classes},
               observed=lambda n: f"{n:.0f} classes have videos, at least {rules.min_classes} are needed"),
        _Check("class_too_rare", "class_too_rare", "stop",
               f"Every class has at least {rules.min_videos_per_class} videos.",
               "ExpectColumnValuesToBeBetween", {"column": "videos", "min_value": rules.min_videos_per_class},
               lambda c: f"class {c.name} has {c.videos:.0f}, at least {rules.min_videos_per_class} are needed"),
        _Check("too_many_rejected", "too_many_rejected", "stop",
               f"At most {rules.max_rejected:.0%} of the videos are rejected ({allowed} of {len(manifest)}).",
               "ExpectColumnSumToBeBetween", {"column": "rejected", "max_value": allowed},
               observed=lambda n: f"{n:.0f} of {len(manifest)} videos are rejected, at most {allowed} may be"),
    ]  # fmt: skip
    if reference and sum(reference.values()) and sum(counts.values()):
        for name in sorted(reference.keys() - set(names)):  # classes that are gone
            frame.loc[len(frame)] = [name, math.nan, 0, None]
        now = frame["videos"].fillna(0) / sum(counts.values())
        then = frame["class"].map(reference).fillna(0) / sum(reference.values())
        frame["change of share"] = ((now - then).abs() / 2).round(6)
        checks.append(
            _Check("balance_shifted", "balance_shifted", "warn",
                   "The shares of the classes are about those of the last data version (total variation).",
                   "ExpectColumnSumToBeBetween",
                   {"column": "change of share", "max_value": rules.max_balance_shift + 1e-6},
                   observed=lambda n: f"the shares of the classes moved by {n:.1%}, allowed are "
                                      f"{rules.max_balance_shift:.1%}")
        )  # fmt: skip
    facts = frame.rename(columns={"class": "name"})
    return _Table("classes", frame, facts.assign(**{"class": facts["name"]}), "class", checks)


# --------------------------------------------------------------------------------------------- Great Expectations


def _context() -> Any:
    """A context that keeps nothing, asks nobody and shows no progress bars."""
    os.environ.setdefault("GX_ANALYTICS_ENABLED", QUIET_ENV["GX_ANALYTICS_ENABLED"])
    import great_expectations as gx
    from great_expectations.data_context.types.base import ProgressBarsConfig

    context = gx.get_context(mode="ephemeral")
    context.variables.progress_bars = ProgressBarsConfig(globally=False)
    return context


def _judge(context: Any, table: _Table) -> tuple[list[_Verdict], Any]:
    """Great Expectations' verdict on each check, and its own result for the Data Docs."""
    import great_expectations as gx
    import great_expectations.expectations as gxe

    severity = {"stop": "critical", "quarantine": "warning", "warn": "info"}
    suite = gx.ExpectationSuite(
        name=table.name,
        expectations=[
            getattr(gxe, check.expectation)(
                **check.options, severity=severity[check.severity], description=check.says, meta={"name": check.name}
            )
            for check in table.checks
        ],
    )
    asset = context.data_sources.add_pandas(table.name).add_dataframe_asset(table.name)
    batch = asset.add_batch_definition_whole_dataframe("all").get_batch({"dataframe": table.frame})
    result = batch.validate(
        context.suites.add(suite),
        result_format={"result_format": "COMPLETE", "unexpected_index_column_names": [table.key]},
    )
    checks = {check.name: check for check in table.checks}
    verdicts = []
    for found in result.results:
        check = checks.pop(found.expectation_config.meta["name"])
        errors = [found.exception_info, *found.exception_info.values()]
        for error in errors:
            if isinstance(error, dict) and error.get("raised_exception"):
                raise RuntimeError(f"Great Expectations failed on {check.name}: {error['exception_message']}")
        rows = found.result.get("unexpected_index_list") or []
        value = found.result.get("observed_value")
        verdicts.append(
            _Verdict(check, bool(found.success), sorted(str(row[table.key]) for row in rows),
                     None if value is None else float(value))
        )  # fmt: skip
    order = {check.name: number for number, check in enumerate(table.checks)}
    return sorted(verdicts, key=lambda verdict: order[verdict.check.name]), result


def _finding(table: _Table, verdict: _Verdict) -> dict[str, Any]:
    check = verdict.check
    if check.explain is None:
        observed = verdict.value or 0.0
        detail = check.observed(observed)
    else:
        observed = len(verdict.broken)
        if check.rule == "duplicate":
            observed -= table.facts.loc[table.facts["path"].isin(verdict.broken), "first"].nunique()
        rows = table.facts[table.facts[table.key].isin(verdict.broken)]
        if check.severity == "quarantine":
            detail = check.says if verdict.success else f"{_count(observed, 'video')}: {RULES[check.rule]}"
        else:
            told = dict.fromkeys(check.explain(row) for row in rows.head(_SHOWN).itertuples(index=False))
            more = f" and {len(rows) - _SHOWN} more" if len(rows) > _SHOWN else ""
            detail = check.says if verdict.success else "; ".join(told) + more
    return {
        "name": check.name,
        "rule": check.rule,
        "success": verdict.success,
        "severity": check.severity,
        "says": check.says,
        "observed": observed,
        "detail": detail,
    }


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}" + ("" if number == 1 else "s")


def _some(names: list[str]) -> str:
    return ", ".join(names[:8]) + (", …" if len(names) > 8 else "")
