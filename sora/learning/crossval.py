"""One fold of a cross-validation: train on one part of the videos, answer for another, keep the answers in one file.

For figures (`benchmarks/accuracy/`), the search for wrong labels (`sora data audit`) and for settings (`sora tune`).
Training runs as in the nightly, in child processes; a killed fold resumes after its last epoch, a finished one is never
trained again.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sora.config import Settings
from sora.core.files import atomic, writing
from sora.core.processes import Emit
from sora.core.records import Recipe, Split
from sora.judging import evaluation
from sora.learning import training
from sora.learning.jobs import TrainJob

if TYPE_CHECKING:
    import pandas as pd

FOLD_FILE = "fold.json"


def configuration(settings: Settings) -> dict[str, Any]:
    """The settings that decide what a fold computes, but not where."""
    values = settings.to_dict()
    train = {name: value for name, value in values["train"].items() if name != "work_pool"}
    return {**{name: values[name] for name in ("classes", "clip", "model", "eval")}, "train": train}


def digest(value: object) -> str:
    """A short name of a JSON-able value."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]


def answers(
    folder: Path,
    shards: Path,
    table: pd.DataFrame,
    settings: Settings,
    *,
    judged: Split,
    features: Path | None = None,
    on_event: Emit = lambda event: None,
    env: dict[str, str] | None = None,
) -> dict[str, Any]:
    """Trains on the table's `train` (early stopping on its `val`) and answers for its `judged` videos.

    Args:
        folder: for this fold only; its content decides what is left to do.
        table: `sha256, path, label, split`, and the facts of `data.table.COLUMNS` that are known. A video that must not
            be touched is not in it.
        features: the bank, for a model that reads one.
        on_event: gets the events of `training.run` and `evaluation.run`; what it raises ends the fold, which goes on
            with the next call.
        env: adds to the training's environment (CUDA_VISIBLE_DEVICES).

    Returns:
        {"videos": [{"sha256", "path", "label", "predicted", "probabilities"}], "metrics": of the judged videos,
        "training": `jobs.TrainResult` without the model, "train": and "val": videos}.

    Raises: as `training.run` and `evaluation.run`.
    """
    result_file = folder / FOLD_FILE
    if result_file.exists():
        _remove_work(folder)  # a kill between the result and the end leaves it behind
        done: dict[str, Any] = json.loads(result_file.read_text(encoding="utf-8"))
        return done
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        table.to_parquet(folder / "table.parquet", index=False)
    values = settings.to_dict()
    job = TrainJob(
        shards=str(shards),
        table=str(folder / "table.parquet"),
        classes=list(settings.classes),
        model=values["model"],
        train=values["train"],
        clip=settings.clip.spec().to_dict(),
        out=str(folder / "fit"),
        features="" if features is None else str(features),
    )
    fitted = training.run(job, on_event, log=folder / "training.log", env=env)
    # With a recipe the model counts as registered: no page is drawn and no temperature fitted; a fold needs neither.
    recipe = Recipe(
        settings.clip.spec(),
        settings.classes,
        model_sha256=evaluation.file_digest(Path(fitted.model)),
        views=settings.eval.views,
        schema=settings.task.schema,
        multilabel=settings.task.multilabel,
    )
    outcome = evaluation.run(
        evaluation.EvalJob(
            shards=str(shards),
            table=job.table,
            models=[evaluation.EvalModel("fold", fitted.model, recipe)],
            classes=list(settings.classes),
            data="",
            out=str(folder / "evaluation"),
        ),
        on_event,
        log=folder / "evaluation.log",
    )
    report = outcome["fold"].reports[judged]
    result = {
        "videos": report.videos,
        "metrics": report.metrics,
        "training": {name: value for name, value in asdict(fitted).items() if name not in ("model", "held_out")},
        "train": int((table["split"] == "train").sum()),
        "val": int((table["split"] == "val").sum()),
    }
    with atomic(result_file) as file:
        file.write(json.dumps(result, allow_nan=False).encode())
    _remove_work(folder)
    return result


def _remove_work(folder: Path) -> None:
    for left in ("fit", "evaluation"):
        shutil.rmtree(folder / left, ignore_errors=True)
