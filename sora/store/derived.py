"""Shards that are computed from other shards, clip by clip: a bank of features.

They have the form of `sora.store.shards`: the same clips in the same buckets, other tensors. The index also names the
digest of the clip that each row was computed from. So an added video costs that video, a changed clip is computed
again, and what is stored is compared with its digest before it is kept.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from sora.core.errors import InputError
from sora.core.files import atomic, writing
from sora.core.progress import say
from sora.core.tensors import Clips, TensorSpec
from sora.store.shards import INDEX, Layout, ShardSet, digest_of, read_bucket, write_index

if TYPE_CHECKING:
    import pandas as pd

SOURCE = "source"  # the index's column of the digests of the source's clips
_SUMS = ".sums"  # suffix of what is noted of a finished bucket while a build is unfinished
Progress = Callable[[int, int], None]  # (done, total) clips
Compute = Callable[[Clips], Mapping[str, np.ndarray]]


@dataclass(frozen=True, slots=True)
class DerivedStats:
    """What a build did: clips computed and reused, buckets written and kept as they were."""

    computed: int
    reused: int
    buckets_written: int
    buckets_kept: int


def derive(
    source: ShardSet,
    out: Path,
    tensors: Mapping[str, TensorSpec],
    code: str,
    compute: Compute,
    *,
    batch: int = 4,
    progress: Progress = lambda done, total: None,
) -> DerivedStats:
    """Brings the set in `out` up to date with `source`. Call it again after an interruption: it resumes.

    Args:
        tensors: what `compute` gives for each clip.
        code: name of what computes; results of another name are not reused.
        compute: n ≤ `batch` clips of `source` → their tensors, each with n as its first dimension.

    Raises:
        InputError: an older Sora made the source, without digests.
        ServiceError: a clip of the source is damaged.
        DiskFull: no space is left. Finished buckets stay.
    """
    if not source.has_digests:
        raise InputError(f"the clips in {source.folder} have no digests", fix="`sora run --force` makes them again")
    with writing(out):
        out.mkdir(parents=True, exist_ok=True)
    layout = Layout.of(tensors)
    known = _Known(out, code, layout)
    index = source.index
    files: dict[int, str] = {}
    digests: dict[int, list[str]] = {}
    done = computed = written = 0
    for number in sorted(source.files):
        places = np.flatnonzero(index["bucket"].to_numpy() == number)
        wanted = [str(one) for one in index["digest"].to_numpy()[places]]
        key = hashlib.sha256(json.dumps([code, [one.to_dict() for one in layout.tensors], wanted]).encode()).hexdigest()
        name = f"bucket-{number:04d}-{key[:16]}.npy"
        files[number] = name
        whole = known.bucket(name, len(places))
        if whole is not None:
            digests[number] = whole
        else:
            missing = [int(place) for place, one in zip(places, wanted, strict=True) if one not in known]
            if missing:
                progress(done, len(index))
            fresh = _computed(source, missing, compute, layout, batch)
            rows: list[bytes] = []
            for one in wanted:
                if one in known:
                    rows.append(known.clip(one))
                else:
                    rows.append(next(fresh))
                    computed += 1
                    progress(done + len(rows), len(index))
            digests[number] = [digest_of(row) for row in rows]
            with atomic(out / name) as file:
                file.write(layout.header(len(rows)) + b"".join(rows))
            known.remember(name, wanted, rows)
            written += 1
        done += len(places)
    columns = {name: index[name] for name in ("sha256", "clip", "bucket", "row", "first", "last")}
    by_place = [digests[int(bucket)][int(row)] for bucket, row in zip(index["bucket"], index["row"], strict=True)]
    write_index(out, source.spec, code, files, layout, _frame(columns, by_place, index["digest"]))
    for left in out.glob("bucket-*.npy*"):
        if left.name not in files.values():  # also what was noted for an interrupted build
            left.unlink(missing_ok=True)
    return DerivedStats(computed, len(index) - computed, written, len(files) - written)


def _frame(columns: Mapping[str, pd.Series], digest: list[str], source: pd.Series) -> pd.DataFrame:
    import pandas as pd

    return pd.DataFrame({**columns, "digest": digest, SOURCE: source})


def _computed(source: ShardSet, places: list[int], compute: Compute, layout: Layout, batch: int) -> Iterator[bytes]:
    """The bytes of each clip's row."""
    for start in range(0, len(places), batch):
        some = source.clips(places[start : start + batch])
        made = compute(some)
        bodies = {one.name: np.ascontiguousarray(made[one.name], one.dtype) for one in layout.tensors}
        packed = layout.packed(bodies)
        for row in range(len(some)):
            yield bytes(packed[row * layout.size : (row + 1) * layout.size])


class _Known:
    """What an earlier build left intact: rows by the digest of the clip that they were computed from."""

    def __init__(self, out: Path, code: str, layout: Layout) -> None:
        self._out, self._layout = out, layout
        self._rows: dict[str, tuple[Path, int]] = {}  # digest of the source's clip → file, byte
        self._whole: dict[str, list[str]] = {}  # name of a file without damage → digests of its rows
        if not (out / INDEX).exists():
            self._unfinished()
            return
        try:
            old = ShardSet.open(out)
        except InputError as error:
            say(f"{out / INDEX} is damaged and is made again: {error.message}")
            return
        if old.code != code or old.layout != layout or SOURCE not in old.index:
            return
        self._take(old)
        self._unfinished()

    def _take(self, old: ShardSet) -> None:
        for number, content in old.contents().items():
            damage = old.damage_of(number, content)
            if damage is not None:
                say(f"{damage}; they are computed again")
            of_bucket = old.index[old.index["bucket"] == number]
            for row, digest, source in zip(of_bucket["row"], of_bucket["digest"], of_bucket[SOURCE], strict=True):
                if content.digests[int(row)] == digest:
                    self._place(old.folder / old.files[number], int(row), str(source))
            if damage is None:
                self._whole[old.files[number]] = list(content.digests)

    def _unfinished(self) -> None:
        """Buckets that an interrupted build finished; beside each lies what it was computed from."""
        for sums in self._out.glob(f"bucket-*.npy{_SUMS}"):
            try:
                stored = json.loads(sums.read_text(encoding="utf-8"))
                sources, digests = list(stored["sources"]), list(stored["digests"])
            except (OSError, ValueError, TypeError, KeyError):
                continue
            file = sums.with_name(sums.name.removesuffix(_SUMS))
            content = read_bucket(file, len(digests), self._layout)
            if not content.fault and list(content.digests) == digests:
                self._whole[file.name] = digests
                for row, source in enumerate(sources):
                    self._place(file, row, source)

    def _place(self, file: Path, row: int, source: str) -> None:
        self._rows[source] = (file, len(self._layout.header(0)) + row * self._layout.size)

    def __contains__(self, source: str) -> bool:
        return source in self._rows

    def clip(self, source: str) -> bytes:
        file, offset = self._rows[source]
        with file.open("rb") as stream:
            stream.seek(offset)
            return stream.read(self._layout.size)

    def bucket(self, name: str, rows: int) -> list[str] | None:
        """The digests of a file that is there and whole, else None."""
        digests = self._whole.get(name)
        return digests if digests is not None and len(digests) == rows else None

    def remember(self, name: str, sources: list[str], rows: list[bytes]) -> None:
        """Notes a finished bucket, for a build that is interrupted before its index."""
        stored = {"sources": sources, "digests": [digest_of(row) for row in rows]}
        with atomic(self._out / f"{name}{_SUMS}") as file:
            file.write(json.dumps(stored).encode())
