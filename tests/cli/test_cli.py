"""The front door: exit codes, JSON on standard output and nothing else there, errors with their fix."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from tests.e2e.conftest import SORA, sora
from tests.videos import make_folder, make_video


def refused(done: subprocess.CompletedProcess[str], code: int, *words: str) -> None:
    assert done.returncode == code, done.stderr
    assert not done.stdout and "Traceback" not in done.stderr
    for word in (*words, "fix:"):
        assert word in done.stderr


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cli")
    footage = make_folder(folder / "fußball videos", classes=("jump high", "wëlle"), groups=4)
    made = sora(folder, "init", "mein projekt", "--data", str(footage), "--json")
    assert made.returncode == 0, made.stderr
    assert json.loads(made.stdout) == {
        "project": str(folder / "mein projekt"),
        "videos": 8,
        "classes": ["jump high", "wëlle"],
    }
    return folder / "mein projekt"


def test_check_of_names_with_spaces_and_umlauts(project: Path) -> None:
    (project / "data" / "wëlle" / "kaputt ß.mp4").write_bytes(b"no video")
    done = sora(project, "check", "--json")
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert set(report) == {"ok", "videos", "accepted", "rejected", "expectations"}
    assert report["ok"] and report["videos"] == 9 and report["accepted"] == 8
    assert [(one["path"], one["rule"]) for one in report["rejected"]] == [("wëlle/kaputt ß.mp4", "not_a_video")]
    assert set(report["expectations"]) == {"passed", "failed"}


def test_check_of_a_folder_that_is_no_project(tmp_path: Path) -> None:
    make_folder(tmp_path / "one class", classes=("jump",), groups=4)
    done = sora(tmp_path, "check", "one class", "--json")
    assert done.returncode == 1 and json.loads(done.stdout)["ok"] is False


@pytest.mark.parametrize("folder", ["empty", "absent"])
def test_init_refuses_a_folder_without_videos(tmp_path: Path, folder: str) -> None:
    (tmp_path / "empty").mkdir()
    refused(sora(tmp_path, "init", "project", "--data", folder, "--json"), 2)
    assert not (tmp_path / "project").exists()


def test_outside_a_project(tmp_path: Path) -> None:
    refused(sora(tmp_path, "run", "--json"), 2, "params.yaml")


def test_wrong_usage(tmp_path: Path) -> None:
    done = sora(tmp_path, "promote", "first")
    assert done.returncode == 2 and "first" in done.stderr
    assert sora(tmp_path, "fly").returncode == 2


def test_torn_files_of_dvc(project: Path) -> None:
    """What reads data.dvc and dvc.lock names them with the way back, what doesn't goes on."""
    lock, data = project / "dvc.lock", project / "data.dvc"
    whole = data.read_text()
    try:
        data.write_text(whole[: len(whole) // 3])
        refused(sora(project, "run", "--json"), 2, str(data), "is torn", "git checkout HEAD -- data.dvc")
        assert sora(project, "check", "--json").returncode == 0
        doctor = json.loads(sora(project, "doctor", "--json").stdout)["checks"]
        [check] = [check for check in doctor if check["name"] == "data"]
        assert not check["ok"] and str(data) in check["detail"]
        models = sora(project, "models", "--json")
        assert models.returncode == 0 and json.loads(models.stdout) == []
        data.write_text(whole)
        lock.write_text("<<<<<<< HEAD\n")
        refused(sora(project, "run", "--json"), 2, str(lock), "unfinished git merge", "remove dvc.lock")
    finally:
        data.write_text(whole)
        lock.unlink(missing_ok=True)


def test_a_wrong_setting_is_named(project: Path) -> None:
    path = project / "params.yaml"
    text = path.read_text(encoding="utf-8")
    try:
        path.write_text(text.replace("epochs: 30", "epoches: 30"), encoding="utf-8")
        refused(sora(project, "run", "--json"), 2, "train.epoches")
    finally:
        path.write_text(text, encoding="utf-8")


@pytest.mark.parametrize("service", ["mlflow_tracking_uri", "prefect_api_url"])
def test_a_configured_server_that_is_down(project: Path, service: str) -> None:
    path = project / "params.yaml"
    text = path.read_text(encoding="utf-8")
    try:
        value = yaml.safe_load(text)
        value["services"] = {service: "http://127.0.0.1:9/api"}
        path.write_text(yaml.safe_dump(value, allow_unicode=True), encoding="utf-8")
        refused(sora(project, "run", "--json"), 3, "127.0.0.1:9")
    finally:
        path.write_text(text, encoding="utf-8")


def test_no_champion_yet(project: Path, tmp_path: Path) -> None:
    refused(sora(project, "predict", str(make_video(tmp_path / "x.mp4")), "--json"), 2, "champion")
    refused(sora(project, "rollback", "--json"), 1)
    done = sora(project, "models", "--json")
    assert done.returncode == 0 and json.loads(done.stdout) == []


def test_ctrl_c_is_130(project: Path) -> None:
    child = subprocess.Popen(
        [*SORA, "run"], cwd=project, stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True
    )
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and not (project / ".sora" / "services.use").exists():
        time.sleep(0.1)
    time.sleep(1)
    os.killpg(child.pid, signal.SIGINT)
    child.communicate(timeout=60)
    assert child.returncode == 130


def test_module_and_script_are_one() -> None:
    done = subprocess.run([sys.executable, "-m", "sora.cli", "--version"], capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.startswith("sora, version")
