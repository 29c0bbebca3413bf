"""The manifest: what every file of a data folder is, found by decoding each once.

A pandas DataFrame with the columns of `records.VideoRecord`, a row a file, sorted by path. Facts belong to bytes: a
file whose sha256 was decoded before, by the same code, is not decoded again, however it is called now.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import fields
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from sora import pool, provenance
from sora.data.scan import Found, scan
from sora.errors import InputError, VideoError
from sora.files import atomic, writing
from sora.records import VideoRecord
from sora.settings import Settings

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["Found", "build", "read", "scan", "write"]

Progress = Callable[[int, int], None]  # (done, total)

COLUMNS = tuple(field.name for field in fields(VideoRecord))
_FACTS = ("codec", "width", "height", "rotation", "frames", "fps", "duration", "audio", "brightness", "signature")
_NOTHING: dict[str, Any] = dict(zip(_FACTS, ("", 0, 0, 0, 0, 0.0, 0.0, False, 0.0, ""), strict=True))
_OF_BYTES = {None, "not_a_video", "unreadable", "truncated"}  # verdicts that decoding gives
_OF_PLACE = {"unlabelled", "unknown_label"}  # verdicts that stand where decoding found nothing wrong
_CRASHED = "the decoder crashed"  # may be the machine's fault: tried again the next time
_TAG = "sora.facts"


def build(
    folder: Path,
    settings: Settings,
    *,
    previous: pd.DataFrame | None = None,
    journal: Path | None = None,
    workers: int = 0,
    progress: Progress | None = None,
) -> pd.DataFrame:
    """Scans and decodes a data folder.

    Args:
        previous: an earlier manifest (`read`, or made by this process), whose facts are reused by sha256.
        journal: a file that facts are appended to as they are found (JSON lines), so that an interrupted call resumes.
            Remove it once the manifest is written.
        workers: processes that decode; 0: one a core.
        progress: called with (done, total) files.

    Raises:
        InputError: the folder or its `labels.csv` can't be used (see `scan`).
        DiskFull, ServiceError: the journal can't be written; worker processes can't start.
    """
    found = scan(folder, settings)
    name = provenance.facts()
    facts = {**_reusable(previous, name), **_journalled(journal, name)}
    total, done = len(found), 0

    def step() -> None:
        nonlocal done
        done += 1
        if progress:
            progress(done, total)

    if progress:
        progress(0, total)
    digests = dict(zip((one.path for one in found), _digests(folder, found), strict=True))
    by_sha: dict[str, list[str]] = {}
    for one in found:
        sha256 = digests[one.path][0]
        if sha256 and sha256 not in facts:
            by_sha.setdefault(sha256, []).append(one.path)
        else:
            step()
    items = ((str(folder / paths[0]), sha256) for sha256, paths in by_sha.items())
    crew = min(workers or pool.cores(), max(1, len(by_sha)))
    with (
        _appending(journal) as note,
        contextlib.closing(pool.each(_decode, items, workers=crew, crashed=_crash)) as results,
    ):
        for (_, sha256), result in results:
            facts[sha256] = result
            if note is not None and not result["detail"].startswith(_CRASHED):
                with writing(Path(note.name)):
                    note.write(json.dumps({"tag": name, "sha256": sha256, **result}) + "\n")
                    note.flush()
            for _ in by_sha[sha256]:
                step()
    return _table([_record(one, *digests[one.path], facts) for one in found], name)


def _record(one: Found, sha256: str, size: int, complaint: str, facts: dict[str, dict[str, Any]]) -> VideoRecord:
    """A row. What the bytes are goes before where the file lies: a stray text file is `not_a_video`, not unlabelled."""
    known = facts.get(sha256, {**_NOTHING, "error": None, "detail": ""})
    error, detail = known["error"], known["detail"]
    if complaint:
        error, detail = "unreadable", complaint
    elif error is None:
        error, detail = one.problem, one.detail
    return VideoRecord(
        path=one.path, sha256=sha256, bytes=size, label=one.label, group=one.group,
        **{key: known[key] for key in _FACTS}, error=error, detail=detail,
    )  # fmt: skip


def _decode(item: tuple[str, str]) -> dict[str, Any]:
    """In a worker process: (file, sha256) → facts, `error` and `detail`."""
    from sora.video import decode

    try:
        facts = decode.inspect(item[0])
    except VideoError as error:
        return {**_NOTHING, "error": error.rule, "detail": error.message}
    truncated = {"error": "truncated", "detail": facts.truncated} if facts.truncated else {"error": None, "detail": ""}
    return {**{key: getattr(facts, key) for key in _FACTS}, **truncated}


def _crash(item: tuple[str, str], how: str) -> dict[str, Any]:
    return {**_NOTHING, "error": "unreadable", "detail": f"{_CRASHED}: it {how}"}


def _digests(folder: Path, found: list[Found]) -> Iterator[tuple[str, int, str]]:
    """(sha256, bytes, complaint) of each file; no sha256 of what is never opened."""

    def one(item: Found) -> tuple[str, int, str]:
        if item.problem not in {None, *_OF_PLACE}:
            return "", 0, ""
        path = folder / item.path
        try:
            with open(path, "rb", opener=_no_link) as file:
                return hashlib.file_digest(file, "sha256").hexdigest(), os.fstat(file.fileno()).st_size, ""
        except OSError as error:
            return "", 0, f"can't be read: {error.strerror}"

    with ThreadPoolExecutor(pool.cores()) as threads:
        yield from threads.map(one, found)


def _no_link(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK)


# --- what was found before ------------------------------------------------------------------------------------------


def _reusable(previous: pd.DataFrame | None, name: str) -> dict[str, dict[str, Any]]:
    """sha256 → facts of an earlier manifest by the same code."""
    if previous is None or previous.attrs.get(_TAG) != name:
        return {}
    facts = {}
    for row in previous.to_dict("records"):
        error = row["error"] if isinstance(row["error"], str) else None
        if row["sha256"] and error in _OF_BYTES | _OF_PLACE and not row["detail"].startswith(_CRASHED):
            verdict = (error, row["detail"]) if error in _OF_BYTES else (None, "")
            facts[row["sha256"]] = {**{key: row[key] for key in _FACTS}, "error": verdict[0], "detail": verdict[1]}
    return facts


def _journalled(journal: Path | None, name: str) -> dict[str, dict[str, Any]]:
    """sha256 → facts of an interrupted call by the same code. A last line that is cut off counts for nothing."""
    facts: dict[str, dict[str, Any]] = {}
    if journal is None or not journal.exists():
        return facts
    with journal.open(encoding="utf-8", errors="replace") as lines:
        for line in lines:
            with contextlib.suppress(ValueError, KeyError, TypeError):
                entry = json.loads(line)
                if entry["tag"] == name and entry["error"] in _OF_BYTES:
                    facts[entry["sha256"]] = {key: entry[key] for key in (*_FACTS, "error", "detail")}
    return facts


@contextlib.contextmanager
def _appending(journal: Path | None) -> Iterator[IO[str] | None]:
    if journal is None:
        yield None
        return
    with writing(journal):
        journal.parent.mkdir(parents=True, exist_ok=True)
        file = journal.open("a+b")
    with file:
        if file.tell():
            file.seek(-1, os.SEEK_END)
            if file.read(1) != b"\n":  # a kill cut the last line off
                file.write(b"\n")
    with journal.open("a", encoding="utf-8") as note:
        yield note


# --- the table ------------------------------------------------------------------------------------------------------


def _table(records: list[VideoRecord], name: str) -> pd.DataFrame:
    import pandas as pd

    table = pd.DataFrame({column: [getattr(record, column) for record in records] for column in COLUMNS})
    table = table.astype({"audio": bool, "fps": float, "duration": float, "brightness": float})
    for column in ("label", "group", "error"):
        table[column] = table[column].astype(object).where(table[column].notna(), None)
    table.attrs[_TAG] = name
    return table


def write(manifest: pd.DataFrame, path: Path) -> None:
    """As Parquet: whole or not at all, and the same bytes for the same rows.

    Raises:
        DiskFull, ServiceError: it can't be written.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    schema = pa.schema(
        [(field.name, _arrow_type(pa, str(field.type))) for field in fields(VideoRecord)],
        metadata={_TAG: str(manifest.attrs.get(_TAG, ""))},
    )
    table = pa.Table.from_pandas(manifest[list(COLUMNS)], schema=schema, preserve_index=False)
    with atomic(path) as file:
        pq.write_table(table.replace_schema_metadata(schema.metadata), file, compression="zstd")


def _arrow_type(pa: Any, annotation: str) -> Any:
    return {"int": pa.int64(), "float": pa.float64(), "bool": pa.bool_()}.get(annotation, pa.string())


def read(path: Path) -> pd.DataFrame:
    """A manifest that `write` wrote.

    Raises:
        InputError: it is not there, or none.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        table = pq.read_table(path)
    except (OSError, pa.ArrowException) as error:
        raise InputError(f"{path} is no manifest: {error}", mend="run `sora run`, which writes it") from error
    if table.column_names != list(COLUMNS):
        raise InputError(f"{path} has other columns than a manifest", mend="remove it and run `sora run`")
    manifest = table.to_pandas(ignore_metadata=True)
    manifest.attrs[_TAG] = (table.schema.metadata or {}).get(_TAG.encode(), b"").decode()
    return manifest
