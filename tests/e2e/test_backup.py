"""A project is backed up while it runs, is gone, and goes on in another folder from the file alone."""

from __future__ import annotations

import json
import shutil
import subprocess
import time
from pathlib import Path

import pytest

from tests.e2e.conftest import SORA, make_project, set_params, sora, sora_json

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


def _wait_for_step(project: Path, step: str, child: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 180
    while time.monotonic() < deadline and child.poll() is None:
        if any(f'"{step}"' in file.read_text() for file in (project / ".sora" / "work").glob("*/steps.json")):
            return
        time.sleep(0.02)
    raise AssertionError(f"step {step} was not reached")


def test_every_verb_goes_on_elsewhere(tmp_path: Path) -> None:
    first, kept = make_project(tmp_path / "machine 1"), tmp_path / "kept"
    kept.mkdir()
    set_params(first, backup={"keep": 1, "folder": str(kept)})
    assert sora_json(first, "run")["version"] == 1
    [by_the_nightly] = kept.iterdir()
    sora_json(first, "promote", "1")
    sora_json(first, "token", "add", "ann")
    subprocess.run(["git", "add", "-A"], cwd=first, check=True)
    who = ["-c", "user.name=a", "-c", "user.email=a@localhost"]
    subprocess.run(["git", *who, "commit", "-qm", "first run"], cwd=first, check=True)

    # While a run is going on.
    run = subprocess.Popen([*SORA, "run", "--force", "--json"], cwd=first, stdout=subprocess.PIPE, text=True)
    _wait_for_step(first, "run", run)
    during = sora_json(first, "backup", str(tmp_path / "during.tar"))
    assert run.poll() is None and during["versions"] == [1] and during["needs_remote"] == []
    second = json.loads(run.communicate(timeout=300)[0])
    assert run.returncode == 0 and second["version"] == 2
    [newer] = kept.iterdir()
    assert newer.name > by_the_nightly.name  # one is kept
    sora_json(first, "promote", "2")
    known = sora_json(first, "models")
    video = next((first / "data").rglob("*.mp4"))
    answer = sora_json(first, "predict", str(video))[0]["probabilities"]
    assert sora_json(first, "backup", str(tmp_path / "after.tar"))["damaged"] == []
    shutil.rmtree(first)

    there = tmp_path / "machine 2" / "elsewhere"
    there.parent.mkdir()
    restored = sora_json(tmp_path, "restore", str(tmp_path / "after.tar"), str(there))
    assert restored["project"] == str(there) and restored["data"] and restored["notes"] == []
    assert sora_json(there, "models") == known
    checks = sora_json(there, "doctor")["checks"]
    assert not [check for check in checks if not check["ok"]]
    status = subprocess.run([*SORA[:1], "-m", "dvc", "status", "--json"], cwd=there, capture_output=True, text=True)
    assert json.loads(status.stdout) == {}
    assert sora_json(there, "predict", str(there / video.relative_to(first)))[0]["probabilities"] == answer
    again = sora_json(there, "run")
    assert again["outcome"] == "unchanged" and again["run_id"] == second["run_id"]
    for version in (1, 2):
        assert sora_json(there, "reproduce", str(version))["matches"]
    assert sora_json(there, "rollback") == {"champion": 1, "previous": 2}
    assert [one["name"] for one in sora_json(there, "token", "list")] == ["ann"]
    log = subprocess.run(["git", "log", "--format=%s"], cwd=there, capture_output=True, text=True).stdout
    assert log.splitlines() == ["first run", "A Sora project"]

    # What was taken in the middle of the second run holds the first whole.
    middle = tmp_path / "middle"
    assert sora_json(tmp_path, "restore", str(tmp_path / "during.tar"), str(middle))["versions"] == [1]
    assert [one["aliases"] for one in sora_json(middle, "models")] == [["champion"]]
    assert sora_json(middle, "reproduce", "1")["matches"]
    assert sora(middle, "run").returncode == 0
