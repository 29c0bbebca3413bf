"""The README's examples for programs, run as they stand there against a real server."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from sora.serving.tokens import TokenFile
from tests.programs import needs
from tests.serving.standing import Standing
from tests.videos import make_video

ADDRESS = "http://127.0.0.1:8000"


def _blocks(repository: Path, language: str, word: str) -> list[str]:
    readme = (repository / "README.md").read_text(encoding="utf-8")
    return [block for block in re.findall(rf"^```{language}\n(.*?)^```", readme, re.M | re.S) if word in block]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for seed, name in enumerate(("video.mp4", "a.mp4", "b.mp4")):
        make_video(tmp_path / name, seed=seed)
    return tmp_path


@needs("curl")
def test_curl(api: Standing, repository: Path, folder: Path) -> None:
    file = TokenFile(api.folder / "tokens.json")
    token = file.add("readme")
    ran = 0
    try:
        for block in _blocks(repository, "sh", "curl "):
            for line in re.findall(r"^curl .*$", block, re.M):
                if "/v1/corrections" in line:
                    continue  # needs a project and its classes: test_inbox sends such a form
                if "Authorization" in line:
                    env = {"SORA_TOKEN": token}
                else:
                    line, env = line.replace("curl ", f'curl -H "Authorization: Bearer {token}" ', 1), {}
                command = line.replace("curl ", "curl -sS --noproxy '*' ", 1).replace(ADDRESS, _address(api))
                done = subprocess.run(
                    ["sh", "-c", command],
                    cwd=folder,
                    env={"PATH": "/usr/bin:/bin", **env},
                    capture_output=True,
                    text=True,
                )
                assert done.returncode == 0, f"{line}\n{done.stderr}"
                ran += 1
                if saved := re.search(r" -o (\S+)", line):
                    assert (folder / saved[1]).read_bytes()[:4] == b"\x89PNG", line
                    continue
                answer = json.loads(done.stdout)
                assert "fix" not in answer, f"{line}\n{answer}"
                if "a.mp4" in line:
                    assert [one["filename"] for one in answer["answers"]] == ["a.mp4", "b.mp4"]
                elif "timeline" in line:
                    assert answer["timeline"] and answer["span"]
    finally:
        file.path.unlink()
    assert ran >= 6


def test_python(api: Standing, repository: Path, folder: Path) -> None:
    (block,) = _blocks(repository, "python", "sora.client")
    done = subprocess.run(
        [sys.executable, "-c", block.replace(ADDRESS, _address(api))], cwd=folder, capture_output=True, text=True,
        env={"PATH": "/usr/bin:/bin", "PYTHONPATH": str(repository)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()


def _address(api: Standing) -> str:
    return f"http://127.0.0.1:{api.port}"
