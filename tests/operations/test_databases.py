"""Damaged databases are named with what to do; whole ones are not disturbed."""

from __future__ import annotations

import sqlite3
from collections.abc import Callable
from pathlib import Path

import pytest

from sora.config import Project
from sora.core.errors import DatabaseDamaged, InputError
from sora.operations import databases
from tests.servers import make_project


@pytest.fixture
def project(tmp_path: Path) -> Project:
    project = make_project(tmp_path / "größe ?1#")
    for name in databases.NAMES:
        file = databases.file_of(project, name)
        file.parent.mkdir(parents=True)
        with sqlite3.connect(file) as database:
            if name == "prefect":
                database.execute("PRAGMA journal_mode = WAL")
            database.execute("CREATE TABLE runs (name TEXT)")
            database.executemany("INSERT INTO runs VALUES (?)", [("x" * 200,) for _ in range(2000)])
        database.close()
    return project


def files(project: Project) -> dict[str, tuple[int, int]]:
    return {str(p): (p.stat().st_size, p.stat().st_mtime_ns) for p in project.state.rglob("*")}


def cut(file: Path) -> None:
    content = file.read_bytes()
    file.write_bytes(content[: len(content) // 2])


def noise(file: Path) -> None:
    file.write_bytes(b"\xa5" * file.stat().st_size)


def zeros(file: Path) -> None:
    content = file.read_bytes()
    file.write_bytes(content[:4096] + bytes(len(content) - 4096))


@pytest.mark.parametrize("name", databases.NAMES)
def test_whole_ones_are_in_order_and_untouched(project: Project, name: str) -> None:
    before = files(project)
    found = databases.look(project, name)
    assert found.exists and found.whole and not found.damage
    assert files(project) == before
    databases.require(project)


@pytest.mark.parametrize("harm", [cut, noise, zeros])
@pytest.mark.parametrize("name", databases.NAMES)
def test_damage_is_named_with_the_fix(project: Project, name: str, harm: Callable[[Path], None]) -> None:
    harm(databases.file_of(project, name))
    found = databases.look(project, name)
    assert found.damage and "sora restore" in found.fix
    with pytest.raises(DatabaseDamaged, match=f"{name}'s database") as caught:
        databases.require(project)
    assert caught.value.exit_code == 3


def test_an_empty_file_is_damage_only_where_runs_were(project: Project) -> None:
    file = databases.file_of(project, "mlflow")
    file.write_bytes(b"")
    assert not databases.look(project, "mlflow").damage
    (file.parent / "artifacts" / "1" / "run").mkdir(parents=True)
    assert "empty" in databases.look(project, "mlflow").damage
    file.unlink()
    assert not databases.look(project, "mlflow").exists


@pytest.mark.parametrize("name", databases.NAMES)
def test_a_writer_goes_on(project: Project, name: str) -> None:
    with sqlite3.connect(databases.file_of(project, name), timeout=0.1) as writer:
        writer.execute("INSERT INTO runs VALUES ('in a transaction')")
        assert not databases.look(project, name).damage
    writer.execute("INSERT INTO runs VALUES ('after it')")
    writer.commit()
    writer.close()


def test_a_locked_one_is_not_called_damaged(project: Project) -> None:
    with sqlite3.connect(databases.file_of(project, "mlflow")) as writer:
        writer.execute("BEGIN EXCLUSIVE")
        found = databases.look(project, "mlflow")
        assert not found.damage and not found.whole
    writer.close()


def test_an_error_is_explained_by_damage_and_only_then(project: Project) -> None:
    with pytest.raises(RuntimeError), databases.explained(project, ["mlflow"]):
        raise RuntimeError("500")
    cut(databases.file_of(project, "mlflow"))
    with pytest.raises(DatabaseDamaged), databases.explained(project, ["mlflow"]):
        raise RuntimeError("500")
    with pytest.raises(RuntimeError), databases.explained(project, ["prefect"]):
        raise RuntimeError("500")
    with pytest.raises(InputError), databases.explained(project, ["mlflow"]):
        raise InputError("no such version")
