"""The ledger that judged runs stored in MLflow, and what a run does before it deals anything."""

from __future__ import annotations

from pathlib import Path

import pytest

from flows import cycle
from flows.records import Night
from sora.config import Project
from sora.core.errors import AnswerIsNo, InputError, SplitsLost
from sora.core.ledger import Row
from sora.dataset import ledger
from sora.operations.doctor import doctor
from sora.registry import Registry
from sora.runtime import lifecycle
from tests.registry.conftest import add_version

ROWS = [Row(f"{n:064x}", split, "") for n, split in enumerate(["train", "train", "val", "test"])]


def judge(registry: Registry, folder: Path, rows: list[Row] | str, content: bytes = b"m") -> int:
    """A judged version whose run stored a ledger."""
    version = add_version(registry, folder, content)
    text = rows if isinstance(rows, str) else ledger.text(rows)
    registry.runs.log_state(registry.get(version).run_id, {"splits.csv": text, "git_commit": None})
    registry.set_decision(version, "refused", ["a test"])
    return version


@pytest.fixture
def project(registry: Registry, tmp_path: Path) -> Project:
    services = f"services: {{mlflow_tracking_uri: '{registry.tracking_uri}'}}\n"
    (tmp_path / "params.yaml").write_text(f"name: {registry.name}\nclasses: [a, b]\n{services}")
    return Project(tmp_path)


def test_the_last_whole_ledger_counts(registry: Registry, tmp_path: Path) -> None:
    assert registry.judged_ledger() is None
    judge(registry, tmp_path, ROWS[:3], b"1")
    second = judge(registry, tmp_path, ROWS, b"2")
    judge(registry, tmp_path, "half a li", b"3")
    found = registry.judged_ledger()
    assert found is not None and found.version == second and list(found.rows) == ROWS
    assert list(registry.version_ledger(1).rows) == ROWS[:3]
    for version in (3, 4):
        with pytest.raises(InputError):
            registry.version_ledger(version)


@pytest.mark.parametrize("force", [False, True])
@pytest.mark.parametrize("now", [None, ROWS[:2], "sha256,split,group\nab"])
def test_a_run_stops_before_anything_is_dealt(
    registry: Registry, project: Project, tmp_path: Path, now: list[Row] | str | None, force: bool
) -> None:
    judge(registry, tmp_path, ROWS)
    if now is not None:
        project.splits_file.write_text(now if isinstance(now, str) else ledger.text(now))
    before = project.splits_file.read_bytes() if now is not None else None
    with pytest.raises(SplitsLost) as caught:
        cycle.run(Night(project, project.settings(), registry), force=force)
    assert caught.value.exit_code == 1 and "sora splits restore" in caught.value.fix
    assert (project.splits_file.read_bytes() if project.splits_file.exists() else None) == before
    check = next(one for one in doctor(project)["checks"] if one["name"] == "splits")
    assert not check["ok"] and "sora splits restore" in check["fix"]
    done = lifecycle.restore_splits(project)
    assert done.source == "version 1" and ledger.read(project.splits_file) == ROWS
    assert next(one for one in doctor(project)["checks"] if one["name"] == "splits")["ok"]


def test_restore_from_a_version_and_from_nothing(registry: Registry, project: Project, tmp_path: Path) -> None:
    with pytest.raises(AnswerIsNo, match="no judged run"):
        lifecycle.restore_splits(project)
    judge(registry, tmp_path, ROWS[:2], b"1")
    judge(registry, tmp_path, ROWS, b"2")
    lifecycle.restore_splits(project, 1)
    assert ledger.read(project.splits_file) == ROWS[:2]
    with pytest.raises(SplitsLost):  # version 2 was judged on more
        ledger.require(project.splits_file, registry.judged_ledger())
    with pytest.raises(InputError):
        lifecycle.restore_splits(project, 9)


def test_a_ledger_beside_an_empty_registry_is_said(registry: Registry, project: Project, tmp_path: Path) -> None:
    assert cycle.doubts_of(registry, None, None, 0) == ()  # a new project
    (doubt,) = cycle.doubts_of(registry, None, None, 4)
    assert "4 videos" in doubt and "sora restore" in doubt
    project.splits_file.write_text(ledger.text(ROWS))
    check = next(one for one in doctor(project)["checks"] if one["name"] == "splits")
    assert not check["ok"] and "registry is empty" in check["detail"]
    run_id = registry.runs.start_run()  # the very first run was interrupted: it dealt these itself
    assert cycle.doubts_of(registry, None, None, 4) == ()
    registry.runs.set_tags(run_id, {cycle.NO_HISTORY: "true"})  # it had found them: whoever goes on says so as well
    assert len(cycle.doubts_of(registry, None, None, 4)) == 1


def test_judged_runs_without_their_ledgers_are_said(registry: Registry, tmp_path: Path) -> None:
    version = add_version(registry, tmp_path, b"1")
    registry.set_decision(version, "promoted", [])
    (doubt,) = cycle.doubts_of(registry, registry.last_judged(), registry.judged_ledger(), 4)
    assert "not compared" in doubt
