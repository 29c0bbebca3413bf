"""Which video is for training, which for validation, which for the test: an append-only ledger, `splits.csv`.

A video never changes its split as data grows; otherwise tomorrow's test set holds what today's champion learned. Videos
that belong together are assigned together: a *unit* is a connected component of videos of one group (person, camera,
source), near-duplicates and equal bytes. New units go where their classes are missing most; a new video that ties two
splits together is quarantined as `split_conflict`.

The ledger is a CSV of `sha256,split,group`, oldest row first. It is replaced as a whole (written beside, synced,
renamed), so a crash leaves the old file or the new one, never half a line.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pandas as pd

from sora.config import Settings
from sora.core.errors import InputError, ServiceError
from sora.core.files import atomic
from sora.core.ledger import COLUMNS
from sora.core.records import SPLITS, Rejection
from sora.dataset import balance, similar
from sora.dataset import ledger as ledgers
from sora.dataset.quality.rules import SPLIT_CONFLICT
from sora.dataset.similar import near_duplicates
from sora.tasks import Task

__all__ = ["COLUMNS", "Assignment", "append", "assign", "digest", "near_duplicates", "read", "units"]

_TRAIN, _VAL, _TEST = (SPLITS.index(name) for name in ("train", "val", "test"))


@dataclass(frozen=True)
class Assignment:
    """What `assign` decided. `ledger` has the old rows first and unchanged, then `added` new ones."""

    ledger: pd.DataFrame
    added: int
    rejections: list[Rejection] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def read(path: Path) -> pd.DataFrame:
    """The ledger, columns `sha256, split, group` (all text, "" for no group); empty if there is no file.

    Raises:
        InputError: the file is not a ledger, ends in the middle of a line, or gives a video two splits.
    """
    rows = [(row.sha256, row.split, row.group) for row in ledgers.read(path)]
    return pd.DataFrame({name: pd.Series([row[i] for row in rows], dtype=str) for i, name in enumerate(COLUMNS)})


def append(path: Path, assignment: Assignment) -> None:
    """Writes `assignment.ledger` to `path`: all of it or, after a crash or on a full disk, nothing new.

    Raises:
        InputError: the file is damaged (see `read`).
        ServiceError: it changed since `assign` read it, or can't be written; the old ledger remains.
        DiskFull: no space; the old ledger remains.
    """
    if not assignment.added:
        return
    old = assignment.ledger.iloc[: len(assignment.ledger) - assignment.added]
    now = read(path)
    if len(now) != len(old) or not (now.to_numpy() == old.to_numpy()).all():
        raise ServiceError(f"{path} changed while splits were assigned", fix="run the same command again")
    with atomic(path) as file:
        assignment.ledger.to_csv(file, index=False, columns=list(COLUMNS), lineterminator="\n")


def digest(ledger: pd.DataFrame, sha256s: list[str]) -> str:
    """One hash of the splits of these videos, whatever else the ledger holds and in whatever order.

    Raises:
        InputError: a video is not in the ledger.
    """
    split = dict(zip(ledger["sha256"], ledger["split"], strict=True))
    missing = sorted(set(sha256s) - split.keys())
    if missing:
        raise InputError(f"{len(missing)} videos have no split yet: {missing[0][:12]}…", fix="run `sora run`")
    lines = "".join(f"{sha},{split[sha]}\n" for sha in sorted(set(sha256s)))
    return hashlib.sha256(lines.encode()).hexdigest()


def assign(accepted: pd.DataFrame, ledger: pd.DataFrame, settings: Settings) -> Assignment:
    """Splits for the accepted videos that the ledger does not hold yet.

    The result depends on the set of videos, the ledger and the settings, not on the order of the rows. Each class gets
    a unit in train, then in test, then in val, before the shares are filled up; the larger units are placed first.
    A video of several labels counts for each of them (as in Sechidis et al. 2011): combinations are not balanced.

    Args:
        accepted: rows of the manifest (`path, sha256, label, group, signature` are read).
        ledger: as `read` returns it.
    """
    if accepted["sha256"].isin(ledger["sha256"]).all():
        return Assignment(ledger=ledger[list(COLUMNS)], added=0)
    order = np.argsort(accepted["sha256"].to_numpy(dtype="S64"), kind="stable")
    if accepted["sha256"].duplicated().any():  # only with the duplicate rules off
        order = np.lexsort((accepted["path"], accepted["sha256"]))
    videos = accepted.iloc[order].reset_index(drop=True)
    bits = settings.validate_.unit_bits
    bound = _bind(videos, ledger)
    untangled = _untangle(videos, bound, units(videos, bits), bits)
    unit, kept = untangled.unit, np.ones(len(videos), bool)
    kept[list(untangled.reasons)] = False
    split = _place(videos, unit, untangled.split, kept, settings)
    new = np.flatnonzero((bound.own < 0) & kept)
    new = new[~videos["sha256"].iloc[new].duplicated().to_numpy()]
    rows = pd.DataFrame(
        {
            "sha256": videos["sha256"].iloc[new].to_numpy(),
            "split": [SPLITS[code] for code in split[new]],
            "group": videos["group"].fillna("").iloc[new].to_numpy(),
        },
        columns=list(COLUMNS),
        dtype=str,
    )
    rejections = [
        Rejection(str(videos.at[i, "path"]), SPLIT_CONFLICT.name, why, str(videos.at[i, "sha256"]))
        for i, why in untangled.reasons.items()
    ]
    return Assignment(
        ledger=pd.concat([ledger[list(COLUMNS)], rows], ignore_index=True),
        added=len(rows),
        rejections=sorted(rejections, key=lambda rejection: rejection.path),
        notes=_notes(videos[kept], unit[kept], split[kept], bound, settings.task) if len(rows) else [],
    )


def units(videos: pd.DataFrame, bits: int | None) -> np.ndarray:
    """The unit number of each video, `(videos,) int64`: a unit must not be divided.

    Args:
        videos: rows of the manifest (`sha256, group, signature` are read).
        bits: videos whose signatures differ in at most this many bits belong together; None: signatures are ignored.
    """
    names = videos["group"].fillna("")
    pairs = np.empty((0, 2), np.int64) if bits is None else near_duplicates(videos, bits)
    group, content = pd.factorize(names.where(names != ""))[0], pd.factorize(videos["sha256"])[0]
    return _components(len(videos), pairs, group, content)


@dataclass(frozen=True)
class _Bindings:
    """What the ledger says about the given videos, one number per video, `(videos,)`; -1 is "nothing"."""

    own: np.ndarray  # the video's own split in the ledger
    group: np.ndarray  # code of its group
    content: np.ndarray  # code of its bytes
    split: np.ndarray  # its own split, or else that of its group
    torn: np.ndarray  # bool: its group is already in two splits
    torn_groups: list[str]  # names of those groups


def _bind(videos: pd.DataFrame, ledger: pd.DataFrame) -> _Bindings:
    code = {name: number for number, name in enumerate(SPLITS)}
    own = videos["sha256"].map(dict(zip(ledger["sha256"], ledger["split"].map(code), strict=True)))
    own = own.fillna(-1).to_numpy(np.int64)
    names = videos["group"].fillna("")
    group, known = pd.factorize(names.where(names != ""))
    # A group is where the ledger put any member, including removed ones, and where known members are now.
    placed = np.zeros((len(known), len(SPLITS)), bool)
    recorded = pd.Index(known).get_indexer(ledger["group"]) if len(known) else np.full(len(ledger), -1)
    recorded_split = ledger["split"].map(code).to_numpy(np.int64)
    placed[recorded[recorded >= 0], recorded_split[recorded >= 0]] = True
    both = (group >= 0) & (own >= 0)
    placed[group[both], own[both]] = True
    sides = placed.sum(axis=1)
    grouped = np.where(sides == 1, placed.argmax(axis=1), -1) if len(known) else np.empty(0, np.int64)
    of_group = np.where(group >= 0, grouped[group] if len(known) else -1, -1)
    return _Bindings(
        own=own,
        group=group,
        content=pd.factorize(videos["sha256"])[0],
        split=np.where(own >= 0, own, of_group),
        torn=(group >= 0) & (sides[group] > 1) if len(known) else np.zeros(len(videos), bool),
        torn_groups=sorted(str(name) for name in known[sides > 1]),
    )


def _components(count: int, pairs: np.ndarray, *codes: np.ndarray) -> np.ndarray:
    """The component number of each video: joined by `pairs` and by equal, non-negative codes."""
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    links = [pairs]
    for code in codes:
        member = np.flatnonzero(code >= 0)
        member = member[np.argsort(code[member], kind="stable")]
        same = code[member[1:]] == code[member[:-1]]
        links.append(np.stack([member[:-1][same], member[1:][same]], axis=1))
    edges = np.concatenate(links).astype(np.int64)
    if not count:
        return np.empty(0, np.int64)
    graph = coo_array((np.ones(len(edges), bool), (edges[:, 0], edges[:, 1])), shape=(count, count))
    numbers: np.ndarray = connected_components(graph, directed=False)[1].astype(np.int64)
    return numbers


@dataclass(frozen=True)
class _Untangled:
    """Units with at most one split each: `unit` and `split` of each video, `(videos,) int64`.

    `reasons` holds the new videos to reject, by number, each with what it ties together.
    """

    unit: np.ndarray
    split: np.ndarray
    reasons: dict[int, str]


def _untangle(videos: pd.DataFrame, bound: _Bindings, unit: np.ndarray, bits: int | None) -> _Untangled:
    """Takes apart units that touch two splits.

    Old videos stay where they are, whatever connects them. The new ones of such a unit are added to them one by one, in
    the order of their hashes; one that would join two parts in different splits is rejected, the others
    stay.
    """
    placed = np.flatnonzero(bound.split >= 0)
    first = np.full(unit.max(initial=-1) + 1, -1)
    first[unit[placed]] = bound.split[placed]
    mixed = np.zeros(len(first), bool)
    mixed[unit[placed[bound.split[placed] != first[unit[placed]]]]] = True
    mixed[unit[bound.torn]] = True
    members = np.flatnonzero(mixed[unit])
    if not len(members):
        return _Untangled(unit, bound.split, {})
    words, textured = similar.words(videos["signature"].iloc[members])
    label = len(first) + np.arange(len(members))  # the part that a member belongs to
    side = bound.split[members]
    side[bound.own[members] < 0] = -1
    present = bound.own[members] >= 0
    of_group: dict[int, int] = {}  # new videos of one group hold together: the first of them
    reasons: dict[int, str] = {}
    for at in np.flatnonzero(~present).tolist():
        i, group = int(members[at]), int(bound.group[members[at]])
        if bound.torn[i]:
            reasons[i] = f"its group {videos.at[i, 'group']!r} is already in more than one split"
            continue
        tied = present & (bound.content[members] == bound.content[i])
        if bits is not None and textured[at]:
            tied |= present & textured & (similar.distance(words, words[at]) <= bits)
        if group in of_group:
            tied |= label == label[of_group[group]]
        ties = {
            int(side[other]): f"it is a near-duplicate of {videos.at[int(members[other]), 'path']} in {{}}"
            for other in np.flatnonzero(tied & (side >= 0))[::-1]
        }
        if bound.split[i] >= 0:
            ties[int(bound.split[i])] = f"its group {videos.at[i, 'group']!r} is in {{}}"
        if len(ties) > 1:
            reasons[i] = " and ".join(text.format(SPLITS[code]) for code, text in sorted(ties.items()))
            continue
        joined = np.isin(label, label[tied])
        joined[at] = present[at] = True
        label[joined] = label[at]
        side[joined] = next(iter(ties), -1)
        if group >= 0:
            of_group.setdefault(group, at)
    parts, split = unit.copy(), bound.split.copy()
    parts[members] = label
    split[members] = side
    return _Untangled(parts, split, reasons)


def _place(
    videos: pd.DataFrame, unit: np.ndarray, bound: np.ndarray, keep: np.ndarray, settings: Settings
) -> np.ndarray:
    """The split number of each video, that of its unit, `(videos,) int64`; -1 for those not kept."""
    kept = np.flatnonzero(keep)
    chosen = np.full(len(videos), -1)
    if not len(kept):
        return chosen
    # Units are renumbered in the order in which they are placed: larger first, equal ones by a hash with the seed.
    number, index, size = np.unique(unit[kept], return_index=True, return_counts=True)
    first = videos["sha256"].to_numpy()[kept][index]  # rows are sorted by hash: the unit's smallest
    shuffled = [hashlib.blake2b(f"{settings.split.seed}:{sha}".encode(), digest_size=8).digest() for sha in first]
    order = sorted(range(len(number)), key=lambda u: (-size[u], shuffled[u]))
    rank = np.empty(len(number), np.int64)
    rank[order] = np.arange(len(number))
    member_unit = rank[np.searchsorted(number, unit[kept])]
    single = settings.task.single(videos["label"].iloc[kept].reset_index(drop=True))
    label, classes = pd.factorize(single, sort=True)

    key, count = np.unique(member_unit[single.index] * len(classes) + label, return_counts=True)
    content: list[list[tuple[int, int]]] = [[] for _ in number]  # unit → [(class, videos)]
    for k, n in zip(key.tolist(), count.tolist(), strict=True):
        content[k // len(classes)].append((k % len(classes), n))

    shares = [0.0] * len(SPLITS)
    shares[_VAL], shares[_TEST] = settings.split.val, settings.split.test
    shares[_TRAIN] = 1 - settings.split.val - settings.split.test
    total = np.bincount(label, minlength=len(classes))
    dealing = _Dealing(content, wanted=[[share * n for n in total.tolist()] for share in shares])
    standing = np.full(len(number), -1)
    old = bound[kept] >= 0
    standing[member_unit[old]] = bound[kept][old]
    for u in np.flatnonzero(standing >= 0).tolist():
        dealing.put(u, int(standing[u]))
    dealing.cover()
    dealing.fill()
    chosen[kept] = np.array(dealing.place)[member_unit]
    return chosen


class _Dealing:
    """Units on their way into splits.

    `content` has (class, videos) pairs of each unit, in the order of placing; `wanted` has the videos of each
    class that each split should have. `place` is the split of each unit, -1 while it has none.
    """

    def __init__(self, content: list[list[tuple[int, int]]], wanted: list[list[float]]) -> None:
        self.place = [-1] * len(content)
        self._content = content
        self._wanted = wanted
        self._have = [[0] * len(wanted[0]) for _ in SPLITS]

    def put(self, u: int, split: int) -> None:
        self.place[u] = split
        for c, n in self._content[u]:
            self._have[split][c] += n

    def cover(self) -> None:
        """Gives each class a unit in train, then test, then val, as far as its units go; classes with fewest first."""
        units: list[list[int]] = [[] for _ in self._wanted[0]]
        for u, parts in enumerate(self._content):
            for c, _ in parts:
                units[c].append(u)
        scarce = sorted(range(len(units)), key=lambda c: (len(units[c]), c))
        for step, split in enumerate((_TRAIN, _TEST, _VAL)):
            for c in scarce:
                if self._have[split][c] or len(units[c]) <= step:
                    continue
                free = [u for u in units[c] if self.place[u] < 0]
                if free:
                    self.put(min(free, key=lambda u: self._gain(u, split)), split)

    def fill(self) -> None:
        """Puts each remaining unit where the distance to the wanted counts falls most."""
        for u in [u for u, split in enumerate(self.place) if split < 0]:
            self.put(u, min((_TRAIN, _TEST, _VAL), key=[self._cost(u, s) for s in range(len(SPLITS))].__getitem__))

    def _gain(self, u: int, split: int) -> tuple[int, int, int]:
        """Sorts units for `cover`: most missing classes first, then the largest for train and else the smallest."""
        missing = sum(1 for c, _ in self._content[u] if not self._have[split][c])
        size = sum(n for _, n in self._content[u])
        return (-missing, -size if split == _TRAIN else size, u)

    def _cost(self, u: int, split: int) -> float:
        wanted, have = self._wanted[split], self._have[split]
        return sum(balance.change(n, wanted[c], have[c]) for c, n in self._content[u])


def _notes(videos: pd.DataFrame, unit: np.ndarray, split: np.ndarray, bound: _Bindings, task: Task) -> list[str]:
    notes = []
    if (bound.group < 0).all():
        notes.append(
            "no groups are known (no `group` column in labels.csv, no split.group_pattern): videos of one person or "
            "camera may be on both sides, and then test figures flatter"
        )
    if bound.torn_groups:
        shown = ", ".join(bound.torn_groups[:3])
        notes.append(f"{len(bound.torn_groups)} groups are already in more than one split ({shown}); none is moved")
    single = task.single(videos["label"].reset_index(drop=True))
    kept = pd.DataFrame({"label": single.to_numpy(), "unit": unit[single.index], "split": split[single.index]})
    for label, rows in kept.groupby("label", sort=True):
        lacking = [name for code, name in enumerate(SPLITS) if not (rows["split"] == code).any()]
        if lacking:
            count = rows["unit"].nunique()
            notes.append(
                f"class {label} has no video in {' and '.join(lacking)}: its {len(rows)} videos make only "
                f"{count} independent {'unit' if count == 1 else 'units'}"
            )
    return notes
