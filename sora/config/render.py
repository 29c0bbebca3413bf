"""The files that are written from the settings' models: params.yaml and docs/settings.md.

Both take values, defaults, ranges and meanings from the fields, so that no setting is missing and none is told twice.
"""

from __future__ import annotations

import types
from textwrap import wrap
from typing import Annotated, Literal, TypeGuard, Union, get_args, get_origin

import yaml
from annotated_types import Ge, Gt, Le, Lt, MultipleOf
from pydantic.fields import FieldInfo

from sora.config.model import Model
from sora.config.presets import PRESETS
from sora.config.section import Section
from sora.config.settings import Settings

_WIDTH = 120  # columns
_HEAD = (
    "All settings. An omitted setting has its default; an unknown key, or a value out of its range, is an "
    "error that says what is allowed. The sections classes, validate, split, clip and shards decide what is made from "
    "the videos (dvc.yaml depends on them): keep them in this file. Sora's docs/settings.md has all types, ranges and "
    "defaults."
)
_PAGE = """\
# Settings

All settings are in a project's `params.yaml`; `sora init` writes the file with the defaults. An unknown key, or a
value out of its range, is an error that says what is allowed. `python -m sora.config` writes this page from the code.

| Name | Type | Range | Default | Meaning |
|---|---|---|---|---|
"""
_TABLE = "| Name | Type | Range | Default | Meaning |\n|---|---|---|---|---|\n"
_NAMES: dict[object, str] = {bool: "boolean", int: "integer", float: "number", str: "text", type(None): "null"}


# --- params.yaml ----------------------------------------------------------------------------------------------------


def params_yaml(settings: Settings) -> str:
    """The text of a params.yaml with all `settings` and their meanings as comments.

    Fields of `model` with the preset's value are commented out: a change of the preset changes them.
    """
    values, defaults = settings.to_dict(), _defaults(Settings)
    lines = _comment(_HEAD)
    for name, field in _fields(Settings):
        section = field.annotation
        if not _is_section(section):
            lines += _entry(name, _as_written(values[name], defaults[name]), field)
            continue
        about, implied = _meaning(field), _defaults(section)
        if section is Model:
            about += f"; a line that is commented out shows the value of `{settings.model.preset}`"
            implied |= _of_preset(settings.model.preset)
        lines += ["", *_placed(f"{name}:", about)]
        for key, setting in _fields(section):
            left_out = section is Model and key != "preset" and values[name][key] == implied[key]
            value = _as_written(values[name][key], implied[key])
            lines += _entry(key, value, setting, indent="  # " if left_out else "  ")
    return "\n".join(lines) + "\n"


def _entry(name: str, value: object, field: FieldInfo, indent: str = "") -> list[str]:
    return _placed(f"{indent}{name}: {_yaml(value)}", _meaning(field))


def _placed(line: str, comment: str) -> list[str]:
    """The comment is behind the line if there is room, else above it."""
    if len(line) + len(comment) + 3 <= _WIDTH:
        return [f"{line} # {comment}"]
    indent = line[: len(line) - len(line.lstrip())]
    return [*_comment(comment, indent), line]


def _comment(text: str, indent: str = "") -> list[str]:
    return [
        f"{indent}# {line}"
        for line in wrap(text, _WIDTH - len(indent) - 2, break_long_words=False, break_on_hyphens=False)
    ]


def _as_written(value: object, default: object) -> object:
    """The default as written in the code (4, not 4.0) if it equals the value."""
    return default if value == default else value


def _yaml(value: object) -> str:
    """A value on one line."""
    text = str(yaml.safe_dump(value, default_flow_style=True, allow_unicode=True, width=10**6))
    return text.removesuffix("\n").removesuffix("\n...")


# --- docs/settings.md -----------------------------------------------------------------------------------------------


def settings_page() -> str:
    """The page about all settings (Markdown): one table per section."""
    defaults = _defaults(Settings)
    top, parts = [], []
    for name, field in _fields(Settings):
        section = field.annotation
        if not _is_section(section):
            top.append(_row(name, defaults[name], field))
            continue
        about = _meaning(field)
        rows = [_row(key, _plain(setting.default), setting) for key, setting in _fields(section)]
        parts.append(f"\n## {name}\n\n{about[0].upper()}{about[1:].rstrip('.')}.\n\n{_TABLE}{''.join(rows)}")
        if section is Model:
            parts.append(_presets())
    return _PAGE + "".join(top) + "".join(parts)


def _row(name: str, default: object, field: FieldInfo) -> str:
    cells = (f"`{name}`", _kind(field.annotation), _range(field), f"`{_yaml(default)}`", _meaning(field))
    return f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |\n"


def _presets() -> str:
    """A table of the presets: what each is for, what it sets, and the clips that it was made for."""
    rows = "".join(
        f"| `{name}` | {preset.about} | "
        f"{', '.join(f'`{key}: {_yaml(value)}`' for key, value in _of_preset(name).items()) or 'the defaults'} | "
        f"{preset.clip.frames} of {preset.clip.width}x{preset.clip.height} |\n"
        for name, preset in PRESETS.items()
    )
    return (
        "\nAn omitted field has the value of `preset`, and what the preset does not set has its default.\n\n"
        f"| Preset | For | Sets | Made for clips of |\n|---|---|---|---|\n{rows}"
    )


def _kind(annotation: object) -> str:
    """The type in words."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return _kind(arguments[0])
    if origin in (Union, types.UnionType):
        return " or ".join(_kind(argument) for argument in arguments)
    if origin is Literal:
        return "choice"
    if origin is tuple and arguments[-1] is Ellipsis:
        return f"list of {_kinds(arguments[0])}"
    if origin is tuple:
        return f"[{', '.join(_kind(argument) for argument in arguments)}]"
    return _NAMES[annotation]


def _kinds(annotation: object) -> str:
    """The type of a list's elements."""
    kind = _kind(annotation)
    return f"{kind}s" if kind in ("integer", "number", "choice") else kind


def _range(field: FieldInfo) -> str:
    """What the constraints allow, in words; a choice's values; nothing if everything is allowed."""
    bounds = {type(one): one for one in field.metadata}
    ge, gt, le, lt = (bounds.get(kind) for kind in (Ge, Gt, Le, Lt))
    words = []
    if isinstance(ge, Ge) and isinstance(le, Le):
        words.append(f"{ge.ge:,} to {le.le:,}")
    else:
        words += [f"{ge.ge:,} or more"] if isinstance(ge, Ge) else []
        words += [f"above {gt.gt:,}"] if isinstance(gt, Gt) else []
        words += [f"{le.le:,} or less"] if isinstance(le, Le) else []
        words += [f"below {lt.lt:,}"] if isinstance(lt, Lt) else []
    multiple = bounds.get(MultipleOf)
    words += [f"a multiple of {multiple.multiple_of}"] if isinstance(multiple, MultipleOf) else []
    words += [f"`{pattern}`" for one in field.metadata if (pattern := getattr(one, "pattern", None))]
    return ", ".join(words) or ", ".join(f"`{choice}`" for choice in _choices(field.annotation))


def _choices(annotation: object) -> tuple[object, ...]:
    arguments = get_args(annotation)
    if get_origin(annotation) is Literal:
        return arguments
    return tuple(choice for argument in arguments for choice in _choices(argument))


# --- both -----------------------------------------------------------------------------------------------------------


def _fields(section: type[Section]) -> list[tuple[str, FieldInfo]]:
    """Each field with its name in params.yaml."""
    return [(field.alias or name, field) for name, field in section.model_fields.items()]


def _defaults(section: type[Section]) -> dict[str, object]:
    """The values as the code writes them."""
    return {name: _plain(field.default) for name, field in _fields(section)}


def _of_preset(name: str) -> dict[str, object]:
    """The fields of `model` that a preset sets."""
    return {key: _plain(value) for key, value in PRESETS[name].model.items()}


def _plain(value: object) -> object:
    """The value as YAML."""
    return list(value) if isinstance(value, tuple) else value


def _is_section(annotation: object) -> TypeGuard[type[Section]]:
    return isinstance(annotation, type) and issubclass(annotation, Section)


def _meaning(field: FieldInfo) -> str:
    assert field.description, "a test holds every field to it"
    return field.description
