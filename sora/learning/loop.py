"""What Keras's `fit` needs: batches in its format, the schedule, and what happens at the end of each epoch."""

from __future__ import annotations

import time
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import keras
import numpy as np

from sora.config import Train
from sora.core.errors import InputError
from sora.core.processes import Emit
from sora.learning import checkpoint
from sora.model.classifier import fed
from sora.store.batches import Batch, Batches
from sora.tasks import SINGLE, Task

_AHEAD = 4  # batches made before they are needed
_BATCH_EVENT_SECONDS = 0.5


class ClipDataset(keras.utils.PyDataset):  # type: ignore[misc]
    """`Batches` for `fit`: what `model` takes, labels one-hot (for label smoothing), multi-hot or mixed, and weights.

    Two threads make at most 4 batches ahead. It has its own threads: Keras's may start the next epoch before they are
    told that it changed. Batches made ahead are identified by epoch and number, so the timing changes nothing.
    """

    def __init__(self, batches: Batches, classes: int, model: keras.Model) -> None:
        super().__init__(workers=1)
        self.batches, self.classes, self.model = batches, classes, model
        self.epoch = 0
        self.error: Exception | None = None
        self._threads = ThreadPoolExecutor(2, "batches")
        self._ahead: dict[tuple[int, int], Future[Batch]] = {}

    @property
    def num_batches(self) -> int:
        return len(self.batches)

    def __getitem__(self, index: int) -> tuple[Any, np.ndarray, np.ndarray]:
        wanted = range(index, min(index + 1 + _AHEAD, len(self.batches)))
        self._ahead = {
            (self.epoch, number): self._ahead.get((self.epoch, number))
            or self._threads.submit(self.batches.load, self.epoch, number)
            for number in wanted
        }
        try:
            batch = self._ahead.pop((self.epoch, index)).result()
        except Exception as error:
            self.error = error  # a backend may show only its text, in an error of its own
            raise
        return fed(self.model, batch.inputs), self.batches.task.dense(batch.labels, self.classes), batch.weights


def compile_model(model: keras.Model, train: Train, steps: int, *, task: Task = SINGLE, jit: bool | str) -> None:
    """AdamW (Loshchilov and Hutter 2019), warm-up over a tenth of the `steps`, then a cosine to 1 % of the rate.

    Biases and normalisation are not decayed. Loss and accuracy are the task's.
    """
    warm_up = max(1, steps // 10)
    schedule = keras.optimizers.schedules.CosineDecay(
        train.learning_rate / 20,
        max(1, steps - warm_up),
        alpha=0.01,
        warmup_target=train.learning_rate,
        warmup_steps=warm_up,
    )
    optimizer = keras.optimizers.AdamW(schedule, weight_decay=train.weight_decay, global_clipnorm=5.0)
    optimizer.exclude_from_weight_decay(var_names=["bias", "gamma", "beta"])
    model.compile(optimizer, task.loss(train.label_smoothing), metrics=[task.accuracy()], jit_compile=jit)


class Average:
    """The average of a model's weights over epochs; it is validated and kept instead of the weights.

    After epoch n it moves towards the weights by max(1 - decay, 1 / n): at first the plain mean, as in stochastic
    weight averaging (Izmailov et al. 2018), then an exponential one that forgets the early epochs. Departure: batch
    normalisation's statistics are averaged too. Measuring them again would cost a pass over the clips. Keras's own
    `use_ema` does not average them, so they would not match the averaged weights.
    """

    def __init__(self, decay: float) -> None:
        self.decay = decay
        self.weights: list[np.ndarray] = []  # empty before the first epoch ended
        self._aside: list[np.ndarray] = []

    def update(self, model: keras.Model, epochs: int) -> None:
        """Adds the weights after the finished epoch, the `epochs`-th, to the average."""
        step = max(1 - self.decay, 1 / epochs)
        now = model.get_weights()
        if not self.weights or epochs == 1:
            self.weights = now
            return
        self.weights = [
            (average + step * (value - average)).astype(value.dtype)
            for average, value in zip(self.weights, now, strict=True)
        ]

    def swap_in(self, model: keras.Model) -> None:
        """Gives the model the average; its own weights are set aside."""
        self._aside = model.get_weights()
        model.set_weights(self.weights)

    def swap_out(self, model: keras.Model) -> None:
        """Gives the model its own weights back."""
        model.set_weights(self._aside)
        self._aside = []


class EpochEnd(keras.callbacks.Callback):  # type: ignore[misc]
    """After each epoch: checks that losses are finite and better, writes the checkpoint, tells the parent; stops when
    patience is exhausted.

    With `train.ema`, validation sees the weights' average, and the best epoch keeps it.

    Before each epoch: gives the epoch's number to the data, and the epoch's seed to every source of randomness in the
    model. So the checkpoint needs no random state.
    """

    def __init__(
        self,
        data: ClipDataset,
        train: Train,
        *,
        monitor: str,
        path: Path,
        fingerprint: str,
        emit: Emit,
    ) -> None:
        super().__init__()
        self.data, self.train, self.monitor, self.path, self.emit = data, train, monitor, path, emit
        self.best: list[np.ndarray] = []
        self.average = Average(train.ema) if train.ema else None
        self._averaged = 0  # the last epoch in the average
        self.state: dict[str, Any] = {
            "fingerprint": fingerprint,
            "epoch": 0,  # finished
            "best_epoch": 0,
            "best": None,  # lowest value of the monitored loss
            "history": [],  # {"epoch", metrics…, "seconds", "clips_per_second"} an epoch
        }

    @property
    def finished(self) -> bool:
        epoch: int = self.state["epoch"]
        patience_is_over: bool = epoch > 0 and epoch - self.state["best_epoch"] >= self.train.patience
        return epoch >= self.train.epochs or patience_is_over

    def restore(self, model: keras.Model) -> int:
        """Resumes from the checkpoint, if there is a usable one. Returns the number of finished epochs."""
        try:
            kept, self.state = checkpoint.load(self.path, model, self.state["fingerprint"])
        except FileNotFoundError:
            return 0
        except checkpoint.Unusable as reason:
            self.emit({"event": "note", "message": f"the checkpoint {self.path.name} is not used: {reason}"})
            return 0
        self.best = kept["best"]
        if self.average is not None:
            self.average.weights = kept["average"]
            self._averaged = self.state["epoch"]
        return int(self.state["epoch"])

    def on_epoch_begin(self, epoch: int, logs: dict[str, float] | None = None) -> None:
        self.data.epoch = epoch
        for number, generator in enumerate(_seed_generators(self.model)):
            seed = np.random.SeedSequence([self.train.seed, epoch, number]).generate_state(1)[0] >> 1
            generator.state.assign(np.array([seed, 0], generator.state.dtype))
        self._started = self._told = time.monotonic()
        self._fed = self._started

    def on_train_batch_end(self, batch: int, logs: dict[str, float] | None = None) -> None:
        self._fed = time.monotonic()
        if self._fed - self._told >= _BATCH_EVENT_SECONDS:
            self._told = self._fed
            count = {"epoch": self.data.epoch + 1, "batch": batch + 1, "batches": len(self.data.batches)}
            self.emit({"event": "batch", **count})

    def on_test_begin(self, logs: dict[str, float] | None = None) -> None:
        if self.average is not None:  # validate what would be kept
            self._take(self.data.epoch + 1)
            self.average.swap_in(self.model)

    def on_test_end(self, logs: dict[str, float] | None = None) -> None:
        if self.average is not None:
            self.average.swap_out(self.model)

    def _take(self, epoch: int) -> None:
        if self.average is not None and self._averaged < epoch:
            self.average.update(self.model, epoch)
            self._averaged = epoch

    def on_epoch_end(self, epoch: int, logs: dict[str, float] | None = None) -> None:
        metrics = {name: float(value) for name, value in (logs or {}).items()}
        wrong = [name for name, value in metrics.items() if not np.isfinite(value)]
        if wrong:
            raise InputError(
                f"training diverged in epoch {epoch + 1}: {wrong[0]} is {metrics[wrong[0]]}",
                fix=f"lower train.learning_rate (it is {self.train.learning_rate})",
            )
        now = time.monotonic()
        clips = len(self.data.batches) * self.data.batches.batch
        took = {"seconds": now - self._started, "clips_per_second": clips / max(self._fed - self._started, 1e-6)}
        state = self.state
        state["epoch"] = epoch + 1
        state["history"].append({"epoch": epoch + 1, **metrics, **took})
        self._take(epoch + 1)
        average = self.average.weights if self.average is not None else []
        if state["best"] is None or metrics[self.monitor] < state["best"]:
            state["best"], state["best_epoch"] = metrics[self.monitor], epoch + 1
            self.best = average or self.model.get_weights()
        checkpoint.save(self.path, self.model, {"best": self.best, "average": average}, state)
        self.emit({"event": "epoch", "epoch": epoch + 1, "epochs": self.train.epochs, "metrics": metrics, **took})
        self.model.stop_training = self.finished


def _seed_generators(model: keras.Model) -> list[keras.random.SeedGenerator]:
    generators = (getattr(layer, "seed_generator", None) for layer in model._flatten_layers(include_self=False))
    return [generator for generator in generators if generator is not None]
