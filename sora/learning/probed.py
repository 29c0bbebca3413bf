"""Training of probes, in the child process of `sora.learning.training`: solved, not trained in epochs."""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np

from sora.config import Model, Train
from sora.core import files
from sora.core.processes import Emit
from sora.core.records import ClipSpec
from sora.learning import jobs, search
from sora.learning.jobs import TrainJob, TrainResult
from sora.model import probes
from sora.store.shards import ShardSet


def fit(job: TrainJob, emit: Emit) -> TrainResult:
    """Chooses among the candidates, solves the best, and saves it as a model.

    The same job in the same folder goes on after its last finished fold.

    Raises: as `training.run`, `search.gather` and `search.choose`.
    """
    model, train = Model(**job.model), Train(**job.train)
    began = time.monotonic()
    out = Path(job.out)
    with files.writing(out):
        out.mkdir(parents=True, exist_ok=True)
    shards, table = jobs.open_shards(job), jobs.labelled(job, model.task)
    bank = ShardSet.open(Path(job.features)) if job.features and model.bank else None
    evidence = search.gather(shards, bank, table, len(job.classes), model.task)
    emit(
        {
            "event": "start",
            "train": len(evidence.owner),
            "val": 0,
            "parameters": 0,
            "device": "cpu",
            "precision": "float32",
            "resumed_from": 0,
        }
    )
    read = [name for name in ("sha256", "label", "split", "unit") if name in table]
    kept = out / f"search-{jobs.fingerprint(job, table[read])[:16]}"
    with files.writing(kept):
        kept.mkdir(exist_ok=True)
    choice = search.choose(evidence, model, train, kept, emit, job.classes)
    network = probes.assemble(model, ClipSpec.from_dict(job.clip), choice.branches)
    jobs.save(network, out / jobs.MODEL_FILE)
    held_out = ""
    if choice.held_out is not None:
        held_out = str(out / jobs.HELD_OUT_FILE)
        with files.atomic(Path(held_out)) as file:
            np.savez(file, sha256=evidence.sha256, clip=evidence.clip, logits=choice.held_out)
    seconds = time.monotonic() - began
    return TrainResult(
        model=str(out / jobs.MODEL_FILE),
        best_epoch=0,
        epochs=0,
        history=[],
        seconds=seconds,
        clips_per_second=len(evidence.owner) / seconds,
        parameters=network.count_params(),
        resumed_from=0,
        tried=list(choice.tried),
        notes=list(choice.notes),
        held_out=held_out,
    )
