"""Shards: the clips of accepted videos, ready to be read by training. They know neither labels nor splits.

    index.parquet                 one row per clip: its place and its digest. It is written last: a folder without it
                                  is not a complete shard set
    bucket-0003-<key>.npy         a tensor of the clips, in the order of (sha256, clip); its header has dtype and shape
    .bucket-0003-<key>.npy.sums   only while a build is unfinished: the digests of a finished bucket's clips

Tensors have names. The index lists them under `tensors`, with dtype and shape. An index without that list has the
tensor `video`, `(frames, height, width, rgb) uint8`. Earlier versions wrote such an index, and it is still written
for videos, so the bytes of a set stay what they were. Buckets of another tensor would be other files,
`bucket-0003-<key>-<name>.npy`.

A video's bucket follows from its sha256. A bucket's key follows from its intended content and from the code that makes
clips. So the same videos give the same bytes, an added video rewrites only its own bucket, an existing file is
complete, and an interrupted build makes only the buckets that are missing.

Disks and people damage files. A build therefore reads what exists and compares it with the digests before it keeps or
copies a byte, and makes the clips of damaged videos again. A reader also compares a clip when it reads it for the
first time. The digests find damage. They don't stop somebody who rewrites the index as well.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import numpy as np

from sora.config import Validate
from sora.core import provenance
from sora.core.errors import InputError, ServiceError, VideoError
from sora.core.files import atomic, sync_folder, writing
from sora.core.progress import say
from sora.core.records import ClipSpec
from sora.core.tensors import VIDEO, TensorSpec
from sora.media import MODALITIES, MODALITY, Modality, pool

if TYPE_CHECKING:
    import pandas as pd
    from typing_extensions import Buffer

INDEX = "index.parquet"
_SORA = b"sora.shards"
_CHUNK = 1 << 23  # bytes that are copied at a time
_FIX = "`sora run --force` makes the damaged clips again from the videos; in a restored folder, restore it again"
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
class Damage:
    """A bucket's file that differs from the index: what is wrong, and the videos whose clips are lost."""

    file: Path
    why: str
    lost: frozenset[str]  # sha256; none if only the file's header or end is wrong
    videos: int  # in this bucket

    def __str__(self) -> str:
        return f"{self.file} {self.why}: clips of {len(self.lost)} of its {self.videos} videos are damaged"


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


@dataclass(frozen=True, slots=True)
class _Content:
    """What a bucket's file holds: the digests of its clips ("" if it can't be read), and other faults."""

    digests: tuple[str, ...]
    fault: str


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
    (tensor,) = modality.tensors(spec).values()
    plan = _plan(manifest, rejected, out, spec, buckets, modality)
    kept = _earlier(out, plan, spec, tensor, recorded)
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
            todo = _begin(bucket, old, tensor)
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
                digests = _store(task, answer, tensor)
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
    _write_index(out, plan, spec, tensor)
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


def _earlier(out: Path, plan: list[_Bucket], spec: ClipSpec, tensor: TensorSpec, recorded: Recorded) -> _Kept:
    """What already exists intact: from the last complete build, and from an interrupted one."""
    kept = _Kept()
    old = _last_set(out, recorded)
    if old is not None and (old.spec != spec or old.code != provenance.clips() or old.tensor != tensor):
        old = None
    _take_set(old, kept, recorded)
    named = set(old.files.values()) if old else set()
    left = [bucket for bucket in plan if bucket.file.name not in named and bucket.file.exists()]
    _take_unfinished(left, kept, tensor, recorded)
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
    if md5 is not None and md5 != _md5(index):
        say(f"{index} is damaged and is made again: it is not the file that DVC recorded")
        return None
    return old


def _take_set(old: ShardSet | None, kept: _Kept, recorded: Recorded) -> None:
    if old is None:
        return
    known = {} if old.has_digests else recorded()
    contents = old.contents()
    damaged, unknown = [], []
    header, size = len(_header(0, old.tensor)), old.tensor.bytes
    row_of = old.index["row"].to_numpy()
    for number, content in contents.items():
        file = old.folder / old.files[number]
        damage = old.damage_of(number, content)
        if not old.has_digests and damage is None:
            if file.name not in known:
                unknown.append(file)
            elif known[file.name] != _md5(file):
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


def _take_unfinished(left: list[_Bucket], kept: _Kept, tensor: TensorSpec, recorded: Recorded) -> None:
    """Buckets that are in no index: an interrupted build left them, or the index was lost."""
    header, size = len(_header(0, tensor)), tensor.bytes
    for bucket in left:
        content = _read(bucket.file, bucket.rows, tensor)
        sums = _read_sums(bucket.sums)
        if sums is not None:
            fine = not content.fault and list(content.digests) == sums
        else:
            fine = not content.fault and recorded().get(bucket.file.name) == _md5(bucket.file)
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


def _digest(clip: Buffer) -> str:
    """Digest of a clip's bytes: 128 bits of SHA-256, computed in hardware by processors: faster than MD5 and BLAKE2."""
    return hashlib.sha256(clip).hexdigest()[:32]


def _md5(file: Path) -> str:
    """The MD5 as DVC computes it; "" if the file can't be read."""
    try:
        with file.open("rb") as stream:
            return hashlib.file_digest(stream, "md5").hexdigest()
    except OSError:
        return ""


def _read(file: Path, rows: int, tensor: TensorSpec) -> _Content:
    """Reads a bucket's file from start to end. It never raises for what it finds there."""
    header, size = _header(rows, tensor), tensor.bytes
    digests: list[str] = []
    fault = ""
    buffer = bytearray(size)
    try:
        # Not through a memory map: an unreadable sector would end the process with SIGBUS.
        with file.open("rb") as stream:
            length, wanted = os.fstat(stream.fileno()).st_size, len(header) + rows * size
            if length != wanted:
                fault = f"has {length} bytes instead of {wanted}"
            elif stream.read(len(header)) != header:
                fault = "has a damaged header"
            stream.seek(len(header))
            while len(digests) < rows and stream.readinto(buffer) == size:
                digests.append(_digest(buffer))
    except FileNotFoundError:
        fault = "is missing"
    except OSError as error:
        fault = f"can't be read ({error.strerror})"
    return _Content((*digests, *[""] * (rows - len(digests))), fault)


def _header(rows: int, tensor: TensorSpec) -> bytes:
    """A .npy header. NumPy leaves room for the first dimension to grow: the length does not depend on `rows`."""
    text = BytesIO()
    about = {"descr": np.dtype(tensor.dtype).str, "fortran_order": False, "shape": (rows, *tensor.shape)}
    np.lib.format.write_array_header_1_0(text, about)
    return text.getvalue()


def _begin(bucket: _Bucket, old: dict[str, _Rows], tensor: TensorSpec) -> list[_Task]:
    """Makes the bucket's draft, copies into it what an old bucket holds, and returns what must be decoded."""
    tasks = []
    header, size = _header(bucket.rows, tensor), tensor.bytes
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


def _store(task: _Task, answer: pool.Answer | VideoError, tensor: TensorSpec) -> tuple[str, ...]:
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
    with writing(task.draft), task.draft.open("r+b") as draft:
        draft.seek(task.offset)
        draft.write(answer.bodies[tensor.name])
    size = tensor.bytes
    clips = memoryview(answer.bodies[tensor.name])
    return tuple(_digest(clips[start : start + size]) for start in range(0, len(clips), size))


def _finish(bucket: _Bucket) -> None:
    with atomic(bucket.sums) as sums:  # first: a build that resumes later uses no unchecked bucket
        sums.write(json.dumps([one for video in bucket.videos for one in bucket.digests[video.sha256]]).encode())
    with writing(bucket.file):
        with bucket.draft.open("rb") as draft:
            os.fsync(draft.fileno())
        os.replace(bucket.draft, bucket.file)
        sync_folder(bucket.file.parent)


def _write_index(out: Path, plan: list[_Bucket], spec: ClipSpec, tensor: TensorSpec) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    columns: dict[str, list[Any]] = {name: [] for name in _schema(pa).names}
    for bucket in plan:
        for row, (video, clip) in enumerate((v, c) for v in bucket.videos for c in range(len(v.clips))):
            digest = bucket.digests[video.sha256][clip]
            cells = (video.sha256, clip, bucket.number, row, *video.clips[clip], digest)
            for name, cell in zip(columns, cells, strict=True):
                columns[name].append(cell)
    files = {str(bucket.number): bucket.file.name for bucket in plan}
    about: dict[str, Any] = {"spec": spec.to_dict(), "code": provenance.clips(), "files": files}
    if tensor != _unnamed(spec):
        about["tensors"] = [tensor.to_dict()]
    table = pa.table(columns, schema=_schema(pa))
    about["digest"] = _index_digest(about, table.to_pandas())
    with atomic(out / INDEX) as file:
        pq.write_table(table.replace_schema_metadata({_SORA: json.dumps(about)}), file, compression="zstd")


def _unnamed(spec: ClipSpec) -> TensorSpec:
    """The tensor of a set whose index lists none."""
    return MODALITIES["video"].tensors(spec)[VIDEO]


def _named(about: dict[str, Any], spec: ClipSpec) -> TensorSpec:
    """The tensor that an index lists.

    Raises:
        ValueError, TypeError, KeyError: it lists several, or the entry is invalid.
    """
    if "tensors" not in about:
        return _unnamed(spec)
    tensors = [TensorSpec.from_dict(one) for one in about["tensors"]]
    if len(tensors) != 1:
        raise ValueError(
            f"it holds {len(tensors)} tensors ({', '.join(one.name for one in tensors)}), but this Sora reads one"
        )
    return tensors[0]


def _schema(pa: Any) -> Any:
    numbers = [(name, pa.int64()) for name in ("clip", "bucket", "row", "first", "last")]
    return pa.schema([("sha256", pa.string()), *numbers, ("digest", pa.string())])


def _index_digest(about: dict[str, Any], index: pd.DataFrame) -> str:
    """Digest of an index's content, so that a flipped bit in it can't give a clip to another video."""
    digest = hashlib.sha256(json.dumps([about, list(index.columns)], sort_keys=True).encode())
    for name in index.columns:
        values = index[name].to_numpy()
        digest.update(values.tobytes() if values.dtype == np.int64 else "\n".join(values).encode())
    return digest.hexdigest()


class ShardSet:
    """A complete shard set, read through memory maps.

    Attributes:
        spec: how the clips were made.
        tensors: what a clip consists of, by name.
        index: DataFrame, one row per clip, in the order of (sha256, clip): sha256, clip, bucket, row (in the bucket's
            file), first, last (index of the video's frames that the clip spans), digest (of its bytes; missing in sets
            that an older Sora made).
        code: name of the code that made the clips.
        files: bucket → file name.
    """

    def __init__(
        self,
        folder: Path,
        spec: ClipSpec,
        index: pd.DataFrame,
        code: str,
        files: dict[int, str],
        tensor: TensorSpec,
    ) -> None:
        self.folder, self.spec, self.index, self.code, self.files = folder, spec, index, code, files
        self.tensor = tensor
        self.tensors: Mapping[str, TensorSpec] = {tensor.name: tensor}
        self._bucket = index["bucket"].to_numpy()
        self._row = index["row"].to_numpy()
        self._owner = index["sha256"].to_numpy()
        self._maps: dict[int, np.ndarray] = {}
        self._digests = index["digest"].to_numpy() if "digest" in index else None
        self._checked = np.zeros(len(index), bool)

    @classmethod
    def open(cls, folder: Path) -> ShardSet:
        """Reads only the index. Each clip is compared with its digest when it is read for the first time.

        Raises:
            InputError: there is no complete shard set in `folder`, or its index is damaged.
        """
        import pyarrow as pa
        import pyarrow.parquet as pq

        try:
            table = pq.read_table(Path(folder) / INDEX)
            about = json.loads(table.schema.metadata[_SORA])
            spec = ClipSpec.from_dict(about["spec"])
            tensor = _named(about, spec)
            files = {int(number): name for number, name in about["files"].items()}
            index = table.to_pandas(ignore_metadata=True)
            digest = about.pop("digest", None)
            if ("digest" in index or digest is not None) and digest != _index_digest(about, index):
                raise ValueError(f"{INDEX} was changed after it was written")
        except (OSError, pa.ArrowException, ValueError, KeyError, TypeError) as error:
            raise InputError(
                f"{folder} holds no complete shard set: {error}", fix="run `sora run`, which makes it"
            ) from error
        return cls(Path(folder), spec, index, about["code"], files, tensor)

    def __len__(self) -> int:
        """Clips."""
        return len(self._row)

    def read(self, name: str, rows: Sequence[int] | np.ndarray) -> np.ndarray:
        """A tensor of the clips at these positions of `index`, in the order given, as a new array.

        Returns:
            (len(rows), *shape) of dtype, as `tensors[name]` says. `video` is (clips, frames, height, width, rgb) uint8.

        Raises:
            InputError: the set has no tensor of this name.
            ServiceError: a bucket's file is missing, or a clip's bytes are not those that were written.
        """
        if name not in self.tensors:
            raise InputError(
                f"the shards in {self.folder} have no tensor {name!r}, only {', '.join(self.tensors)}",
                fix="`sora run` prepares what the settings ask for",
            )
        rows = np.asarray(rows, np.int64)
        tensor = self.tensors[name]
        out = np.empty((len(rows), *tensor.shape), tensor.dtype)
        # Clip by clip: indexing several at once would copy each twice.
        for place, (bucket, row) in enumerate(zip(self._bucket[rows], self._row[rows], strict=True)):
            out[place] = self._map(int(bucket))[row]
            if self._digests is not None and not self._checked[rows[place]]:
                self._check(int(rows[place]), out[place])
        return out

    def _check(self, place: int, clip: np.ndarray) -> None:
        """Compares exactly the bytes that are returned. Two threads may compare the same clip, which is harmless."""
        assert self._digests is not None
        if _digest(clip.data) != self._digests[place]:
            file = self.folder / self.files[int(self._bucket[place])]
            raise ServiceError(
                f"{file} is damaged: clip {self.index['clip'].iloc[place]} of video "
                f"{self.index['sha256'].iloc[place]} is not what was written",
                fix=_FIX,
            )
        self._checked[place] = True

    @property
    def has_digests(self) -> bool:
        """False if an older Sora made the set: its bytes can't be checked."""
        return self._digests is not None

    def damage(self) -> list[Damage]:
        """Reads every bucket and compares it with the index. Empty: everything is as it was written."""
        verdicts = (self.damage_of(number, content) for number, content in self.contents().items())
        return [damage for damage in verdicts if damage is not None]

    def contents(self) -> dict[int, _Content]:
        """What every bucket's file holds, read by all cores."""
        numbers = list(self.files)
        rows = [int((self._bucket == number).sum()) for number in numbers]
        with ThreadPoolExecutor(pool.cores()) as threads:
            read = threads.map(lambda number, n: _read(self.folder / self.files[number], n, self.tensor), numbers, rows)
            return dict(zip(numbers, read, strict=True))

    def places_of(self, number: int) -> dict[str, np.ndarray]:
        """sha256 of a bucket's videos → positions of their clips in the index."""
        places = np.flatnonzero(self._bucket == number)
        if not len(places):
            return {}
        owners = self._owner[places]  # those of one video are adjacent
        starts = np.flatnonzero(np.concatenate([[True], owners[1:] != owners[:-1]]))
        return dict(zip(owners[starts], np.split(places, starts[1:]), strict=True))

    def damage_of(self, number: int, content: _Content) -> Damage | None:
        """What is wrong with a bucket; without digests only its length, its header and the disk can tell."""
        videos = self.places_of(number)
        lost = set()
        for sha256, places in videos.items():
            there = [content.digests[row] for row in self._row[places]]
            known = self._digests[places] if self._digests is not None else None
            if "" in there or (known is not None and list(known) != there):
                lost.add(sha256)
        if not lost and not content.fault:
            return None
        why = content.fault or "holds other bytes than were written"
        return Damage(self.folder / self.files[number], why, frozenset(lost), len(videos))

    def _map(self, bucket: int) -> np.ndarray:
        if bucket not in self._maps:
            file = self.folder / self.files[bucket]
            try:
                stored = np.load(file, mmap_mode="r", allow_pickle=False)
                tensor = self.tensor
                shape = (int((self._bucket == bucket).sum()), *tensor.shape)
                if stored.shape != shape or stored.dtype != tensor.dtype:
                    raise ValueError(f"it holds {stored.dtype}{stored.shape}, but the index says {tensor.dtype}{shape}")
                self._maps[bucket] = stored
            except (OSError, ValueError, EOFError) as error:
                raise ServiceError(f"{file} can't be read: {error}", fix=_FIX) from error
        return self._maps[bucket]
