"""Training, in a child process that dies with its parent: shards and a table of splits become `model.keras`.

`run` is the parent's side and imports nothing heavy. The child (`python -m sora.learning.training`) holds Keras. When
it ends, for whatever reason, its GPU memory is free. It keeps a checkpoint in the job's folder: the same job run again
resumes after the last finished epoch, and its result is the same as without the interruption.
"""

from __future__ import annotations

import hashlib
import json
import os
import statistics
import time
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sora import __version__
from sora.config import Model, Train
from sora.core import files
from sora.core.errors import InputError, ServiceError
from sora.core.processes import Emit, child_main, run_child
from sora.core.records import ClipSpec, Tried

if TYPE_CHECKING:
    import keras
    import pandas as pd
    import tensorflow as tf

    from sora.learning import loop
    from sora.store.batches import Batches
    from sora.store.shards import ShardSet
    from sora.tasks import Task

MODEL_FILE = "model.keras"
CHECKPOINT_FILE = "checkpoint.npz"
HELD_OUT_FILE = "held_out.npz"  # sha256, clip, logits


@dataclass(frozen=True)
class TrainJob:
    """What the child needs; `to_dict` makes it JSON-able."""

    shards: str  # folder
    table: str  # parquet or CSV file: sha256, label, split and, for a search, unit (`sora.dataset.splits.units`)
    classes: Sequence[str]  # in the order of the logits
    model: dict[str, Any]  # settings.Model
    train: dict[str, Any]  # settings.Train
    clip: dict[str, Any]  # records.ClipSpec; must be the shards' own
    out: str  # folder for this job only: for the checkpoint and, at the end, the model
    features: str = ""  # folder of the bank of features; "": there is none

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "classes": list(self.classes)}

    @classmethod
    def from_dict(cls, value: dict[str, Any]) -> TrainJob:
        return cls(**value)


@dataclass(frozen=True)
class TrainResult:
    """The result. Epochs count from 1."""

    model: str  # file, without optimiser, float32; the weights of the best epoch
    best_epoch: int
    epochs: int  # trained epochs, including those before a resumption
    history: list[dict[str, float]]  # one entry per epoch: epoch, loss, accuracy, val_…, seconds, clips_per_second
    seconds: float  # of all epochs
    clips_per_second: float  # of training only: the median epoch, without the first, which traces
    parameters: int
    resumed_from: int  # epochs that an interrupted run had finished; 0: none
    tried: list[Tried] = field(default_factory=list)  # what a search compared
    held_out: str = ""  # file: answers for clips of train and validation by folds that had not seen them; "": none

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, value: dict[str, Any]) -> TrainResult:
        return cls(**{**value, "tried": [Tried.from_dict(one) for one in value.get("tried", ())]})


def run(
    job: TrainJob,
    on_event: Emit = lambda event: None,
    log: Path | None = None,
    env: dict[str, str] | None = None,
) -> TrainResult:
    """Trains in a child process. `env` adds to its environment (CUDA_VISIBLE_DEVICES, KERAS_BACKEND).

    Events: {"event": "start", "train", "val": clips, "parameters", "device", "precision", "resumed_from"};
    {"event": "batch", "epoch", "batch", "batches"}, at most two per second;
    {"event": "epoch", "epoch", "epochs", "metrics": {"loss", "accuracy", "val_loss", "val_accuracy"}, "seconds",
    "clips_per_second"}; {"event": "note", "message"}.

    Raises:
        InputError: no clip to train on, a class without clips, shards of another clip spec, a diverging loss.
        DiskFull: no space for the checkpoint; the previous one is intact.
        ServiceError: the child died.
    """
    result = run_child("sora.learning.training", job.to_dict(), on_event, log=log, env=env)
    result.pop("event")
    return TrainResult.from_dict(result)


# ---- the child's side -----------------------------------------------------------------------------------------------


def fit(job: TrainJob, emit: Emit = lambda event: None, *, devices: Sequence[str] | None = None) -> TrainResult:
    """Trains in this process, which keeps Keras's and the backend's global settings afterwards: use `run`.

    `devices` (TensorFlow only) names the devices to mirror over; None: the GPUs of this machine.

    Raises: as `run`.
    """
    train, model = Train(**job.train), Model(**job.model)
    if model.preset == "auto" or model.probe != "none":
        return _searched(job, model, train, emit)
    footage = _footage(job, train)
    if not footage.validation.clips:
        emit({"event": "note", "message": "no validation clips: early stopping watches the training loss instead"})
    machine = _machine(train, devices)
    fitting = _assembled(job, train, footage, machine, emit)
    emit(
        {
            "event": "start",
            "train": footage.training.clips,
            "val": footage.validation.clips,
            "parameters": fitting.model.count_params(),
            "device": machine.name,
            "precision": machine.precision,
            "resumed_from": fitting.resumed_from,
        }
    )
    if not fitting.end.finished:
        _fit(fitting, train, footage, len(job.classes))
    return _result(job, fitting)


def _searched(job: TrainJob, model: Model, train: Train, emit: Emit) -> TrainResult:
    """A probe: solved, not trained in epochs."""
    import numpy as np

    from sora.learning import search
    from sora.model import probes
    from sora.store.shards import ShardSet

    began = time.monotonic()
    out = Path(job.out)
    with files.writing(out):
        out.mkdir(parents=True, exist_ok=True)
    shards, table = _open(job), _table(job, model.task)
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
    key = hashlib.sha256(json.dumps([job.to_dict() | {"out": ""}, _rows_of(table)]).encode()).hexdigest()[:16]
    kept = out / f"search-{key}"
    with files.writing(kept):
        kept.mkdir(exist_ok=True)
    choice = search.choose(evidence, model, train, kept, emit)
    network = probes.assemble(model, ClipSpec.from_dict(job.clip), choice.branches)
    _save(network, out / MODEL_FILE)
    held_out = ""
    if choice.held_out is not None:
        held_out = str(out / HELD_OUT_FILE)
        with files.atomic(Path(held_out)) as file:
            np.savez(file, sha256=evidence.sha256, clip=evidence.clip, logits=choice.held_out)
    seconds = time.monotonic() - began
    return TrainResult(
        model=str(out / MODEL_FILE),
        best_epoch=0,
        epochs=0,
        history=[],
        seconds=seconds,
        clips_per_second=len(evidence.owner) / seconds,
        parameters=network.count_params(),
        resumed_from=0,
        tried=list(choice.tried),
        held_out=held_out,
    )


def _rows_of(table: pd.DataFrame) -> str:
    columns = [name for name in ("sha256", "label", "split", "unit") if name in table]
    return str(table[columns].to_csv(index=False))


@dataclass(frozen=True)
class _Footage:
    """The batches for training and validation. `table` is the job's, see `_table`."""

    table: pd.DataFrame
    training: Batches
    validation: Batches


@dataclass(frozen=True)
class _Fitting:
    """A compiled model, its data, and what happens at the end of each epoch."""

    model: keras.Model
    data: loop.ClipDataset
    end: loop.EpochEnd
    resumed_from: int  # epochs that an interrupted run had finished


def _footage(job: TrainJob, train: Train) -> _Footage:
    """
    Raises:
        InputError: see `run`.
    """
    from sora.store.augment import Augmentation
    from sora.store.batches import Batches

    task = Model(**job.model).task
    shards = _open(job)
    table = _table(job, task)
    training = Batches(
        shards,
        table[table["split"] == "train"],
        batch=train.batch,
        shuffle_seed=train.seed,
        min_batches=train.min_steps,
        augmentation=Augmentation.of(train, job.classes),
        classes=len(job.classes),
        class_weights=train.class_weights,
        task=task,
    )
    validation = Batches(shards, table[table["split"] == "val"], batch=train.batch, classes=len(job.classes), task=task)
    return _Footage(table, training, validation)


def _assembled(job: TrainJob, train: Train, footage: _Footage, machine: Machine, emit: Emit) -> _Fitting:
    """The model with its initial weights, or as the job's checkpoint left it."""
    import keras

    from sora.learning import loop
    from sora.model import pretrained

    settings = Model(**job.model)
    keras.utils.set_random_seed(train.seed)
    out = Path(job.out)
    with files.writing(out):
        out.mkdir(parents=True, exist_ok=True)
    with machine.scope():
        model = _built(job)
        if settings.streams != "low" and settings.backbone != "residual":
            pretrained.load(model)
        data = loop.ClipDataset(footage.training, len(job.classes), model)
        steps = len(footage.training) * train.epochs
        loop.compile_model(model, train, steps, task=settings.task, jit=machine.jit)
        end = loop.EpochEnd(
            data,
            train,
            monitor="val_loss" if footage.validation.clips else "loss",
            path=out / CHECKPOINT_FILE,
            fingerprint=_fingerprint(job, footage.table, machine),
            emit=emit,
        )
        return _Fitting(model, data, end, end.restore(model))


def _fit(fitting: _Fitting, train: Train, footage: _Footage, classes: int) -> None:
    from sora.learning import loop

    model, judged = fitting.model, footage.validation
    try:
        model.fit(
            _feed(fitting.data),
            validation_data=_feed(loop.ClipDataset(judged, classes, model)) if judged.clips else None,
            initial_epoch=fitting.resumed_from,
            epochs=train.epochs,
            callbacks=[fitting.end],
            shuffle=False,  # `Batches` shuffles; Keras would draw from a generator that no checkpoint holds
            verbose=0,
        )
    except Exception:
        if fitting.data.error is not None:
            raise fitting.data.error from None
        raise


def _result(job: TrainJob, fitting: _Fitting) -> TrainResult:
    """Saves the best epoch's model, without optimiser."""
    import keras

    # Built again in float32: a mixed-precision graph would compute in half precision on the server's CPU too.
    keras.config.set_dtype_policy("float32")
    final = _built(job)
    final.set_weights(fitting.end.best)
    path = Path(job.out) / MODEL_FILE
    _save(final, path)
    history = fitting.end.state["history"]
    rates = [epoch["clips_per_second"] for epoch in history]
    return TrainResult(
        model=str(path),
        best_epoch=fitting.end.state["best_epoch"],
        epochs=len(history),
        history=history,
        seconds=sum(epoch["seconds"] for epoch in history),
        clips_per_second=statistics.median(rates[1:] or rates),
        parameters=final.count_params(),
        resumed_from=fitting.resumed_from,
    )


def _built(job: TrainJob) -> keras.Model:
    """The job's model (keras.Model) with random weights, under the current dtype policy."""
    from sora.model import classifier

    return classifier.build(Model(**job.model), ClipSpec.from_dict(job.clip), len(job.classes))


def _open(job: TrainJob) -> ShardSet:
    from sora.store.shards import ShardSet

    shards, clip = ShardSet.open(Path(job.shards)), ClipSpec.from_dict(job.clip)
    if shards.spec != clip:
        raise InputError(
            f"the shards in {job.shards} hold {shards.spec}, but the settings want {clip}",
            fix="`sora run` prepares them again",
        )
    return shards


def _table(job: TrainJob, task: Task) -> pd.DataFrame:
    """The job's table with `label_index`, as the task's `index` returns it, sorted by sha256."""
    import pandas as pd

    table = pd.read_parquet(job.table) if job.table.endswith(".parquet") else pd.read_csv(job.table, dtype=str)
    single = task.single(table["label"])
    unknown = sorted(set(single) - set(job.classes))
    if unknown:
        raise InputError(
            f"the table has a label that is not a class: {unknown[0]!r}", fix="add it to `classes` in params.yaml"
        )
    trained = set(task.single(table.loc[table["split"] == "train", "label"]))
    if not trained:
        raise InputError("no clip to train on: the split `train` is empty", fix="add videos or groups")
    empty = [name for name in job.classes if name not in trained]
    if empty:
        raise InputError(
            f"no clip to train on of class {', '.join(map(repr, empty))}",
            fix="add videos of it (from more than one group), or remove it from `classes` in params.yaml",
        )
    numbers = {name: number for number, name in enumerate(job.classes)}
    index = [task.index(label, numbers) for label in table["label"]]
    return table.assign(label_index=index).sort_values("sha256", ignore_index=True)


def _fingerprint(job: TrainJob, table: pd.DataFrame, machine: Machine) -> str:
    """A digest of everything that decides what the training computes."""
    import keras

    what = {
        **job.to_dict(),
        "table": table[["sha256", "label", "split"]].to_csv(index=False),
        "version": [__version__, keras.__version__, keras.backend.backend(), machine.name, machine.precision],
    }
    for place in ("out", "shards"):  # where, not what
        what.pop(place)
    return hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()


@dataclass(frozen=True)
class Machine:
    """What the child computes on."""

    name: str  # "tensorflow cpu", "tensorflow 2 x gpu", "jax gpu"
    precision: str  # Keras dtype policy
    jit: bool | str
    strategy: tf.distribute.Strategy | None = None  # over several devices

    def scope(self) -> AbstractContextManager[object]:
        return self.strategy.scope() if self.strategy is not None else nullcontext()


def _machine(train: Train, devices: Sequence[str] | None) -> Machine:
    """Sets up the backend for the available devices.

    XLA only on accelerators: it made training on CPU three times slower. JAX compiles by XLA always. Half precision on
    TensorFlow's GPUs is float16 (with loss scaling, which Keras adds), whose convolutions cuDNN has on every card since
    2017; elsewhere bfloat16.
    """
    import keras

    backend = keras.backend.backend()
    strategy = None
    if backend == "tensorflow":
        import tensorflow as tf

        gpus = tf.config.list_physical_devices("GPU")
        for gpu in gpus:
            tf.config.experimental.set_memory_growth(gpu, True)
        tf.config.experimental.enable_op_determinism()
        count, kind = (len(gpus), "gpu") if gpus else (1, "cpu")
        if devices is None and len(gpus) > 1:
            devices = [f"GPU:{number}" for number in range(len(gpus))]
        if devices is not None and len(devices) > 1:
            count = len(devices)
            strategy = tf.distribute.MirroredStrategy(devices)
        jit: bool | str = "auto" if gpus and strategy is None else False
        half = "mixed_float16" if gpus else "mixed_bfloat16"
    else:
        count, kind = 1, _accelerator(backend)
        jit, half = "auto", "mixed_bfloat16"
    if train.batch < count:
        raise InputError(f"train.batch is {train.batch}, fewer than the {count} devices", fix="raise train.batch")
    mixed = train.mixed_precision == "on" or (train.mixed_precision == "auto" and kind != "cpu")
    precision = half if mixed else "float32"
    keras.config.set_dtype_policy(precision)
    return Machine(f"{backend} {count} x {kind}", precision, jit, strategy)


def _accelerator(backend: str) -> str:
    if backend == "jax":
        import jax

        return jax.default_backend()
    if backend == "torch":
        import torch

        return "gpu" if torch.cuda.is_available() else "cpu"
    raise ServiceError(
        f"the Keras backend {backend!r} can't train", fix="set KERAS_BACKEND to tensorflow, jax or torch"
    )


def _feed(data: loop.ClipDataset) -> loop.ClipDataset | tf.data.Dataset:
    """The argument of Keras's `fit`: the data itself, but with TensorFlow a `tf.data.Dataset` of it.

    Keras does the same with a `PyDataset`, but with autotuning. At the end of an iterator TensorFlow waits for the
    autotuning thread, which sleeps: one epoch in three took 5 to 8 idle seconds more (TensorFlow 2.21, 12 s each).
    """
    import keras

    if keras.backend.backend() != "tensorflow":
        return data
    import tensorflow as tf

    from sora.model.classifier import fed

    batches = data.batches
    inputs = {name: tf.TensorSpec((None, *one.shape), one.dtype) for name, one in batches.shards.tensors.items()}
    signature = (
        fed(data.model, inputs),
        tf.TensorSpec((None, data.classes), tf.float32),
        tf.TensorSpec((None,), tf.float32),
    )
    # Each epoch makes its own iterator, so no iterator starts before the data knows the epoch.
    dataset = tf.data.Dataset.from_generator(
        lambda: (data[index] for index in range(len(batches))), output_signature=signature
    )
    options = tf.data.Options()
    options.autotune.enabled = False
    return dataset.apply(tf.data.experimental.assert_cardinality(len(batches))).prefetch(1).with_options(options)


def _save(model: keras.Model, path: Path) -> None:
    """Saves the whole model or nothing. Keras requires the suffix."""
    draft = path.with_name("draft.keras")
    with files.writing(path):
        try:
            model.save(draft)
            with draft.open("rb") as file:
                os.fsync(file.fileno())
            os.replace(draft, path)
            files.sync_folder(path.parent)
        finally:
            draft.unlink(missing_ok=True)


def _body(job: dict[str, Any], emit: Emit) -> dict[str, Any]:
    return fit(TrainJob.from_dict(job), emit).to_dict()


if __name__ == "__main__":
    child_main(_body)
