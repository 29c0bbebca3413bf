"""Footage in data/ that costs hours or gigabytes to decode is quarantined, in seconds; real footage is not."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from sora.config import Project, Settings, Validate, parse
from sora.core import provenance
from sora.core.errors import ServiceError
from sora.core.records import ClipSpec
from sora.dataset import manifest, versioning
from sora.dataset.quality import validate
from sora.dataset.versioning.pipeline import bounds_of
from sora.store import building
from tests.bombs import animated_png, many_streams, motion_jpeg, raw_h264
from tests.videos import make_video

SPEC = ClipSpec(frames=4, height=32, width=32)


def settings(**limits: int) -> Settings:
    return Settings.model_validate({"validate": {"max_rejected": 1, **limits}})


@pytest.fixture(scope="module")
def bombs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`data/` with a bomb of each kind and two videos."""
    data = tmp_path_factory.mktemp("bombs") / "data"
    for name, seed in (("run/a.mp4", 1), ("walk/b.mp4", 2)):
        make_video(data / name, seed=seed)
    raw_h264(data / "run" / "frames.mp4", 284)  # 35,500 frames
    animated_png(data / "run" / "pixels.apng")
    motion_jpeg(data / "walk" / "jpegs.avi")
    many_streams(data / "walk" / "streams.mkv")
    return data


def test_bombs_are_quarantined_in_seconds(bombs: Path) -> None:
    assert (bombs / "run" / "frames.mp4").stat().st_size < 10_000_000
    assert (bombs / "run" / "pixels.apng").stat().st_size < 5_000_000
    began = time.monotonic()
    rules = settings(max_decode_seconds=3)
    found = manifest.build(bombs, rules, workers=1)
    assert time.monotonic() - began < 90
    by_path = found.set_index("path")
    assert by_path["error"].fillna("").to_dict() == {
        "run/a.mp4": "",
        "run/frames.mp4": "too_slow",
        "run/pixels.apng": "too_large",
        "walk/b.mp4": "",
        "walk/jpegs.avi": "too_large",
        "walk/streams.mkv": "too_large",
    }
    assert "3 s of processor time" in by_path.loc["run/frames.mp4", "detail"]
    assert "15000x15000" in by_path.loc["run/pixels.apng", "detail"]
    assert "8192x8192" in by_path.loc["walk/jpegs.avi", "detail"]
    assert "128 streams" in by_path.loc["walk/streams.mkv", "detail"]
    report = validate(found, rules)
    assert {one.path: one.rule for one in report.rejected} == by_path["error"].dropna().to_dict()


def test_each_limit(tmp_path: Path) -> None:
    video = make_video(tmp_path / "data" / "run" / "a.mp4", frames=24, fps=12)

    def verdict(**limits: int) -> tuple[str | None, str]:
        row = manifest.build(tmp_path / "data", settings(**limits), workers=1).iloc[0]
        return row["error"], row["detail"]

    assert verdict() == (None, "")
    size = video.stat().st_size
    assert verdict(max_bytes=size) == (None, "")
    assert verdict(max_bytes=size - 1) == ("too_large", f"{size:,} bytes, allowed are {size - 1:,}")
    assert verdict(max_pixels=64 * 48 - 1)[0] == "too_large"
    assert verdict(max_frames=23) == ("too_large", "more than 23 frames")
    assert verdict(max_frames=24) == (None, "")
    assert verdict(max_seconds=1) == ("too_large", "longer than 1 seconds")


def test_a_file_beyond_max_bytes_is_not_even_read(tmp_path: Path) -> None:
    file = tmp_path / "data" / "run" / "hollow.mp4"
    file.parent.mkdir(parents=True)
    with file.open("wb") as hollow:
        hollow.truncate(5 * 10**12)  # takes no room on the disk; reading it would take hours
    began = time.monotonic()
    row = manifest.build(tmp_path / "data", settings(), workers=1).iloc[0]
    assert (row["error"], row["sha256"], row["bytes"]) == ("too_large", "", 5 * 10**12)
    assert time.monotonic() - began < 10


def test_verdicts_follow_the_limits_and_facts_stay(tmp_path: Path) -> None:
    """Raised limits: what was beyond the old ones is decoded. Lowered ones: what is known is judged as it is."""
    make_video(tmp_path / "data" / "run" / "long.mp4", frames=48, seed=1)
    make_video(tmp_path / "data" / "run" / "short.mp4", frames=12, seed=2)
    file = tmp_path / "manifest.parquet"

    def errors(rules: Settings, decodes: bool = True) -> list[str | None]:
        previous = manifest.read(file) if file.exists() else None
        journal = tmp_path / "journal"
        journal.unlink(missing_ok=True)
        found = manifest.build(tmp_path / "data", rules, previous=previous, journal=journal, workers=1)
        assert bool(journal.read_text()) == decodes
        manifest.write(found, file)
        verdicts: list[str | None] = found["error"].tolist()
        return verdicts

    assert errors(settings(max_frames=20)) == ["too_large", None]
    assert errors(settings(max_frames=20), decodes=False) == ["too_large", None]
    assert errors(settings()) == [None, None]
    assert errors(settings(max_frames=20), decodes=False) == ["too_large", None]
    assert errors(settings(), decodes=False) == [None, None]


def test_an_interrupted_build_does_not_keep_verdicts_of_other_limits(tmp_path: Path) -> None:
    make_video(tmp_path / "data" / "run" / "a.mp4", frames=24)
    journal = tmp_path / "journal"

    def error(rules: Settings) -> Any:
        return manifest.build(tmp_path / "data", rules, journal=journal, workers=1).iloc[0]["error"]

    assert error(settings(max_frames=20)) == "too_large"
    assert error(settings(max_frames=20)) == "too_large" and len(journal.read_text().splitlines()) == 1
    assert error(settings()) is None


def test_the_manifest_depends_on_the_limits_and_nothing_else_does(tmp_path: Path) -> None:
    plain = provenance.stages()
    changed = provenance.stages(bounds=bounds_of(settings(max_frames=20)))
    assert bounds_of(settings(min_side=8)) == ""
    assert [stage for stage in plain if plain[stage] != changed[stage]] == ["manifest"]
    project = Project(tmp_path)
    project.dvc_yaml.write_text("stages: {manifest: {}}")
    project.params_file.write_text(yaml.safe_dump({"validate": {"max_frames": 20}}))
    versioning.write_code_lock(project)
    assert yaml.safe_load((tmp_path / versioning.CODE_LOCK).read_text())["manifest"] != plain["manifest"]


def test_clips_are_bounded_too(tmp_path: Path) -> None:
    """A file that was exchanged after the manifest: an error that names it, not hours."""
    data = tmp_path / "data"
    video = make_video(data / "run" / "a.mp4")
    rows = manifest.build(data, settings(), workers=1)
    motion_jpeg(tmp_path / "big.avi").replace(video)
    with pytest.raises(ServiceError, match=r"run/a\.mp4 no longer decodes: 8192x8192 pixels"):
        building.build(rows, (), data, tmp_path / "shards", SPEC, buckets=1, workers=1)
    assert not list((tmp_path / "shards").iterdir())


def test_real_footage_keeps_within_the_defaults(shared: Path) -> None:
    for name in ("odd", "kth9"):
        found = manifest.build(shared / name, settings())
        assert not set(found["error"].dropna()) & {"too_large", "too_slow"}
        assert (found["frames"] > 0).sum() >= 9


def test_the_templates_show_the_defaults(repository: Path) -> None:
    for file in ("params.yaml", "sora/templates/params.yaml"):
        text = (repository / file).read_text(encoding="utf-8").replace("{", "").replace("}", "")
        section = text[text.index("validate:") : text.index("split:")]
        assert yaml.safe_load(section)["validate"] == Validate().model_dump()
    assert parse("").validate_.decoding()["max_decode_seconds"] == 1800
