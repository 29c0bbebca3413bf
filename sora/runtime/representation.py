"""The champion's representation: vectors of videos, and the training clips nearest to one.

The vectors of the training clips are computed once per version and kept beside its model file in the cache, so they
are removed with it (`sora gc`). They depend only on the model and on how clips are made: labels and paths are
looked up when needed, and a video added since costs only its own clips.
"""

from __future__ import annotations

import hashlib
import json
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from sora.config import Project
from sora.core.errors import InputError, VideoError
from sora.core.files import atomic, temporary_folder
from sora.core.progress import say
from sora.core.records import Recipe
from sora.core.tensors import Clips
from sora.media import pool

if TYPE_CHECKING:
    import pandas as pd

    from sora.runtime.predictor import Predictor

Progress = Callable[[int, int], None]  # (done, total) videos
_CHUNK = 32  # clips in memory at a time


@dataclass(frozen=True, slots=True)
class Vectors:
    """Vectors of clips: `sha256 (n,) text` of the video, `clip (n,) int` in it, `values (n, width) float32`."""

    sha256: np.ndarray
    clip: np.ndarray
    values: np.ndarray

    def joined(self, other: Vectors) -> Vectors:
        pairs = ((self.sha256, other.sha256), (self.clip, other.clip), (self.values, other.values))
        return Vectors(*(np.concatenate(pair) for pair in pairs))


def embed(project: Project, files: list[Path]) -> list[dict[str, Any]]:
    """The champion's vectors: {"path", "vector": [float], "version"} or {"path", "error"} per file, in order.

    A video's vector is the mean over its clips.

    Raises:
        InputError: there is no champion yet.
    """
    from sora.runtime.lifecycle import champion, open_registry
    from sora.runtime.predictor import Predictor, decoded

    with open_registry(project) as registry:
        version, model_file, recipe = champion(project, registry)
    limits = project.settings().serve
    predictor: Predictor | None = None
    answers: list[dict[str, Any]] = []
    with closing(decoded(files, recipe, limits)) as all_clips:
        for path, clips in zip(files, all_clips, strict=True):
            if isinstance(clips, InputError):
                answers.append({"path": str(path), "error": clips.message})
                continue
            predictor = predictor or Predictor(model_file, recipe, version)
            vector = predictor.embeddings(clips).mean(axis=0)
            answers.append({"path": str(path), "vector": vector.tolist(), "version": version})
    return answers


def write(path: Path, answers: list[dict[str, Any]]) -> None:
    """Writes the vectors of `embed`'s answers as a .npy file, `(answers, width) float32`, whole or not at all.

    Raises:
        DiskFull, ServiceError: it can't be written.
    """
    with atomic(path) as file:
        np.save(file, np.array([answer["vector"] for answer in answers], np.float32), allow_pickle=False)


def similar(
    project: Project, file: Path, *, count: int = 5, progress: Progress = lambda done, total: None
) -> dict[str, Any]:
    """The `count` videos nearest to `file` among those that the champion learned from and that still exist.

    Returns {"path", "version", "neighbours": [{"path" (below data/), "label", "clip", "similarity"}]}, nearest first.
    `similarity` is the cosine between the file's vector and the video's nearest clip, which `clip` numbers from 0.

    Raises:
        InputError: there is no champion yet, the file can't be used, or none of the training videos is left.
    """
    from sora.runtime.lifecycle import champion, open_registry
    from sora.runtime.predictor import Predictor, clips_of

    with open_registry(project) as registry:
        version, model_file, recipe = champion(project, registry)
        state = registry.restore_state(version)
    clips = clips_of(file, recipe, project.settings().serve)
    table = _learned(project, state)
    predictor = Predictor(model_file, recipe, version)
    vectors = training_vectors(project, predictor, table, cache_file(model_file, recipe), progress)
    closest = nearest(predictor.embeddings(clips).mean(axis=0), vectors, count)
    about = table.set_index("sha256")
    neighbours = [
        {"path": about.at[sha256, "path"], "label": about.at[sha256, "label"], "clip": clip, "similarity": similarity}
        for sha256, clip, similarity in closest
    ]
    return {"path": str(file), "version": version, "neighbours": neighbours}


def nearest(vector: np.ndarray, vectors: Vectors, count: int) -> list[tuple[str, int, float]]:
    """(sha256, clip, cosine) of the nearest clip of each of the `count` nearest videos; ties by sha256 and clip.

    Arguments:
        vector: `(width,)`.
    """
    lengths = np.linalg.norm(vectors.values, axis=1) * np.linalg.norm(vector)
    cosines = vectors.values @ vector / np.maximum(lengths, 1e-12)
    best: dict[str, tuple[str, int, float]] = {}
    for row in np.lexsort((vectors.clip, vectors.sha256, -cosines)):
        sha256 = str(vectors.sha256[row])
        best.setdefault(sha256, (sha256, int(vectors.clip[row]), float(cosines[row])))
        if len(best) == count:
            break
    return list(best.values())


def training_vectors(
    project: Project, predictor: Predictor, table: pd.DataFrame, cache: Path, progress: Progress
) -> Vectors:
    """The vectors of all clips of the table's videos; those missing in `cache` are computed and added.

    Raises:
        InputError: there are no shards.
        DiskFull, ServiceError: the cache can't be written.
    """
    known = _load(cache)
    todo = table[~table["sha256"].isin(set(known.sha256) if known else set())]
    if len(todo):
        new = _computed(project, predictor, todo, progress)
        known = known.joined(new) if known else new
        with atomic(cache) as file:
            np.savez(file, allow_pickle=False, sha256=known.sha256, clip=known.clip, values=known.values)
    assert known is not None  # the table is not empty
    wanted = np.isin(known.sha256, table["sha256"].to_numpy("U64"))
    return Vectors(known.sha256[wanted], known.clip[wanted], known.values[wanted])


def cache_file(model_file: Path, recipe: Recipe) -> Path:
    """A file beside the model, whose folder is named by its digest; its name holds what else decides the vectors."""
    from sora.core import provenance

    made = json.dumps([recipe.clip.to_dict(), provenance.clips()], sort_keys=True)
    return model_file.with_name(f"embeddings-{hashlib.sha256(made.encode()).hexdigest()[:16]}.npz")


def _learned(project: Project, state: dict[str, Any]) -> pd.DataFrame:
    """The videos of a version's training split that still exist and are not in quarantine: `data.table.COLUMNS`."""
    from sora.dataset import manifest, splits, table
    from sora.dataset.quality import quarantine

    if "splits.csv" not in state:
        raise InputError("this version has no stored splits", fix="promote a version that a full `sora run` made")
    with temporary_folder("splits") as folder:
        ledger_file = folder / "splits.csv"
        ledger_file.write_text(state["splits.csv"], encoding="utf-8")
        ledger = splits.read(ledger_file)
    rows = manifest.read(project.manifest)
    rejected = quarantine.rejected_paths(project)
    joined = table.join(rows, rejected, ledger)
    learned = joined[joined["split"] == "train"].reset_index(drop=True)
    if learned.empty:
        raise InputError(
            "none of the videos that the champion learned from is in this project",
            fix="`sora run` trains on those that are, or restore the data with `dvc pull`",
        )
    return learned


def _computed(project: Project, predictor: Predictor, table: pd.DataFrame, progress: Progress) -> Vectors:
    parts: list[Vectors] = []
    done: set[str] = set()
    for sha256, clip, clips in _chunks(project, predictor.recipe, table):
        parts.append(Vectors(sha256, clip, predictor.embeddings(clips).astype(np.float32)))
        done.update(sha256)
        progress(len(done), len(table))
    columns = zip(*((part.sha256, part.clip, part.values) for part in parts), strict=True)
    return Vectors(*(np.concatenate(column) for column in columns))


def _chunks(project: Project, recipe: Recipe, table: pd.DataFrame) -> Iterator[tuple[np.ndarray, np.ndarray, Clips]]:
    """(sha256, clip, clips) of some clips at a time: from the shards, or from the videos if the recipe differs."""
    from sora.store.shards import ShardSet

    shards = ShardSet.open(project.shards)
    if shards.spec != recipe.clip:
        bounds = pool.Bounds.of_data(project.settings().validate_)
        decoded_clips = pool.in_order((project.data / path for path in table["path"]), recipe.clip, bounds)
        for row, clips in zip(table.itertuples(), decoded_clips, strict=True):
            if isinstance(clips, VideoError):
                raise clips
            yield np.full(len(clips), row.sha256, "U64"), np.arange(len(clips)), clips
        return
    owner, clip = shards.index["sha256"].to_numpy("U64"), shards.index["clip"].to_numpy(np.int64)
    lacking = table[~table["sha256"].isin(set(owner))]
    if len(lacking):
        raise InputError(
            f"the shards lack {len(lacking)} of {len(table)} training videos, among them {lacking['path'].iloc[0]}",
            fix="`sora run` prepares what is missing",
        )
    rows = np.flatnonzero(np.isin(owner, table["sha256"].to_numpy("U64")))
    for start in range(0, len(rows), _CHUNK):
        some = rows[start : start + _CHUNK]
        yield owner[some], clip[some], shards.clips(some)


def _load(cache: Path) -> Vectors | None:
    """What is in the cache, or None. A damaged file counts as none: it is computed again."""
    try:
        with np.load(cache, allow_pickle=False) as stored:
            vectors = Vectors(stored["sha256"], stored["clip"], stored["values"])
    except FileNotFoundError:
        return None
    except (OSError, ValueError, TypeError, KeyError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        say(f"{cache} is damaged and is made again: {error}")
        return None
    if not len(vectors.sha256) == len(vectors.clip) == len(vectors.values):
        say(f"{cache} is damaged and is made again: its columns differ in length")
        return None
    return vectors
