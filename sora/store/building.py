"""Makes shards from videos: see `sora.store.shards` for what they are."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, TYPE_CHECKING

from sora.config import Validate
from sora.core import provenance
from sora.core.errors import InputError, ServiceError, VideoError
from sora.core.files import atomic, sync_folder, writing
from sora.core.progress import say
from sora.core.records import ClipSpec
from sora.media import MODALITY, Modality, pool
from sora.store.shards import INDEX, Damage, Layout, ShardSet, digest_of, md5_of, read_bucket, write_index

if TYPE_CHECKING:
    import pandas as pd

_CHUNK = 1 << 23  # bytes that are copied at a time
Progress = Callable[[int, int], None]  # (done, total) videos
Recorded = Callable[[], Mapping[str, str]]  # file names → MD5 recorded by DVC


@dataclass(frozen=True, slots=True)
class BuildStats:
    """What a build did: videos decoded and reused, buckets written and kept as they were.

    `damaged` counts decoded videos whose stored clips were damaged or could not be checked.
    """

    decoded: int
    reused: int
    buckets_written: int
    buckets_kept: int
    damaged: int = 0


@dataclass(frozen=True, slots=True)
class _Video:
    sha256: str
    path: str
    frames: int
    fps: float
    clips: tuple[tuple[int, int], ...]  # (first, last) index of each


@dataclass(slots=True)
class _Bucket:
    number: int
    videos: list[_Video]
    file: Path
    waiting: int = 0  # videos still to be decoded into its draft
    digests: dict[str, tuple[str, ...]] = field(default_factory=dict)  # sha256 of a video → of its clips

    @property
    def rows(self) -> int:
        return sum(len(video.clips) for video in self.videos)

    @property
    def draft(self) -> Path:
        return self.file.with_name(f".{self.file.name}.part")

    @property
    def sums(self) -> Path:
        return self.file.with_name(f".{self.file.name}.sums")


@dataclass(frozen=True, slots=True)
class _Rows:
    """Stored, intact clips of a video: from byte `offset` of `file`."""

    file: Path
    offset: int
    digests: tuple[str, ...]


@dataclass(slots=True)
class _Kept:
    """What can be kept of an earlier build."""

    rows: dict[str, _Rows] = field(default_factory=dict)  # sha256 of a video → its intact clips
    whole: set[str] = field(default_factory=set)  # names of files without any damage
    lost: set[str] = field(default_factory=set)  # videos whose stored clips can't be used


@dataclass(frozen=True, slots=True)
class _Task:
    """A video to decode, and where its clips go: at `offset` of `draft`."""

    bucket: int
    video: _Video
    draft: Path
    offset: int


def build(
    manifest: pd.DataFrame,
    rejected: Collection[str],
    data: Path,
    out: Path,
    spec: ClipSpec,
    *,
    buckets: int = 16,
    workers: int = 0,
    rules: Validate | None = None,
    progress: Progress | None = None,
    recorded: Recorded = dict,
    modality: Modality = MODALITY,
) -> BuildStats:
    """Brings the shard set in `out` up to date. Call it again after an interruption: it resumes.

    It first reads the existing files and compares them with the digests. It reports damaged clips and makes them again.

    Args:
        manifest: see `data.manifest`; rows with an `error` are left out, and of equal bytes all but the first path.
        rejected: paths (of the manifest) to leave out.
        data: the folder that the manifest's paths are relative to.
        workers: decoders; 0: one per core.
        rules: bounds on what a video may cost; default: those of the default settings.
        recorded: returns the MD5 of files in `out` as DVC last recorded them. Called only for files without digests,
            which an older Sora wrote: files that match are kept, files that differ are made again.
        modality: the kind of the files.

    Raises:
        ServiceError: a video that the manifest accepted no longer decodes (the message names it), or a decoder died.
        DiskFull: no space is left. Finished buckets stay, and the next call resumes from them.
    """
    with writing(out):
        out.mkdir(parents=True, exist_ok=True)
        _remove(out.glob(".*.part"))
    layout = Layout.of(modality.tensors(spec))
    plan = _plan(manifest, rejected, out, spec, buckets, modality)
    kept = _earlier(out, plan, spec, layout, recorded)
    old = kept.rows
    missing = []
    for bucket in plan:
        if bucket.file.name in kept.whole:
            bucket.digests = {video.sha256: old[video.sha256].digests for video in bucket.videos}
        else:
            missing.append(bucket)
    total = sum(len(bucket.videos) for bucket in plan)
    to_decode = decoded = 0
    open_now: dict[int, _Bucket] = {}
    for bucket in missing:
        to_decode += sum(video.sha256 not in old for video in bucket.videos)
    if progress:
        progress(total - to_decode, total)

    def jobs() -> Iterator[pool.Job[_Task]]:
        for bucket in missing:
            open_now[bucket.number] = bucket
            todo = _begin(bucket, old, layout)
            if not todo:
                _finish(open_now.pop(bucket.number))
            for task in todo:
                video = task.video
                yield pool.Job(task, data / video.path, spec, (video.frames, video.fps))

    try:
        crew = min(workers or pool.cores(), max(1, to_decode))
        bounds = pool.Bounds.of_data(rules or Validate.model_validate({}))
        with closing(pool.each(jobs(), bounds, clips=True, workers=crew, modality=modality)) as results:
            for job, answer in results:
                task = job.item
                digests = _store(task, answer, layout)
                decoded += 1
                bucket = open_now[task.bucket]
                bucket.digests[task.video.sha256] = digests
                bucket.waiting -= 1
                if not bucket.waiting:
                    _finish(open_now.pop(task.bucket))
                if progress:
                    progress(total - to_decode + decoded, total)
    except BaseException:
        _remove(bucket.draft for bucket in open_now.values())  # also makes room
        raise
    files = {bucket.number: bucket.file.name for bucket in plan}
    write_index(out, spec, provenance.clips(), files, layout, _rows(plan))
    keep = {bucket.file for bucket in plan}
    _remove(file for file in out.glob("bucket-*.npy") if file not in keep)
    _remove(out.glob(".*.sums"))
    lost = sum(video.sha256 in kept.lost for bucket in missing for video in bucket.videos)
    return BuildStats(decoded, total - decoded, len(missing), len(plan) - len(missing), lost)


def _remove(files: Iterable[Path]) -> None:
    for file in list(files):
        file.unlink(missing_ok=True)


def _plan(
    manifest: pd.DataFrame, rejected: Collection[str], out: Path, spec: ClipSpec, buckets: int, modality: Modality
) -> list[_Bucket]:
    """The buckets to have, without empty ones."""
    usable = manifest[manifest["error"].isna() & ~manifest["path"].isin(set(rejected))]
    usable = usable.sort_values(["sha256", "path"]).drop_duplicates("sha256")
    videos: dict[int, list[_Video]] = {}
    for sha256, path, frames, fps in zip(
        usable["sha256"], usable["path"], usable["frames"], usable["fps"], strict=True
    ):
        spans = tuple((min(w.indices), max(w.indices)) for w in modality.windows(int(frames), float(fps), spec))
        number = int(sha256[:8], 16) * buckets >> 32
        videos.setdefault(number, []).append(_Video(sha256, path, int(frames), float(fps), spans))
    code = provenance.clips()
    plan = []
    for number, members in sorted(videos.items()):
        content = [code, spec.to_dict(), [(video.sha256, video.clips) for video in members]]
        key = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]
        plan.append(_Bucket(number, members, out / f"bucket-{number:04d}-{key}.npy"))
    return plan


def _earlier(out: Path, plan: list[_Bucket], spec: ClipSpec, layout: Layout, recorded: Recorded) -> _Kept:
    """What already exists intact: from the last complete build, and from an interrupted one."""
    kept = _Kept()
    old = _last_set(out, recorded)
    if old is not None and (old.spec != spec or old.code != provenance.clips() or old.layout != layout):
        old = None
    _take_set(old, kept, recorded)
    named = set(old.files.values()) if old else set()
    left = [bucket for bucket in plan if bucket.file.name not in named and bucket.file.exists()]
    _take_unfinished(left, kept, layout, recorded)
    return kept


def _last_set(out: Path, recorded: Recorded) -> ShardSet | None:
    """The set that the last complete build left; None without one, or if its index is damaged."""
    index = out / INDEX
    if not index.exists():
        return None
    try:
        old = ShardSet.open(out)
    except InputError as error:
        say(f"{index} is damaged and is made again: {error.message}")
        return None
    md5 = None if old.has_digests else recorded().get(INDEX)
    if md5 is not None and md5 != md5_of(index):
        say(f"{index} is damaged and is made again: it is not the file that DVC recorded")
        return None
    return old


def _take_set(old: ShardSet | None, kept: _Kept, recorded: Recorded) -> None:
    if old is None:
        return
    known = {} if old.has_digests else recorded()
    contents = old.contents()
    damaged, unknown = [], []
    header, size = len(old.layout.header(0)), old.layout.size
    row_of = old.index["row"].to_numpy()
    for number, content in contents.items():
        file = old.folder / old.files[number]
        damage = old.damage_of(number, content)
        if not old.has_digests and damage is None:
            if file.name not in known:
                unknown.append(file)
            elif known[file.name] != md5_of(file):
                every = frozenset(old.places_of(number))
                damage = Damage(file, "is not the file that DVC recorded", every, len(every))
        for sha256, places in old.places_of(number).items():
            if damage is None or sha256 not in damage.lost:
                row = int(row_of[places[0]])
                digests = content.digests[row : row + len(places)]
                kept.rows[sha256] = _Rows(file, header + row * size, digests)
        if damage is None:
            kept.whole.add(file.name)
        else:
            damaged.append(damage)
            kept.lost |= damage.lost
    for damage in damaged:
        say(f"{damage}; they are made again from the videos")
    if unknown:
        say(
            f"{len(unknown)} buckets in {old.folder} were made by an older Sora, and DVC has no record to compare them "
            "with: they are kept as they are, and from now on changes to them are detected"
        )


def _take_unfinished(left: list[_Bucket], kept: _Kept, layout: Layout, recorded: Recorded) -> None:
    """Buckets that are in no index: an interrupted build left them, or the index was lost."""
    header, size = len(layout.header(0)), layout.size
    for bucket in left:
        content = read_bucket(bucket.file, bucket.rows, layout)
        sums = _read_sums(bucket.sums)
        if sums is not None:
            fine = not content.fault and list(content.digests) == sums
        else:
            fine = not content.fault and recorded().get(bucket.file.name) == md5_of(bucket.file)
        if not fine:
            say(f"{bucket.file} is damaged or can't be checked: its {len(bucket.videos)} videos are made again")
            kept.lost.update(video.sha256 for video in bucket.videos)
            continue
        kept.whole.add(bucket.file.name)
        row = 0
        for video in bucket.videos:
            digests = content.digests[row : row + len(video.clips)]
            kept.rows[video.sha256] = _Rows(bucket.file, header + row * size, digests)
            row += len(video.clips)


def _read_sums(file: Path) -> list[str] | None:
    try:
        return list(json.loads(file.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return None


def _begin(bucket: _Bucket, old: dict[str, _Rows], layout: Layout) -> list[_Task]:
    """Makes the bucket's draft, copies into it what an old bucket holds, and returns what must be decoded."""
    tasks = []
    header, size = layout.header(bucket.rows), layout.size
    with writing(bucket.file), bucket.draft.open("wb") as draft:
        # Takes the space now: the workers must not find the disk full after hours.
        os.posix_fallocate(draft.fileno(), 0, len(header) + bucket.rows * size)
        draft.write(header)
        for video in bucket.videos:
            length = len(video.clips) * size
            if video.sha256 in old:
                rows = old[video.sha256]
                _copy(rows.file, rows.offset, length, draft)
                bucket.digests[video.sha256] = rows.digests
            else:
                tasks.append(_Task(bucket.number, video, bucket.draft, draft.tell()))
                draft.seek(length, os.SEEK_CUR)
    bucket.waiting = len(tasks)
    return tasks


def _copy(source: Path, offset: int, length: int, target: IO[bytes]) -> None:
    with source.open("rb") as file:
        file.seek(offset)
        while length:
            part = file.read(min(length, _CHUNK))
            if not part:
                raise ServiceError(f"{source} is shorter than its index says", fix="remove the folder and run again")
            target.write(part)
            length -= len(part)


def _store(task: _Task, answer: pool.Answer | VideoError, layout: Layout) -> tuple[str, ...]:
    """Writes a video's clips to their place in the draft. Returns their digests."""
    video = task.video
    if isinstance(answer, pool.Crashed):
        raise ServiceError(
            f"the decoder of {video.path} crashed: {answer.message}", fix="run the same command again: it resumes"
        )
    if isinstance(answer, VideoError):
        raise ServiceError(
            f"{video.path} no longer decodes: {answer.message}",
            fix="the file changed since it was checked: restore it, or run again so that it is checked again",
        ) from answer
    if answer.clips != len(video.clips):
        raise ServiceError(
            f"{video.path} now has {answer.clips} clips, not {len(video.clips)}",
            fix="run again so that it is checked again",
        )
    clips = layout.packed(answer.bodies)
    with writing(task.draft), task.draft.open("r+b") as draft:
        draft.seek(task.offset)
        draft.write(clips)
    size = layout.size
    return tuple(digest_of(clips[start : start + size]) for start in range(0, len(clips), size))


def _finish(bucket: _Bucket) -> None:
    with atomic(bucket.sums) as sums:  # first: a build that resumes later uses no unchecked bucket
        sums.write(json.dumps([one for video in bucket.videos for one in bucket.digests[video.sha256]]).encode())
    with writing(bucket.file):
        with bucket.draft.open("rb") as draft:
            os.fsync(draft.fileno())
        os.replace(bucket.draft, bucket.file)
        sync_folder(bucket.file.parent)


def _rows(plan: list[_Bucket]) -> pd.DataFrame:
    """The rows of the index."""
    import pandas as pd

    return pd.DataFrame(
        [
            (video.sha256, clip, bucket.number, row, *video.clips[clip], bucket.digests[video.sha256][clip])
            for bucket in plan
            for row, (video, clip) in enumerate((v, c) for v in bucket.videos for c in range(len(v.clips)))
        ],
        columns=["sha256", "clip", "bucket", "row", "first", "last", "digest"],
    )
