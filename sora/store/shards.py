"""Shards: the clips of accepted videos, ready to be read by training. They know neither labels nor splits.

    index.parquet                 one row per clip: its place and its digest. It is written last: a folder without it
                                  is not a complete shard set
    bucket-0003-<key>.npy         the clips, in the order of (sha256, clip); its header has dtype and shape
    .bucket-0003-<key>.npy.sums   only while a build is unfinished: the digests of a finished bucket's clips

Tensors have names. The index lists them under `tensors`, with dtype and shape. An index without that list has the
tensor `video`, `(frames, height, width, rgb) uint8`. Earlier versions wrote such an index, and it is still written
for videos alone, so the bytes of a set stay what they were. A bucket of several tensors is an array of records: the
tensors of a clip lie side by side, so a clip stays one piece with one digest.

A video's bucket follows from its sha256. A bucket's key follows from its intended content and from the code that makes
clips. So the same videos give the same bytes, an added video rewrites only its own bucket, an existing file is
complete, and an interrupted build makes only the buckets that are missing.

Disks and people damage files. A build (`sora.store.building`, `sora.store.derived`) therefore reads what exists and
compares it with the digests before it keeps or copies a byte, and makes damaged clips again. A reader also compares a
clip when it reads it for the first time. The digests find damage. They don't stop somebody who rewrites the index as
well.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from sora.core.errors import InputError, ServiceError
from sora.core.files import atomic
from sora.core.records import ClipSpec
from sora.core.tensors import VIDEO, Clips, TensorSpec
from sora.media import MODALITIES, pool

if TYPE_CHECKING:
    import pandas as pd
    from typing_extensions import Buffer

INDEX = "index.parquet"
_SORA = b"sora.shards"
_FIX = "`sora run --force` makes the damaged clips again from the videos; in a restored folder, restore it again"
_COUNTS = ("clip", "bucket", "row", "first", "last")  # the index's columns of whole numbers


@dataclass(frozen=True)
class Layout:
    """How a clip lies in a bucket's file."""

    tensors: tuple[TensorSpec, ...]

    @classmethod
    def of(cls, tensors: Mapping[str, TensorSpec]) -> Layout:
        return cls(tuple(tensors.values()))

    @cached_property
    def dtype(self) -> np.dtype[Any]:
        """Of the file: the only tensor's, or records with a field for each tensor."""
        if len(self.tensors) == 1:
            return np.dtype(self.tensors[0].dtype)
        return np.dtype([(one.name, one.dtype, one.shape) for one in self.tensors])

    @property
    def shape(self) -> tuple[int, ...]:
        """Of a clip in the file."""
        return self.tensors[0].shape if len(self.tensors) == 1 else ()

    @cached_property
    def size(self) -> int:
        """Bytes of a clip."""
        return sum(one.bytes for one in self.tensors)

    def header(self, rows: int) -> bytes:
        """A .npy header. NumPy leaves room for the first dimension to grow: the length does not depend on `rows`."""
        text = BytesIO()
        descr = np.lib.format.dtype_to_descr(self.dtype)
        about = {"descr": descr, "fortran_order": False, "shape": (rows, *self.shape)}
        np.lib.format.write_array_header_1_0(text, about)
        return text.getvalue()

    def packed(self, bodies: Mapping[str, bytes | bytearray | np.ndarray]) -> memoryview:
        """The clips' bytes as they lie in the file, from the bytes of each of their tensors."""
        if len(self.tensors) == 1:
            only = bodies[self.tensors[0].name]
            return (only.data if isinstance(only, np.ndarray) else memoryview(only)).cast("B")
        columns = [np.frombuffer(bodies[one.name], np.uint8).reshape(-1, one.bytes) for one in self.tensors]
        return np.concatenate(columns, axis=1).data.cast("B")

    def tensor(self, stored: np.ndarray, name: str) -> np.ndarray:
        """A tensor of clips that were read from the file."""
        return stored if len(self.tensors) == 1 else stored[name]


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
class Content:
    """What a bucket's file holds: the digests of its clips ("" if it can't be read), and other faults."""

    digests: tuple[str, ...]
    fault: str


def digest_of(clip: Buffer) -> str:
    """Digest of a clip's bytes: 128 bits of SHA-256, computed in hardware by processors: faster than MD5 and BLAKE2."""
    return hashlib.sha256(clip).hexdigest()[:32]


def md5_of(file: Path) -> str:
    """The MD5 as DVC computes it; "" if the file can't be read."""
    try:
        with file.open("rb") as stream:
            return hashlib.file_digest(stream, "md5").hexdigest()
    except OSError:
        return ""


def read_bucket(file: Path, rows: int, layout: Layout) -> Content:
    """Reads a bucket's file from start to end. It never raises for what it finds there."""
    header, size = layout.header(rows), layout.size
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
                digests.append(digest_of(buffer))
    except FileNotFoundError:
        fault = "is missing"
    except OSError as error:
        fault = f"can't be read ({error.strerror})"
    return Content((*digests, *[""] * (rows - len(digests))), fault)


def write_index(
    out: Path, spec: ClipSpec, code: str, files: Mapping[int, str], layout: Layout, rows: pd.DataFrame
) -> None:
    """Writes the index: afterwards the set is complete.

    Args:
        files: bucket → file name.
        rows: the columns of `ShardSet.index`.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    kinds = [(name, pa.int64() if name in _COUNTS else pa.string()) for name in rows.columns]
    about: dict[str, Any] = {
        "spec": spec.to_dict(), "code": code, "files": {str(number): name for number, name in files.items()},
    }  # fmt: skip
    if layout != unnamed(spec):
        about["tensors"] = [one.to_dict() for one in layout.tensors]
    table = pa.table({name: list(rows[name]) for name in rows.columns}, schema=pa.schema(kinds))
    about["digest"] = _index_digest(about, table.to_pandas())
    with atomic(out / INDEX) as file:
        pq.write_table(table.replace_schema_metadata({_SORA: json.dumps(about)}), file, compression="zstd")


def unnamed(spec: ClipSpec) -> Layout:
    """The layout of a set whose index lists no tensors."""
    return Layout((MODALITIES["video"].tensors(spec)[VIDEO],))


def _named(about: dict[str, Any], spec: ClipSpec) -> Layout:
    """The tensors that an index lists.

    Raises:
        ValueError, TypeError, KeyError: it lists none, or an entry is invalid.
    """
    if "tensors" not in about:
        return unnamed(spec)
    tensors = tuple(TensorSpec.from_dict(one) for one in about["tensors"])
    if not tensors or len({one.name for one in tensors}) < len(tensors):
        raise ValueError("its tensors have no names, or one name twice")
    return Layout(tensors)


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
        layout: Layout,
    ) -> None:
        self.folder, self.spec, self.index, self.code, self.files = folder, spec, index, code, files
        self.layout = layout
        self.tensors: Mapping[str, TensorSpec] = {one.name: one for one in layout.tensors}
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
            layout = _named(about, spec)
            files = {int(number): name for number, name in about["files"].items()}
            index = table.to_pandas(ignore_metadata=True)
            digest = about.pop("digest", None)
            if ("digest" in index or digest is not None) and digest != _index_digest(about, index):
                raise ValueError(f"{INDEX} was changed after it was written")
        except (OSError, pa.ArrowException, ValueError, KeyError, TypeError) as error:
            raise InputError(
                f"{folder} holds no complete shard set: {error}", fix="run `sora run`, which makes it"
            ) from error
        return cls(Path(folder), spec, index, about["code"], files, layout)

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
            stored = self._map(int(bucket))[row : row + 1]
            if self._digests is None or self._checked[rows[place]]:
                out[place] = self.layout.tensor(stored, name)[0]
            elif len(self.tensors) == 1:
                out[place] = stored[0]
                self._check(int(rows[place]), out[place])
            else:
                stored = stored.copy()
                self._check(int(rows[place]), stored)
                out[place] = stored[name][0]
        return out

    def clips(self, rows: Sequence[int] | np.ndarray) -> Clips:
        """All tensors of the clips at these positions of `index`, in the order given. Raises: as `read`."""
        return Clips({name: self.read(name, rows) for name in self.tensors})

    def _check(self, place: int, clip: np.ndarray) -> None:
        """Compares exactly the bytes that are returned. Two threads may compare the same clip, which is harmless."""
        assert self._digests is not None
        if digest_of(clip.view(np.uint8).data if clip.dtype.names else clip.data) != self._digests[place]:
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

    def contents(self) -> dict[int, Content]:
        """What every bucket's file holds, read by all cores."""
        numbers = list(self.files)
        rows = [int((self._bucket == number).sum()) for number in numbers]
        with ThreadPoolExecutor(pool.cores()) as threads:
            read = threads.map(
                lambda number, n: read_bucket(self.folder / self.files[number], n, self.layout), numbers, rows
            )
            return dict(zip(numbers, read, strict=True))

    def places_of(self, number: int) -> dict[str, np.ndarray]:
        """sha256 of a bucket's videos → positions of their clips in the index."""
        places = np.flatnonzero(self._bucket == number)
        if not len(places):
            return {}
        owners = self._owner[places]  # those of one video are adjacent
        starts = np.flatnonzero(np.concatenate([[True], owners[1:] != owners[:-1]]))
        return dict(zip(owners[starts], np.split(places, starts[1:]), strict=True))

    def damage_of(self, number: int, content: Content) -> Damage | None:
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
                shape, dtype = (int((self._bucket == bucket).sum()), *self.layout.shape), self.layout.dtype
                if stored.shape != shape or stored.dtype != dtype:
                    raise ValueError(f"it holds {stored.dtype}{stored.shape}, but the index says {dtype}{shape}")
                self._maps[bucket] = stored
            except (OSError, ValueError, EOFError) as error:
                raise ServiceError(f"{file} can't be read: {error}", fix=_FIX) from error
        return self._maps[bucket]
