"""`sora model describe`: the figures, the diagram and the door."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from sora.cli.failures import run_verb
from sora.config import PRESETS, Model, parse
from sora.core.errors import InputError
from sora.model import classifier, cost, describe
from tests.clips import SMALL
from tests.model.variants import VARIANTS

CLIP = "clip: {frames: 8, height: 32, width: 32}\n"


@pytest.mark.parametrize("name", VARIANTS)
def test_rows_add_up_to_the_model(name: str) -> None:
    given = parse(f"{CLIP}model: {json.dumps({**SMALL, **VARIANTS[name]})}")
    found = describe.describe(given, classes=2)
    model = classifier.build(given.model, given.clip.spec(), 2)
    assert found["parameters"] == model.count_params() == sum(row["parameters"] for row in found["layers"])
    assert found["flops"] == cost.flops(model) == sum(row["flops"] for row in found["layers"])
    text = describe.draw(found)
    assert f"{found['parameters']:,} parameters" in text and "GFLOP per clip" in text
    assert f"2 classes, head {given.model.head}" in text
    for row in found["layers"]:
        assert "x".join(map(str, row["output"])) in text


def test_levels_have_their_shapes() -> None:
    found = describe.describe(describe.of_preset("article"), batch=2)
    shapes = {row["name"]: row["output"] for row in found["layers"]}
    assert shapes["low/stem"] == [10, 128, 128, 16] and shapes["high/level 3"] == [10, 16, 16, 256]
    assert shapes["gram"] == [256 * 257 // 2] and found["clip"] == [10, 256, 256, 3]
    assert found["memory"]["batch"] == 2 and found["classes"] == 2


def test_a_project_is_described_as_it_is_set(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "params.yaml").write_text(
        f"{CLIP}classes: [a, b, c]\nmodel: {json.dumps(SMALL)}\ntrain: {{batch: 5}}\n"
    )
    assert run_verb(["model", "describe", "--json", "--project", str(tmp_path)]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["classes"] == 3 and found["memory"]["batch"] == 5 and found["clip"] == [8, 32, 32, 3]
    assert found["settings"] == Model(**SMALL).model_dump(mode="json", exclude={"preset"})
    assert run_verb(["model", "describe", "--project", str(tmp_path)]) == 0
    assert "GFLOP per clip" in capsys.readouterr().out


def test_preset_and_options_at_the_door(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_verb(["model", "describe", "demo", "--classes", "4", "--batch", "32", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["preset"], found["classes"], found["memory"]["batch"]) == ("demo", 4, 32)
    assert found["clip"] == [12, 64, 64, 3]
    assert run_verb(["model", "describe", "huge"]) == 2
    error = capsys.readouterr().err
    assert "'huge'" in error and all(name in error for name in PRESETS)


def test_what_does_not_go_together_is_bad_input() -> None:
    with pytest.raises(InputError, match="binary head needs 2 classes, received 3"):
        describe.describe(parse(f"{CLIP}model: {json.dumps({**SMALL, 'head': 'binary'})}"), classes=3)
