"""Sora's peers: they are the networks of their papers, and the benchmark trains and compares them over a tiny set."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest

from benchmarks import common
from benchmarks.peers import article, compare
from benchmarks.peers import networks as peer_networks
from benchmarks.peers import training as peer_training
from sora.core.records import ClipSpec
from tests.benchmarks.test_accuracy import TINY, fold, videos_of
from tests.clips import make_shards


def near(value: float, share: float) -> Any:
    return pytest.approx(value, rel=share)


@pytest.mark.parametrize(
    ("build", "clip", "classes", "parameters", "multiply_adds"),
    [
        # 33,371,472 and 40.7 G are torchvision's figures of the network, whose weights reproduce the paper's accuracy.
        (peer_networks.r3d_18, ClipSpec(16, 112, 112), 400, 33_371_472, near(40.697e9, 1e-4)),
        # The paper says 3.76 M and 0.60 G; 3.79 M is what its author's group lists.
        (peer_networks.x3d_xs, ClipSpec(4, 160, 160), 400, near(3.79e6, 0.002), near(0.60e9, 0.01)),
        # X3D-S is the same network on 13 frames: 1.96 G.
        (peer_networks.x3d_xs, ClipSpec(13, 160, 160), 400, near(3.79e6, 0.002), near(1.96e9, 0.01)),
        # The paper says 3.1 M and 2.71 G; 2.63 G are counted.
        (peer_networks.movinet_a0, ClipSpec(50, 172, 172), 600, near(3.1e6, 0.01), near(2.71e9, 0.04)),
    ],
)
def test_size_and_cost_are_those_of_the_paper(
    build: Any, clip: ClipSpec, classes: int, parameters: Any, multiply_adds: Any
) -> None:
    model = build(clip, classes)
    assert sum(math.prod(weight.shape) for weight in model.trainable_weights) == parameters
    assert peer_networks.flops(model) / 2 == multiply_adds
    assert model.input_shape == (None, clip.frames, clip.height, clip.width, 3)
    assert model.output_shape == (None, classes)


def test_four_frames_cost_a_quarter() -> None:
    clip = ClipSpec(16, 64, 64)
    some, all_ = (peer_networks.flops(build(clip, 2)) for build in (peer_networks.x3d_xs_4, peer_networks.x3d_xs))
    assert some == pytest.approx(all_ / 4, rel=0.02)
    with pytest.raises(ValueError, match="4 frames are wanted of a clip of 2"):
        peer_networks.x3d_xs_4(ClipSpec(2, 64, 64), 2)


@pytest.mark.parametrize(("size", "stride", "frames"), [((3, 3, 3), 2, 5), ((5, 1, 1), 1, 6), ((5, 3, 3), 1, 2)])
def test_a_depthwise_convolution_is_one_whose_channels_do_not_mix(
    size: tuple[int, int, int], stride: int, frames: int
) -> None:
    """Against Keras's own, with a kernel that is zero off the diagonal."""
    x = np.random.default_rng(0).normal(size=(2, frames, 7, 8, 3)).astype(np.float32)
    layer = peer_networks.DepthwiseConv3D(size, stride)
    found = np.asarray(layer(x))
    whole = keras.layers.Conv3D(3, size, strides=(1, stride, stride), padding="same", use_bias=False)
    whole.build(x.shape)
    whole.set_weights([np.asarray(layer.kernel)[..., None] * np.eye(3, dtype=np.float32)])
    np.testing.assert_allclose(found, np.asarray(whole(x)), atol=1e-5)
    assert layer.compute_output_shape(x.shape) == found.shape


def test_an_answer_for_a_clip_is_the_mean_of_its_frames() -> None:
    clip = ClipSpec(3, 20, 24)
    frame = peer_networks.article_frame(clip, 2, 16)
    clips = np.random.default_rng(0).integers(0, 256, (2, 3, 20, 24, 3), np.uint8)
    alone = keras.ops.softmax(frame(clips.reshape(6, 20, 24, 3)))
    together = keras.ops.softmax(peer_networks.of_frames(frame, clip)(clips))
    np.testing.assert_allclose(np.asarray(together), np.asarray(alone).reshape(2, 3, 2).mean(axis=1), atol=1e-5)
    counted = sum(
        2 * math.prod(layer.output.shape[1:]) * math.prod(layer.kernel.shape[:-1])
        for layer in article.network(16, 16).layers
        if isinstance(layer, keras.layers.Conv2D)
    )
    assert article.flops(16, 16) == counted


def test_the_rate_rises_and_falls() -> None:
    shares = [peer_training.share_of_rate(at) for at in (0, 0.1, 0.55, 1, 3)]
    assert shares == pytest.approx([0.05, 1, 0.505, 0.01, 0.01])


def test_ahead_is_a_paired_difference() -> None:
    videos = videos_of(4, [0, 1, 2, 3])
    ours, theirs = [fold(0, 0, [True, True, True, False])], [fold(0, 0, [True, False, False, False])]
    found = compare.ahead(ours, theirs, videos)
    assert found["ahead"] == 0.5 and found["ahead_low"] <= 0.5 <= found["ahead_high"]
    assert compare.ahead(ours, ours, videos) == {"ahead": 0, "ahead_low": 0, "ahead_high": 0}


def test_it_trains_compares_and_never_trains_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(common, "commit", lambda _: "commit")  # another session's commit would make other folds of it
    make_shards(tmp_path / "tiny", each=6)
    options = ["--data", str(tmp_path / "tiny" / "data"), "--group-pattern", r"/(\d+)\.mp4", "--seeds", "1",
               "--folds", "1", "--budget", "0.5", "--network", "article", "--network", "r3d-18*2", "--side", "16",
               *(item for name in ("clips", "cache", "out") for item in (f"--{name}", str(tmp_path / name))),
               "--plot", str(tmp_path / "plot.png"), *TINY]  # fmt: skip
    assert compare.main(options) == 0
    entry = json.loads((tmp_path / "out" / "peers_data.json").read_text())["result"]
    assert entry["partial"] and entry["folds"] == [[0, 1]] and entry["folds_of"] == 5
    ours, article_, r3d = entry["networks"]
    assert [ours["network"], article_["network"], r3d["network"]] == ["sora", "article", "r3d-18*2"]
    assert ours["GFLOP a clip"] < min(article_["GFLOP a clip"], r3d["GFLOP a clip"])
    for one in entry["networks"]:
        assert one["videos"] == ours["videos"] > 0 and one["low"] <= one["accuracy"] <= one["high"]
        assert one["passes"] > 0 and one["latency_ms"] > 0
    assert r3d["seconds a fold"] > article_["seconds a fold"] >= 0.5 and "ahead" in r3d
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")
    monkeypatch.setattr(peer_training, "run", lambda *_, **__: pytest.fail("trained again"))
    assert compare.main(options) == 0
    with pytest.raises(SystemExit):
        compare.main(["--network", "vgg"])
