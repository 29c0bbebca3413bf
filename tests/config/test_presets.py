"""Presets, and what a field that is given beside one does."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml

from sora.config import PRESETS, Model, Settings, parse
from sora.core.errors import SettingsError


def test_a_preset_is_what_left_out_fields_are() -> None:
    settings = parse("model: {preset: base}")
    assert settings.model.high_filters == (48, 96, 192, 256) and settings.model.embedding == 256
    assert settings.model.fusion == "concat"  # which base does not name


def test_a_given_field_overrides_the_preset() -> None:
    settings = parse("model: {preset: base, embedding: 64}")
    assert settings.model.embedding == 64 and settings.model.high_filters == (48, 96, 192, 256)


def test_small_is_the_default() -> None:
    assert Model(preset="small") == Model() == parse("").model


@pytest.mark.parametrize("name", PRESETS)
def test_what_is_stored_reads_back(name: str) -> None:
    """A training's job and a version's state hold every field."""
    clip = PRESETS[name].clip
    settings = parse(f"model: {{preset: {name}}}\nclip: {{frames: {clip.frames}}}")
    assert parse(yaml.safe_dump(settings.to_dict())) == settings
    assert Model(**settings.to_dict()["model"]) == settings.model


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("model: {preset: huge}", ["model.preset", "'article'", "received 'huge'"]),
        ("model: {preset: [base]}", ["model.preset", "received ['base']"]),
        ("model: {preset: base, embedding: 1}", ["model.embedding", "received 1"]),
        ("model: {preset: base, high_filters: [8]}", ["model.high_filters", "16 to 2048"]),
        ("model: {preset: base, depth: 9}", ["model.depth", "not permitted"]),
        ("model: {preset: article}\nclip: {frames: 8}", ["model.key_frames 10", "clip.frames 8", "preset is article"]),
        ("model: {preset: article}", ["model.gram_vectors", "clip.frames 16", "preset is article"]),
        ("model: {lateral: true, streams: low}", ["model.lateral", "joins two networks", "low"]),
        ("model: {shift: 0.6}", ["model.shift", "received 0.6"]),
        ("model: {head: binary}\nclasses: [a, b, c]", ["model.head binary", "names 3"]),
        ("model: {head: multilabel}\nclasses: [a, 'b|c']", ["model.head multilabel", "'b|c'", "single labels"]),
        ("model: {head: multilabel}\nunsure: {precision: 0.9}", ["unsure.precision", "model.head multilabel", "null"]),
        ("model: {head: softmax}", ["model.head", "'multilabel'", "received 'softmax'"]),
    ],
)
def test_errors_name_the_field(text: str, words: list[str]) -> None:
    with pytest.raises(SettingsError) as caught:
        parse(text)
    for word in words:
        assert word in caught.value.message
    assert caught.value.fix


@pytest.mark.parametrize("place", ["params.yaml", "sora/templates/params.yaml"])
def test_the_lines_that_stand_as_comments_are_the_presets_values(repository: Path, place: str) -> None:
    text = (repository / place).read_text(encoding="utf-8")
    section = text[text.index("\nmodel:") : text.index("\ntrain:")]
    given = yaml.safe_load(section)["model"]
    shown = yaml.safe_load(re.sub(r"^  # (\w+:)", r"  \1", section, flags=re.MULTILINE))["model"]
    expected = Settings(model=Model(**given)).to_dict()["model"]
    assert shown == expected and given.keys() == {"preset"}
