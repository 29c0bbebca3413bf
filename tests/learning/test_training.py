"""Training: what comes out, SIGKILL and resume, damaged checkpoints, full disks, wrong tables, several devices."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from sora.config import Model, Train
from sora.core.errors import DiskFull, InputError, ServiceError
from sora.core.records import ClipSpec
from sora.learning import jobs, training
from sora.learning.jobs import TrainJob
from tests.clips import CLASSES, SMALL, SPEC, make_shards

Events = list[dict[str, Any]]


@pytest.fixture(scope="module")
def shard_folder(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, pd.DataFrame]:
    return make_shards(tmp_path_factory.mktemp("shards"))


@pytest.fixture
def job(shard_folder: tuple[Path, pd.DataFrame], tmp_path: Path) -> Callable[..., TrainJob]:
    """Makes a job of 3 epochs; keywords go to settings.Train, `table` replaces the table, `out` names its folder."""

    def make(
        *, table: pd.DataFrame | None = None, out: str = "out", model: dict[str, Any] | None = None, **train: Any
    ) -> TrainJob:
        shards, rows = shard_folder
        file = tmp_path / f"{out}.csv"
        (rows if table is None else table).to_csv(file, index=False)
        return TrainJob(
            shards=str(shards),
            table=str(file),
            classes=CLASSES,
            model=Model(**(model or SMALL)).model_dump(mode="json"),
            train=Train(**{"epochs": 3, "batch": 4, **train}).model_dump(mode="json"),
            clip=SPEC.to_dict(),
            out=str(tmp_path / out),
        )

    return make


@pytest.fixture(autouse=True)
def policy() -> Iterator[None]:
    """`fit` in the test's own process leaves Keras's dtype policy float32, as it was, also when it fails half-way."""
    yield
    if "keras" in sys.modules:
        sys.modules["keras"].config.set_dtype_policy("float32")


def weights(file: str) -> list[np.ndarray]:
    import keras

    import sora.model.classifier  # noqa: F401  (registers the layers that the file names)

    found: list[np.ndarray] = keras.saving.load_model(file, safe_mode=True, compile=False).get_weights()
    return found


def kinds(events: Events, kind: str) -> Events:
    return [event for event in events if event["event"] == kind]


ALL = {"speed": 0.5, "crop": 0.2, "noise": 4.0, "mix_up": 0.3, "ema": 0.7}


@pytest.mark.parametrize("more", [{}, ALL], ids=["defaults", "all augmentations and averaged weights"])
def test_killed_and_run_again_it_ends_as_if_it_had_not_been(
    job: Callable[..., TrainJob], tmp_path: Path, more: dict[str, float]
) -> None:
    """A real SIGKILL of the child after an epoch, then the same job again; dropout, flips and moves included."""
    whole: Events = []
    uninterrupted = training.run(job(out="whole", epochs=4, **more), whole.append)
    assert [event["epoch"] for event in kinds(whole, "epoch")] == [1, 2, 3, 4]
    assert uninterrupted.epochs == 4 and uninterrupted.resumed_from == 0
    assert set(kinds(whole, "epoch")[0]["metrics"]) == {"loss", "accuracy", "val_loss", "val_accuracy"}
    start = kinds(whole, "start")[0]
    assert (start["train"], start["val"]) == (12, 4) and start["parameters"] == uninterrupted.parameters
    json.dumps(uninterrupted.to_dict())

    def kill_after_two(event: dict[str, Any]) -> None:
        if event["event"] == "epoch" and event["epoch"] == 2:
            found = subprocess.run(
                ["pgrep", "-P", str(os.getpid()), "-f", "sora.learning.training"],
                capture_output=True,
                text=True,
                check=True,
            )
            for child in found.stdout.split():
                os.kill(int(child), signal.SIGKILL)

    with pytest.raises(ServiceError, match="killed by signal 9"):
        training.run(job(epochs=4, **more), kill_after_two)
    rest: Events = []
    resumed = training.run(job(epochs=4, **more), rest.append)
    assert resumed.resumed_from in (2, 3)  # it may have finished another epoch before the signal came
    assert [event["epoch"] for event in kinds(rest, "epoch")] == list(range(resumed.resumed_from + 1, 5))
    for one, other in zip(uninterrupted.history, resumed.history, strict=True):
        for name in ("loss", "accuracy", "val_loss", "val_accuracy"):
            assert one[name] == other[name], name
    for weight, again in zip(weights(uninterrupted.model), weights(resumed.model), strict=True):
        np.testing.assert_array_equal(weight, again)


def test_the_child_dies_with_its_parent(job: Callable[..., TrainJob], tmp_path: Path) -> None:
    file = tmp_path / "job.json"
    file.write_text(json.dumps(job(epochs=10_000).to_dict()))
    code = (
        "import json, sys; from sora.learning import jobs, training; from sora.learning.jobs import TrainJob\n"
        "def show(event): print(event['event'], flush=True)\n"
        f"training.run(TrainJob.from_dict(json.load(open({str(file)!r}))), show)"
    )
    parent = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None and parent.stdout.readline().strip() == "start"
    found = subprocess.run(["pgrep", "-P", str(parent.pid)], capture_output=True, text=True, check=True)
    child = int(found.stdout.split()[0])
    parent.kill()
    parent.wait()
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline and _runs(child):
        time.sleep(0.05)
    assert not _runs(child)


def _runs(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


def test_a_finished_job_run_again_trains_no_more_unless_its_checkpoint_is_damaged(job: Callable[..., TrainJob]) -> None:
    first = training.fit(job(epochs=1))
    events: Events = []
    again = training.fit(job(epochs=1), events.append)
    assert again.resumed_from == 1 and not kinds(events, "epoch") and again.history == first.history
    for one, other in zip(weights(first.model), weights(again.model), strict=True):
        np.testing.assert_array_equal(one, other)
    checkpoint = Path(first.model).parent / training.CHECKPOINT_FILE
    checkpoint.write_bytes(checkpoint.read_bytes()[:-100])
    events.clear()
    anew = training.fit(job(epochs=1), events.append)
    assert anew.resumed_from == 0 and "damaged" in kinds(events, "note")[0]["message"]
    assert anew.history[0]["loss"] == first.history[0]["loss"]  # one machine, one seed


def test_early_stopping_gives_back_the_best_epoch(
    job: Callable[..., TrainJob], shard_folder: tuple[Path, pd.DataFrame]
) -> None:
    """Labels without meaning: validation gets worse while training goes on."""
    table = shard_folder[1].copy()
    rng = np.random.default_rng(0)
    train = table["split"] == "train"
    table.loc[train, "label"] = rng.permutation(table.loc[train, "label"])
    result = training.fit(job(table=table, epochs=30, patience=2, learning_rate=0.01))
    losses = [epoch["val_loss"] for epoch in result.history]
    assert result.epochs < 30 and result.epochs == result.best_epoch + 2
    assert losses[result.best_epoch - 1] == min(losses)
    assert _validation_loss(result.model, job(), table) == pytest.approx(min(losses), rel=1e-3)


def test_averaged_weights_are_what_is_validated_and_kept(
    job: Callable[..., TrainJob], shard_folder: tuple[Path, pd.DataFrame]
) -> None:
    result = training.fit(job(epochs=4, ema=0.5, learning_rate=0.01, mix_up=0.2))
    losses = [epoch["val_loss"] for epoch in result.history]
    assert _validation_loss(result.model, job(), shard_folder[1]) == pytest.approx(min(losses), rel=1e-3)
    plain = training.fit(job(out="plain", epochs=4, learning_rate=0.01, mix_up=0.2))
    # The weights that train are those of a training without the average: the same losses, other validations.
    assert [epoch["loss"] for epoch in plain.history] == [epoch["loss"] for epoch in result.history]
    assert plain.history[0]["val_loss"] == losses[0] and plain.history[2]["val_loss"] != losses[2]


def test_the_average_by_hand() -> None:
    import keras

    from sora.learning.loop import Average

    model = keras.Sequential([keras.Input((1,)), keras.layers.Dense(1, use_bias=False)])
    average, seen = Average(0.75), []
    for epoch, value in enumerate([8.0, 4.0, 0.0, 4.0, 4.0, 0.0], 1):
        model.set_weights([np.full((1, 1), value)])
        average.update(model, epoch)
        seen.append(float(average.weights[0][0, 0]))
    assert seen == [8, 6, 4, 4, 4, 3]  # the mean of four, then a quarter of each new one
    average.swap_in(model)
    assert model.get_weights()[0] == 3
    average.swap_out(model)
    assert model.get_weights()[0] == 0


def _validation_loss(model: str, job: TrainJob, table: pd.DataFrame) -> float:
    """The loss of the saved model, computed anew."""
    import keras

    from sora.store.batches import Batches
    from sora.store.shards import ShardSet

    rows = table[table["split"] == "val"].assign(label_index=lambda t: t["label"].map(CLASSES.index))
    batch = Batches(ShardSet.open(Path(job.shards)), rows, batch=64).load(0, 0)
    x, y = batch.inputs["video"], batch.labels
    logits = keras.saving.load_model(model, safe_mode=True, compile=False).predict_on_batch(x)
    loss = keras.losses.CategoricalCrossentropy(from_logits=True, label_smoothing=job.train["label_smoothing"])
    return float(loss(np.eye(2)[y], logits))


def test_without_validation_clips_it_watches_the_training_loss(
    job: Callable[..., TrainJob], shard_folder: tuple[Path, pd.DataFrame]
) -> None:
    events: Events = []
    table = shard_folder[1].assign(split="train")
    result = training.fit(job(table=table, epochs=2, mixed_precision="on"), events.append)
    assert "no validation clips" in kinds(events, "note")[0]["message"]
    assert kinds(events, "start")[0]["precision"] == "mixed_bfloat16"
    assert set(result.history[0]) == {"epoch", "loss", "accuracy", "seconds", "clips_per_second"}
    import keras

    model = keras.saving.load_model(result.model, safe_mode=True)
    assert {layer.compute_dtype for layer in model._flatten_layers()} == {"float32", "uint8"} - {"uint8"}
    assert not model.compiled


def test_a_diverging_loss_names_the_fix(job: Callable[..., TrainJob], monkeypatch: pytest.MonkeyPatch) -> None:
    from sora.learning import loop

    def too_fast(model: Any, *args: Any, **options: Any) -> None:
        compile_model(model, *args, **options)
        model.compile("sgd", lambda truth, logits: logits[:, 0] * float("inf"), metrics=["accuracy"], jit_compile=False)

    compile_model = loop.compile_model
    monkeypatch.setattr(loop, "compile_model", too_fast)
    with pytest.raises(InputError, match="diverged in epoch 1") as caught:
        training.fit(job())
    assert "lower train.learning_rate" in caught.value.fix


def test_a_full_disk_at_the_end_leaves_no_half_model(job: Callable[..., TrainJob]) -> None:
    out = Path(job().out)
    out.mkdir(parents=True)
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=400k", "tmpfs", str(out)], capture_output=True)
    if mounted.returncode:
        pytest.skip("can't mount a small file system here")
    try:
        with pytest.raises(DiskFull):
            training.fit(job(epochs=1))
        assert not (out / jobs.MODEL_FILE).exists() and not list(out.glob("*.keras"))
    finally:
        subprocess.run(["umount", str(out)], check=True)


def test_a_folder_that_can_not_be_made(job: Callable[..., TrainJob], tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ServiceError, match="can't write"):
        training.fit(replace(job(), out=str(tmp_path / "file" / "out")))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t[t["split"] == "val"], "split `train` is empty"),
        (lambda t: t.iloc[:0], "split `train` is empty"),
        (lambda t: t[(t["split"] == "val") | (t["label"] == "left")], "no clip to train on of class 'right'"),
        (lambda t: t.replace({"label": {"left": "sideways"}}), "not a class: 'sideways'"),
        (lambda t: pd.concat([t, t.tail(1).assign(sha256="f" * 64)]), "lack 1 of 13 videos, among them ffff"),
    ],
)
def test_a_wrong_table_is_named(
    job: Callable[..., TrainJob],
    shard_folder: tuple[Path, pd.DataFrame],
    change: Callable[[pd.DataFrame], pd.DataFrame],
    message: str,
) -> None:
    with pytest.raises(InputError, match=message):
        training.fit(job(table=change(shard_folder[1])))


def test_wrong_shards_are_named(job: Callable[..., TrainJob], tmp_path: Path) -> None:
    with pytest.raises(InputError, match="the settings want"):
        training.fit(replace(job(), clip=ClipSpec(frames=4, height=32, width=32).to_dict()))
    with pytest.raises(InputError, match="no complete shard set"):
        training.fit(replace(job(), shards=str(tmp_path / "nowhere")))


def test_a_shard_that_is_lost_while_training_is_named(
    job: Callable[..., TrainJob], shard_folder: tuple[Path, pd.DataFrame], tmp_path: Path
) -> None:
    import shutil

    copy = tmp_path / "shards"
    shutil.copytree(shard_folder[0], copy)
    for file in copy.glob("bucket-*.npy"):
        file.unlink()
    with pytest.raises(ServiceError, match=r"bucket-.*can't be read"):
        training.fit(replace(job(), shards=str(copy)))


def test_errors_cross_to_the_parent(job: Callable[..., TrainJob], shard_folder: tuple[Path, pd.DataFrame]) -> None:
    with pytest.raises(InputError, match="split `train` is empty"):
        training.run(job(table=shard_folder[1].iloc[:0]))


_MIRRORED = """
import json, sys
import tensorflow as tf
cpu = tf.config.list_physical_devices("CPU")[0]
tf.config.set_logical_device_configuration(cpu, [tf.config.LogicalDeviceConfiguration()] * 2)
from sora.learning import jobs, training
job = jobs.TrainJob.from_dict(json.load(open(sys.argv[1])))
events = []
result = training.fit(job, events.append, devices=["CPU:0", "CPU:1"])
print(json.dumps([events[0], result.to_dict()]))
"""


def test_two_devices_mirror_the_model(job: Callable[..., TrainJob], tmp_path: Path) -> None:
    """Two virtual devices of this CPU: the strategy's path, run for real, and its checkpoint."""
    file = tmp_path / "job.json"
    for epochs, resumed in ((2, 0), (2, 2)):
        file.write_text(json.dumps(job(epochs=epochs, ema=0.5).to_dict()))
        done = subprocess.run(
            [sys.executable, "-c", _MIRRORED, str(file)], capture_output=True, text=True, env=_quiet(), check=False
        )
        assert done.returncode == 0, done.stderr[-2000:]
        start, result = json.loads(done.stdout.splitlines()[-1])
        assert start["device"] == "tensorflow 2 x cpu" and start["resumed_from"] == resumed
        assert result["epochs"] == 2 and np.isfinite(result["history"][-1]["val_loss"])
    assert len(weights(result["model"])) > 0


def _quiet(**more: str) -> dict[str, str]:
    from sora.core.processes import quiet_environment

    return quiet_environment(**more)


def test_jax_trains_from_shards_without_tensorflow(job: Callable[..., TrainJob], tmp_path: Path) -> None:
    pytest.importorskip("jax")
    file = tmp_path / "job.json"
    file.write_text(json.dumps(job(epochs=2, ema=0.5, mix_up=0.2).to_dict()))
    code = (
        "import json, sys; sys.modules['tensorflow'] = None\n"
        "from sora.learning import jobs, training\n"
        f"result = training.fit(jobs.TrainJob.from_dict(json.load(open({str(file)!r}))))\n"
        "print(json.dumps(result.to_dict()))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=_quiet(KERAS_BACKEND="jax"), check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert json.loads(done.stdout.splitlines()[-1])["epochs"] == 2
