"""`sora tune` as a user types it: a search with real trainings, killed once, in Prefect and MLflow."""

from __future__ import annotations

import signal
import sqlite3
import subprocess
import time
from pathlib import Path

import pandas as pd
import pytest

from tests.e2e.conftest import SORA, make_project, set_params, sora, sora_json

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]
TUNE = ("tune", "--trials", "2", "--folds", "2", "--only", "train.learning_rate,model.dropout")


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    project = make_project(tmp_path_factory.mktemp("tune"))
    set_params(project, train={"epochs": 1}, alert={"webhook": None})
    return project


def test_it_needs_a_run_first(project: Path) -> None:
    done = sora(project, *TUNE, "--json")
    assert done.returncode == 2 and not done.stdout and "`sora run`" in done.stderr


def test_a_search_killed_once(project: Path) -> None:
    judged = sora_json(project, "run")
    child = subprocess.Popen([*SORA, *TUNE], cwd=project, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    deadline = time.monotonic() + 180
    while time.monotonic() < deadline and not list((project / ".sora" / "tune").glob("folds/*/fold.json")):
        time.sleep(0.2)
    child.send_signal(signal.SIGKILL)
    child.communicate()
    kept = {file: file.stat().st_mtime_ns for file in (project / ".sora" / "tune").glob("folds/*/fold.json")}
    assert kept
    before = (project / "params.yaml").read_text()
    found = sora_json(project, *TUNE)
    assert {"study", "trials", "best", "baseline", "proposal", "applied", "page"} <= set(found)
    assert [trial["state"] for trial in found["trials"]] == ["complete", "complete"] and found["ended"] == "trials"
    assert found["baseline"]["values"] == {"train.learning_rate": 0.002, "model.dropout": 0.3}
    assert {file: file.stat().st_mtime_ns for file in kept} == kept
    assert (project / "params.yaml").read_text() == before and found["applied"] is False
    ledger = pd.read_csv(project / "splits.csv", dtype=str)
    test = set(ledger.loc[ledger["split"] == "test", "sha256"])
    tables = list((project / ".sora" / "tune").glob("folds/*/table.parquet"))
    assert len(tables) == 4 and test
    for table in tables:
        assert not set(pd.read_parquet(table)["sha256"]) & test
    with sqlite3.connect(project / ".sora" / "mlflow" / "mlflow.db") as database:
        names = {name for (name,) in database.execute("SELECT name FROM experiments")}
        children = database.execute("SELECT count(*) FROM tags WHERE key = 'mlflow.parentRunId'").fetchone()[0]
    assert any(name.endswith("/tune") for name in names) and children == 2
    assert [one["version"] for one in sora_json(project, "models")] == [judged["version"]]
    again = sora_json(project, *TUNE, "--apply")  # everything is there: nothing is trained
    assert again["trials"] == found["trials"] and again["applied"] is bool(found["proposal"]["changes"])
    if not again["applied"]:
        assert sora_json(project, "run")["outcome"] == "unchanged"
