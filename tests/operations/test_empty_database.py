"""Prefect's empty database: made once, copied after that, and never in the way."""

from __future__ import annotations

import sqlite3
from importlib.metadata import version
from pathlib import Path

import pytest

from sora.operations import empty_database


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "sora"


def _rows(database: Path) -> dict[str, int]:
    with sqlite3.connect(database) as opened:
        names = [name for (name,) in opened.execute("SELECT name FROM sqlite_master WHERE type = 'table'")]
        return {name: opened.execute(f'SELECT COUNT(*) FROM "{name}"').fetchone()[0] for name in names}


def test_it_is_made_once_and_holds_nobodys_rows(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = tmp_path / "one.db", tmp_path / "two.db"
    empty_database.provide(first)
    rows = _rows(first)
    assert len(rows) > 20 and {name for name, count in rows.items() if count} == {"alembic_version"}
    assert [file.suffix for file in cache.iterdir()] == [".db"]  # neither drafts nor logs beside it
    monkeypatch.setattr(empty_database, "_make", lambda file: pytest.fail("made again"))
    empty_database.provide(second)
    assert second.read_bytes() == first.read_bytes()
    second.write_bytes(b"a project's own")
    empty_database.provide(second)
    assert second.read_bytes() == b"a project's own"


def test_a_damaged_one_is_made_again(cache: Path, tmp_path: Path) -> None:
    cache.mkdir(parents=True)
    kept = cache / f"prefect-{version('prefect')}.db"
    kept.write_bytes(b"SQLite format 3\0" + bytes(5000))
    empty_database.provide(tmp_path / "one.db")
    assert _rows(tmp_path / "one.db")["alembic_version"] == 1


def test_where_it_cannot_be_kept_the_server_makes_its_own(cache: Path, tmp_path: Path) -> None:
    cache.parent.write_text("a file where the folder should be")
    empty_database.provide(tmp_path / "one.db")
    assert not (tmp_path / "one.db").exists()
