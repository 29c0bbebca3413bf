"""Trains one of Sora's peers for a given time and answers for the videos of a fold, in a child process.

All see what Sora sees in its training: the same clips, augmentation, class weights, label smoothing and weight decay
(those of the fold's settings). AdamW with a cosine over the time that is given, after a tenth of it as warm-up. Where
the fold has validation videos their loss is taken after every epoch, in the same time, and the best epoch is kept.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from benchmarks.peers import article
from sora.config import Model, Train
from sora.core.errors import InputError
from sora.core.processes import child_main, run_child
from sora.core.records import ClipSpec, Recipe
from sora.core.tensors import VIDEO
from sora.judging import evaluation
from sora.store.augment import Augmentation
from sora.store.batches import Batches
from sora.store.shards import ShardSet
from sora.tasks import SINGLE

if TYPE_CHECKING:
    import keras

    from sora.learning.loop import ClipDataset

Emit = Callable[[dict[str, Any]], None]
FRAME_CLIPS = 16  # clips whose frames are shuffled together, where frames are the samples
FEW_STEPS = 50  # so many it takes until running statistics (momentum 0.9) have forgotten what they began as
SETTLING_BATCHES = 8
ASKED_CLIPS = 8  # at once
ASKED_FRAME_CLIPS = 2  # at once, where frames are the samples: the article's network keeps 35 MB a frame of 56 pixels


@dataclass(frozen=True)
class Peer:
    """How a network is trained.

    The rates were chosen beforehand and never tuned: 1e-3, Adam's default, for the two old designs (the article prints
    Adam; Tran et al. train with plain SGD at 0.01); 2e-3, which is Sora's own default, for the two mobile ones, whose
    papers train at large rates (SGD at 1.6, RMSProp at 1.8, for 1024 clips a step).
    """

    about: str
    rate: float  # AdamW's
    batch: int  # clips a step; frames where `builder` is none
    builder: str | None = None  # in `peer_networks`; none: the article's network, on frames


PEERS = {
    "article": Peer("the article's network, fixed, frame by frame", 1e-3, 32),
    "r3d-18": Peer("R3D-18 (Tran et al. 2018)", 1e-3, 8, "r3d_18"),
    "x3d-xs": Peer("X3D-XS (Feichtenhofer 2020) on all frames", 2e-3, 16, "x3d_xs"),
    "x3d-xs-4": Peer("X3D-XS on 4 of the frames, as in its paper", 2e-3, 16, "x3d_xs_4"),
    "movinet-a0": Peer("MoViNet-A0, base (Kondratyuk et al. 2021)", 2e-3, 16, "movinet_a0"),
}


@dataclass(frozen=True)
class PeerJob:
    """What the child needs; JSON-able."""

    network: str  # of PEERS
    seconds: float  # of training, the first step, which compiles, left out
    side: int  # pixels, of the article network's frames
    shards: str  # folder
    table: str  # parquet file: `sha256, path, label, split`
    classes: list[str]
    train: dict[str, Any]  # settings.Train
    clip: dict[str, Any]  # records.ClipSpec
    views: list[str]  # of each clip besides itself that the network is asked about
    out: str  # folder of this job alone


def run(job: PeerJob, on_event: Emit = lambda event: None, log: Path | None = None) -> dict[str, Any]:
    """Trains and asks in a child process.

    Events: {"event": "step", "steps", "seconds"}; {"event": "evaluate", …}, see `evaluation.run`.

    Returns:
        {"videos" (see `crossval.answers`), "metrics", "training": {"parameters", "flops" (of a clip), "steps", "passes"
        (over the training clips), "best_epoch", "epochs" (whole ones), "seconds", "clips_per_second", "history",
        "settled"}}.

    Raises:
        InputError: the loss diverged.
        ServiceError: the child died.
    """
    return run_child("benchmarks.peers.training", asdict(job), on_event, log=log)


def cost(model: Model, clip: ClipSpec, classes: int) -> dict[str, int]:
    """{"parameters", "flops" of a clip} of Sora's own network, counted in a child process."""
    job = {"model": model.model_dump(mode="json"), "clip": clip.to_dict(), "classes": classes}
    return run_child("benchmarks.peers.training", {"sora": job})


# ---- the child's side -----------------------------------------------------------------------------------------------


def fit(job: PeerJob, emit: Emit) -> dict[str, Any]:
    """Body of the child: see `run`."""
    import keras

    from benchmarks.peers import networks as peer_networks
    from sora.learning import loop

    peer, train, clip = PEERS[job.network], Train(**job.train), ClipSpec.from_dict(job.clip)
    shards, classes = ShardSet.open(Path(job.shards)), len(job.classes)
    numbers = {name: number for number, name in enumerate(job.classes)}
    table = pd.read_parquet(job.table)
    table = table.assign(label_index=table["label"].map(numbers)).sort_values("sha256", ignore_index=True)
    batches = Batches(
        shards,
        table[table["split"] == "train"],
        batch=peer.batch if peer.builder else FRAME_CLIPS,
        shuffle_seed=train.seed,
        augmentation=Augmentation.of(train, job.classes),
        classes=classes,
        class_weights=train.class_weights,
    )
    validation = Batches(
        shards, table[table["split"] == "val"], batch=ASKED_CLIPS if peer.builder else ASKED_FRAME_CLIPS
    )  # fmt: skip
    keras.utils.set_random_seed(train.seed)
    if peer.builder:
        trained = asked = getattr(peer_networks, peer.builder)(clip, classes)
        flops, samples = peer_networks.flops(asked), batches.clips
    else:
        trained = peer_networks.article_frame(clip, classes, job.side)
        asked = peer_networks.of_frames(trained, clip)
        flops, samples = clip.frames * article.flops(job.side, job.side), batches.clips * clip.frames
    done = _train(job, trained, asked, loop.ClipDataset(batches, classes, trained), validation, emit)
    videos, metrics = _answers(job, asked, emit)
    return {
        "videos": videos,
        "metrics": metrics,
        "training": {
            "parameters": asked.count_params(),
            "flops": flops,
            **done,
            "passes": done["steps"] * peer.batch / samples,
            "clips_per_second": done["steps"] * peer.batch / samples * batches.clips / max(done["seconds"], 1e-6),
        },
    }


def _train(
    job: PeerJob, trained: keras.Model, asked: keras.Model, data: ClipDataset, validation: Batches, emit: Emit
) -> dict[str, Any]:
    """Trains for the job's time; leaves `asked`, which shares the weights, with the ones that are judged.

    Returns {"steps", "epochs", "best_epoch", "seconds", "history", "settled"}.
    """
    import keras

    peer, train = PEERS[job.network], Train(**job.train)
    optimizer = keras.optimizers.AdamW(peer.rate, weight_decay=train.weight_decay, global_clipnorm=5.0)
    optimizer.exclude_from_weight_decay(var_names=["bias", "gamma", "beta"])
    loss = keras.losses.CategoricalCrossentropy(from_logits=True, label_smoothing=train.label_smoothing)
    trained.compile(optimizer, loss, jit_compile=False)
    best = _Best()
    history: list[dict[str, float]] = []
    steps = told = epoch = 0
    spent, began = 0.0, time.monotonic()
    for ended, x, y, w in _samples(data, None if peer.builder else peer.batch, train.seed):
        optimizer.learning_rate = peer.rate * share_of_rate(spent / job.seconds)
        value = float(trained.train_on_batch(x, y, sample_weight=w))  # the mean of the epoch so far
        if not math.isfinite(value):
            raise InputError(f"{job.network} diverged at step {steps + 1}", fix="lower its rate in PEERS")
        steps += 1
        if ended:
            epoch += 1
            trained.reset_metrics()
            history.append({"epoch": epoch, "loss": value, **best.offer(epoch, asked, validation)})
        if steps == 1:
            began = time.monotonic()  # the first step compiles, which no network is charged for but Sora
        spent = time.monotonic() - began
        if spent - told >= 1:
            told = int(spent)
            emit({"event": "step", "steps": steps, "seconds": spent})
        if spent >= job.seconds:
            break
    settled = steps < FEW_STEPS and _settle(asked, data)
    if settled:
        best = _Best()  # what went before was judged by other statistics
    if settled or not ended:
        at = epoch if ended else epoch + 1
        history.append({"epoch": at, "loss": value, **best.offer(at, asked, validation)})
    if best.weights:
        asked.set_weights(best.weights)
    found = {"steps": steps, "epochs": epoch, "best_epoch": best.epoch or epoch, "seconds": spent}
    return {**found, "history": history, "settled": settled}


@dataclass
class _Best:
    """The weights of the lowest validation loss."""

    loss: float = math.inf
    epoch: int = 0  # none: there was no validation
    weights: list[np.ndarray] = field(default_factory=list)

    def offer(self, epoch: int, model: keras.Model, validation: Batches) -> dict[str, float]:
        """Takes the model's weights if they are better. Returns {"val_loss"}, nothing where there are no videos."""
        if not validation.clips:
            return {}
        logits = np.concatenate([np.asarray(model.predict_on_batch(one.inputs[VIDEO])) for one in validation.epoch(0)])
        shares = SINGLE.clip_probabilities(logits)
        loss = SINGLE.log_loss(shares, validation.labels)
        if loss < self.loss:
            self.loss, self.epoch, self.weights = loss, epoch, model.get_weights()
        return {"val_loss": loss}


def share_of_rate(progress: float) -> float:
    """Of the learning rate, when `progress` (0 to 1) of the time is over: as `sora.learning.loop.compile_model`'s."""
    warm_up = 0.1
    if progress < warm_up:
        return 0.05 + 0.95 * progress / warm_up
    return 0.01 + 0.99 * (1 + math.cos(math.pi * min(1, (progress - warm_up) / (1 - warm_up)))) / 2


def _samples(
    data: ClipDataset, frames: int | None, seed: int
) -> Iterator[tuple[bool, np.ndarray, np.ndarray, np.ndarray]]:  # fmt: skip
    """Without end: (does an epoch end with it, x, y, w) of a step; with `frames` so many of the clips, shuffled."""
    while True:
        for number in range(len(data.batches)):
            last = number + 1 == len(data.batches)
            x, y, w = data[number]
            if frames is None:
                yield last, x, y, w
                continue
            time_ = x.shape[1]
            order = np.random.default_rng([seed, data.epoch, number]).permutation(len(x) * time_)
            x, y, w = x.reshape(-1, *x.shape[2:]), np.repeat(y, time_, axis=0), np.repeat(w, time_)
            for first in range(0, len(order), frames):
                chosen = order[first : first + frames]
                yield last and first + frames >= len(order), x[chosen], y[chosen], w[chosen]
        data.epoch += 1


def _settle(model: keras.Model, data: ClipDataset) -> bool:
    """Measures the normalisations' statistics anew on training clips; not in the network's time.

    After a few steps running averages are still those that training began with, and the network would be judged by
    them. X3D's own recipe does so after every epoch (precise statistics; Wu and Johnson 2021).
    """
    import keras

    normalisations = [layer for layer in model.layers if isinstance(layer, keras.layers.BatchNormalization)]
    sums = [np.zeros((2, layer.moving_mean.shape[0])) for layer in normalisations]
    momenta = [layer.momentum for layer in normalisations]
    count = min(SETTLING_BATCHES, len(data.batches))
    for layer in normalisations:
        layer.momentum = 0.0
    for number in range(count):
        model(data[number][0], training=True)
        for layer, total in zip(normalisations, sums, strict=True):
            mean = np.asarray(layer.moving_mean)
            total += [mean, np.asarray(layer.moving_variance) + mean**2]
    for layer, total, momentum in zip(normalisations, sums, momenta, strict=True):
        mean, square = total / count
        layer.moving_mean.assign(mean)
        layer.moving_variance.assign(square - mean**2)
        layer.momentum = momentum
    return bool(normalisations)


def _answers(job: PeerJob, model: keras.Model, emit: Emit) -> tuple[list[dict[str, Any]], dict[str, float]]:
    """Of the test videos, by the evaluation that Sora's own networks go through: (videos, metrics)."""
    import keras

    out = Path(job.out)
    out.mkdir(parents=True, exist_ok=True)
    file, table = out / "model.keras", pd.read_parquet(job.table)
    table[table["split"] == "test"].to_parquet(out / "table.parquet", index=False)
    keras.Model(model.inputs, model.outputs[0]).save(file)  # without the optimiser
    recipe = Recipe(
        ClipSpec.from_dict(job.clip),
        tuple(job.classes),
        model_sha256=evaluation.file_digest(file),
        views=tuple(job.views),
    )
    evaluation.evaluate(
        asdict(
            evaluation.EvalJob(
                shards=job.shards,
                table=str(out / "table.parquet"),
                models=[evaluation.EvalModel("fold", str(file), recipe)],
                classes=job.classes,
                data="",
                out=job.out,
                batch=ASKED_CLIPS if PEERS[job.network].builder else ASKED_FRAME_CLIPS,
            )
        ),
        emit,
    )
    report = evaluation.read(out / "fold").reports["test"]
    return report.videos, report.metrics


def _body(job: dict[str, Any], emit: Emit) -> dict[str, Any]:
    if "sora" not in job:
        return fit(PeerJob(**job), emit)
    from sora.model import classifier, cost

    what = job["sora"]
    model = classifier.build(Model(**what["model"]), ClipSpec.from_dict(what["clip"]), what["classes"])
    return {"parameters": cost.parameters(model), "flops": cost.flops(model)}


if __name__ == "__main__":
    child_main(_body)
