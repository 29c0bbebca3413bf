"""What a user loses by accident between two nightlies: `splits.csv`, half a database, all of `.sora/`."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.conftest import make_project, sora, sora_json
from tests.videos import make_video

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A project after its first run."""
    project = make_project(tmp_path_factory.mktemp("lost"))
    assert sora_json(project, "run")["version"] == 1
    return project


def refused(done: subprocess.CompletedProcess[str], code: int, *words: str) -> None:
    assert done.returncode == code, done.stderr
    assert not done.stdout and "Traceback" not in done.stderr
    for word in words:
        assert word in done.stderr


def check_of(project: Path, name: str) -> dict[str, Any]:
    return next(one for one in sora_json(project, "doctor")["checks"] if one["name"] == name)


def test_a_deleted_ledger_stops_the_run_until_it_is_restored(project: Path) -> None:
    ledger = project / "splits.csv"
    recorded = ledger.read_text()
    for number in range(4):
        make_video(project / "data" / "jump" / f"g30_{number}.mp4", seed=700 + number)
    ledger.unlink()
    for arguments in (["run"], ["run", "--force"]):
        refused(sora(project, *arguments, "--json"), 1, "version 1 was judged", "is missing", "sora splits restore")
        assert not ledger.exists()
    assert not check_of(project, "splits")["ok"]
    assert sora_json(project, "check", code=1)["ok"] is False
    assert sora_json(project, "splits", "restore")["returned"] == recorded.count("\n") - 1
    assert ledger.read_text() == recorded
    assert check_of(project, "splits")["ok"] and sora_json(project, "check")["ok"]


def test_half_a_database_is_said_by_every_verb(project: Path) -> None:
    database = project / ".sora" / "mlflow" / "mlflow.db"
    whole = database.read_bytes()
    database.write_bytes(whole[: len(whole) // 2])
    for arguments in (["run"], ["models"], ["rollback"], ["splits", "restore"]):
        refused(sora(project, *arguments, "--json"), 3, "mlflow's database", "damaged", "sora restore")
    found = check_of(project, "mlflow database")
    assert not found["ok"] and "sora restore" in found["fix"]
    database.write_bytes(whole)
    assert check_of(project, "mlflow database")["ok"]
    assert len(sora_json(project, "models")) == 1


def test_a_lost_registry_is_said_and_recorded(project: Path) -> None:
    ledger = (project / "splits.csv").read_text()
    shutil.rmtree(project / ".sora")
    found = check_of(project, "splits")
    assert not found["ok"] and "registry is empty" in found["detail"]
    result = sora_json(project, "run")
    assert result["version"] == 1 and any("numbers start again" in reason for reason in result["reasons"])
    assert (project / "splits.csv").read_text().startswith(ledger), "a video changed its split"
    (version,) = sora_json(project, "models")
    assert any("numbers start again" in reason for reason in version["reasons"])
    assert check_of(project, "splits")["ok"]
