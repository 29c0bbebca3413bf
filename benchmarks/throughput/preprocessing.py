"""Decoding, shards, loading and bookkeeping near the limit.

`python -m benchmarks.throughput.preprocessing [--only FIGURE…]`

- `decode`: fights300 from files to shards, against the fastest of PyAV's ways to decode the same files on all cores and
  drop the frames: files side by side in processes or in threads, or frame threads a file.
- `long`: 16 clips of a video of 5 minutes, 1080p, against the same from decoding it in order; the clips must be equal.
- `batches`: shuffled batches of 16x112x112 clips from shards, against a memory copy of the same bytes and against what
  training takes.
- `added`: one video added to fights300, `prepared/` brought up to date, beside what decoding that video takes.
- `rows`: manifest written and read, splits assigned, for a million made-up videos.

What is compared is measured in rounds that take turns; the table has medians.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from fractions import Fraction
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from statistics import median
from typing import Any

import av
import numpy as np
import pandas as pd

from benchmarks import common
from benchmarks.common import SHARED, SORA, table, timed
from sora.config import Project, Settings
from sora.core.records import ClipSpec
from sora.core.tensors import VIDEO
from sora.dataset import manifest, splits, versioning
from sora.media import pool
from sora.media.video.transform import prepare_clips
from sora.store import building
from sora.store.batches import Batches
from sora.store.shards import ShardSet

MODULE = "benchmarks.throughput.preprocessing"
FIGHTS = SHARED / "fights300"
BATCH = 16
MILLION = 1_000_000
SECONDS, RATE = 300, 30  # of the long video
GROUPS = {"a key frame every 2 s": 60, "every 8.3 s (x264's default)": 250}


def spent(work: Callable[[], Any]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def decode_and_drop(path: str, threads: int = 1) -> int:
    with av.open(path) as container:
        stream = container.streams.video[0]
        stream.codec_context.thread_count = threads
        stream.thread_type = "AUTO" if threads > 1 else "NONE"
        return sum(1 for _ in container.decode(stream))


def in_processes(paths: list[str]) -> None:
    with ProcessPoolExecutor(pool.cores(), get_context("spawn")) as crew:
        list(crew.map(decode_and_drop, paths))


def in_threads(paths: list[str]) -> None:
    with ThreadPoolExecutor(pool.cores()) as crew:
        list(crew.map(decode_and_drop, paths))


def frame_threads(paths: list[str]) -> None:
    for path in paths:
        decode_and_drop(path, pool.cores())


def decode(rounds: int) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(prefix="sora-bench-") as name:
        rows = manifest.build(FIGHTS, Settings())
        paths = [str(FIGHTS / path) for path in rows["path"]]
        for number in range(rounds):
            out = Path(name) / str(number)
            ours = spent(partial(building.build, rows, (), FIGHTS, out, ClipSpec()))
            ways = {way.__name__: spent(partial(way, paths)) for way in (in_processes, in_threads, frame_threads)}
            best = min(ways, key=ways.__getitem__)
            found.append({"ours": ours, "limit": ways[best], "ratio": ways[best] / ours, "ways": ways})
            print(json.dumps(found[-1]), flush=True)
    frames = int(rows["frames"].sum())
    return [
        {
            "figure": "decode, sample, resize, write fights300: s",
            "ours": median(one["ours"] for one in found),
            "compared with": median(one["limit"] for one in found),
            "which is": f"PyAV decodes its {frames:,} frames and drops them, the fastest way",
            "ratio": median(one["ratio"] for one in found),
            "asked": "≥ 0.75",
            "rounds": found,
        }
    ]


def long_video(target: Path, key_frames: int) -> Path:
    """Real footage of fights300, enlarged to 1080p and shown again and again: one stretch is encoded, its packets are
    repeated."""
    pictures = []
    for path in sorted((FIGHTS / "fight").glob("*.mp4")):
        with av.open(str(path)) as container:
            pictures += [frame.reformat(1920, 1080, "yuv420p") for frame in container.decode(video=0)]
        if len(pictures) >= key_frames:
            break
    stretch = pictures[:key_frames]
    repeats = SECONDS * RATE // key_frames
    piece = target.with_suffix(".piece.mp4")
    with av.open(str(piece), "w") as container:
        # The quality of an ordinary camera; scene cuts make no key frames of their own.
        options = {"preset": "veryfast", "crf": "26", "g": str(key_frames), "sc_threshold": "0"}
        stream = container.add_stream("libx264", rate=RATE, options=options)
        stream.width, stream.height, stream.pix_fmt = 1920, 1080, "yuv420p"
        for index, frame in enumerate(stretch):
            frame.pts, frame.time_base, frame.pict_type = index, Fraction(1, RATE), 0
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    with av.open(str(target), "w") as made:
        out = None
        for repeat in range(repeats):
            with av.open(str(piece)) as given:
                source = given.streams.video[0]
                assert source.time_base is not None
                out = out or made.add_stream_from_template(source)
                step = round(key_frames / RATE / source.time_base)
                for packet in given.demux(source):
                    if packet.dts is None:
                        continue
                    assert packet.pts is not None
                    packet.pts += repeat * step
                    packet.dts += repeat * step
                    packet.stream = out
                    made.mux(packet)
    piece.unlink()
    return target


def long(rounds: int) -> list[dict[str, Any]]:
    spec = ClipSpec(sampling="window", window_seconds=2.0, max_clips=16)
    result = []
    with tempfile.TemporaryDirectory(prefix="sora-bench-") as name:
        for words, key_frames in GROUPS.items():
            path = long_video(Path(name) / f"{key_frames}.mp4", key_frames)
            frames = SECONDS * RATE // key_frames * key_frames
            clips: dict[str, np.ndarray] = {}

            def short(path: Path = path, frames: int = frames, clips: dict[str, np.ndarray] = clips) -> None:
                clips["ours"] = prepare_clips(path, spec, frames=frames, fps=float(RATE))

            def in_order(path: Path = path, frames: int = frames, clips: dict[str, np.ndarray] = clips) -> None:
                clips["order"] = prepare_clips(path, spec, frames=frames, fps=float(RATE), in_order=True)

            pairs = [(spent(short), spent(in_order)) for _ in range(min(rounds, 2))]
            assert np.array_equal(clips["ours"], clips["order"]) and len(clips["ours"]) == 16
            print(words, pairs, flush=True)
            result.append(
                {
                    "figure": f"16 clips of a 5 min 1080p video, {words}: s",
                    "ours": median(ours for ours, _ in pairs),
                    "compared with": median(order for _, order in pairs),
                    "which is": "the same clips by decoding in order; they are equal",
                    "ratio": median(order / ours for ours, order in pairs),
                    "asked": "≥ 5",
                }
            )
    return result


def batches(rounds: int) -> list[dict[str, Any]]:
    with tempfile.TemporaryDirectory(prefix="sora-bench-") as name:
        place = Path(name)
        rows = manifest.build(FIGHTS, Settings())
        building.build(rows, (), FIGHTS, place / "shards", ClipSpec())
        labelled = rows[["sha256"]].assign(label_index=pd.factorize(rows["label"])[0]).drop_duplicates("sha256")
        loader = Batches(ShardSet.open(place / "shards"), labelled, batch=BATCH, shuffle_seed=0)

        def load() -> int:
            return sum(one.inputs[VIDEO].nbytes for one in loader.epoch(0))

        size = load()  # from now on in memory
        source = np.ones((BATCH, 16, 112, 112, 3), np.uint8)

        def copy() -> None:
            for _ in range(len(loader)):
                source.copy()

        pairs = [(spent(load), spent(copy)) for _ in range(rounds * 3)]
        trained = timed([sys.executable, "-m", MODULE, "--child", "train"], Path.cwd()).json()
        ours = median(pair[0] for pair in pairs)
        clips = len(loader) * BATCH / ours
        return [
            {
                "figure": f"shuffled batches of {BATCH} clips: GB/s",
                "ours": size / ours / 1e9,
                "compared with": size / median(pair[1] for pair in pairs) / 1e9,
                "which is": "a memory copy of as many bytes",
                "ratio": median(copied / loaded for loaded, copied in pairs),
                "asked": "≥ 0.5",
            },
            {
                "figure": "the same: clips/s",
                "ours": clips,
                "compared with": trained["clips/s"],
                "which is": "what training (preset small) takes on all cores",
                "ratio": clips / trained["clips/s"],
                "asked": "≥ 3",
            },
        ]


def train() -> None:
    """In a process of its own: prints {"clips/s"} of training steps on made-up clips."""
    import keras

    from sora.model import classifier

    settings = Settings()
    model = classifier.build(settings.model, settings.clip.spec(), 2)
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(optimizer=keras.optimizers.AdamW(1e-3), loss=loss)
    clips = np.random.default_rng(0).integers(0, 255, (BATCH, *model.input_shape[1:]), np.uint8)
    labels = np.arange(BATCH) % 2
    times = [spent(lambda: model.train_on_batch(clips, labels)) for _ in range(10)][3:]
    print(json.dumps({"clips/s": BATCH / median(times)}))


def added(rounds: int) -> list[dict[str, Any]]:
    with tempfile.TemporaryDirectory(prefix="sora-bench-") as name:
        place = Path(name)
        project = Project(place / "fights300")
        data = place / "footage"
        # All but the first, which is added.
        files = sorted(FIGHTS.rglob("*.mp4"))
        for file in files[1:]:
            target = data / file.relative_to(FIGHTS)
            target.parent.mkdir(parents=True, exist_ok=True)
            target.symlink_to(file)
        timed([*SORA, "init", str(project.root), "--data", str(data)], place)
        versioning.add(project)
        versioning.reproduce(project)
        new = project.data / files[0].relative_to(FIGHTS)
        pairs = []
        for _ in range(rounds):
            new.write_bytes(files[0].read_bytes())
            ours = spent(lambda: (versioning.add(project), versioning.reproduce(project)))
            decoded = spent(lambda: (decode_and_drop(str(new)), prepare_clips(new, ClipSpec())))
            pairs.append((ours, decoded))
            print(pairs[-1], flush=True)
            new.unlink()
            versioning.add(project)
            versioning.reproduce(project)
        return [
            {
                "figure": "one video added to fights300, until it is in the shards: s",
                "ours": median(ours for ours, _ in pairs),
                "compared with": median(decoded for _, decoded in pairs),
                "which is": "decoding that video for facts and clips",
                "ratio": "",
                "asked": "< 10 + that",
            }
        ]


def rows(rounds: int) -> list[dict[str, Any]]:
    done = timed([sys.executable, "-m", MODULE, "--child", "rows"], Path.cwd(), memory=True)
    found = done.json()
    print(json.dumps({**found, "peak MB": done.peak / 1e6}), flush=True)
    return [
        {
            "figure": f"manifest and splits of {MILLION:,} made-up videos: s",
            "ours": sum(found.values()),
            "compared with": "",
            "which is": ", ".join(f"{name} {seconds:.1f}" for name, seconds in found.items()),
            "ratio": "",
            "asked": "< 60",
        },
        {
            "figure": "the same: peak memory, MB (the made-up table included)",
            "ours": done.peak / 1e6,
            "compared with": "",
            "which is": "",
            "ratio": "",
            "asked": "< 2000",
        },
    ]


def million() -> None:
    """In a process of its own: prints the seconds of each part."""
    rng = np.random.default_rng(0)
    digests = [hashlib.sha256(number.to_bytes(8, "big")).hexdigest() for number in range(MILLION)]
    # As many groups as a large team would have cameras; signatures far from each other, as random ones are.
    group = rng.integers(0, 20_000, MILLION)
    signature = rng.integers(0, 2**62, (MILLION, 3))
    made = pd.DataFrame(
        {
            "path": [f"c{number % 10}/g{of:05d}/{number:07d}.mp4" for number, of in enumerate(group)],
            "sha256": digests,
            "bytes": np.full(MILLION, 100_000),
            "label": [f"c{number % 10}" for number in range(MILLION)],
            "group": [f"g{of:05d}" for of in group],
            "codec": "h264",
            "width": 320,
            "height": 240,
            "rotation": 0,
            "frames": 60,
            "fps": 30.0,
            "duration": 2.0,
            "audio": False,
            "brightness": 100.0,
            "signature": ["".join(f"{part:016x}" for part in row) for row in signature.tolist()],
            "error": None,
            "detail": "",
        }
    )
    made = made[[name for name in manifest.COLUMNS if name in made]]
    lacking = set(manifest.COLUMNS) - set(made)
    assert not lacking, lacking
    seconds = {}
    with tempfile.TemporaryDirectory(prefix="sora-bench-") as name:
        place = Path(name)
        began = time.perf_counter()
        manifest.write(made, place / "manifest.parquet")
        seconds["manifest written"] = time.perf_counter() - began
        del made, digests, group, signature
        kept: dict[str, Any] = {}
        seconds["read"] = spent(lambda: kept.update(rows=manifest.read(place / "manifest.parquet")))
        ledger = splits.read(place / "splits.csv")
        seconds["splits assigned"] = spent(
            lambda: kept.update(assignment=splits.assign(kept["rows"], ledger, Settings()))
        )
        seconds["ledger written"] = spent(lambda: splits.append(place / "splits.csv", kept["assignment"]))
        assert kept["assignment"].added == MILLION
    print(json.dumps(seconds))


FIGURES = {"decode": decode, "long": long, "batches": batches, "added": added, "rows": rows}


def measure(chosen: list[str], rounds: int) -> list[dict[str, Any]]:
    result = []
    for figure in chosen:
        result += FIGURES[figure](rounds)
    return result


def show(result: list[dict[str, Any]]) -> None:
    table("preprocessing and loading", [{k: v for k, v in row.items() if k != "rounds"} for row in result])


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--only", nargs="*", choices=list(FIGURES))
    options.add_argument("--rounds", type=int, default=3)
    options.add_argument("--child", choices=["train", "rows"], help=argparse.SUPPRESS)
    given = options.parse_args()
    if given.child:
        {"train": train, "rows": million}[given.child]()
        return
    result = measure(given.only or list(FIGURES), given.rounds)
    show(result)
    common.write("preprocessing", result)


if __name__ == "__main__":
    main()
