"""Training, in a child process that dies with its parent: shards and a table of splits become `model.keras`.

`run` is the parent's side and imports nothing heavy. The child (`python -m sora.learning.training`) holds Keras. When
it ends, for whatever reason, its GPU memory is free. It keeps a checkpoint in the job's folder: the same job run again
resumes after the last finished epoch, and its result is the same as without the interruption.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sora.config import Model, Train
from sora.core import files
from sora.core.errors import InputError, ServiceError
from sora.core.processes import Emit, child_main, run_child
from sora.core.records import ClipSpec
from sora.learning.jobs import MODEL_FILE, TrainJob, TrainResult, fingerprint, labelled, open_shards, save

if TYPE_CHECKING:
    import keras
    import pandas as pd
    import tensorflow as tf

    from sora.learning import loop
    from sora.store.batches import Batches

CHECKPOINT_FILE = "checkpoint.npz"


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
    if model.solved:
        from sora.learning import probed

        return probed.fit(job, emit)
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


@dataclass(frozen=True)
class _Footage:
    """The batches for training and validation. `table` is the job's, see `jobs.labelled`."""

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
    shards = open_shards(job)
    table = labelled(job, task)
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
    save(final, path)
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


def _fingerprint(job: TrainJob, table: pd.DataFrame, machine: Machine) -> str:
    """A digest of everything that decides what the training computes."""
    import keras

    computed_by = (keras.__version__, keras.backend.backend(), machine.name, machine.precision)
    return fingerprint(job, table[["sha256", "label", "split"]], *computed_by)


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


def _body(job: dict[str, Any], emit: Emit) -> dict[str, Any]:
    return fit(TrainJob.from_dict(job), emit).to_dict()


if __name__ == "__main__":
    child_main(_body)
