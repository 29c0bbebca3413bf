from __future__ import annotations

import json
import os
import pty
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from sora.config import Project
from sora.core.errors import InputError
from sora.core.processes import rebuild_error
from sora.dataset.versioning import stages


def test_an_error_is_handed_over_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SORA_STAGE_ERROR", str(tmp_path / "error.json"))
    assert stages.main(["paint"]) == 2
    error = rebuild_error(json.loads((tmp_path / "error.json").read_text()))
    assert isinstance(error, InputError) and "paint" in error.message


def test_an_error_that_can_not_be_handed_over_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """On a full disk the file of the error has no room either."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SORA_STAGE_ERROR", str(tmp_path / "gone" / "error.json"))
    assert stages.main(["paint"]) == 2
    assert "no stage paint" in capsys.readouterr().err


def test_a_stage_whose_caller_is_gone_does_nothing(fresh_project: Project) -> None:
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    answer = subprocess.run(
        [sys.executable, "-m", "sora.stages", "manifest"],
        cwd=fresh_project.root,
        env={**os.environ, "SORA_STAGE_OWNER": str(gone.pid)},
    )
    assert answer.returncode == 1
    assert not fresh_project.manifest.exists()


def test_balance_is_judged_beside_the_versioned_verdict(
    prepared_project: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    verdict = (prepared_project.prepared / "validation.json").read_bytes()
    (prepared_project.state / "reference.json").write_text(json.dumps({"jump": 40, "wave": 4}))
    stages.validate(prepared_project)
    assert (prepared_project.prepared / "validation.json").read_bytes() == verdict
    told = json.loads(stages.side_file(prepared_project).read_text())
    (balance,) = [found for found in told["expectations"] if found["rule"] == stages.BALANCE]
    assert balance["success"] is False
    assert (prepared_project.docs).is_dir()


def test_the_bar_is_drawn_on_the_callers_terminal(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    ours, theirs = pty.openpty()
    drawn: list[bytes] = []

    def read() -> None:
        while True:
            try:
                drawn.append(os.read(ours, 4096))
            except OSError:
                return

    reader = threading.Thread(target=read, daemon=True)
    reader.start()
    monkeypatch.setenv("SORA_STAGE_TTY", os.ttyname(theirs))
    monkeypatch.setenv("TERM", "xterm")
    with stages._bar("Decoding") as update:
        update(3, 4)
    os.close(theirs)
    reader.join(5)
    os.close(ours)
    assert b"3/4" in b"".join(drawn)
    assert capsys.readouterr() == ("", "")
