"""The rules about good data: one record each, from which everything that is shown about a rule is derived.

To add a rule, write its record into `VIDEO_RULES` or `CLASS_RULES`, with a function that yields its conditions. A
condition names the column that Great Expectations judges, the values of that column, and the words for a row that
breaks it. Nothing else needs to know the rule: the fix that `sora check`, the Data Docs and errors print, the order of
severity and the report come from the record. The README's table is held to it by `tests/test_docs.py`.

Pixels are not read here: decoding has already found the facts. Rules that reading a file can break have their fix in
`records.RULES`, since the decoders raise them without this module.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Generic, TypeAlias, TypeVar

import numpy as np
import pandas as pd

from sora.config import Settings
from sora.core.records import RULES, Rejection
from sora.dataset import ledger
from sora.dataset.quality.expectations import (
    Expectation,
    Severity,
    between,
    distinct,
    none_of,
    one_of,
    present,
    rows,
    total,
    unique,
)
from sora.dataset.similar import near_duplicates
from sora.tasks import Task

Subject = TypeVar("Subject", "Videos", "Classes")
Values: TypeAlias = pd.Series  # one value a row of the subject


@dataclass(frozen=True)
class Condition:
    """One expectation of a rule.

    Attributes:
        expectation: what is judged.
        says: what is required, in words.
        values: the values of the judged column; None if it is about the table as a whole.
        explain: for a row of `Subject.facts` with `facts` that breaks it, what it has and what is allowed.
        observed: the same for the value observed, if the expectation is about the table.
        facts: more columns for `explain`.
        aspect: tells several conditions of one rule apart.
        spared: which of the rows that break it stay anyway.
    """

    expectation: Expectation
    says: str
    values: Values | None = None
    explain: Callable[[Any], str] | None = None
    observed: Callable[[float], str] = "{:g}".format
    facts: Mapping[str, Values] = field(default_factory=dict)
    aspect: str = ""
    spared: Callable[[Any], bool] = lambda row: False


@dataclass(frozen=True)
class Rule(Generic[Subject]):
    """What good data is, in one respect.

    Attributes:
        name: as reports and the README show it.
        severity: a video that breaks it is left out (quarantine), training stops (stop), or it is only reported (warn).
        fix: what the owner of the data can do.
        conditions: yields those that apply to what is judged; None for a rule that is judged elsewhere.
        gravity: a video that breaks several rules is listed under the one with the lowest number.
    """

    name: str
    severity: Severity
    fix: str
    conditions: Callable[[Subject], Iterator[Condition]] | None = None
    gravity: int = 0


# ---- what is judged ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Scenes:
    """What near-duplicates have in common, one value per video: see `Videos.scenes`."""

    groups: Values
    labels: Values
    pair: Values  # in words, the video and one that it looks like


class Videos:
    """The manifest, one row per video, with what several rules need.

    `facts` has the columns of `records.VideoRecord`, and `foremost`: the label that the rules about classes use.
    """

    def __init__(self, manifest: pd.DataFrame, settings: Settings, classes: list[str]) -> None:
        self.limits = settings.validate_
        self.classes = classes
        facts = manifest.reset_index(drop=True)
        foremost = facts["label"].map(lambda label: _foremost(label, classes, settings.task)).astype(object)
        self.facts = facts.assign(foremost=foremost)

    @cached_property
    def decoded(self) -> Values:
        """bool: at least one frame decodes."""
        return self.facts["frames"] > 0

    @cached_property
    def problem(self) -> Values:
        """The rule that reading the file broke, or None. A name that is not a rule counts as `unreadable`."""
        error = self.facts["error"]
        return error.mask(error.notna() & ~error.isin(FIXES), "unreadable").astype(object)

    def of_decoded(self, fact: Values) -> Values:
        """The fact as numbers, NaN where nothing decodes: no rule about it applies there."""
        return fact.where(self.decoded).astype(float)

    @cached_property
    def labelled(self) -> Values:
        """sha256 of the videos that decode and whose label is a class; NaN of the others."""
        usable = self.facts["foremost"].isin(self.classes) & self.decoded & self.facts["error"].isna()
        return self.facts["sha256"].where(usable)

    @cached_property
    def labels_of_bytes(self) -> Values:
        """How many labels the same bytes carry, among `labelled` videos."""
        return self.facts["label"].groupby(self.labelled).transform("nunique")

    @cached_property
    def settled(self) -> Values:
        """`labelled`, but NaN also where the same bytes carry several labels."""
        return self.labelled.mask(self.labels_of_bytes > 1)

    @cached_property
    def scenes(self) -> Scenes:
        """Groups and labels of a scene, which is a chain of near-duplicates among the first copies of `settled`.

        A video without a group is its own group, as when splits are assigned. Labels count only in a scene
        of several groups: one person or camera looks alike in every class.
        """
        from scipy.sparse import coo_array
        from scipy.sparse.csgraph import connected_components

        facts = self.facts
        distinct_rows = np.flatnonzero(self.settled.notna() & ~self.settled.duplicated())
        pairs = near_duplicates(facts.iloc[distinct_rows], self.limits.near_duplicate_bits)
        count = len(distinct_rows)
        graph = coo_array((np.ones(len(pairs), bool), (pairs[:, 0], pairs[:, 1])), shape=(count, count))
        scene = pd.Series(np.nan, index=facts.index)
        if count:
            number = connected_components(graph, directed=False)[1]
            scene.iloc[distinct_rows] = np.where(np.bincount(number)[number] > 1, number, np.nan)  # of one video: none
        group = facts["group"].where(facts["group"].fillna("") != "", facts["path"])
        groups = group.groupby(scene).transform("nunique")
        alike = np.unique(distinct_rows[pairs])
        names = [
            f"{row.path} ({row.label}{f', group {row.group}' if isinstance(row.group, str) and row.group else ''})"
            for row in facts.iloc[alike].itertuples()
        ]
        name = dict(zip(alike.tolist(), names, strict=True))
        texts = [""] * len(facts)
        for left, right in distinct_rows[pairs].tolist():
            texts[left] = texts[right] = f"{name[left]} ~ {name[right]}"
        return Scenes(
            groups,
            facts["label"].groupby(scene).transform("nunique").where(groups > 1),
            pd.Series(texts, index=facts.index),
        )


class Classes:
    """One row per class, counted over what was not quarantined, and one for each other label that was rejected.

    `facts` has the columns `name` ("" for videos without a label), `videos` (NaN if it is not a class) and `rejected`.
    With a `reference` there is also a row for each of its classes that is gone.
    """

    def __init__(
        self,
        manifest: pd.DataFrame,
        counts: dict[str, int],
        rejected: list[Rejection],
        settings: Settings,
        reference: dict[str, int] | None,
    ) -> None:
        self.limits = settings.validate_
        self.counts = counts
        self.all_videos = len(manifest)
        self.reference = reference if reference and sum(reference.values()) and sum(counts.values()) else None
        # Several labels of one video count as one here: each rejected video counts once.
        label = manifest.set_index("path")["label"].reindex([entry.path for entry in rejected])
        lost = label.fillna("").value_counts()
        names = [*counts, *sorted(set(lost.index) - counts.keys())]
        names += sorted((self.reference or {}).keys() - set(names))
        self.facts = pd.DataFrame(
            {
                "name": names,
                "videos": [float(counts[name]) if name in counts else math.nan for name in names],
                "rejected": [int(lost.get(name, 0)) for name in names],
            }
        )

    @cached_property
    def change_of_share(self) -> Values:
        """Half the distance of each class's share from the one in `reference`: their sum is the total variation."""
        reference = self.reference or {}
        now = self.facts["videos"].fillna(0) / sum(self.counts.values())
        then = self.facts["name"].map(reference).fillna(0) / sum(reference.values())
        return ((now - then).abs() / 2).round(6)


def _foremost(label: object, classes: list[str], task: Task) -> str | None:
    """The label that the rule about classes uses: among several, one that is not a class, if there is one."""
    if not isinstance(label, str):
        return None
    own = task.names(label)
    return next((name for name in own if name not in classes), own[0])


# ---- the rules' conditions -----------------------------------------------------------------------------------------


def _read(name: str, gravity: int, says: str) -> Rule[Videos]:
    """A rule that reading the file broke: its name is in the manifest."""

    def conditions(videos: Videos) -> Iterator[Condition]:
        yield Condition(
            none_of("problem", name), says, videos.problem, lambda v: v.detail or f"decoding says {v.error}"
        )

    return Rule(name, "quarantine", RULES[name], conditions, gravity)


def _versionable(videos: Videos) -> Iterator[Condition]:
    yield Condition(
        none_of("problem", "bad_name"),
        "DVC can version every name.",
        videos.problem,
        lambda v: f"{v.path}: {v.detail}",
        aspect="anywhere",
    )


def _labelled(videos: Videos) -> Iterator[Condition]:
    yield Condition(
        present("label"),
        "Every video has a label.",
        videos.facts["foremost"],
        lambda v: v.detail or "it lies in no class folder and labels.csv does not name it",
    )


def _of_a_class(videos: Videos) -> Iterator[Condition]:
    classes = videos.classes
    yield Condition(
        one_of("label", classes),
        "Every label is one of the classes.",
        videos.facts["foremost"],
        lambda v: f"its label {v.foremost!r} is not one of the {len(classes)} classes ({_some(classes)})",
    )


def _long_enough(videos: Videos) -> Iterator[Condition]:
    frames, seconds = videos.limits.min_frames, videos.limits.min_seconds
    known = videos.decoded | videos.facts["error"].isna()
    yield Condition(
        between("frames", least=frames),
        f"At least {frames} frames decode.",
        videos.facts["frames"].where(known).astype(float),
        lambda v: f"{counted(v.frames, 'decodable frame')}, at least {frames} are needed",
        aspect="frames",
    )
    yield Condition(
        between("seconds", least=seconds),
        f"It lasts at least {seconds:g} s.",
        videos.of_decoded(videos.facts["duration"]),
        lambda v: f"it lasts {v.duration:.2f} s, at least {seconds:g} s are needed",
        aspect="seconds",
    )


def _big_enough(videos: Videos) -> Iterator[Condition]:
    side = videos.limits.min_side
    yield Condition(
        between("shorter side", least=side),
        f"The shorter side has at least {side} pixels.",
        videos.of_decoded(videos.facts[["width", "height"]].min(axis=1)),
        lambda v: f"it is {v.width}x{v.height} pixels, the shorter side must have at least {side}",
    )


def _usual_frame_rate(videos: Videos) -> Iterator[Condition]:
    least, most = videos.limits.min_fps, videos.limits.max_fps
    yield Condition(
        between("frames a second", least=least, most=most),
        f"The frame rate is between {least:g} and {most:g} a second.",
        videos.of_decoded(videos.facts["fps"]),
        lambda v: f"it has {v.fps:.4g} frames a second, allowed are {least:g} to {most:g}",
    )


def _one_label_for_the_same_bytes(videos: Videos) -> Iterator[Condition]:
    facts, conflict = videos.facts, videos.labels_of_bytes > 1
    copies = pd.Series("", index=facts.index)  # "fight (fight/a.mp4) and noFight (noFight/b.mp4)"
    for _, same in facts[conflict].groupby(videos.labelled[conflict]):
        firsts = same.drop_duplicates("label").sort_values("path")
        copies[same.index] = " and ".join(f"{row.label} ({row.path})" for row in firsts.itertuples())
    yield Condition(
        between("labels of these bytes", most=1),
        "The same bytes carry one label only.",
        videos.labels_of_bytes,
        lambda v: f"the same bytes are labelled {v.copies}",
        facts={"copies": copies},
    )


def _no_copies(videos: Videos) -> Iterator[Condition]:
    if videos.limits.duplicates:
        yield Condition(
            unique("sha256"),
            "No video is there twice (the first by path stays).",
            videos.settled.astype(object),
            lambda v: f"the same bytes as {v.first}",
            facts={"first": videos.facts["path"].groupby(videos.settled).transform("min")},
            spared=lambda v: bool(v.path == v.first),  # Great Expectations names every copy
        )


def _one_group_for_near_duplicates(videos: Videos) -> Iterator[Condition]:
    if videos.limits.duplicates:
        yield _one_of_a_scene(videos, "groups", "Near-duplicates belong to one group.", videos.scenes.groups)


def _one_label_for_near_duplicates(videos: Videos) -> Iterator[Condition]:
    if videos.limits.duplicates:
        yield _one_of_a_scene(videos, "labels", "Near-duplicates across groups carry one label.", videos.scenes.labels)


def _one_of_a_scene(videos: Videos, what: str, says: str, values: Values) -> Condition:
    return Condition(
        between(f"{what} of this scene", most=1),
        says,
        values,
        lambda v: str(v.pair),
        facts={"pair": videos.scenes.pair},
    )


def _some_videos(_: Videos) -> Iterator[Condition]:
    yield Condition(rows(least=1), "There is at least one video.", observed=lambda n: f"{n:.0f} videos found")


def _enough_classes(classes: Classes) -> Iterator[Condition]:
    least = classes.limits.min_classes
    names = [name if classes.counts.get(name) else None for name in classes.facts["name"]]
    yield Condition(
        distinct("present", least=least),
        f"At least {least} classes have videos.",
        pd.Series(names, dtype=object),
        observed=lambda n: f"{n:.0f} classes have videos, at least {least} are needed",
    )


def _enough_videos_a_class(classes: Classes) -> Iterator[Condition]:
    least = classes.limits.min_videos_per_class
    yield Condition(
        between("videos", least=least),
        f"Every class has at least {least} videos.",
        classes.facts["videos"],
        lambda c: f"class {c.name} has {c.videos:.0f}, at least {least} are needed",
    )


def _few_rejected(classes: Classes) -> Iterator[Condition]:
    share, videos = classes.limits.max_rejected, classes.all_videos
    allowed = math.floor(share * videos + 1e-9)
    yield Condition(
        total("rejected", most=allowed),
        f"At most {share:.0%} of the videos are rejected ({allowed} of {videos}).",
        classes.facts["rejected"],
        observed=lambda n: f"{n:.0f} of {videos} videos are rejected, at most {allowed} may be",
    )


def _steady_balance(classes: Classes) -> Iterator[Condition]:
    most = classes.limits.max_balance_shift
    if classes.reference:
        yield Condition(
            total("change of share", most=most + 1e-6),
            "The shares of the classes are about those of the last data version (total variation).",
            classes.change_of_share,
            observed=lambda n: f"the shares of the classes moved by {n:.1%}, allowed are {most:.1%}",
        )


# ---- the rules, in the order of the report -------------------------------------------------------------------------

VIDEO_RULES: tuple[Rule[Videos], ...] = (
    _read("bad_name", 1, "Every name is UTF-8."),
    _read("symlink", 2, "Every video is a file of its own, not a link."),
    _read("not_a_video", 3, "Every file is a video."),
    _read("unreadable", 4, "Every video decodes."),
    _read("too_large", 5, "Every video keeps within the limits of bytes, pixels, frames, seconds and memory."),
    _read("too_slow", 6, "Every video decodes in the time that one may take."),
    _read("truncated", 10, "Every video decodes to its end."),
    # Leaving such a video out is not enough: DVC versions the folder as a whole, and can't with such a name in it.
    Rule("bad_name", "stop", RULES["bad_name"], _versionable),
    Rule("unlabelled", "quarantine", "move the video into data/<class>/ or add it to data/labels.csv", _labelled, 7),
    Rule(
        "unknown_label",
        "quarantine",
        "add the class to `classes` in params.yaml, or move the folder out of data/",
        _of_a_class,
        8,
    ),
    Rule(
        "too_short",
        "quarantine",
        "use a longer video or lower validate.min_frames / validate.min_seconds",
        _long_enough,
        11,
    ),
    Rule("too_small", "quarantine", "use a larger picture or lower validate.min_side", _big_enough, 12),
    Rule(
        "odd_frame_rate",
        "quarantine",
        "re-encode at a usual frame rate or widen validate.min_fps / validate.max_fps",
        _usual_frame_rate,
        13,
    ),
    Rule(
        "label_conflict",
        "quarantine",
        "the same bytes carry two labels: keep the right one and remove the other",
        _one_label_for_the_same_bytes,
        9,
    ),
    Rule("duplicate", "quarantine", "nothing to do: the first copy by path is used", _no_copies, 14),
    Rule(
        "near_duplicates",
        "warn",
        "nothing to do: they are kept in one split; give them one group if they are of one source",
        _one_group_for_near_duplicates,
    ),
    Rule(
        "near_duplicate_labels",
        "warn",
        "look at both videos: one of the two labels may be wrong",
        _one_label_for_near_duplicates,
    ),
)
# The only rule about a folder without videos: no other rule applies there.
NO_VIDEOS: Rule[Videos] = Rule("no_videos", "stop", "put videos into data/<class>/", _some_videos)
CLASS_RULES: tuple[Rule[Classes], ...] = (
    Rule(
        "too_few_classes",
        "stop",
        "add videos of another class, or fix those that were rejected",
        _enough_classes,
    ),
    Rule(
        "class_too_rare",
        "stop",
        "add videos of that class, take it out of `classes`, or lower validate.min_videos_per_class",
        _enough_videos_a_class,
    ),
    Rule(
        "too_many_rejected", "stop", "fix or remove the rejected videos, or raise validate.max_rejected", _few_rejected
    ),
    Rule(
        "balance_shifted",
        "warn",
        "look at what was added or removed; raise validate.max_balance_shift if it is meant",
        _steady_balance,
    ),
)
# Judged elsewhere: when splits are assigned, and when the ledger is compared with the recorded one.
SPLIT_CONFLICT: Rule[Videos] = Rule(
    "split_conflict",
    "quarantine",
    "it ties a train to a test video (same group, near-duplicate): leave it out or fix its group",
)
SPLITS_LOST: Rule[Classes] = Rule("splits_lost", "stop", f"{ledger.RESTORE}; {ledger.ANEW}")

ALL: tuple[Rule[Any], ...] = (*VIDEO_RULES, NO_VIDEOS, *CLASS_RULES, SPLIT_CONFLICT, SPLITS_LOST)
# Rule → the fix that is printed with it.
FIXES: dict[str, str] = {rule.name: rule.fix for rule in ALL}
# The rules that leave a video out → their fix; the README lists them.
REJECTING: dict[str, str] = {rule.name: rule.fix for rule in ALL if rule.severity == "quarantine"}


def counted(number: int, noun: str) -> str:
    """`1 video`, `2,000 videos`."""
    return f"{number:,} {noun}" + ("" if number == 1 else "s")


def _some(names: list[str]) -> str:
    return ", ".join(names[:8]) + (", …" if len(names) > 8 else "")
