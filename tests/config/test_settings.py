"""The settings' models are the one source: of both params.yaml, of docs/settings.md, and of what `sora init` writes."""

from __future__ import annotations

import ast
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import BaseModel, Field, ValidationError
from pydantic.fields import FieldInfo

import sora.config
from sora.config import Model, Project, Settings, of_new_project, params_yaml, parse, settings_page
from sora.config.__main__ import generated
from sora.config.render import _placed, _range, _row
from sora.config.section import Section
from sora.core.errors import SettingsError

REPOSITORY = Path(__file__).resolve().parent.parent.parent
PARAMS = ("params.yaml", "sora/templates/params.yaml")
SECTIONS: dict[str, type[Section]] = {
    field.alias or name: field.annotation
    for name, field in Settings.model_fields.items()
    if isinstance(field.annotation, type) and issubclass(field.annotation, Section)
}
ALL: list[tuple[str, type[BaseModel]]] = [("", Settings), *SECTIONS.items()]
FIELDS = [
    pytest.param(field, id=f"{section}.{name}") for section, model in ALL for name, field in model.model_fields.items()
]


def uncommented(text: str) -> dict[str, Any]:
    """The settings of a params.yaml, those that stand there as comments included."""
    value = yaml.safe_load(re.sub(r"^  # (\w+: )", r"  \1", text, flags=re.MULTILINE))
    assert isinstance(value, dict)
    return value


# --- one source -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("field", FIELDS)
def test_every_setting_says_what_it_means(field: FieldInfo) -> None:
    assert field.description and field.description == " ".join(field.description.split())
    sentence = field.description[0].isupper() and field.description.endswith(".")
    assert sentence or not field.description.endswith("."), (
        "a sentence begins with a capital letter, a phrase has no dot"
    )


@pytest.mark.parametrize("file", ["params.yaml", "sora/templates/params.yaml", "docs/settings.md"])
def test_the_files_are_what_the_code_writes(file: str) -> None:
    written = (REPOSITORY / file).read_text(encoding="utf-8")
    assert written == generated(REPOSITORY)[REPOSITORY / file], "run `python -m sora.config`"


@pytest.mark.parametrize("file", PARAMS)
def test_every_setting_is_in_the_file(file: str) -> None:
    text = (REPOSITORY / file).read_text(encoding="utf-8")
    shown = uncommented(text)
    assert list(shown) == [field.alias or name for name, field in Settings.model_fields.items()]
    for name, section in SECTIONS.items():
        assert list(shown[name]) == list(section.model_fields), name
    settings = parse(text)
    assert parse(yaml.safe_dump(shown)) == settings
    for name in SECTIONS.keys() - {"model"}:  # of which what the preset gives stands there as comments
        assert yaml.safe_load(text)[name].keys() == settings.to_dict()[name].keys()


def test_the_template_is_what_a_new_project_has() -> None:
    assert parse((REPOSITORY / "sora/templates/params.yaml").read_text(encoding="utf-8")) == of_new_project()
    assert Settings().model.preset == "small"  # an omitted setting keeps its meaning for older projects


def test_every_setting_is_on_the_page() -> None:
    page = settings_page()
    sections = re.split(r"^## (\w+)$", page, flags=re.MULTILINE)
    tables = dict(zip(["", *sections[1::2]], sections[0::2], strict=True))
    assert list(tables)[1:] == list(SECTIONS)
    for name, section in SECTIONS.items():
        assert re.findall(r"^\| `(\w+)` \| (?:[^|]|\\\|)+ \| (?:[^|]|\\\|)* \| `", tables[name], re.MULTILINE) == list(
            section.model_fields
        )
    assert re.findall(r"^\| `(\w+)`", tables[""], re.MULTILINE) == ["name", "classes"]
    for line in page.splitlines():
        if line.startswith("|"):
            assert len(re.split(r"(?<!\\)\|", line)) in (6, 7), line


@pytest.mark.parametrize(
    ("section", "name", "kind", "range_"),
    [
        ("validate", "near_duplicate_bits", "integer", "0 to 64"),
        ("clip", "height", "integer", "16 to 1,024, a multiple of 8"),
        ("split", "val", "number", "above 0, below 0.5"),
        ("train", "learning_rate", "number", "above 0, 1 or less"),
        ("train", "flip", "boolean or list of text or [text, text]", ""),
        ("model", "low_filters", "list of integers", ""),
        ("eval", "views", "list of choices", "`mirrored`, `left`, `right`"),
        ("unsure", "precision", "number or null", "above 0, below 1"),
        ("gate", "mode", "choice", "`better`, `not_worse`, `auto`"),
        ("alert", "webhook", "text or null", ""),
    ],
)
def test_types_and_ranges_are_those_of_the_code(section: str, name: str, kind: str, range_: str) -> None:
    part = settings_page().split(f"\n## {section}\n")[1]
    assert re.search(rf"^\| `{name}` \| {re.escape(kind)} \| {re.escape(range_)} \|", part, re.MULTILINE)


@pytest.mark.parametrize("file", PARAMS)
def test_lines_are_not_too_long(file: str) -> None:
    lines = (REPOSITORY / file).read_text(encoding="utf-8").splitlines()
    assert max(map(len, lines)) <= 120 and not any(line != line.rstrip() for line in lines)


def test_a_setting_without_a_meaning_is_not_written() -> None:
    class Careless(Section):
        port: int = Field(1, ge=0)

    field = Careless.model_fields["port"]
    assert _range(field) == "0 or more"
    with pytest.raises(AssertionError):
        _row("port", 1, field)


def test_a_long_comment_stands_above_its_line() -> None:
    assert _placed("  a: 1", "short") == ["  a: 1 # short"]
    placed = _placed("  a: 1", "word " * 40)
    assert placed[-1] == "  a: 1" and len(placed) == 3 and all(line.startswith("  # ") for line in placed[:-1])


# --- what is written is read ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text",
    [
        "",
        "classes: ['no', '1e3', 'a: b', 'été ''x''', '#', 'null', 'yes {x}', '{name}', '~', '- a', 'a #b', '*']",
        "model: {preset: article}\nclip: {frames: 10, height: 256, width: 256}",
        "model: {preset: base, embedding: 64}",
        "model: {preset: demo, high_filters: [16, 32, 64], head: binary}\nclasses: [a, b]",
        "model: {preset: pretrained, head: multilabel}",
        "classes: [a, b, c]\ntrain: {flip: [a, [b, c]], learning_rate: 1.0e-5, ema: 0.5}",
        "split: {group_pattern: '/(?:p|q)([^#''\"]+): \\d'}",
        "serve: {host: '::', origins: ['https://a.example', 'http://[::1]:80'], max_seconds: 0.5}",
        "alert: {webhook: 'https://chat.example/#x'}\nbackup: {keep: 3, folder: '~/a: b # c'}",
        "unsure: {precision: 0.9}\nvalidate: {max_fps: 1.0e+30, min_seconds: 1}",
    ],
)
def test_what_is_written_is_read(text: str) -> None:
    settings = parse(text)
    written = params_yaml(settings)
    assert parse(written) == settings
    assert params_yaml(parse(written)) == written
    assert parse(yaml.safe_dump(uncommented(written))) == settings


def test_what_overrides_the_preset_is_no_comment() -> None:
    lines = params_yaml(parse("model: {preset: base, embedding: 64}")).splitlines()
    assert "  embedding: 64 # width of the vector before the head" in lines
    assert any(line.startswith("  # high_filters: [48, 96, 192, 256] #") for line in lines)


def test_defaults_are_written_as_the_code_has_them() -> None:
    """DVC compares the values of params.yaml with dvc.lock: a 4 must not become a 4.0."""
    text = params_yaml(Settings())
    for line in ("min_fps: 4 ", "max_seconds: 90000 ", "window_seconds: 2.0 ", "gamma: 1.0 "):
        assert f"\n  {line}" in text
    assert params_yaml(parse(text)) == text


# --- errors ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("split: {group_pattern: '('}", ["split.group_pattern", "not a regular expression"]),
        ("split: {group_pattern: 'abc'}", ["split.group_pattern", "capturing group"]),
        ("serve: {origins: [ftp://x]}", ["serve.origins", "not an origin"]),
        ("schedule: {timezone: Mars/Olympus}", ["schedule.timezone", "not a time zone"]),
        ("schedule: {cron: '* *'}", ["schedule.cron", "five cron fields"]),
        ("backup: {keep: 1}", ["backup", "keep needs a folder"]),
        ("alert: {webhook: 'mailto:x'}", ["alert.webhook", "http"]),
        ("serve: {port: 70000}", ["serve.port", "received 70000"]),
        ("nonsense: 1", ["nonsense", "not permitted"]),
        ("[]\n- x", ["not YAML"]),
        ("7", ["sections, not a int"]),
    ],
)
def test_errors_say_what_is_allowed(text: str, words: list[str]) -> None:
    with pytest.raises(SettingsError) as caught:
        parse(text)
    assert caught.value.fix
    for word in words:
        assert word in caught.value.message


def test_nobody_changes_a_setting() -> None:
    settings = Settings()
    with pytest.raises(ValidationError):
        settings.serve.port = 1  # type: ignore[misc]
    assert Model().model_config["extra"] == "forbid"


# --- what the room exports ------------------------------------------------------------------------------------------


def test_the_room_exports_what_it_says() -> None:
    assert sora.config.__all__ == sorted(
        sora.config.__all__, key=lambda name: (name.upper() != name, name.islower(), name)
    )
    for name in sora.config.__all__:
        assert getattr(sora.config, name) is not None
    assert {section.__name__ for section in SECTIONS.values()} <= set(sora.config.__all__)


def test_others_import_from_the_room_and_not_from_its_files() -> None:
    """Except the credentials, which are a subject of their own."""
    for folder in ("sora", "flows", "benchmarks"):
        for file in (REPOSITORY / folder).rglob("*.py"):
            if file.is_relative_to(REPOSITORY / "sora" / "config"):
                continue
            for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
                names = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
                names += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
                for name in names:
                    assert not name.startswith("sora.config.") or name == "sora.config.credentials", f"{file}: {name}"


def test_the_project_of_this_repository_is_its_own_values() -> None:
    settings = Project(REPOSITORY).settings()
    assert settings.name == "sora-demo" and settings.model.preset == "auto"
