"""Candidate and champion on the same current splits: logits, temperature, reports, page; in a child process.

`run` is the parent's side and imports nothing heavy. The child (`python -m sora.judging.evaluation`) loads one model
after the other, so that memory holds one; a champion whose clip spec differs from the shards' gets clips prepared from
the videos with its own recipe.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from sora import tasks
from sora.config import Validate
from sora.core import statistics
from sora.core.errors import InputError, ServiceError, VideoError
from sora.core.files import atomic
from sora.core.processes import Emit, child_main, run_child
from sora.core.records import ClipSpec, EvalReport, Recipe, Split, Tried
from sora.core.tensors import Clips
from sora.judging.report import measure
from sora.media import MODALITY, pool
from sora.store import augment

if TYPE_CHECKING:
    import keras
    import pandas as pd

    from sora.store.shards import ShardSet

GOLDEN_SEEDS = (0, 1)
JUDGED: tuple[Split, ...] = ("val", "test")
LATENCY_CALLS = 20


@dataclass(frozen=True)
class EvalModel:
    """One model to evaluate. Without a recipe it is fresh from training: it gets one, and a page."""

    name: str  # its folder below `EvalJob.out`, and its key in the result
    file: str
    recipe: Recipe | None = None
    history: Sequence[dict[str, float]] = ()  # the metrics of each epoch of its training; for the page
    tried: Sequence[Tried] = ()  # what a search compared before its training; for the page
    held_out: str = ""  # of a fresh model that learned from validation too: its answers there, see `TrainResult`


@dataclass(frozen=True)
class EvalJob:
    """What the child needs, in a form that JSON can carry.

    `table` is a Parquet or CSV file with the columns of `sora.dataset.table.COLUMNS`. `data` is the folder that its
    paths are relative to. `classes` are those of a fresh model, in the order of its logits.
    """

    shards: str
    table: str
    models: list[EvalModel]
    classes: list[str]
    data: str
    out: str
    batch: int = 16
    title: str = ""  # of the page
    views: list[str] = field(default_factory=list)  # of a fresh model, see `sora.store.augment.views`
    unsure_precision: float | None = None  # of a fresh model: the wanted precision of answers that are not unsure
    multilabel: bool = False  # of a fresh model: a video may have several classes
    bounds: dict[str, Any] = field(default_factory=dict)  # for decoding videos again: the settings' section `validate`


@dataclass(frozen=True)
class EvalOutcome:
    """One model's recipe and reports ("val" and "test").

    `folder` holds report.json and, for a fresh model, index.html and the plots.
    """

    recipe: Recipe
    reports: dict[str, EvalReport]
    folder: Path

    def to_dict(self) -> dict[str, Any]:
        reports = {split: report.to_dict() for split, report in self.reports.items()}
        return {"recipe": self.recipe.to_dict(), "reports": reports, "folder": str(self.folder)}


def run(job: EvalJob, on_event: Emit = lambda event: None, log: Path | None = None) -> dict[str, EvalOutcome]:
    """Evaluates every model of the job in one child process.

    Events: {"event": "evaluate", "name": model, "done": videos, "total": all videos}.

    Raises:
        InputError: a model file's digest is not its recipe's; a model answers for a different number of classes.
        ServiceError: the shards lack a video of the table, or the child died.
        VideoError: a video can no longer be read (only if a champion's own clip spec needs it).
    """
    result = run_child("sora.judging.evaluation", asdict(job), on_event, log=log)
    return {name: read(Path(job.out) / name) for name in result["models"]}


def read(folder: Path) -> EvalOutcome:
    """Reads the result of an evaluation from `folder`."""
    stored = json.loads((folder / "report.json").read_text(encoding="utf-8"))
    reports = {split: EvalReport.from_dict(report) for split, report in stored["reports"].items()}
    return EvalOutcome(Recipe.from_dict(stored["recipe"]), reports, folder)


def golden_clip(spec: ClipSpec, seed: int) -> Clips:
    """A made-up clip: whoever loads the model repeats it and compares with the recipe."""
    chance = np.random.default_rng(seed)
    made = {}
    for name, tensor in MODALITY.tensors(spec).items():
        if tensor.dtype == "uint8":
            made[name] = chance.integers(0, 256, (1, *tensor.shape), np.uint8)
        else:
            made[name] = chance.random((1, *tensor.shape), np.float32).astype(tensor.dtype)
    return Clips(made)


def file_digest(path: Path) -> str:
    """sha256, hexadecimal.

    Raises:
        InputError: the file can't be read.
    """
    try:
        with path.open("rb") as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest()
    except OSError as error:
        raise InputError(
            f"can't read the model {path}: {error.strerror}", fix="name the file that training wrote"
        ) from error


# ---- the child's side ----


def evaluate(value: dict[str, Any], emit: Emit) -> dict[str, Any]:
    """Body of the child: evaluates the models of the job and writes a folder for each."""
    import pandas as pd

    from sora.store.shards import ShardSet

    job = _job(value)
    table = pd.read_parquet(job.table) if job.table.endswith(".parquet") else pd.read_csv(job.table)
    table = table.sort_values("sha256", ignore_index=True)
    shards = ShardSet.open(Path(job.shards))
    for model in job.models:
        folder = Path(job.out) / model.name
        folder.mkdir(parents=True, exist_ok=True)
        judged = _evaluate_one(job, model, table, shards, emit)
        if model.recipe is None:
            from sora.judging.report import page

            page.write(
                folder,
                judged.reports,
                raw_test=judged.raw_test,
                shards=shards,
                history=model.history,
                tried=model.tried,
                title=job.title,
            )
        with atomic(folder / "report.json") as file:  # last: a folder with it is complete
            stored = EvalOutcome(judged.recipe, judged.reports, folder).to_dict()
            file.write(json.dumps(stored, indent=1, allow_nan=False).encode())
    return {"models": [model.name for model in job.models]}


@dataclass(frozen=True)
class _Part:
    """One split: the model's answers for its clips, and the truth."""

    logits: np.ndarray  # (clips, classes)
    owner: np.ndarray  # (clips,) int: the video of each clip
    truth: np.ndarray  # the targets of the videos, see `sora.tasks.Task`
    rows: pd.DataFrame  # of the table, one per video


@dataclass(frozen=True)
class _Judged:
    recipe: Recipe
    reports: dict[str, EvalReport]
    raw_test: np.ndarray  # (videos, classes): probabilities of the test split before calibration


def _job(value: dict[str, Any]) -> EvalJob:
    """The job from its JSON."""
    models = [
        EvalModel(
            **{
                **one,
                "recipe": None if one["recipe"] is None else Recipe.from_dict(one["recipe"]),
                "tried": [Tried.from_dict(each) for each in one["tried"]],
            }
        )
        for one in value["models"]
    ]
    return EvalJob(**{**value, "models": models})


def _evaluate_one(job: EvalJob, model: EvalModel, table: pd.DataFrame, shards: ShardSet, emit: Emit) -> _Judged:
    digest = file_digest(Path(model.file))
    if model.recipe is None:
        recipe = Recipe(
            clip=shards.spec,
            classes=tuple(job.classes),
            model_sha256=digest,
            views=tuple(job.views),
            schema=tasks.of(job.multilabel).schema,
            multilabel=job.multilabel,
        )
    else:
        recipe = model.recipe
        if recipe.model_sha256 and recipe.model_sha256 != digest:
            raise InputError(
                f"the model file of {model.name} has sha256 {digest}, but its recipe says {recipe.model_sha256}",
                fix="fetch that version again; the file was altered or is another version's",
            )
    task = tasks.of(recipe.multilabel)
    network = _load(Path(model.file), recipe)
    # The model can't be right about a class that it does not know; the gate reports such classes separately.
    kept = _HeldOut.read(Path(model.held_out), table, recipe) if model.held_out and model.recipe is None else None
    asked: Sequence[Split] = JUDGED if kept is None else ("test",)
    known, truths = _known(table[table["split"].isin(asked)], recipe)
    logits, owner = _logits(network, _clips(known, shards, recipe, job), len(known), job.batch, model.name, emit)
    if not np.isfinite(logits).all():
        raise ServiceError(
            f"the model {model.name} answers with NaN: its training diverged", fix="lower train.learning_rate"
        )

    parts: dict[Split, _Part] = {} if kept is None else {"val": kept.val}
    for split in asked:
        chosen = np.flatnonzero((known["split"] == split).to_numpy())
        clips = np.isin(owner, chosen)
        parts[split] = _Part(logits[clips], np.searchsorted(chosen, owner[clips]), truths[chosen], known.iloc[chosen])
    if model.recipe is None:
        val = parts["val"] if kept is None else kept.all
        recipe = replace(recipe, temperature=task.fit_temperature(val.logits, val.owner, val.truth))
        if job.unsure_precision is not None:
            recipe = replace(recipe, unsure_below=_unsure_below(val, recipe, job.unsure_precision))
        recipe = replace(recipe, golden=tuple(_golden(network, recipe, seed) for seed in GOLDEN_SEEDS))
    latency = _latency(network, recipe)
    reports: dict[str, EvalReport] = {}
    for split in JUDGED:
        part, truth, rows = parts[split], parts[split].truth, parts[split].rows
        raw = _probabilities(part, replace(recipe, temperature=1.0))
        extra = {"latency_ms": latency}
        if len(truth):
            extra["ece_uncalibrated"] = statistics.expected_calibration_error(*task.decisions(raw, truth))
        served = _probabilities(part, recipe)
        if recipe.unsure_below is not None:
            extra |= {"unsure_below": recipe.unsure_below}
            extra |= statistics.selective(*task.decisions(served, truth), recipe.unsure_below)
        reports[split] = measure.report(
            split,
            recipe.classes,
            truth,
            served,
            sha256=rows["sha256"].tolist(),
            paths=rows["path"].tolist(),
            facts={name: rows[name].tolist() for name in ("brightness", "duration", "codec", "group") if name in rows},
            task=task,
            temperature=recipe.temperature,
            metrics=extra,
        )
    return _Judged(recipe, reports, raw_test=_probabilities(parts["test"], replace(recipe, temperature=1.0)))


@dataclass(frozen=True)
class _HeldOut:
    """Answers of a search's folds for videos that they had not seen: of validation, and of training as well."""

    val: _Part
    all: _Part

    @classmethod
    def read(cls, file: Path, table: pd.DataFrame, recipe: Recipe) -> _HeldOut:
        with np.load(file, allow_pickle=False) as kept:
            sha256, logits = kept["sha256"], kept["logits"]

        def part(rows: pd.DataFrame) -> _Part:
            known, truth = _known(rows, recipe)
            number = {one: place for place, one in enumerate(known["sha256"])}
            owner = np.array([number.get(str(one), -1) for one in sha256], int)
            answered, places = np.unique(owner[owner >= 0], return_inverse=True)
            return _Part(logits[owner >= 0], places, truth[answered], known.iloc[answered])

        return cls(part(table[table["split"] == "val"]), part(table[table["split"] != "test"]))


def _known(table: pd.DataFrame, recipe: Recipe) -> tuple[pd.DataFrame, np.ndarray]:
    """The videos with a class of the recipe, and their targets."""
    task = tasks.of(recipe.multilabel)
    known = table[task.known(table["label"], recipe.classes)].reset_index(drop=True)
    return known, task.encode(known["label"], recipe.classes)


def _probabilities(part: _Part, recipe: Recipe) -> np.ndarray:
    """`(videos, classes) float`, as served according to the recipe."""
    task = tasks.of(recipe.multilabel)
    return task.video_probabilities(part.logits, part.owner, len(part.truth), recipe.temperature)


def _unsure_below(part: _Part, recipe: Recipe, precision: float) -> float:
    decisions = tasks.of(recipe.multilabel).decisions(_probabilities(part, recipe), part.truth)
    return statistics.unsure_below(*decisions, precision)


def _load(path: Path, recipe: Recipe) -> keras.Model:
    import keras

    from sora.model import classifier  # also registers the layers that the file names

    try:
        model = keras.saving.load_model(path, compile=False, safe_mode=True)
    except (ValueError, TypeError, OSError, KeyError) as error:
        raise InputError(
            f"can't load the model {path}: {error}", fix="train again, or fetch the version again"
        ) from error
    wrong = classifier.misfit(model, recipe.clip, len(recipe.classes))
    if wrong:
        raise InputError(
            f"the model {path} does not fit its recipe: {wrong}",
            fix="evaluate the model with the parameters that it was trained with",
        )
    return model


def _clips(table: pd.DataFrame, shards: ShardSet, recipe: Recipe, job: EvalJob) -> Iterator[Clips]:
    """The clips of one video after the other, in all views: from the shards, or prepared again for another spec."""
    if recipe.clip != shards.spec:
        bounds = pool.Bounds.of_data(Validate.model_validate(job.bounds))
        for clips in pool.in_order((Path(job.data) / path for path in table["path"]), recipe.clip, bounds):
            if isinstance(clips, VideoError):
                raise clips
            yield augment.views(clips, recipe.views)
        return
    rows = shards.index.groupby("sha256").indices
    missing = [row.path for row in table.itertuples() if row.sha256 not in rows]
    if missing:
        raise ServiceError(
            f"the shards lack {len(missing)} video(s) of the splits, among them {missing[0]}",
            fix="`sora run` prepares what is missing",
        )
    for sha256 in table["sha256"]:
        yield augment.views(shards.clips(rows[sha256]), recipe.views)


def _logits(
    model: keras.Model,
    clips: Iterator[Clips],
    videos: int,
    batch: int,
    name: str,
    emit: Emit,
) -> tuple[np.ndarray, np.ndarray]:
    """`(clips, classes) float32` logits and `(clips,) int` owners; every call has the same batch size, traced once."""
    from sora.model import classifier

    waiting: list[Clips] = []
    results: list[np.ndarray] = []
    owner: list[int] = []

    def flush() -> None:
        some = Clips.joined(waiting)
        answers = model.predict_on_batch(classifier.fed(model, some.padded(batch).tensors))
        results.append(np.asarray(answers, np.float32)[: len(some)])
        waiting.clear()

    for number, some in enumerate(clips):
        for clip in some:
            waiting.append(clip)
            owner.append(number)
            if len(waiting) == batch:
                flush()
        if number % 20 == 0 or number + 1 == videos:
            emit({"event": "evaluate", "name": name, "done": number + 1, "total": videos})
    if waiting:
        flush()
    return np.concatenate([np.zeros((0, model.output_shape[-1]), np.float32), *results]), np.array(owner, int)


def _golden(model: keras.Model, recipe: Recipe, seed: int) -> dict[str, Any]:
    from sora.model import classifier

    clips = augment.views(golden_clip(recipe.clip, seed), recipe.views)
    logits = np.asarray(model.predict_on_batch(classifier.fed(model, clips.tensors)), np.float32)
    owner = np.zeros(len(clips), int)
    probabilities = tasks.of(recipe.multilabel).video_probabilities(logits, owner, 1, recipe.temperature)[0]
    return {"seed": seed, "probabilities": [float(p) for p in probabilities]}


def _latency(model: keras.Model, recipe: Recipe) -> float:
    """Milliseconds of a warmed call for one clip in its views, the median of 20."""
    import time

    from sora.model import classifier

    clip = classifier.fed(model, augment.views(golden_clip(recipe.clip, 0), recipe.views).tensors)
    seconds = []
    for _ in range(LATENCY_CALLS + 2):
        started = time.perf_counter()
        np.asarray(model.predict_on_batch(clip))
        seconds.append(time.perf_counter() - started)
    return float(np.median(seconds[2:]) * 1000)


if __name__ == "__main__":
    child_main(evaluate)
