"""Checks of the machine: interpreter, packages, programs, memory. Versions come from the packages' metadata."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, requires, version

from sora.core import sandbox as confinement
from sora.operations.checks.check import Check

_FREE_MEMORY = 1.5e9  # bytes: TensorFlow and a small model
_DISTRIBUTION = "sora-video"


def python() -> Check:
    running = ".".join(map(str, sys.version_info[:3]))
    ok = sys.version_info[:2] == (3, 11)
    return Check("python", ok, running, "" if ok else "use Python 3.11: `make setup` builds .venv with it")


def packages() -> Check:
    from packaging.requirements import Requirement

    try:
        lines = requires(_DISTRIBUTION) or []
    except PackageNotFoundError:
        return Check("packages", False, f"{_DISTRIBUTION} is not installed", "make setup (or: pip install -e .)")
    wanted = [r for r in map(Requirement, lines) if r.marker is None or r.marker.evaluate({"extra": ""})]
    wrong = []
    for requirement in wanted:
        try:
            installed = version(requirement.name)
        except PackageNotFoundError:
            wrong.append(f"{requirement.name} is missing")
            continue
        if not requirement.specifier.contains(installed, prereleases=True):
            wrong.append(f"{requirement.name} {installed} is not {requirement.specifier}")
    if wrong:
        return Check("packages", False, "; ".join(wrong), "make setup (or: pip install -r requirements.lock)")
    return Check("packages", True, f"all {len(wanted)} are within their ranges")


def git() -> Check:
    return _command("git", ["git", "--version"], "install git")


def dvc() -> Check:
    try:
        return Check("dvc", True, version("dvc"))
    except PackageNotFoundError:
        return Check("dvc", False, "not installed", "make setup")


def ffmpeg() -> Check:
    # The wheel carries FFmpeg's libraries; a separate process shows whether they load.
    code = "import av; print(av.__version__, '.'.join(map(str, av.library_versions['libavcodec'])))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        return Check(
            "ffmpeg", False, f"PyAV does not load: {last}", "make setup (or: pip install --force-reinstall av)"
        )
    package, codec = done.stdout.split()
    return Check("ffmpeg", True, f"PyAV {package} with libavcodec {codec}")


def sandbox() -> Check:
    confined = f"decoders are confined by {confinement.described()}"
    lacks = confinement.lacking()
    if not lacks:
        return Check("sandbox", True, confined)
    return Check(
        "sandbox",
        False,
        f"{confined} and by limits on memory, files and time; this machine lacks {', '.join(lacks)}",
        "run on Linux 6.12 or later, on x86_64 or aarch64; in a container, let its profile allow both",
    )


def memory() -> Check:
    import psutil

    memory = psutil.virtual_memory()
    detail = f"{memory.available / 1e9:.1f} GB of {memory.total / 1e9:.1f} GB free, {os.cpu_count()} processors"
    ok = memory.available >= _FREE_MEMORY
    return Check("memory", ok, detail, "" if ok else "end other programs, or lower train.batch and the clip's size")


def gpu() -> Check:
    if shutil.which("nvidia-smi") is None:
        return Check("gpu", True, "none found: training runs on the processor")
    query = ["nvidia-smi", "--query-gpu=name,memory.total", "--format=csv,noheader"]
    done = subprocess.run(query, capture_output=True, text=True, timeout=20, check=False)
    if done.returncode:
        lines = (done.stdout + done.stderr).strip().splitlines() or ["no message"]
        return Check("gpu", False, f"nvidia-smi fails: {lines[0]}", "fix the NVIDIA driver")
    return Check("gpu", True, "; ".join(done.stdout.strip().splitlines()))


def _command(name: str, command: list[str], fix: str) -> Check:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)
    except FileNotFoundError:
        return Check(name, False, "not found", fix)
    first = (done.stdout or done.stderr).strip().splitlines() or ["no answer"]
    return Check(name, done.returncode == 0, first[0], "" if done.returncode == 0 else fix)
