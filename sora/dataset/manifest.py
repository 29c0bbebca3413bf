"""The manifest: what every file of a data folder is. Each is decoded once.

A pandas DataFrame with the columns of `records.VideoRecord`, one row per file, sorted by path. Facts belong to bytes: a
file whose sha256 was decoded before, by the same code, is not decoded again, whatever its name is now.
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

from sora.config import Settings, Validate
from sora.core import provenance
from sora.core.errors import InputError, VideoError
from sora.core.files import atomic, writing
from sora.core.records import VideoRecord
from sora.dataset.scan import Found, scan
from sora.media import MODALITY, pool

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["Found", "build", "read", "scan", "write"]

Progress = Callable[[int, int], None]  # (done, total)
Complaint = tuple[str, str] | None  # (rule, detail) of a file that is not to be decoded

COLUMNS = tuple(field.name for field in fields(VideoRecord))
_NOTHING: dict[str, Any] = dict(MODALITY.facts)  # the facts of a file that could not be read
_FACTS = tuple(_NOTHING)
_OF_BOUNDS = {"too_large", "too_slow"}  # verdicts of decoding that hold as long as the bounds stay the same
_OF_BYTES = {None, "not_a_video", "unreadable", "truncated", *_OF_BOUNDS}  # verdicts that decoding gives
_OF_PLACE = {"unlabelled", "unknown_label"}  # verdicts that hold if decoding found nothing wrong
_CRASHED = "the decoder crashed"  # may be the machine's fault: tried again the next time
_TAG, _BOUNDS = "sora.facts", "sora.bounds"
_TEXT = 200  # characters of a fact at most


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
        journal: a file to which facts are appended at once (JSON lines), so that an interrupted call resumes.
            Remove it once the manifest is written.
        workers: processes that decode; 0: one per core.
        progress: called with (done, total) files.

    Raises:
        InputError: the folder or its `labels.csv` can't be used (see `scan`).
        DiskFull, ServiceError: the journal can't be written; worker processes can't start.
    """
    files = scan(folder, settings)
    name = provenance.facts()
    rules = settings.validate_
    limits = json.dumps(rules.decoding(), sort_keys=True)
    facts = {**_reusable(previous, name, limits), **_journalled(journal, name, limits)}
    total, done = len(files), 0

    def step() -> None:
        nonlocal done
        done += 1
        if progress:
            progress(done, total)

    if progress:
        progress(0, total)
    digests = dict(zip((one.path for one in files), _digests(folder, files, rules.max_bytes), strict=True))
    by_sha: dict[str, list[str]] = {}
    for one in files:
        sha256 = digests[one.path][0]
        if sha256 and sha256 not in facts:
            by_sha.setdefault(sha256, []).append(one.path)
        else:
            step()
    jobs = (pool.Job(sha256, folder / paths[0]) for sha256, paths in by_sha.items())
    crew = min(workers or pool.cores(), max(1, len(by_sha)))
    with (
        _appending(journal) as note,
        contextlib.closing(pool.each(jobs, pool.Bounds.of_data(rules), clips=False, workers=crew)) as results,
    ):
        for job, answer in results:
            sha256, result = job.item, _result(answer)
            facts[sha256] = result
            if note is not None and not result["detail"].startswith(_CRASHED):
                with writing(Path(note.name)):
                    note.write(json.dumps({"tag": name, "bounds": limits, "sha256": sha256, **result}) + "\n")
                    note.flush()
            for _ in by_sha[sha256]:
                step()
    return _table([_record(one, *digests[one.path], facts, rules) for one in files], name, limits)


def _record(
    one: Found, sha256: str, size: int, complaint: Complaint, facts: dict[str, dict[str, Any]], rules: Validate
) -> VideoRecord:
    """A row. What the bytes are precedes where the file is: a stray text file is `not_a_video`, not unlabelled."""
    known = facts.get(sha256, {**_NOTHING, "error": None, "detail": ""})
    error, detail = known["error"], known["detail"]
    if complaint:
        error, detail = complaint
    elif error is None and (beyond := _beyond(known, rules)):
        error, detail = "too_large", beyond
    elif error is None:
        error, detail = one.problem, one.detail
    return VideoRecord(
        path=one.path, sha256=sha256, bytes=size, label=one.label, group=one.group,
        **{key: known[key] for key in _FACTS}, error=error, detail=detail,
    )  # fmt: skip


def _result(answer: pool.Answer | VideoError) -> dict[str, Any]:
    """Facts, `error` and `detail`, checked: a decoder's answer is no more trustworthy than its file."""
    try:
        if isinstance(answer, VideoError):
            raise answer
        facts = answer.header["facts"]
        for name, nothing in _NOTHING.items():
            if type(facts[name]) is not type(nothing) or len(str(facts[name])) > _TEXT:
                raise pool.Crashed(f"it answered nonsense about {name}", rule="unreadable")
        truncated = facts["truncated"]
    except pool.Crashed as error:
        return {**_NOTHING, "error": "unreadable", "detail": f"{_CRASHED}: {error.message}"}
    except VideoError as error:
        return {**_NOTHING, "error": error.rule, "detail": error.message}
    except (KeyError, TypeError) as error:
        return {**_NOTHING, "error": "unreadable", "detail": f"{_CRASHED}: it answered nonsense: {error!r}"}
    verdict = ("truncated", str(truncated)) if truncated else (None, "")
    return {**{key: facts[key] for key in _FACTS}, "error": verdict[0], "detail": verdict[1]}


def _beyond(facts: dict[str, Any], rules: Validate) -> str:
    """Which limit is exceeded by facts that were collected under other limits, in the words of `video.ffmpeg`."""
    frames = facts["frames"]
    if not frames:
        return ""
    if facts["width"] * facts["height"] > rules.max_pixels:
        return f"{facts['width']}x{facts['height']} pixels, allowed are {rules.max_pixels:,}"
    if frames > rules.max_frames:
        return f"more than {rules.max_frames:,} frames"
    if facts["duration"] * (frames - 1) / frames > rules.max_seconds:
        return f"longer than {rules.max_seconds:g} seconds"
    return ""


def _digests(folder: Path, files: list[Found], max_bytes: int) -> Iterator[tuple[str, int, Complaint]]:
    """(sha256, bytes, complaint) of each file; no sha256 if it is never opened or is beyond `max_bytes`."""

    def one(item: Found) -> tuple[str, int, Complaint]:
        if item.problem not in {None, *_OF_PLACE}:
            return "", 0, None
        path = folder / item.path
        try:
            with open(path, "rb", opener=_no_link) as file:
                size = os.fstat(file.fileno()).st_size
                if size > max_bytes:
                    return "", size, ("too_large", f"{size:,} bytes, allowed are {max_bytes:,}")
                return hashlib.file_digest(file, "sha256").hexdigest(), os.fstat(file.fileno()).st_size, None
        except OSError as error:
            return "", 0, ("unreadable", f"can't be read: {error.strerror}")

    with ThreadPoolExecutor(pool.cores()) as threads:
        yield from threads.map(one, files)


def _no_link(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK)


# --- earlier facts --------------------------------------------------------------------------------------------------


def _reusable(previous: pd.DataFrame | None, name: str, limits: str) -> dict[str, dict[str, Any]]:
    """sha256 → facts of an earlier manifest by the same code. Files beyond other bounds are judged again."""
    if previous is None or previous.attrs.get(_TAG) != name:
        return {}
    facts = {}
    lasting = _OF_BYTES if previous.attrs.get(_BOUNDS) == limits else _OF_BYTES - _OF_BOUNDS
    for row in previous.to_dict("records"):
        error = row["error"] if isinstance(row["error"], str) else None
        if error in _OF_BOUNDS and row["frames"]:  # all its facts are known: `_record` judges it again
            error = None
        if row["sha256"] and error in lasting | _OF_PLACE and not row["detail"].startswith(_CRASHED):
            verdict = (error, row["detail"]) if error in _OF_BYTES else (None, "")
            facts[row["sha256"]] = {**{key: row[key] for key in _FACTS}, "error": verdict[0], "detail": verdict[1]}
    return facts


def _journalled(journal: Path | None, name: str, limits: str) -> dict[str, dict[str, Any]]:
    """sha256 → facts of an interrupted call by the same code. A last line that is cut off is ignored."""
    facts: dict[str, dict[str, Any]] = {}
    if journal is None or not journal.exists():
        return facts
    with journal.open(encoding="utf-8", errors="replace") as lines:
        for line in lines:
            with contextlib.suppress(ValueError, KeyError, TypeError):
                entry = json.loads(line)
                lasting = _OF_BYTES if entry.get("bounds") == limits else _OF_BYTES - _OF_BOUNDS
                if entry["tag"] == name and entry["error"] in lasting:
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


def _table(records: list[VideoRecord], name: str, limits: str) -> pd.DataFrame:
    import pandas as pd

    table = pd.DataFrame({column: [getattr(record, column) for record in records] for column in COLUMNS})
    table = table.astype({"audio": bool, "fps": float, "duration": float, "brightness": float})
    for column in ("label", "group", "error"):
        table[column] = table[column].astype(object).where(table[column].notna(), None)
    table.attrs[_TAG], table.attrs[_BOUNDS] = name, limits
    return table


def write(manifest: pd.DataFrame, path: Path) -> None:
    """Writes Parquet: whole or not at all, and the same bytes for the same rows.

    Raises:
        DiskFull, ServiceError: it can't be written.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    schema = pa.schema(
        [(field.name, _arrow_type(pa, str(field.type))) for field in fields(VideoRecord)],
        metadata={name: str(manifest.attrs.get(name, "")) for name in (_TAG, _BOUNDS)},
    )
    table = pa.Table.from_pandas(manifest[list(COLUMNS)], schema=schema, preserve_index=False)
    with atomic(path) as file:
        pq.write_table(table.replace_schema_metadata(schema.metadata), file, compression="zstd")


def _arrow_type(pa: Any, annotation: str) -> Any:
    return {"int": pa.int64(), "float": pa.float64(), "bool": pa.bool_()}.get(annotation, pa.string())


def read(path: Path) -> pd.DataFrame:
    """A manifest that `write` wrote.

    Raises:
        InputError: the file does not exist, or is not a manifest.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        table = pq.read_table(path)
    except (OSError, pa.ArrowException) as error:
        raise InputError(f"{path} is not a manifest: {error}", fix="run `sora run`, which writes it") from error
    if table.column_names != list(COLUMNS):
        raise InputError(f"{path} does not have a manifest's columns", fix="remove it and run `sora run`")
    manifest = table.to_pandas(ignore_metadata=True)
    for name in (_TAG, _BOUNDS):
        manifest.attrs[name] = (table.schema.metadata or {}).get(name.encode(), b"").decode()
    return manifest
