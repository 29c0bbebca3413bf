"""Single settings change in a params.yaml; every other byte of it stays."""

from __future__ import annotations

import difflib

import pytest
import yaml

from sora.config import Settings, changed, edited, parse
from sora.config.render import params_yaml
from sora.core.errors import InputError, SettingsError

CHANGES = {
    "train.learning_rate": 0.00317,
    "train.jitter": False,
    "model.dropout": 0.12,
    "model.low_filters": [24, 48, 96],
}


def test_the_file_of_init_keeps_its_comments_and_order() -> None:
    before = params_yaml(Settings())
    after = edited(before, CHANGES)
    assert parse(after) == changed(Settings(), CHANGES)
    changes = [line for line in difflib.ndiff(before.splitlines(), after.splitlines()) if line[:2] in ("- ", "+ ")]
    assert len(changes) == 8  # a line out and a line in for each, nothing else
    out, new = ([line[2:] for line in changes if line[0] == mark] for mark in "-+")
    assert [line.partition(" # ")[2] for line in out if "dropout" not in line and "filters" not in line] == [
        line.partition(" # ")[2] for line in new if "dropout" not in line and "filters" not in line
    ]
    assert any(line.startswith("  dropout: 0.12 # ") for line in new)  # was commented out, with its meaning behind it


@pytest.mark.parametrize(
    "text",
    [
        "",
        "train: {}\nmodel: {dropout: 0.4, embedding: 64} # mine\n",
        "# top\ntrain:\n    # why\n    jitter: true   # shaky\n    seed: 3\n\nmodel:\n  low_filters:\n  - 16 # narrow\n"
        "  - 32\n  # between\n  dropout: 0.3\nname: x # end",
        yaml.safe_dump(Settings().to_dict()),
        'name: "x"\nmodel:\n  "dropout": 0.5\n  low_filters: [16,\n    32]\n',
    ],
)
def test_any_way_to_write_it(text: str) -> None:
    after = edited(text, CHANGES)
    assert parse(after) == changed(parse(text), CHANGES)
    for comment in ("# top", "# why", "# shaky", "# between", "# mine", "# end"):
        assert (comment in after) == (comment in text)


def test_what_is_not_understood_is_refused() -> None:
    text = "train:\n  label_smoothing: &small 0.1\n  weight_decay: *small\n"
    assert parse(edited(text, {"train.epochs": 9})).train.weight_decay == 0.1
    with pytest.raises(InputError, match="can't be edited") as caught:
        edited(text, {"train.label_smoothing": 0.2})
    assert "by hand" in caught.value.fix


def test_a_value_out_of_range() -> None:
    with pytest.raises(SettingsError, match="dropout"):
        changed(Settings(), {"model.dropout": 2.0})
