from __future__ import annotations

import hashlib
import json
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from sora.config import Settings
from sora.core.errors import DiskFull, InputError, ServiceError
from sora.core.records import ClipSpec
from sora.core.tensors import TensorSpec
from sora.dataset import manifest
from sora.media import MODALITY
from sora.media.video.transform import prepare_clips
from sora.store import building, shards
from sora.store.building import BuildStats
from sora.store.shards import INDEX, Layout, ShardSet, digest_of, write_index
from tests.videos import make_folder, make_video

SPEC = ClipSpec(frames=4, height=32, width=32, sampling="window", window_seconds=1.0, max_clips=3)


def build(
    table: pd.DataFrame,
    data: Path,
    out: Path,
    spec: ClipSpec = SPEC,
    *,
    rejected: Iterable[str] = (),
    buckets: int = 4,
    **options: Any,
) -> BuildStats:
    return building.build(table, set(rejected), data, out, spec, buckets=buckets, **{"workers": 1, **options})


def tree(folder: Path) -> dict[str, str]:
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in sorted(folder.iterdir())}


def bucket_of(sha256: str, buckets: int = 4) -> int:
    return int(sha256[:8], 16) * buckets >> 32


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = make_folder(tmp_path_factory.mktemp("shards") / "data", groups=4, frames=24, fps=12)
    make_video(folder / "wave" / "longer.mp4", frames=50, fps=12, seed=50)
    return folder


@pytest.fixture(scope="module")
def table(data: Path) -> pd.DataFrame:
    return manifest.build(data, Settings(), workers=1)


@pytest.fixture(scope="module")
def whole(data: Path, table: pd.DataFrame, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An uninterrupted build. Read only."""
    out = tmp_path_factory.mktemp("whole") / "shards"
    assert build(table, data, out) == BuildStats(9, 0, len(set(map(bucket_of, table["sha256"]))), 0)
    return out


def test_clips_are_those_of_the_videos(data: Path, table: pd.DataFrame, whole: Path) -> None:
    found = ShardSet.open(whole)
    assert found.spec == SPEC
    paths = table.set_index("sha256")["path"]
    for sha256, rows in found.index.groupby("sha256").indices.items():
        assert np.array_equal(found.read("video", rows), prepare_clips(data / paths[sha256], SPEC))
    assert len(found) == 8 * 2 + 3


def test_the_index_tells_what_lies_where(table: pd.DataFrame, whole: Path) -> None:
    index = ShardSet.open(whole).index
    assert list(index.columns) == ["sha256", "clip", "bucket", "row", "first", "last", "digest"]
    assert index.equals(index.sort_values(["sha256", "clip"], ignore_index=True))
    assert (index["bucket"] == index["sha256"].map(bucket_of)).all()
    assert set(index["sha256"]) == set(table["sha256"])
    # By its path: the encoder's bytes, and with them the order of the digests, differ between processors.
    [longer] = table.loc[table["path"] == "wave/longer.mp4", "sha256"]
    for sha256, clips in index.groupby("sha256"):
        spans = [(1, 10), (20, 29), (39, 48)] if sha256 == longer else [(1, 10), (13, 22)]
        assert list(zip(clips["first"], clips["last"], strict=True)) == spans


def test_clips_come_in_the_order_asked_for(whole: Path) -> None:
    found = ShardSet.open(whole)
    every = found.read("video", range(len(found)))
    rows = np.random.default_rng(0).integers(0, len(found), 40)
    assert np.array_equal(found.read("video", rows), every[rows])
    assert found.read("video", []).shape == (0, 4, 32, 32, 3)


def test_buckets_are_plain_memory_mappable_arrays(whole: Path) -> None:
    for file in whole.glob("bucket-*.npy"):
        rows = np.load(file, mmap_mode="r", allow_pickle=False)
        assert rows.dtype == np.uint8 and rows.shape[1:] == (4, 32, 32, 3)
    assert not [file for file in whole.iterdir() if file.name.startswith(".")]


def test_the_same_videos_give_the_same_bytes(data: Path, table: pd.DataFrame, whole: Path, tmp_path: Path) -> None:
    shuffled = table.sample(frac=1, random_state=1)
    build(shuffled, data, tmp_path / "s", workers=2)
    assert tree(tmp_path / "s") == tree(whole)


def test_nothing_changed_does_nothing(data: Path, table: pd.DataFrame, whole: Path, tmp_path: Path) -> None:
    out = shutil.copytree(whole, tmp_path / "s")
    before = {file.name: file.stat().st_mtime_ns for file in out.glob("bucket-*")}
    stats = build(table, data, out)
    assert (stats.decoded, stats.buckets_written) == (0, 0)
    assert {file.name: file.stat().st_mtime_ns for file in out.glob("bucket-*")} == before
    assert tree(out) == tree(whole)


def test_an_added_video_is_decoded_alone_and_rewrites_its_bucket_only(
    data: Path, table: pd.DataFrame, whole: Path, tmp_path: Path
) -> None:
    more = shutil.copytree(data, tmp_path / "data")
    make_video(more / "jump" / "new.mp4", frames=24, fps=12, seed=99)
    grown = manifest.build(more, Settings(), previous=table, workers=1)
    [added] = set(grown["sha256"]) - set(table["sha256"])
    out = shutil.copytree(whole, tmp_path / "s")
    before = tree(out)
    for path in more.rglob("*.mp4"):  # nothing but the new one may be read
        if path.name != "new.mp4":
            path.write_bytes(b"gone")
    stats = build(grown, more, out)
    assert stats == BuildStats(1, 9, 1, len(before) - 2)
    changed = {name for name in before if name not in tree(out)}
    assert {int(name[7:11]) for name in changed} == {bucket_of(added)}
    shutil.copytree(data, more, dirs_exist_ok=True)
    build(grown, more, tmp_path / "fresh")
    assert tree(out) == tree(tmp_path / "fresh")


def test_a_removed_video_is_decoded_by_nobody(data: Path, table: pd.DataFrame, whole: Path, tmp_path: Path) -> None:
    out = shutil.copytree(whole, tmp_path / "s")
    gone = table["path"].iloc[2]
    stats = build(table, tmp_path / "no data", out, rejected=[gone])
    assert (stats.decoded, stats.reused, stats.buckets_written) == (0, 8, 1)
    assert set(ShardSet.open(out).index["sha256"]) == set(table["sha256"]) - {table["sha256"].iloc[2]}


def test_rejected_broken_and_copied_files_are_left_out(data: Path, table: pd.DataFrame, tmp_path: Path) -> None:
    more = shutil.copytree(data, tmp_path / "data")
    shutil.copy(more / "jump" / "g00_0.mp4", more / "wave" / "copy.mp4")
    (more / "wave" / "text.mp4").write_bytes(b"text")
    grown = manifest.build(more, Settings(), previous=table, workers=1)
    stats = build(grown, more, tmp_path / "s", rejected=["wave/longer.mp4"])
    assert stats.decoded == 8
    assert len(ShardSet.open(tmp_path / "s")) == 16


@pytest.mark.parametrize("change", ["spec", "code"])
def test_other_clips_are_made_anew(
    data: Path, table: pd.DataFrame, whole: Path, tmp_path: Path, change: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = shutil.copytree(whole, tmp_path / "s")
    spec = SPEC
    if change == "spec":
        spec = ClipSpec(frames=4, height=32, width=32)
    else:
        monkeypatch.setattr("sora.core.provenance.clips", lambda: "other")
    stats = build(table, data, out, spec)
    assert (stats.decoded, stats.buckets_kept) == (9, 0)
    assert len(list(out.iterdir())) == stats.buckets_written + 1


def test_no_videos_give_an_empty_set(data: Path, table: pd.DataFrame, tmp_path: Path) -> None:
    assert build(table.iloc[:0], data, tmp_path / "s") == BuildStats(0, 0, 0, 0)
    assert len(ShardSet.open(tmp_path / "s")) == 0


def test_progress_counts_videos(data: Path, table: pd.DataFrame, tmp_path: Path) -> None:
    seen = []
    build(table, data, tmp_path / "s", progress=lambda done, total: seen.append((done, total)))
    assert seen == [(number, 9) for number in range(10)]


# --- faults -----------------------------------------------------------------------------------------------------------


def test_a_folder_without_an_index_is_no_shard_set(whole: Path, tmp_path: Path) -> None:
    out = shutil.copytree(whole, tmp_path / "s")
    (out / INDEX).unlink()
    with pytest.raises(InputError, match="no complete shard set"):
        ShardSet.open(out)
    (out / INDEX).write_bytes(b"PAR1 half")
    with pytest.raises(InputError, match="no complete shard set"):
        ShardSet.open(out)


def test_a_missing_bucket_is_a_clear_error(whole: Path, tmp_path: Path) -> None:
    out = shutil.copytree(whole, tmp_path / "s")
    next(out.glob("bucket-*")).unlink()
    with pytest.raises(ServiceError, match="can't be read"):
        found = ShardSet.open(out)
        found.read("video", range(len(found)))


def test_a_video_that_no_longer_decodes_is_named(data: Path, table: pd.DataFrame, whole: Path, tmp_path: Path) -> None:
    more = shutil.copytree(data, tmp_path / "data")
    (more / "jump" / "g01_0.mp4").write_bytes(b"text")
    with pytest.raises(ServiceError, match=r"jump/g01_0\.mp4 no longer decodes"):
        build(table, more, tmp_path / "s")
    assert not (tmp_path / "s" / INDEX).exists()
    assert not list((tmp_path / "s").glob(".*.part"))
    shutil.copy(data / "jump" / "g01_0.mp4", more / "jump" / "g01_0.mp4")
    build(table, more, tmp_path / "s")
    assert tree(tmp_path / "s") == tree(whole)


def test_a_kill_in_the_middle_costs_the_open_bucket_only(
    data: Path, table: pd.DataFrame, whole: Path, tmp_path: Path
) -> None:
    """SIGKILL once the first bucket is complete; the next call ends with the bytes of an uninterrupted build."""
    out = tmp_path / "s"
    manifest.write(table, tmp_path / "m.parquet")
    code = (
        "import sys, time; from pathlib import Path\n"
        "from sora.dataset import manifest; from sora.store import building\n"
        "from tests.store.test_shards import SPEC\n"
        "m, data, out = map(Path, sys.argv[1:])\n"
        "slow = lambda done, total: time.sleep(0.3)\n"
        "building.build(manifest.read(m), set(), data, out, SPEC, buckets=4, workers=2, progress=slow)"
    )
    child = subprocess.Popen([sys.executable, "-c", code, str(tmp_path / "m.parquet"), str(data), str(out)])
    end = time.monotonic() + 60
    while not list(out.glob("bucket-*.npy")) and time.monotonic() < end:
        time.sleep(0.01)
    child.send_signal(signal.SIGKILL)
    child.wait()
    finished = {file.name for file in out.glob("bucket-*.npy")}
    assert finished and not (out / INDEX).exists()
    stats = build(table, data, out)
    assert stats.buckets_kept == len(finished) and stats.decoded < 9
    assert tree(out) == tree(whole)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """300 kB of disk, of its own."""
    folder = tmp_path / "disk"
    folder.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=300k", "tmpfs", folder], capture_output=True).returncode:
        pytest.skip("may not mount a small disk here")
    yield folder
    subprocess.run(["umount", folder], check=True)


def test_a_full_disk_loses_nothing(data: Path, table: pd.DataFrame, whole: Path, small_disk: Path) -> None:
    filler = small_disk / "filler"
    filler.write_bytes(bytes(120_000))
    with pytest.raises(DiskFull) as caught:
        build(table, data, small_disk / "s")
    assert caught.value.fix and caught.value.exit_code == 3
    finished = len(list((small_disk / "s").glob("bucket-*.npy")))
    assert finished >= 1 and not list((small_disk / "s").glob(".*.part"))
    filler.unlink()
    assert build(table, data, small_disk / "s").buckets_kept == finished
    assert tree(small_disk / "s") == tree(whole)


# --- damage -----------------------------------------------------------------------------------------------------------


def overwrite(file: Path, share: float = 7 / 8) -> None:
    """The end of a file becomes noise, in place."""
    size = file.stat().st_size
    start = int(size * (1 - share))
    with file.open("r+b") as stream:
        stream.seek(start)
        stream.write(np.random.default_rng(0).bytes(size - start))


def largest(folder: Path) -> Path:
    return max(folder.glob("bucket-*.npy"), key=lambda file: file.stat().st_size)


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-5000])


def spoil_header(file: Path) -> None:
    file.write_bytes(b"\0" * 16 + file.read_bytes()[16:])


def noise_in_all(folder: Path) -> None:
    for file in folder.glob("bucket-*.npy"):
        overwrite(file)


def swap(folder: Path) -> None:
    files = sorted(folder.glob("bucket-*.npy"), key=lambda file: file.stat().st_size)
    first, second = files[0].read_bytes(), files[1].read_bytes()
    files[0].write_bytes(second)
    files[1].write_bytes(first)


def flip_a_bit(folder: Path) -> None:
    file = largest(folder)
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)


DAMAGES: dict[str, Callable[[Path], object]] = {
    "noise": noise_in_all,
    "a bit": flip_a_bit,
    "cut": lambda folder: cut(largest(folder)),
    "empty": lambda folder: largest(folder).write_bytes(b""),
    "header": lambda folder: spoil_header(largest(folder)),
    "missing": lambda folder: largest(folder).unlink(),
    "swapped": swap,
}


@pytest.mark.parametrize("name", DAMAGES)
def test_damaged_buckets_are_made_anew_and_said(
    data: Path, table: pd.DataFrame, whole: Path, tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    out = shutil.copytree(whole, tmp_path / "s")
    DAMAGES[name](out)
    assert ShardSet.open(out).damage()
    stats = build(table, data, out)
    assert tree(out) == tree(whole)
    assert stats.buckets_written >= 1
    assert stats.decoded == stats.damaged == (9 - stats.reused)
    assert (stats.damaged > 0) == (name != "header")  # behind a spoilt header the clips are whole: nothing is decoded
    said = capsys.readouterr().err
    assert "bucket-" in said and "are made again from the videos" in said
    assert not ShardSet.open(out).damage()


def test_only_the_damaged_videos_of_a_bucket_are_decoded(
    data: Path, table: pd.DataFrame, whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = shutil.copytree(whole, tmp_path / "s")
    flip_a_bit(out)
    [damage] = ShardSet.open(out).damage()
    assert damage.file == largest(out) and len(damage.lost) == 1 < damage.videos
    stats = build(table, data, out)
    assert (stats.decoded, stats.damaged, stats.buckets_written) == (1, 1, 1)
    assert tree(out) == tree(whole)
    assert f"{largest(out)} holds other bytes than were written" in capsys.readouterr().err


def test_damaged_clips_are_not_copied_into_a_new_bucket(
    data: Path, table: pd.DataFrame, whole: Path, tmp_path: Path
) -> None:
    more = shutil.copytree(data, tmp_path / "data")
    make_video(more / "jump" / "new.mp4", frames=24, fps=12, seed=99)
    grown = manifest.build(more, Settings(), previous=table, workers=1)
    out = shutil.copytree(whole, tmp_path / "s")
    noise_in_all(out)
    build(grown, more, out)
    build(grown, more, tmp_path / "fresh")
    assert tree(out) == tree(tmp_path / "fresh")


@pytest.mark.parametrize("name", ["noise", "a bit", "cut", "empty", "header", "missing", "swapped"])
def test_who_reads_a_damaged_clip_is_told(whole: Path, tmp_path: Path, name: str) -> None:
    out = shutil.copytree(whole, tmp_path / "s")
    DAMAGES[name](out)
    found = ShardSet.open(out)
    with pytest.raises(ServiceError, match=r"bucket-.*\.npy") as caught:
        found.read("video", range(len(found)))
    assert "sora run --force" in caught.value.fix


def test_whole_clips_are_compared_once(whole: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = ShardSet.open(whole)
    found.read("video", range(len(found)))
    monkeypatch.setattr(shards, "digest_of", lambda clip: pytest.fail("compared again"))
    found.read("video", range(len(found)))


def test_every_bit_of_the_index_counts(data: Path, table: pd.DataFrame, whole: Path, tmp_path: Path) -> None:
    """A flipped bit is found, or changes nothing that is read."""
    out = shutil.copytree(whole, tmp_path / "s")
    written = (out / INDEX).read_bytes()
    reference = ShardSet.open(whole)
    rng = np.random.default_rng(0)
    found = 0
    for place in rng.integers(0, len(written), 300):
        spoilt = bytearray(written)
        spoilt[place] ^= 1 << int(rng.integers(8))
        (out / INDEX).write_bytes(spoilt)
        try:
            read = ShardSet.open(out)
        except InputError:
            found += 1
            continue
        assert read.index.equals(reference.index) and read.files == reference.files and read.spec == reference.spec
    assert found > 100


def test_a_damaged_index_costs_no_decoding_where_dvc_knows_the_buckets(
    data: Path, table: pd.DataFrame, whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    known = {file.name: hashlib.md5(file.read_bytes()).hexdigest() for file in whole.iterdir()}
    for text in (None, b"PAR1 half"):
        out = shutil.copytree(whole, tmp_path / f"s{text is None}")
        (out / INDEX).unlink() if text is None else (out / INDEX).write_bytes(text)
        assert build(table, data, out, recorded=lambda: known).decoded == 0
        assert tree(out) == tree(whole)
    assert "is damaged and is made again" in capsys.readouterr().err


def test_without_index_and_record_nothing_is_trusted(
    data: Path, table: pd.DataFrame, whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = shutil.copytree(whole, tmp_path / "s")
    noise_in_all(out)
    (out / INDEX).unlink()
    stats = build(table, data, out)
    assert stats.decoded == stats.damaged == 9
    assert tree(out) == tree(whole)
    assert "can't be checked" in capsys.readouterr().err


def older(out: Path) -> None:
    """Makes a set what the Sora before digests left."""
    import pyarrow.parquet as pq

    kept = pq.read_table(out / INDEX)
    about = json.loads(kept.schema.metadata[b"sora.shards"])
    del about["digest"]
    plain = kept.drop_columns(["digest"]).replace_schema_metadata({b"sora.shards": json.dumps(about)})
    pq.write_table(plain, out / INDEX, compression="zstd")


def test_an_older_set_gets_digests_without_decoding(
    data: Path, table: pd.DataFrame, whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = shutil.copytree(whole, tmp_path / "s")
    older(out)
    assert not ShardSet.open(out).has_digests
    assert len(ShardSet.open(out).read("video", [0, 1])) == 2
    known = {file.name: hashlib.md5(file.read_bytes()).hexdigest() for file in out.iterdir()}
    accepted = shutil.copytree(out, tmp_path / "accepted")
    assert build(table, data, out, recorded=lambda: known) == BuildStats(0, 9, 0, len(known) - 1)
    assert not capsys.readouterr().err
    assert tree(out) == tree(whole)
    assert build(table, data, accepted).decoded == 0
    assert "an older Sora" in capsys.readouterr().err
    assert tree(accepted) == tree(whole)
    assert build(table, data, accepted).decoded == 0 and not capsys.readouterr().err


def test_damage_in_an_older_set_is_found_by_dvcs_record(
    data: Path, table: pd.DataFrame, whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = shutil.copytree(whole, tmp_path / "s")
    older(out)
    known = {file.name: hashlib.md5(file.read_bytes()).hexdigest() for file in out.iterdir()}
    noise_in_all(out)
    stats = build(table, data, out, recorded=lambda: known)
    assert stats.decoded == stats.damaged == 9
    assert tree(out) == tree(whole)
    assert "is not the file that DVC recorded" in capsys.readouterr().err


def test_what_an_interrupted_build_left_is_compared_too(
    data: Path, table: pd.DataFrame, whole: Path, tmp_path: Path
) -> None:
    """Two buckets were finished and the index was not written; then one of them is damaged."""
    more = shutil.copytree(data, tmp_path / "data")
    last = max(table["sha256"])
    [path] = table.loc[table["sha256"] == last, "path"]
    (more / path).write_bytes(b"text")
    out = tmp_path / "s"
    with pytest.raises(ServiceError):
        build(table, more, out)
    finished = sorted(out.glob("bucket-*.npy"))
    assert finished and len(list(out.glob(".*.sums"))) == len(finished)
    overwrite(finished[0])
    stats = build(table, data, out)
    assert stats.buckets_kept == len(finished) - 1 and stats.damaged
    assert tree(out) == tree(whole)


def with_tensors(out: Path, tensors: list[dict[str, object]]) -> None:
    """Rewrites an index so that it names these tensors."""
    import pyarrow.parquet as pq

    kept = pq.read_table(out / INDEX)
    about = json.loads(kept.schema.metadata[b"sora.shards"])
    del about["digest"]
    about["tensors"] = tensors
    about["digest"] = shards._index_digest(about, kept.to_pandas(ignore_metadata=True))
    pq.write_table(kept.replace_schema_metadata({b"sora.shards": json.dumps(about)}), out / INDEX, compression="zstd")


VIDEO: dict[str, object] = {"name": "video", "dtype": "uint8", "shape": [4, 32, 32, 3]}


def test_an_index_without_names_holds_one_tensor_video(whole: Path) -> None:
    """Sets of earlier versions have no names, and the bytes of today's index are the same."""
    import pyarrow.parquet as pq

    about = json.loads(pq.read_schema(whole / INDEX).metadata[b"sora.shards"])
    assert set(about) == {"spec", "code", "files", "digest"}
    opened = ShardSet.open(whole)
    assert opened.tensors == {"video": TensorSpec("video", "uint8", (4, 32, 32, 3))}
    assert opened.read("video", [0]).shape == (1, 4, 32, 32, 3)


def test_an_index_that_names_video_is_read_alike_and_kept(
    data: Path, table: pd.DataFrame, whole: Path, tmp_path: Path
) -> None:
    out = shutil.copytree(whole, tmp_path / "s")
    with_tensors(out, [VIDEO])
    opened = ShardSet.open(out)
    assert opened.tensors == ShardSet.open(whole).tensors and not opened.damage()
    rows = range(len(opened))
    assert np.array_equal(opened.read("video", rows), ShardSet.open(whole).read("video", rows))
    assert build(table, data, out).decoded == 0


def test_a_tensor_that_the_set_lacks_is_named(whole: Path) -> None:
    with pytest.raises(InputError, match="no tensor 'audio', only video"):
        ShardSet.open(whole).read("audio", [0])


@pytest.mark.parametrize(
    ("tensors", "why"),
    [
        ([VIDEO, {**VIDEO, "dtype": "float16"}], "one name twice"),
        ([], "no names"),
        ([{**VIDEO, "dtype": "object"}], "dtype 'object'"),
        ([{**VIDEO, "shape": [4, -1]}], "shape"),
        ([{"name": "video"}], "complete"),
        (["video"], "complete"),
    ],
)
def test_tensors_that_this_version_cannot_read_are_refused(
    whole: Path, tmp_path: Path, tensors: list[Any], why: str
) -> None:
    out = shutil.copytree(whole, tmp_path / "s")
    with_tensors(out, tensors)
    with pytest.raises(InputError, match=why):
        ShardSet.open(out)


@pytest.mark.parametrize("tensors", [[{**VIDEO, "dtype": "float16"}], [VIDEO, {**VIDEO, "name": "features"}]], ids=len)
def test_a_bucket_of_another_dtype_than_the_index_says_is_not_read(
    whole: Path, tmp_path: Path, tensors: list[dict[str, object]]
) -> None:
    out = shutil.copytree(whole, tmp_path / "s")
    with_tensors(out, tensors)
    with pytest.raises(ServiceError, match="it holds uint8"):
        ShardSet.open(out).read("video", [0])


def test_a_modality_with_another_tensor_names_it_in_the_index(data: Path, table: pd.DataFrame, tmp_path: Path) -> None:
    grey = TensorSpec("grey", "float16", (4, 8, 8))
    other = replace(MODALITY, tensors=lambda spec: {"grey": grey})
    everything = table["path"].tolist()
    build(table, data, tmp_path / "s", rejected=everything, modality=other)
    opened = ShardSet.open(tmp_path / "s")
    assert opened.tensors == {"grey": grey}
    assert opened.read("grey", []).dtype == np.float16


TWO = Layout((TensorSpec("video", "uint8", (4, 32, 32, 3)), TensorSpec("features", "float16", (5,))))


@pytest.fixture
def two(tmp_path: Path) -> tuple[Path, dict[str, np.ndarray]]:
    """A set of two tensors, written by hand: videos of 2, 1 and 2 clips in two buckets. And what it holds."""
    rng = np.random.default_rng(0)
    clips = {
        "video": rng.integers(0, 256, (5, 4, 32, 32, 3), np.uint8),
        "features": rng.normal(size=(5, 5)).astype(np.float16),
    }
    out = tmp_path / "two"
    out.mkdir()
    packed = TWO.packed({name: tensor.tobytes() for name, tensor in clips.items()})
    buckets = {0: slice(0, 3), 1: slice(3, 5)}
    files = {number: f"bucket-{number:04d}-x.npy" for number in buckets}
    for number, rows in buckets.items():
        body = packed[rows.start * TWO.size : rows.stop * TWO.size]
        (out / files[number]).write_bytes(TWO.header(rows.stop - rows.start) + body)
    rows = pd.DataFrame(
        {
            "sha256": [name * 64 for name in "aabcc"],
            "clip": [0, 1, 0, 0, 1],
            "bucket": [0, 0, 0, 1, 1],
            "row": [0, 1, 2, 0, 1],
            "first": [0, 8, 0, 0, 8],
            "last": [7, 15, 7, 7, 15],
            "digest": [digest_of(packed[row * TWO.size : (row + 1) * TWO.size]) for row in range(5)],
        }
    )
    write_index(out, SPEC, "code", files, TWO, rows)
    return out, clips


def test_a_set_of_two_tensors_gives_what_was_written(two: tuple[Path, dict[str, np.ndarray]]) -> None:
    out, clips = two
    found = ShardSet.open(out)
    assert found.tensors == {one.name: one for one in TWO.tensors} and len(found) == 5 and not found.damage()
    for rows in ([0, 1, 2, 3, 4], [4, 0, 2, 0], []):
        for _ in ("compared", "no more"):
            together = found.clips(rows)
            assert list(together.tensors) == list(clips)
            for name, tensor in clips.items():
                read = found.read(name, rows)
                assert read.dtype == tensor.dtype and read.shape == (len(rows), *tensor.shape[1:])
                assert np.array_equal(read, tensor[rows]) and np.array_equal(together.tensors[name], tensor[rows])
    with pytest.raises(InputError, match="no tensor 'audio', only video, features"):
        found.read("audio", [0])
    # Each bucket is an array of records, which NumPy reads by itself: the tensors of a clip lie side by side.
    stored = np.load(out / found.files[1], mmap_mode="r", allow_pickle=False)
    assert stored.shape == (2,) and stored.dtype.names == ("video", "features")
    assert np.array_equal(stored["features"], clips["features"][3:])


@pytest.mark.parametrize("damaged", ["video", "features"])
@pytest.mark.parametrize("asked", ["video", "features"])
def test_a_damaged_record_is_noticed_whichever_of_its_tensors_is_read(
    two: tuple[Path, dict[str, np.ndarray]], damaged: str, asked: str
) -> None:
    out, clips = two
    file = out / ShardSet.open(out).files[0]
    content = bytearray(file.read_bytes())
    assert len(content) == len(TWO.header(3)) + 3 * TWO.size
    # A bit of the second of its three records.
    content[len(TWO.header(3)) + TWO.size + (100 if damaged == "video" else TWO.tensors[0].bytes + 3)] ^= 1
    file.write_bytes(content)
    found = ShardSet.open(out)
    others = [0, 2, 3, 4]
    assert np.array_equal(found.read(asked, others), clips[asked][others])
    for _ in range(2):
        with pytest.raises(ServiceError, match=r"bucket-0000-x\.npy is damaged: clip 1 of video aaaa"):
            found.read(asked, [1])
    [damage] = found.damage()
    assert damage.file == file and damage.lost == {"a" * 64} and damage.videos == 2
