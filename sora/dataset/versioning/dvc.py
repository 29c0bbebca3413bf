"""DVC and git as child processes: the only caller of DVC; it translates DVC's messages into Sora's errors."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

from sora.core.errors import DiskFull, InputError, RunActive, ServiceError, SoraError
from sora.core.files import atomic
from sora.core.processes import quiet_environment, start_child
from sora.core.progress import say


def environment(**more: str) -> dict[str, str]:
    """Environment for DVC and git: quiet, this interpreter first in PATH (stages say `python`), no outer repository.

    A git hook exports GIT_DIR and the like, which would lead both away from the project.
    """
    env = quiet_environment(**more)
    env["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), env.get("PATH", os.defpath)])
    for name in ("GIT_DIR", "GIT_WORK_TREE", "GIT_INDEX_FILE", "GIT_PREFIX", "DVC_ROOT"):
        env.pop(name, None)
    return env


def git(root: Path, *arguments: str) -> str | None:
    """Git's answer; None without git, without a repository, or without a commit."""
    try:
        answer = subprocess.run(["git", *arguments], cwd=root, env=environment(), capture_output=True, text=True)
    except OSError:
        return None
    return answer.stdout.strip() if answer.returncode == 0 else None


def dvc(root: Path, *arguments: str, relay: bool = False, env: dict[str, str] | None = None) -> str:
    """Standard output of `dvc ARGUMENTS` in `root`. `relay`: what stages write to standard error is shown at once.

    Raises:
        RunActive, DiskFull, InputError, ServiceError: what DVC's messages mean.
    """
    try:
        return _run(root, *arguments, relay=relay, env=env)
    except RunActive:
        if not _forget_dead_holders(root / ".dvc" / "tmp" / "rwlock"):
            raise
        return _run(root, *arguments, relay=relay, env=env)


def _forget_dead_holders(lock: Path) -> bool:
    """Removes processes that were killed, but not yet reaped by their parent, from DVC's lock file.

    DVC itself forgets those that are gone. It takes a zombie for alive, and below a container's first process,
    which seldom reaps, it stays one: every later run would hear that DVC is busy. Returns whether any was removed.
    """
    import psutil

    def dead(holder: dict[str, Any]) -> bool:
        try:
            return bool(psutil.Process(int(holder["pid"])).status() == psutil.STATUS_ZOMBIE)
        except psutil.NoSuchProcess:
            return True

    try:
        held = json.loads(lock.read_text(encoding="utf-8"))
        read = {path: [one for one in holders if not dead(one)] for path, holders in held["read"].items()}
        write = {path: one for path, one in held["write"].items() if one and not dead(one)}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False
    left = {"read": {path: holders for path, holders in read.items() if holders}, "write": write}
    if left == held:
        return False
    with atomic(lock) as file:
        file.write(json.dumps(left).encode())
    return True


def _run(root: Path, *arguments: str, relay: bool, env: dict[str, str] | None) -> str:
    child = start_child(
        [sys.executable, "-m", "dvc", *arguments],
        cwd=root,
        env=environment(**(env or {})),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
    )
    complaints: list[str] = []

    def listen() -> None:
        assert child.stderr is not None
        for line in child.stderr:
            complaints.append(line)
            if relay and not line.startswith(("ERROR", "WARNING")) and line.strip():
                say(line.rstrip())

    listener = threading.Thread(target=listen, daemon=True)
    listener.start()
    try:
        assert child.stdout is not None
        output: str = child.stdout.read()
        code = child.wait()
    except BaseException:
        child.terminate()
        child.wait()
        raise
    finally:
        listener.join(5)
    # When a copy into the cache fails (a full disk), DVC prints an ERROR line but still ends with 0.
    if code != 0 or any(line.startswith("ERROR: ") for line in complaints):
        raise _translate(root, arguments, code, "".join(complaints))
    return output


def _translate(root: Path, arguments: tuple[str, ...], code: int, complaints: str) -> SoraError:
    errors = [line for line in complaints.splitlines() if line.startswith("ERROR")] or complaints.splitlines()[-5:]
    text = "\n".join(errors[:5]).replace("ERROR: ", "")
    what = f"dvc {arguments[0]} in {root}"

    def complained(*words: str) -> bool:
        return any(word in complaints for word in words)

    if complained("Unable to acquire lock", "is busy"):
        return RunActive(f"{what}: another DVC command is running in this project", fix="wait until it has ended")
    if complained("No space left on device", "[Errno 28]", "Disk quota"):
        return DiskFull(
            f"{what}: no space left: {text}", fix="make room (`sora gc --dry-run` shows what can go) and run again"
        )
    if complained("no remote specified"):
        return InputError(f"{what}: no remote is configured", fix="dvc remote add --default NAME FOLDER-OR-URL")
    if complained("missing-files", "do not exist neither locally nor on remote"):
        return ServiceError(
            f"{what}: neither the cache nor the remote has all that data.dvc and dvc.lock name\n{complaints.strip()}",
            fix="`dvc push` where the files still are, or check the remote's address in .dvc/config",
        )
    if complained("not inside of a DVC repository", "supported SCM tool", "is not a git"):
        return InputError(f"{what}: no DVC and git repository: {text}", fix="`git init` and `dvc init`, or `sora init`")
    if complained("Permission denied", "Read-only file system"):
        return ServiceError(f"{what}: {text}", fix="make the folder writable for this user")
    if missing := re.search(r"requires '(dvc-([a-z0-9]+))' to be installed", complaints):
        package, kind = missing.groups()
        return InputError(
            f"{what}: remotes of the kind {kind} need the package {package}, which is not installed",
            fix="pip install 'sora-video[s3]'" if kind == "s3" else f"pip install {package}",
        )
    how = f"was killed by signal {-code}" if code < 0 else f"ended with {code}"
    return ServiceError(f"{what} {how}: {text}", fix="run the same command again: it resumes")
