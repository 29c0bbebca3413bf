"""What is printed can do nothing to a terminal."""

from __future__ import annotations

import ast
import json
from pathlib import Path

import pytest

from sora.core import progress

TITLE = "\x1b]0;owned\x07\nsora: all is well"


def test_control_characters_are_escaped() -> None:
    assert progress.printable("plain ü é 日本\ttab\nline") == "plain ü é 日本\ttab\nline"
    assert progress.printable("\x1b[31m \r \x7f \x9b \u202e \udcff") == r"\x1b[31m \x0d \x7f \x9b \u202e \xff"
    assert progress.one_line(TITLE) == r"\x1b]0;owned\x07\nsora: all is well"


def test_json_reads_as_before() -> None:
    value = {"path": TITLE + "\x9b\u2028\udcff"}
    text = progress.json_text(json.dumps(value, ensure_ascii=False))
    assert text.isprintable() and json.loads(text) == value
    text.encode()


def test_say_echo_and_tables(capsys: pytest.CaptureFixture[str]) -> None:
    from rich.table import Table

    progress.say(TITLE)
    progress.echo(TITLE)
    progress.echo(TITLE, err=True, mark="ok", colour="green")
    table = Table("video")
    table.add_row("\x1b[2Jin a cell")
    table.add_row(progress.markup("[bold]" + TITLE))
    progress.console(soft_wrap=True).print(table)
    progress.console().print("\x1b[2Jin a line")
    with progress.bar("Decoding", every=0) as update:
        update(1, 2, TITLE)
    out, err = capsys.readouterr()
    assert "\x1b]" not in out + err and "\x1b[2J" not in out + err and "\x07" not in out + err
    assert r"\x1b]0;owned\x07" in out and r"\x1b[2Jin a cell" in out and "[bold]" in out


def test_all_printing_passes_through_one_module(repository: Path) -> None:
    allowed = {"sora/core/progress.py"}
    for path in sorted(file for folder in ("sora", "flows") for file in (repository / folder).rglob("*.py")):
        name = path.relative_to(repository).as_posix()
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and name not in allowed:
                called = ast.unparse(node.func)
                safe = called == "click.echo" and ast.unparse(node.args[0]).startswith("json_text(")
                assert safe or called not in ("print", "click.echo", "click.secho", "Console"), f"{name}:{node.lineno}"
