"""Changes single settings in the text of a params.yaml, and nothing else in it: comments, order and spaces stay.

YAML's own parser says where a value begins and ends; only that piece of text is replaced. The result is parsed again
and compared with what it should say, so a file that is written in an unforeseen way is refused, never damaged.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import yaml

from sora.config.settings import Settings, parse
from sora.core.errors import InputError, SettingsError

_FIX = "change it by hand; `sora tune` shows the values"


def changed(settings: Settings, changes: Mapping[str, Any]) -> Settings:
    """The settings with other values; `changes` maps `section.name` to a value as JSON has it.

    Raises:
        SettingsError: a value is out of range, or does not go with the others.
    """
    values = settings.to_dict()
    for name, value in changes.items():
        section, _, key = name.partition(".")
        values[section] = {**values[section], key: value}
    return parse(yaml.safe_dump(values), "the changed settings")


def edited(text: str, changes: Mapping[str, Any]) -> str:
    """The text of a params.yaml with other values; `changes` as in `changed`.

    A setting that the file leaves out is put where its commented line is, or else first in its section.

    Raises:
        InputError: the file is written in a way in which this can't be done.
    """
    wanted = changed(parse(text), changes)
    result = text
    for name, value in changes.items():
        section, _, key = name.partition(".")
        result = _with(result, section, key, _flow(value))
    try:
        got = parse(result)
    except SettingsError as error:
        raise InputError(f"params.yaml is written in a way that can't be edited: {error.message}", fix=_FIX) from error
    if got != wanted:
        raise InputError("params.yaml is written in a way that can't be edited (anchors?)", fix=_FIX)
    return result


def _with(text: str, section: str, key: str, value: str) -> str:
    root = yaml.compose(text, Loader=yaml.SafeLoader)
    found = _entry(root, section)
    if found is None:
        end = "" if not text or text.endswith("\n") else "\n"
        return f"{text}{end}\n{section}:\n  {key}: {value}\n"
    name, node = found
    own = _entry(node, key)
    if own is not None:
        return f"{text[: own[0].end_mark.index]}: {value}{text[_end(own[1]) :]}"
    if isinstance(node, yaml.MappingNode) and node.flow_style:
        start = node.start_mark.index + 1
        return f"{text[:start]}{key}: {value}{', ' if node.value else ''}{text[start:]}"
    return _added(text, name, node, key, value)


def _added(text: str, name: yaml.Node, node: yaml.Node, key: str, value: str) -> str:
    """Puts a line into a block section that lacks it: where it is commented out, or else at the top."""
    below = text.index("\n", name.end_mark.index) + 1
    following = re.compile(r"^[^\s#]", re.MULTILINE).search(text, below)
    stop = following.start() if following else len(text)
    line = f"{' ' * node.start_mark.column}{key}: {value}"
    commented = re.compile(rf"^[ \t]+# ?{re.escape(key)}:[ \t]*(?:\[[^\]\n]*\]|[^\s#]+)", re.MULTILINE)
    if (old := commented.search(text, below, stop)) is not None:
        return f"{text[: old.start()]}{line}{text[old.end() :]}"
    return f"{text[:below]}{line}\n{text[below:]}"


def _entry(node: yaml.Node | None, key: str) -> tuple[yaml.Node, yaml.Node] | None:
    """The nodes of a key and of its value."""
    if isinstance(node, yaml.MappingNode):
        for name, value in node.value:
            if name.value == key:
                return name, value
    return None


def _end(node: yaml.Node) -> int:
    """Where a value's text ends. PyYAML lets a block end only where the next token begins, behind the comments."""
    if isinstance(node, yaml.CollectionNode) and not node.flow_style and node.value:
        last = node.value[-1]
        return _end(last[1] if isinstance(last, tuple) else last)
    return int(node.end_mark.index)


def _flow(value: Any) -> str:
    """The value on one line."""
    return str(yaml.safe_dump(value, default_flow_style=True, width=10**6)).removesuffix("\n").removesuffix("\n...")
