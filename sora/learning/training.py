"""Training, in a child process that dies with its parent: shards and a table of splits become `model.keras`.

`run` is the parent's side and imports nothing heavy. The child (`python -m sora.learning.training`) holds Keras; when
it ends, however it ends, its GPU memory is free. It keeps a checkpoint in the job's folder: the same job run again goes
on after the last finished epoch, to the same result as if it had not been interrupted.
"""

from __future__ import annotations

import hashlib
import json
import os
import statistics
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sora import __version__
from sora.config import Model, Train
from sora.core import files
from sora.core.errors import InputError, ServiceError
from sora.core.processes import child_main, run_child
from sora.core.records import ClipSpec

if TYPE_CHECKING:
    import pandas as pd

    from sora.learning import loop
    from sora.store.batches import ClipSource

Emit = Callable[[dict[str, Any]], None]
MODEL_FILE = "model.keras"
CHECKPOINT_FILE = "checkpoint.npz"


@dataclass(frozen=True)
class TrainJob:
    """What the child needs; JSON-able by `to_dict`."""

    shards: str  # folder
    table: str  # parquet or CSV file: sha256, label, split
    classes: Sequence[str]  # in the order of the logits
    model: dict[str, Any]  # settings.Model
    train: dict[str, Any]  # settings.Train
    clip: dict[str, Any]  # records.ClipSpec; must be the shards' own
    out: str  # folder, of this job alone: the checkpoint, and the model at the end

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "classes": list(self.classes)}

    @classmethod
    def from_dict(cls, value: dict[str, Any]) -> TrainJob:
        return cls(**value)


@dataclass(frozen=True)
class TrainResult:
    """What came out. Epochs count from 1."""

    model: str  # file, without optimiser, float32; the weights of the best epoch
    best_epoch: int
    epochs: int  # that were run, resumed ones included
    history: list[dict[str, float]]  # an epoch each: epoch, loss, accuracy, val_…, seconds, clips_per_second
    seconds: float  # of all epochs
    clips_per_second: float  # training alone; the median epoch, the first (with tracing) left out
    parameters: int
    resumed_from: int  # epochs that an interrupted run had done; 0: none

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def run(
    job: TrainJob,
    on_event: Emit = lambda event: None,
    log: Path | None = None,
    env: dict[str, str] | None = None,
) -> TrainResult:
    """Trains in a child process. `env` adds to its environment (CUDA_VISIBLE_DEVICES, KERAS_BACKEND).

    Events: {"event": "start", "train", "val": clips, "parameters", "device", "precision", "resumed_from"};
    {"event": "batch", "epoch", "batch", "batches"}, at most two a second;
    {"event": "epoch", "epoch", "epochs", "metrics": {"loss", "accuracy", "val_loss", "val_accuracy"}, "seconds",
    "clips_per_second"}; {"event": "note", "message"}.

    Raises:
        InputError: no clip to train on, a class without one, shards of another clip spec, a diverging loss.
        DiskFull: while writing the checkpoint; the one before is whole.
        ServiceError: the child died.
    """
    result = run_child("sora.learning.training", job.to_dict(), on_event, log=log, env=env)
    result.pop("event")
    return TrainResult(**result)


# ---- the child's side -----------------------------------------------------------------------------------------------


def fit(job: TrainJob, emit: Emit = lambda event: None, *, devices: Sequence[str] | None = None) -> TrainResult:
    """Trains in this process, which keeps Keras's and the backend's global settings afterwards: use `run`.

    `devices` (TensorFlow only) names what to mirror over; None: the GPUs of this machine.

    Raises: as `run`.
    """
    model_settings, train, clip = Model(**job.model), Train(**job.train), ClipSpec.from_dict(job.clip)
    multilabel = model_settings.head == "multilabel"
    shards = _open(job, clip)
    table = _table(job, multilabel)
    from sora.store.batches import Batches

    training = Batches(
        shards,
        table[table["split"] == "train"],
        batch=train.batch,
        shuffle_seed=train.seed,
        min_batches=train.min_steps,
        flip=train.flip is not False,
        mirror=train.mirrors(job.classes),
        jitter=train.jitter,
        speed=train.speed,
        crop=train.crop,
        noise=train.noise,
        mix_up=train.mix_up,
        classes=len(job.classes),
        class_weights=train.class_weights,
        multilabel=multilabel,
    )
    validation = Batches(
        shards, table[table["split"] == "val"], batch=train.batch, classes=len(job.classes), multilabel=multilabel
    )
    if not validation.clips:
        emit({"event": "note", "message": "no validation clips: early stopping watches the training loss instead"})

    machine = _machine(train, devices)
    import keras

    from sora.learning import loop
    from sora.model import classifier, pretrained

    classes = len(job.classes)
    keras.utils.set_random_seed(train.seed)
    data = loop.ClipDataset(training, classes)
    out = Path(job.out)
    with files.writing(out):
        out.mkdir(parents=True, exist_ok=True)
    with machine.scope():
        model = classifier.build(model_settings, clip, classes)
        if model_settings.streams != "low" and model_settings.backbone != "residual":
            pretrained.load(model)
        loop.compile_model(model, train, len(training) * train.epochs, multilabel=multilabel, jit=machine.jit)
        end = loop.EpochEnd(
            data,
            train,
            monitor="val_loss" if validation.clips else "loss",
            path=out / CHECKPOINT_FILE,
            fingerprint=_fingerprint(job, table, machine),
            emit=emit,
        )
        resumed = end.restore(model)
    emit(
        {
            "event": "start",
            "train": training.clips,
            "val": validation.clips,
            "parameters": model.count_params(),
            "device": machine.name,
            "precision": machine.precision,
            "resumed_from": resumed,
        }
    )
    if not end.finished:
        try:
            model.fit(
                _feed(data),
                validation_data=_feed(loop.ClipDataset(validation, classes)) if validation.clips else None,
                initial_epoch=resumed,
                epochs=train.epochs,
                callbacks=[end],
                shuffle=False,  # `Batches` shuffles; Keras would draw from a generator that no checkpoint holds
                verbose=0,
            )
        except Exception:
            if data.error is not None:
                raise data.error from None
            raise
    # Built anew in float32: a mixed-precision graph would compute in half precision on the server's CPU too.
    keras.config.set_dtype_policy("float32")
    final = classifier.build(model_settings, clip, classes)
    final.set_weights(end.best)
    _save(final, out / MODEL_FILE)
    history = end.state["history"]
    rates = [epoch["clips_per_second"] for epoch in history]
    return TrainResult(
        model=str(out / MODEL_FILE),
        best_epoch=end.state["best_epoch"],
        epochs=len(history),
        history=history,
        seconds=sum(epoch["seconds"] for epoch in history),
        clips_per_second=statistics.median(rates[1:] or rates),
        parameters=final.count_params(),
        resumed_from=resumed,
    )


def _open(job: TrainJob, clip: ClipSpec) -> ClipSource:
    from sora.store.shards import ShardSet

    shards = ShardSet.open(Path(job.shards))
    if shards.spec != clip:
        raise InputError(
            f"the shards in {job.shards} hold {shards.spec}, the settings want {clip}",
            fix="`sora run` prepares them anew",
        )
    return shards


def _table(job: TrainJob, multilabel: bool) -> pd.DataFrame:
    """The job's table with `label_index` (of several labels a tuple), sorted by sha256."""
    import pandas as pd

    from sora.core import labels

    table = pd.read_parquet(job.table) if job.table.endswith(".parquet") else pd.read_csv(job.table, dtype=str)
    single = labels.single(table["label"], multilabel)
    unknown = sorted(set(single) - set(job.classes))
    if unknown:
        raise InputError(
            f"the table has a label that is no class: {unknown[0]!r}", fix="add it to `classes` in params.yaml"
        )
    trained = set(labels.single(table.loc[table["split"] == "train", "label"], multilabel))
    if not trained:
        raise InputError("no clip to train on: the split `train` is empty", fix="add videos or groups")
    empty = [name for name in job.classes if name not in trained]
    if empty:
        raise InputError(
            f"no clip to train on of class {', '.join(map(repr, empty))}",
            fix="add videos of it (from more than one group), or take it out of `classes` in params.yaml",
        )
    numbers = {name: number for number, name in enumerate(job.classes)}
    if multilabel:
        index = table["label"].map(lambda label: tuple(numbers[name] for name in labels.names(label, True)))
    else:
        index = table["label"].map(numbers)
    return table.assign(label_index=index).sort_values("sha256", ignore_index=True)


def _fingerprint(job: TrainJob, table: pd.DataFrame, machine: Machine) -> str:
    """Of all that decides what the training computes."""
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
    strategy: Any = None  # tf.distribute.Strategy over several devices

    def scope(self) -> Any:
        return self.strategy.scope() if self.strategy is not None else nullcontext()


def _machine(train: Train, devices: Sequence[str] | None) -> Machine:
    """Sets the backend up for what it finds.

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


def _feed(data: loop.ClipDataset) -> Any:
    """What `fit` is given: the data as they are, but with TensorFlow a `tf.data.Dataset` of them.

    Keras makes the same of a `PyDataset`, with autotuning. At the end of an iterator TensorFlow waits for the
    autotuning thread, which sleeps: one epoch in three took 5 to 8 idle seconds more (TensorFlow 2.21, 12 s each).
    """
    import keras

    if keras.backend.backend() != "tensorflow":
        return data
    import tensorflow as tf

    batches = data.batches
    signature = (
        tf.TensorSpec((None, *batches.shards.clips(batches.rows[:1]).shape[1:]), tf.uint8),
        tf.TensorSpec((None, data.classes), tf.float32),
        tf.TensorSpec((None,), tf.float32),
    )
    # Each epoch makes an iterator of its own, so none is begun before the data know the epoch.
    dataset = tf.data.Dataset.from_generator(
        lambda: (data[index] for index in range(len(batches))), output_signature=signature
    )
    options = tf.data.Options()
    options.autotune.enabled = False
    return dataset.apply(tf.data.experimental.assert_cardinality(len(batches))).prefetch(1).with_options(options)


def _save(model: Any, path: Path) -> None:
    """The whole model or nothing. Keras insists on the suffix."""
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
