"""Explanations: what they point at, what they depend on, and the route."""

from __future__ import annotations

import asyncio
import base64
import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from typing import Any

import cv2
import httpx
import keras
import numpy as np
import pytest
from scipy.stats import spearmanr

from sora.config import Model, Serve
from sora.core.errors import ServiceError
from sora.core.records import ClipSpec, Recipe
from sora.core.tensors import VIDEO, Clips
from sora.model import attribution, classifier
from sora.runtime.predictor import Predictor
from sora.serving.app import create_app
from sora.serving.batcher import Batcher
from sora.serving.context import Context
from sora.serving.explain import GRID, _coarse, weighed
from sora.serving.source import ModelCache
from tests.serving.conftest import CLASSES, Made

SEEN = ClipSpec(frames=8, height=32, width=32)
BLOB, SHOWN = 8, 3  # pixels of its side, frames that it is seen in


def planted(seed: int, blob: bool) -> tuple[np.ndarray, np.ndarray]:
    """A clip of a texture that stands still, and, where `blob`, a square that crosses it in a few of its frames.

    Returns `(time, height, width, rgb) uint8` and where the square is, `(time, height, width) bool`.
    """
    rng = np.random.default_rng(seed)
    texture = np.kron(rng.integers(40, 200, (8, 8, 3)), np.ones((4, 4, 1)))
    clip = np.repeat(texture[None], SEEN.frames, axis=0)
    mask = np.zeros(clip.shape[:3], bool)
    first, top, left = int(rng.integers(0, SEEN.frames - SHOWN + 1)), *rng.integers(0, 32 - BLOB - 2 * SHOWN, 2)
    if blob:
        for step in range(SHOWN):
            mask[first + step, top + 2 * step : top + 2 * step + BLOB, left + 2 * step : left + 2 * step + BLOB] = True
        clip[mask] = 250
    noise = rng.normal(0, 4, clip.shape)
    return (clip + noise).clip(0, 255).astype(np.uint8), mask


def alone(clip: np.ndarray) -> Clips:
    return Clips({VIDEO: clip[None]})


def saved(model: keras.Model, file: Path, classes: tuple[str, ...]) -> Predictor:
    model.save(file)
    recipe = Recipe(SEEN, classes, 1.3, model_sha256=sha256(file.read_bytes()).hexdigest())
    return Predictor(file, recipe, 1)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Predictor:
    """A tiny model that learned to tell clips with the square from clips without."""
    keras.utils.set_random_seed(3)
    config = Model(low_filters=(16,), high_filters=(16,), key_frames=4, embedding=16, dropout=0)
    model = classifier.build(config, SEEN, 2)
    clips = np.stack([planted(seed, seed % 2 == 1)[0] for seed in range(192)])
    labels = np.arange(192) % 2
    model.compile(
        keras.optimizers.Adam(3e-3), keras.losses.SparseCategoricalCrossentropy(from_logits=True), jit_compile=False
    )
    model.fit(clips, labels, batch_size=16, epochs=8, verbose=0)
    return saved(model, tmp_path_factory.mktemp("trained") / "model.keras", ("nothing", "square"))


def test_it_points_at_what_decides(trained: Predictor) -> None:
    """The pointing game (Zhang et al. 2016) on held-out clips: is the hottest place on the square?"""
    attribute = trained.attribution()
    hits, moments = [], []
    for seed in range(1000, 1030):
        clip, mask = planted(seed, True)
        assert trained.predict(alone(clip)).label == "square"
        heat, weights = weighed(attribute(alone(clip), 1)[0])
        frame, row, column = np.unravel_index(heat.argmax(), heat.shape)
        cell = 32 // heat.shape[1]
        # The features of a frame reach a frame and a cell further (the temporal shift, the convolutions).
        near = mask[max(0, frame - 1) : frame + 2, max(0, (row - 1) * cell) : (row + 2) * cell]
        hits.append(near[..., max(0, (column - 1) * cell) : (column + 2) * cell].any())
        shown = mask.any(axis=(1, 2))
        moments.append(weights[shown].sum() / shown.mean())
    assert np.mean(hits) >= 0.8
    assert np.mean(moments) >= 1.3  # the frames that show it weigh more than their number


def test_it_depends_on_the_weights(trained: Predictor, tmp_path: Path) -> None:
    """Adebayo et al. 2018, "Sanity Checks for Saliency Maps": other weights, another map."""
    clips = [alone(planted(seed, True)[0]) for seed in range(1000, 1006)]
    for layers in (("logits",), ("embedding", "logits"), ("low", "high", "embedding", "logits")):
        model = keras.saving.load_model(_file_of(trained, tmp_path), compile=False, safe_mode=True)
        rng = np.random.default_rng(5)
        for name in layers:
            layer = model.get_layer(name)
            layer.set_weights([rng.permutation(w.ravel()).reshape(w.shape) for w in layer.get_weights()])
        other = saved(model, tmp_path / f"{len(layers)}.keras", trained.classes)
        likeness = [
            spearmanr(trained.attribution()(clip, 1)[0].ravel(), other.attribution()(clip, 1)[0].ravel()).statistic
            for clip in clips
        ]
        assert np.mean(likeness) < 0.6, layers


def _file_of(predictor: Predictor, folder: Path) -> Path:
    file = folder / "again.keras"
    predictor._model.save(file)
    return file


def test_the_two_parts_are_the_model(trained: Predictor) -> None:
    clip = alone(planted(7, True)[0])
    parts = attribution.split(trained._model)
    maps = parts.maps(clip.video)
    logits = np.asarray(parts.head(attribution.pooled(maps)))
    np.testing.assert_allclose(logits, trained._call(clip), atol=1e-4)
    odds = [trained.attribution()(clip, label)[1] for label in (0, 1)]
    share = trained.probabilities(clip)[0]
    np.testing.assert_allclose(odds, np.log(share / (1 - share)), atol=1e-3)


@pytest.mark.parametrize("options", [{"lateral": True}, {"streams": "low"}], ids=str)
def test_every_structure_with_all_frames_is_its_two_parts(options: dict[str, Any]) -> None:
    model = classifier.build(Model(key_frames=2, **options), ClipSpec(frames=4, height=32, width=32), 2)
    clip = np.random.default_rng(0).integers(0, 256, (1, 4, 32, 32, 3), np.uint8)
    parts = attribution.split(model)
    maps = parts.maps(clip)
    logits = np.asarray(parts.head(attribution.pooled(maps)))
    np.testing.assert_allclose(logits, np.asarray(model(clip)), atol=1e-4)
    gradients = [np.ones((*level.shape[:2], level.shape[4]), np.float32) for level in maps]
    assert np.asarray(attribution.evidence(maps, gradients, parts.key_frames)).shape[0] == 4


def test_a_model_of_key_frames_alone_has_no_moments() -> None:
    model = classifier.build(Model(streams="high", key_frames=2), ClipSpec(frames=4, height=32, width=32), 2)
    with pytest.raises(ServiceError, match="no network that sees every frame"):
        attribution.split(model)


def test_evidence_adds_up() -> None:
    """Summed over frames, the mean over the picture is gradient times feature, of all levels and both networks."""
    rng = np.random.default_rng(0)
    shapes = [(8, 8, 8, 5), (8, 4, 4, 6), (3, 8, 8, 4)]
    maps = [rng.normal(size=(1, *shape)).astype(np.float32) for shape in shapes]
    gradients = [rng.normal(size=(1, shape[0], shape[3])).astype(np.float32) for shape in shapes]
    found = np.asarray(attribution.evidence(maps, gradients, 3))
    assert found.shape == (8, 8, 8)
    expected = sum((m.mean(axis=(2, 3)) * g).sum() for m, g in zip(maps, gradients, strict=True))
    np.testing.assert_allclose(found.mean(axis=(1, 2)).sum(), expected, rtol=1e-4)
    assert attribution.part_lengths(8, 3) == [2, 3, 3]


def test_a_model_of_other_parts_is_refused() -> None:
    inputs = keras.Input((4, 8, 8, 3))
    with pytest.raises(ServiceError, match="no network that sees every frame"):
        attribution.split(keras.Model(inputs, keras.layers.Flatten()(inputs)))


def test_nothing_speaks_for_it() -> None:
    heat, weights = weighed(np.full((4, 2, 2), -1.0))
    assert not heat.any() and not weights.any()


def test_coarse_maps_keep_the_mean() -> None:
    heat = np.random.default_rng(0).random((2, 33, 16))
    coarse = _coarse(heat)
    assert coarse.shape == (2, 11, 16) and max(coarse.shape[1:]) <= GRID
    np.testing.assert_allclose(coarse.mean(axis=(1, 2)), heat.mean(axis=(1, 2)))


# --- the route ------------------------------------------------------------------------------------------------------


@asynccontextmanager
async def running(folder: Path, **settings: Any) -> AsyncIterator[tuple[httpx.AsyncClient, Context]]:
    options = {"poll_seconds": 0.05, "decode_workers": 1, **settings}
    app = create_app(Serve(**options), ModelCache(folder / "registry"), ModelCache(folder / "cache"))
    context: Context = app.state.context
    transport = httpx.ASGITransport(app)
    async with (
        context.running(),
        httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1", timeout=60) as client,
    ):
        yield client, context


async def _ready(client: httpx.AsyncClient) -> None:
    async with asyncio.timeout(60):
        while (await client.get("/readyz")).status_code != 200:
            await asyncio.sleep(0.02)


def _sent(video: Path, **fields: str) -> dict[str, Any]:
    return {"files": {"file": (video.name, video.read_bytes())}, "data": fields}


def test_the_route(models: list[Made], video: Path, tmp_path: Path) -> None:
    models[0].promote(ModelCache(tmp_path / "registry"))

    async def story() -> None:
        async with running(tmp_path) as (client, context):
            assert (await client.post("/v1/explain", **_sent(video))).status_code in (200, 503)
            await _ready(client)
            predicted = (await client.post("/v1/predict", **_sent(video))).json()
            answer = await client.post("/v1/explain", **_sent(video))
            assert answer.status_code == 200, answer.text
            body = answer.json()
            assert body["label"] == predicted["label"] and body["version"] == 1 and body["clip"] == 0
            assert body["probabilities"] == pytest.approx(predicted["probabilities"], abs=1e-6)
            share = body["probabilities"][body["label"]]
            assert body["log_odds"] == pytest.approx(np.log(share / (1 - share)), abs=1e-2)
            assert len(body["weights"]) == 4 and sum(body["weights"]) == pytest.approx(1, abs=1e-3)
            heat = np.array(body["heat"])
            assert heat.shape[0] == 4 and heat.min() >= 0 and heat.max() <= 1
            png = base64.b64decode(body["strip"], validate=True)
            picture = cv2.imdecode(np.frombuffer(png, np.uint8), cv2.IMREAD_COLOR)
            assert picture is not None and picture.shape[0] > 64
            assert "Grad-CAM" in body["method"] and set(body["seconds"]) >= {"decode", "model", "explain"}

            other = next(name for name in CLASSES if name != body["label"])
            asked = (await client.post("/v1/explain", **_sent(video, label=other))).json()
            assert asked["label"] == other and asked["heat"] != body["heat"]
            image = await client.post("/v1/explain", **_sent(video), headers={"accept": "image/png"})
            assert image.headers["content-type"] == "image/png" and image.content == png

            refused = await client.post("/v1/explain", **_sent(video, label="<script>"))
            assert refused.status_code == 422 and refused.json()["type"].endswith("no-class")
            text = tmp_path / "text.mp4"
            text.write_text("no video", encoding="utf-8")
            refused = await client.post("/v1/explain", **_sent(text))
            assert refused.status_code == 422 and refused.json()["rule"] == "not_a_video"
            for fields in ({"path": "/etc/passwd"}, {"label": "x" * 2000}):
                refused = await client.post("/v1/explain", **_sent(video, **fields))
                assert refused.status_code == 400, refused.text
            assert context.active == 0 and not list(context.folder.iterdir())
            assert 'sora_predict_stage_seconds_count{stage="explain"}' in (await client.get("/metrics")).text

    asyncio.run(story())


def test_explanations_take_turns_with_predictions() -> None:
    """However many wait, the batch that waits is next."""
    order: list[str] = []
    gate = threading.Event()

    class Quick(Predictor):
        def __init__(self) -> None:
            pass

        def probabilities(self, clips: Clips) -> np.ndarray:
            order.append("batch")
            return np.ones((len(clips), 3))

    def first() -> None:
        gate.wait(30)
        order.append("first")

    async def story() -> None:
        batcher = Batcher()
        await batcher.start()
        try:
            tasks: list[asyncio.Task[Any]] = [asyncio.create_task(batcher.between(first))]
            tasks += [asyncio.create_task(batcher.between(lambda: order.append("more"))) for _ in range(3)]
            await asyncio.sleep(0.05)
            tasks.append(asyncio.create_task(batcher.answer(Quick(), alone(np.zeros((4, 8, 8, 3), np.uint8)))))
            await asyncio.sleep(0.05)
            gate.set()
            await asyncio.gather(*tasks)
        finally:
            await batcher.close()

    asyncio.run(story())
    assert order == ["first", "batch", "more", "more", "more"]


def test_beyond_the_queue_is_429(models: list[Made], video: Path, tmp_path: Path) -> None:
    models[0].promote(ModelCache(tmp_path / "registry"))

    async def story() -> None:
        async with running(tmp_path, queue=1) as (client, context):
            await _ready(client)
            context.active = 1
            answer = await client.post("/v1/explain", **_sent(video))
            assert answer.status_code == 429 and answer.headers["retry-after"]
            context.active = 0
            assert (await client.post("/v1/explain", **_sent(video))).status_code == 200

    asyncio.run(story())


def test_the_clip_that_speaks_most_is_explained(models: list[Made], tmp_path: Path) -> None:
    """Of several clips of a long video, the one most probably of the class."""
    from tests.videos import make_video

    made = models[0]
    spec = replace(made.recipe.clip, sampling="window", window_seconds=0.5)
    made.put(ModelCache(tmp_path / "registry"), replace(made.recipe, clip=spec, golden=()))
    ModelCache(tmp_path / "registry").remember(made.champion)
    long = make_video(tmp_path / "long.mp4", frames=48)

    async def story() -> None:
        async with running(tmp_path) as (client, _):
            await _ready(client)
            body = (await client.post("/v1/explain", **_sent(long))).json()
            assert body["clips"] == 8 and 0 <= body["clip"] < 8
            share = 1 / (1 + np.exp(-body["log_odds"]))
            assert share >= body["probabilities"][body["label"]] - 1e-3

    asyncio.run(story())
