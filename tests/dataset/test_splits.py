"""Splits: groups stay together, nothing ever moves, and the ledger survives crashes."""

from __future__ import annotations

import hashlib
import random
import resource
import signal
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sora.config import Settings
from sora.core.errors import InputError, ServiceError
from sora.core.records import VideoRecord
from sora.dataset import similar, splits
from tests.dataset.rows import manifest, row

SETTINGS = Settings()
EMPTY = splits.read(Path("/nonexistent/splits.csv"))


def where(assignment: splits.Assignment) -> dict[str, str]:
    return dict(zip(assignment.ledger["sha256"], assignment.ledger["split"], strict=True))


def counts(assignment: splits.Assignment) -> dict[str, int]:
    found: dict[str, int] = assignment.ledger["split"].value_counts().to_dict()
    return found


def flipped(signature: str, *bits: int) -> str:
    value = int(signature, 16)
    for bit in bits:
        value ^= 1 << bit
    return f"{value:048x}"


# ---------------------------------------------------------------------------------------------------- assignment


def test_shares_are_met_and_classes_balanced() -> None:
    table = manifest(row(f"{label}/{i}.mp4") for label in "ab" for i in range(100))
    result = splits.assign(table, EMPTY, SETTINGS)
    assert result.added == 200
    split = table["sha256"].map(where(result))
    assert pd.crosstab(table["label"], split).to_dict() == {
        "train": {"a": 70, "b": 70},
        "val": {"a": 15, "b": 15},
        "test": {"a": 15, "b": 15},
    }


def test_three_single_videos_a_class_make_one_for_each_split() -> None:  # kth9: nine clips of nine persons
    table = manifest(row(f"{label}/{i}.mp4", group=f"{label}{i}") for label in "abc" for i in range(3))
    split = table["sha256"].map(where(splits.assign(table, EMPTY, SETTINGS)))
    assert (pd.crosstab(table["label"], split) == 1).all(axis=None)


def test_three_persons_make_one_for_each_split() -> None:  # steps27: each person shows every action
    table = manifest(
        row(f"{label}/{person}{trial}.avi", group=person)
        for label in "abc" for person in ("P1", "P2", "P3") for trial in range(3)
    )  # fmt: skip
    split = table["sha256"].map(where(splits.assign(table, EMPTY, SETTINGS)))
    by_person = split.groupby(table["group"]).unique()
    assert sorted(name for names in by_person for name in names) == ["test", "train", "val"]


def test_two_units_serve_train_and_test_and_one_serves_train() -> None:
    table = manifest([row("a/1.mp4"), row("a/2.mp4"), row("b/1.mp4")])
    result = splits.assign(table, EMPTY, SETTINGS)
    split = dict(zip(table["path"], table["sha256"].map(where(result)), strict=True))
    assert sorted([split["a/1.mp4"], split["a/2.mp4"]]) == ["test", "train"]
    assert split["b/1.mp4"] == "train"
    assert any("class b has no video in val and test" in note for note in result.notes)


def test_a_large_group_does_not_fill_the_test_split() -> None:
    sizes = {"big": 100, "large": 90, **{f"g{i}": 10 for i in range(11)}}
    table = manifest(row(f"a/{g}_{i}.mp4", group=g) for g, n in sizes.items() for i in range(n))
    found = counts(splits.assign(table, EMPTY, SETTINGS))
    assert found["train"] == 190 + 20 or abs(found["train"] - 210) <= 10
    assert 30 <= found["test"] <= 60 and 30 <= found["val"] <= 60


def test_order_of_rows_does_not_matter_and_the_seed_does() -> None:
    table = manifest(row(f"{label}/{i}.mp4", group=f"g{i % 9}") for label in "ab" for i in range(30))
    shuffled = table.sample(frac=1, random_state=3).reset_index(drop=True)
    first, second = splits.assign(table, EMPTY, SETTINGS), splits.assign(shuffled, EMPTY, SETTINGS)
    pd.testing.assert_frame_equal(first.ledger, second.ledger)
    other = splits.assign(table, EMPTY, Settings.model_validate({"split": {"seed": 1}}))
    assert where(other) != where(first)


def test_nothing_known_of_groups_is_said_once() -> None:
    table = manifest(row(f"a/{i}.mp4") for i in range(20))
    first = splits.assign(table, EMPTY, SETTINGS)
    assert sum("no groups are known" in note for note in first.notes) == 1
    again = splits.assign(table, first.ledger, SETTINGS)
    assert (again.added, again.notes) == (0, [])
    grouped = splits.assign(manifest(row(f"a/{i}.mp4", group=f"g{i}") for i in range(20)), EMPTY, SETTINGS)
    assert not grouped.notes


def test_nothing_accepted_gives_nothing() -> None:
    result = splits.assign(manifest([]), EMPTY, SETTINGS)
    assert (len(result.ledger), result.added, result.rejections) == (0, 0, [])


def test_near_duplicates_share_a_split_also_across_groups() -> None:
    rows = []
    for i in range(40):
        first = row(f"a/{i}.mp4", group=f"g{i}")
        rows += [first, row(f"a/{i}_again.mp4", group=f"h{i}", signature=flipped(first.signature, 3, 90, 191))]
    table = manifest(rows)
    split = where(splits.assign(table, EMPTY, SETTINGS))
    for i in range(40):
        pair = table[table["path"].isin([f"a/{i}.mp4", f"a/{i}_again.mp4"])]
        assert pair["sha256"].map(split).nunique() == 1
    off = Settings.model_validate({"validate": {"duplicates": False}})
    apart = where(splits.assign(table, EMPTY, off))
    assert any(table[table["path"].str.startswith(f"a/{i}")]["sha256"].map(apart).nunique() > 1 for i in range(40))


# ------------------------------------------------------------------------------------------------ as data grows


def test_a_group_stays_where_it_was_also_when_its_old_videos_are_gone() -> None:
    old = manifest(row(f"a/{i}.mp4", group=f"g{i}") for i in range(12))
    first = splits.assign(old, EMPTY, SETTINGS)
    new = manifest(row(f"a/new{i}.mp4", group=f"g{i}") for i in range(12))
    second = splits.assign(new, first.ledger, SETTINGS)
    side = dict(zip(old["group"], old["sha256"].map(where(first)), strict=True))
    assert dict(zip(new["group"], new["sha256"].map(where(second)), strict=True)) == side


def two_sides() -> tuple[pd.DataFrame, pd.DataFrame]:
    """Two old videos, x in train and y in test."""
    table = manifest([row("a/x.mp4", group="gx"), row("a/y.mp4", group="gy")])
    ledger = pd.DataFrame({"sha256": table["sha256"], "split": ["train", "test"], "group": ["gx", "gy"]})
    return table, ledger


def test_a_new_video_that_ties_two_splits_together_is_rejected_alone() -> None:
    old, ledger = two_sides()
    bridge = row("a/bridge.mp4", group="gy", signature=flipped(old.at[0, "signature"], 1, 2))
    innocent = row("a/innocent.mp4", group="gx")
    table = pd.concat([old, manifest([bridge, innocent])], ignore_index=True)
    result = splits.assign(table, ledger, SETTINGS)
    assert [(r.path, r.rule, r.sha256) for r in result.rejections] == [
        ("a/bridge.mp4", "split_conflict", bridge.sha256)
    ]
    assert "near-duplicate of a/x.mp4 in train" in result.rejections[0].detail
    assert "group 'gy' is in test" in result.rejections[0].detail
    assert where(result)[innocent.sha256] == "train"
    assert bridge.sha256 not in where(result)
    pd.testing.assert_frame_equal(result.ledger.iloc[:2], ledger)


def test_of_a_chain_between_two_splits_only_one_link_is_rejected() -> None:
    old, ledger = two_sides()
    target = old.at[1, "signature"]
    start = old.at[0, "signature"]
    # 5 steps of at most 9 bits lead from x towards y, and the last is near y.
    differing = [bit for bit in range(192) if (int(start, 16) ^ int(target, 16)) >> bit & 1]
    chain, current = [], start
    while differing:
        current = flipped(current, *differing[:9])
        differing = differing[9:]
        chain.append(current)
    table = manifest(row(f"a/link{i:02d}.mp4", group=f"l{i}", signature=s) for i, s in enumerate(chain[:-1]))
    table = pd.concat([old, table], ignore_index=True)
    result = splits.assign(table, ledger, SETTINGS)
    assert len(result.rejections) == 1
    split = where(result)
    for left, right in similar.near_duplicates(table, 10):
        sides = {split.get(table.at[i, "sha256"]) for i in (left, right)} - {None}
        assert len(sides) == 1


def test_a_group_made_known_too_late_keeps_its_old_videos_and_takes_no_new_ones() -> None:
    old, ledger = two_sides()
    ledger["group"] = ""
    old["group"] = "g"
    new = row("a/new.mp4", group="g")
    result = splits.assign(pd.concat([old, manifest([new])], ignore_index=True), ledger, SETTINGS)
    assert [r.path for r in result.rejections] == ["a/new.mp4"]
    assert "more than one split" in result.rejections[0].detail


def test_old_near_duplicates_on_two_sides_are_left_alone() -> None:
    old, ledger = two_sides()
    old.loc[1, "signature"] = flipped(old.at[0, "signature"], 7)
    fresh = row("a/fresh.mp4", group="gz")
    result = splits.assign(pd.concat([old, manifest([fresh])], ignore_index=True), ledger, SETTINGS)
    assert not result.rejections and result.added == 1
    near_both = row("a/both.mp4", group="gz", signature=flipped(old.at[0, "signature"], 8))
    result = splits.assign(pd.concat([old, manifest([near_both])], ignore_index=True), ledger, SETTINGS)
    assert [r.path for r in result.rejections] == ["a/both.mp4"]


@st.composite
def growing(draw: st.DrawFn) -> list[pd.DataFrame]:
    """A folder of videos on several nights: some come, some go; groups and near-duplicates at random."""
    rng = random.Random(draw(st.integers(0, 2**32)))
    total = draw(st.integers(1, 40))
    rows: list[VideoRecord] = []
    for i in range(total):
        signature = None
        if rows and rng.random() < 0.3:
            signature = flipped(rng.choice(rows).signature, *rng.sample(range(192), rng.randint(0, 10)))
        group = rng.choice([None, *(f"g{k}" for k in range(8))])
        rows.append(row(f"{rng.choice('abc')}/{i}.mp4", group=group, signature=signature))
    nights = sorted(rng.sample(range(1, total + 1), min(total, draw(st.integers(1, 4)))))
    result = []
    for night in nights:
        present = [r for r in rows[:night] if rng.random() < 0.9]
        rng.shuffle(present)
        result.append(manifest(present))
    return result


@settings(max_examples=100, deadline=None)
@given(growing())
def test_no_group_on_two_sides_and_no_video_ever_moves(nights: list[pd.DataFrame]) -> None:
    ledger = EMPTY
    seen: dict[str, str] = {}
    for table in nights:
        result = splits.assign(table, ledger, SETTINGS)
        pd.testing.assert_frame_equal(result.ledger.iloc[: len(ledger)].reset_index(drop=True), ledger)
        split = where(result)
        assert all(split[sha] == side for sha, side in seen.items())
        refused = {r.sha256 for r in result.rejections}
        assert not refused & split.keys() and refused | split.keys() >= set(table["sha256"])
        named = result.ledger[result.ledger["group"] != ""]
        assert (named.groupby("group")["split"].nunique() <= 1).all()
        # All near-duplicates, compared one by one: a pair of which one is new never lies on two sides. (Two old ones
        # can: one was gone when the other came.)
        known = set(ledger["sha256"])
        words, _ = similar.words(table["signature"])
        for i in range(len(table)):
            for j in np.flatnonzero(similar.distance(words, words[i]) <= 10):
                left, right = table.at[i, "sha256"], table.at[int(j), "sha256"]
                if {left, right} <= split.keys() and not {left, right} <= known:
                    assert split[left] == split[right]
        ledger, seen = result.ledger, split


# ------------------------------------------------------------------------------------------------ near-duplicates


@pytest.mark.parametrize("count", [300, 6000])  # compared one by one, and by bands
def test_near_duplicates_connect_what_is_near(count: int) -> None:
    rng = np.random.default_rng(count)
    words = rng.integers(0, 2**64, (count, 3), dtype=np.uint64)
    words[:, 0] &= np.uint64(0xFFFF)  # black bars: 48 bits say nothing
    planted = count // 10
    words[-planted:] = words[:planted]
    for _ in range(10):
        bit = rng.integers(0, 192, planted)
        words[np.arange(count - planted, count), bit // 64] ^= np.uint64(1) << (bit % 64).astype(np.uint64)
    table = pd.DataFrame({"signature": [f"{a:016x}{b:016x}{c:016x}" for a, b, c in words.tolist()]})
    pairs = similar.near_duplicates(table, 10)
    assert {tuple(pair) for pair in pairs.tolist()} >= {(i, count - planted + i) for i in range(planted)}
    assert len(pairs) == planted and (pairs[:, 0] < pairs[:, 1]).all()


def test_thousands_of_like_signatures_are_chained_not_paired() -> None:
    rng = np.random.default_rng(0)
    base = row("a/1.mp4").signature
    near = [flipped(base, *rng.choice(192, 4, replace=False).tolist()) for _ in range(4000)]
    table = pd.DataFrame({"signature": [base] * 4000 + near + [""] * 50})
    pairs = similar.near_duplicates(table, 10)
    assert len(pairs) == 7999  # a spanning tree
    assert pairs.max() < 8000  # no texture, no likeness


def test_zero_bits_means_equal_signatures_only() -> None:
    base = row("a/1.mp4").signature
    table = pd.DataFrame({"signature": [base, flipped(base, 5), base, "", ""]})
    assert similar.near_duplicates(table, 0).tolist() == [[0, 2]]


# ---------------------------------------------------------------------------------------------------- the ledger


@pytest.fixture
def ledger_file(tmp_path: Path) -> Path:
    path = tmp_path / "splits.csv"
    table = manifest(row(f"a/{i}.mp4", group="" if i % 2 else f'p,"{i}" ü') for i in range(10))
    splits.append(path, splits.assign(table, splits.read(path), SETTINGS))
    return path


def test_append_keeps_every_byte_of_the_old_rows(ledger_file: Path) -> None:
    before = ledger_file.read_bytes()
    assert before.startswith(b"sha256,split,group\n")
    more = splits.assign(manifest(row(f"a/more{i}.mp4") for i in range(5)), splits.read(ledger_file), SETTINGS)
    splits.append(ledger_file, more)
    assert ledger_file.read_bytes().startswith(before)
    pd.testing.assert_frame_equal(splits.read(ledger_file), more.ledger)
    assert [p.name for p in ledger_file.parent.iterdir()] == ["splits.csv"]


def test_nothing_new_writes_nothing(tmp_path: Path) -> None:
    path = tmp_path / "splits.csv"
    splits.append(path, splits.assign(manifest([]), splits.read(path), SETTINGS))
    assert not path.exists()


def test_a_torn_last_line_is_noticed(ledger_file: Path) -> None:
    whole = ledger_file.read_bytes()
    for cut in (1, 2, 30):
        ledger_file.write_bytes(whole[:-cut])
        with pytest.raises(InputError, match="line 11 is torn") as caught:
            splits.read(ledger_file)
        assert "git checkout" in caught.value.fix


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "first line"),
        ("sha,split\n", "first line"),
        ("sha256,split,group\nabc,train,\n", "row 2"),
        (f"sha256,split,group\n{'a' * 64},training,\n", "row 2"),
        (f"sha256,split,group\n{'a' * 64},train\n", "row 2"),
        (f"sha256,split,group\n{'a' * 64},train,\n{'a' * 64},test,\n", "row 3"),
        (f"sha256,split,group\n<<<<<<< HEAD\n{'a' * 64},train,\n", "row 2"),
        (f'sha256,split,group\n{"a" * 64},train,"open\n', "not CSV"),
    ],
)
def test_a_damaged_ledger_is_refused(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "splits.csv"
    path.write_text(text)
    with pytest.raises(InputError, match=message):
        splits.read(path)


def test_a_ledger_that_changed_meanwhile_is_not_overwritten(ledger_file: Path) -> None:
    stale = splits.read(ledger_file)
    first = splits.assign(manifest([row("a/x.mp4")]), stale, SETTINGS)
    second = splits.assign(manifest([row("a/y.mp4")]), stale, SETTINGS)
    splits.append(ledger_file, first)
    with pytest.raises(ServiceError, match="changed while"):
        splits.append(ledger_file, second)
    pd.testing.assert_frame_equal(splits.read(ledger_file), first.ledger)


def test_a_failing_disk_leaves_the_old_ledger(ledger_file: Path) -> None:
    before = ledger_file.read_bytes()
    more = splits.assign(manifest(row(f"a/m{i}.mp4") for i in range(200)), splits.read(ledger_file), SETTINGS)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))  # writing beyond it fails as on a full disk
    try:
        with pytest.raises(ServiceError, match="can't write"):
            splits.append(ledger_file, more)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, handler)
    assert ledger_file.read_bytes() == before
    assert [p.name for p in ledger_file.parent.iterdir()] == ["splits.csv"]


def test_digest_tells_splits_apart_and_ignores_the_rest() -> None:
    a, b, c = (hashlib.sha256(x).hexdigest() for x in (b"a", b"b", b"c"))
    ledger = pd.DataFrame({"sha256": [a, b, c], "split": ["train", "test", "val"], "group": [""] * 3})
    assert splits.digest(ledger, [a, b]) == splits.digest(ledger.iloc[[1, 0]], [b, a, a])
    assert splits.digest(ledger, [a, b]) != splits.digest(ledger, [a, c])
    assert splits.digest(ledger.assign(split=["val", "test", "val"]), [a, b]) != splits.digest(ledger, [a, b])
    with pytest.raises(InputError, match="1 videos have no split"):
        splits.digest(ledger, ["f" * 64])
