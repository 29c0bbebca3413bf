"""Shards: the clips of accepted videos, ready to be read by training. They know neither labels nor splits.

    index.parquet                 one row a clip: where it lies; written last: a folder without it is no shard set
    bucket-0003-<key>.npy         (clips, frames, height, width, 3) uint8, in the order of (sha256, clip)

A video's bucket follows from its sha256, and a bucket's key from what it is to hold and from the code that makes clips.
So the same videos give the same bytes, an added video rewrites its own bucket only, a file that is there is complete,
and an interrupted build goes on with the buckets that lack.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import numpy as np

from sora import pool
from sora.errors import InputError, ServiceError, VideoError
from sora.files import atomic, sync_folder, writing
from sora.records import ClipSpec
from sora.settings import Validate
from sora.video import tag
from sora.video.clips import windows

if TYPE_CHECKING:
    import pandas as pd

INDEX = "index.parquet"
_SORA = b"sora.shards"
_CHUNK = 1 << 23  # bytes that are copied at a time
Progress = Callable[[int, int], None]  # (done, total) videos


@dataclass(frozen=True, slots=True)
class BuildStats:
    """What a build did: videos decoded now and reused from what was there, buckets written and kept as they were."""

    decoded: int
    reused: int
    buckets_written: int
    buckets_kept: int


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
    waiting: int = 0  # videos that are still to be decoded into its draft

    @property
    def rows(self) -> int:
        return sum(len(video.clips) for video in self.videos)

    @property
    def draft(self) -> Path:
        return self.file.with_name(f".{self.file.name}.part")


@dataclass(frozen=True, slots=True)
class _Task:
    """A video to be decoded, and where its clips go: at `offset` of `draft`."""

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
) -> BuildStats:
    """Brings the shard set in `out` up to date. Call it again after an interruption: it resumes.

    Args:
        manifest: see `data.manifest`; rows with an `error` are left out, and of the same bytes all but the first path.
        rejected: paths (of the manifest) to leave out.
        data: the folder that the manifest's paths are relative to.
        workers: processes that decode; 0: one a core.
        rules: bounds of what a video may cost; default: those of the default settings.

    Raises:
        ServiceError: a video that the manifest accepted does not decode now (it names it), or a process died.
        DiskFull: no space is left. Finished buckets stay, and the next call goes on from them.
    """
    with writing(out):
        out.mkdir(parents=True, exist_ok=True)
        _remove(out.glob(".*.part"))
    plan = _plan(manifest, rejected, out, spec, buckets)
    missing = [bucket for bucket in plan if not bucket.file.exists()]
    total = sum(len(bucket.videos) for bucket in plan)
    to_decode = decoded = 0
    open_now: dict[int, _Bucket] = {}
    old = _old_rows(out, spec) if missing else {}
    for bucket in missing:
        to_decode += sum(video.sha256 not in old for video in bucket.videos)
    if progress:
        progress(total - to_decode, total)

    def jobs() -> Iterator[pool.Job[_Task]]:
        for bucket in missing:
            open_now[bucket.number] = bucket
            todo = _begin(bucket, old, spec)
            if not todo:
                _finish(open_now.pop(bucket.number))
            for task in todo:
                video = task.video
                yield pool.Job(task, data / video.path, spec, (video.frames, video.fps))

    try:
        crew = min(workers or pool.cores(), max(1, to_decode))
        bounds = pool.Bounds.of_data(rules or Validate.model_validate({}))
        with closing(pool.each(jobs(), bounds, clips=True, workers=crew)) as results:
            for job, answer in results:
                task = job.item
                _store(task, answer, spec)
                decoded += 1
                bucket = open_now[task.bucket]
                bucket.waiting -= 1
                if not bucket.waiting:
                    _finish(open_now.pop(task.bucket))
                if progress:
                    progress(total - to_decode + decoded, total)
    except BaseException:
        _remove(bucket.draft for bucket in open_now.values())  # makes room, too
        raise
    _write_index(out, plan, spec)
    keep = {bucket.file for bucket in plan}
    _remove(file for file in out.glob("bucket-*.npy") if file not in keep)
    return BuildStats(decoded, total - decoded, len(missing), len(plan) - len(missing))


def _remove(files: Iterable[Path]) -> None:
    for file in list(files):
        file.unlink(missing_ok=True)


def _plan(manifest: pd.DataFrame, rejected: Collection[str], out: Path, spec: ClipSpec, buckets: int) -> list[_Bucket]:
    """The buckets that are to be, without empty ones."""
    usable = manifest[manifest["error"].isna() & ~manifest["path"].isin(set(rejected))]
    usable = usable.sort_values(["sha256", "path"]).drop_duplicates("sha256")
    videos: dict[int, list[_Video]] = {}
    for sha256, path, frames, fps in zip(
        usable["sha256"], usable["path"], usable["frames"], usable["fps"], strict=True
    ):
        spans = tuple((min(w.indices), max(w.indices)) for w in windows(int(frames), float(fps), spec))
        number = int(sha256[:8], 16) * buckets >> 32
        videos.setdefault(number, []).append(_Video(sha256, path, int(frames), float(fps), spans))
    code = tag.clips()
    plan = []
    for number, members in sorted(videos.items()):
        content = [code, spec.to_dict(), [(video.sha256, video.clips) for video in members]]
        key = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]
        plan.append(_Bucket(number, members, out / f"bucket-{number:04d}-{key}.npy"))
    return plan


def _old_rows(out: Path, spec: ClipSpec) -> dict[str, tuple[Path, int]]:
    """sha256 → (file, position of its first clip's first byte) of the last complete build, if it made such clips."""
    try:
        old = ShardSet.open(out)
    except InputError:
        return {}
    if old.spec != spec or old.code != tag.clips():
        return {}
    first = old.index[old.index["clip"] == 0]
    header, size = len(_header(0, spec)), _clip_bytes(spec)
    return {
        sha256: (out / old.files[bucket], header + row * size)
        for sha256, bucket, row in zip(first["sha256"], first["bucket"], first["row"], strict=True)
        if (out / old.files[bucket]).exists()
    }


def _clip_bytes(spec: ClipSpec) -> int:
    return spec.frames * spec.height * spec.width * 3


def _header(rows: int, spec: ClipSpec) -> bytes:
    """Of a .npy file; NumPy leaves room for the first dimension to grow, so that its length does not depend on it."""
    text = BytesIO()
    shape = (rows, spec.frames, spec.height, spec.width, 3)
    np.lib.format.write_array_header_1_0(text, {"descr": "|u1", "fortran_order": False, "shape": shape})
    return text.getvalue()


def _begin(bucket: _Bucket, old: dict[str, tuple[Path, int]], spec: ClipSpec) -> list[_Task]:
    """Makes the bucket's draft, copies into it what an old bucket holds, and returns what is to be decoded."""
    tasks = []
    header, size = _header(bucket.rows, spec), _clip_bytes(spec)
    with writing(bucket.file), bucket.draft.open("wb") as draft:
        # Takes the space now: the workers must not find the disk full after hours.
        os.posix_fallocate(draft.fileno(), 0, len(header) + bucket.rows * size)
        draft.write(header)
        for video in bucket.videos:
            length = len(video.clips) * size
            if video.sha256 in old:
                _copy(*old[video.sha256], length, draft)
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
                raise ServiceError(f"{source} is shorter than its index says", mend="remove the folder and run again")
            target.write(part)
            length -= len(part)


def _store(task: _Task, answer: pool.Answer | VideoError, spec: ClipSpec) -> None:
    """A video's clips into their place of the draft."""
    video = task.video
    if isinstance(answer, pool.Crashed):
        raise ServiceError(
            f"the decoder of {video.path} crashed: {answer.message}", mend="run the same command again: it resumes"
        )
    if isinstance(answer, VideoError):
        raise ServiceError(
            f"{video.path} does not decode any more: {answer.message}",
            mend="the file changed since it was checked: restore it, or run again so that it is checked anew",
        ) from answer
    assert answer.body is not None
    if len(answer.body) != len(video.clips) * _clip_bytes(spec):
        raise ServiceError(
            f"{video.path} has {answer.header['shape'][0]} clips now, not {len(video.clips)}",
            mend="run again so that it is checked anew",
        )
    with writing(task.draft), task.draft.open("r+b") as draft:
        draft.seek(task.offset)
        draft.write(answer.body)


def _finish(bucket: _Bucket) -> None:
    with writing(bucket.file):
        with bucket.draft.open("rb") as draft:
            os.fsync(draft.fileno())
        os.replace(bucket.draft, bucket.file)
        sync_folder(bucket.file.parent)


def _write_index(out: Path, plan: list[_Bucket], spec: ClipSpec) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    columns: dict[str, list[Any]] = {name: [] for name in ("sha256", "clip", "bucket", "row", "first", "last")}
    for bucket in plan:
        for row, (video, clip) in enumerate((v, c) for v in bucket.videos for c in range(len(v.clips))):
            cells = (video.sha256, clip, bucket.number, row, *video.clips[clip])
            for name, cell in zip(columns, cells, strict=True):
                columns[name].append(cell)
    files = {str(bucket.number): bucket.file.name for bucket in plan}
    about = {"spec": spec.to_dict(), "code": tag.clips(), "files": files}
    table = pa.table(columns, schema=_schema(pa)).replace_schema_metadata({_SORA: json.dumps(about)})
    with atomic(out / INDEX) as file:
        pq.write_table(table, file, compression="zstd")


def _schema(pa: Any) -> Any:
    numbers = [(name, pa.int64()) for name in ("clip", "bucket", "row", "first", "last")]
    return pa.schema([("sha256", pa.string()), *numbers])


class ShardSet:
    """A complete shard set, read through memory maps.

    Attributes:
        spec: how the clips were made.
        index: DataFrame, a row a clip, in the order of (sha256, clip): sha256, clip, bucket, row (in the bucket's
            file), first, last (index of the video's frames that the clip spans).
        code: name of the code that made the clips.
        files: bucket → file name.
    """

    def __init__(self, folder: Path, spec: ClipSpec, index: pd.DataFrame, code: str, files: dict[int, str]) -> None:
        self.folder, self.spec, self.index, self.code, self.files = folder, spec, index, code, files
        self._bucket = index["bucket"].to_numpy()
        self._row = index["row"].to_numpy()
        self._maps: dict[int, np.ndarray] = {}

    @classmethod
    def open(cls, folder: Path) -> ShardSet:
        """Reads the index only.

        Raises:
            InputError: there is no complete shard set in `folder`.
        """
        import pyarrow as pa
        import pyarrow.parquet as pq

        try:
            table = pq.read_table(Path(folder) / INDEX)
            about = json.loads(table.schema.metadata[_SORA])
            spec = ClipSpec.from_dict(about["spec"])
            files = {int(number): name for number, name in about["files"].items()}
        except (OSError, pa.ArrowException, ValueError, KeyError, TypeError) as error:
            raise InputError(
                f"{folder} holds no complete shard set: {error}", mend="run `sora run`, which makes it"
            ) from error
        return cls(Path(folder), spec, table.to_pandas(ignore_metadata=True), about["code"], files)

    def __len__(self) -> int:
        """Clips."""
        return len(self._row)

    def clips(self, rows: Sequence[int] | np.ndarray) -> np.ndarray:
        """The clips at these positions of `index`, in the order given, as a new array.

        Returns:
            (len(rows), frames, height, width, 3) uint8 rgb.

        Raises:
            ServiceError: a bucket's file is missing or is not what the index says.
        """
        rows = np.asarray(rows, np.int64)
        spec = self.spec
        out = np.empty((len(rows), spec.frames, spec.height, spec.width, 3), np.uint8)
        # Clip by clip: one indexing for several would copy each twice.
        for place, (bucket, row) in enumerate(zip(self._bucket[rows], self._row[rows], strict=True)):
            out[place] = self._map(int(bucket))[row]
        return out

    def _map(self, bucket: int) -> np.ndarray:
        if bucket not in self._maps:
            file = self.folder / self.files[bucket]
            try:
                self._maps[bucket] = np.load(file, mmap_mode="r", allow_pickle=False)
            except (OSError, ValueError) as error:
                raise ServiceError(
                    f"{file} can't be read: {error}", mend="`dvc checkout`, or remove the folder and run again"
                ) from error
        return self._maps[bucket]
