"""What the benchmarks share: projects over real footage, peak memory of a process tree, tables and JSON."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import subprocess
import sys
import threading
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import yaml

REPOSITORY = Path(__file__).resolve().parent.parent
RESULTS = REPOSITORY / "benchmarks" / "results"
IMAGES = REPOSITORY / "docs" / "images"
SHARED = REPOSITORY.parent / "shared" / "data"
SORA = [sys.executable, "-m", "sora.cli"]


@dataclass
class Done:
    """One command: seconds of wall clock, peak anonymous memory of its tree in bytes (0: not watched), its output."""

    seconds: float
    peak: int
    code: int
    out: str
    err: str = field(repr=False, default="")

    def json(self) -> Any:
        return json.loads(self.out)


def timed(command: Sequence[str], cwd: Path, *, ok: Iterable[int] = (0,), memory: bool = False, **env: str) -> Done:
    """Runs a command; with `memory` samples its tree's each 50 ms (RssAnon: mapped shard files are not counted).

    Sampling takes a core's time in proportion to the processes that run, so what is timed is not sampled.
    """
    began = time.perf_counter()
    child = subprocess.Popen(
        list(command), cwd=cwd, env={**os.environ, **env}, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    peak = 0

    def watch() -> None:
        nonlocal peak
        while child.poll() is None:
            peak = max(peak, anonymous_bytes(child.pid))
            time.sleep(0.05)

    watcher = threading.Thread(target=watch, daemon=True)
    if memory:
        watcher.start()
    out, err = child.communicate()
    seconds = time.perf_counter() - began
    if memory:
        watcher.join()
    if child.returncode not in ok:
        raise SystemExit(f"{' '.join(command)} ended with {child.returncode}\n{err[-3000:]}")
    return Done(seconds, peak, child.returncode, out, err)


def anonymous_bytes(pid: int) -> int:
    """Anonymous resident memory of a process and its descendants."""
    total = 0
    try:
        tree = [pid, *(child.pid for child in psutil.Process(pid).children(recursive=True))]
    except psutil.Error:
        return 0
    for one in tree:
        try:
            for line in Path(f"/proc/{one}/status").read_text().splitlines():
                if line.startswith("RssAnon:"):
                    total += int(line.split()[1]) * 1024
        except OSError:
            continue
    return total


def change_params(project: Path, **sections: dict[str, Any]) -> None:
    """Sets values in params.yaml: change_params(p, train={"epochs": 3})."""
    path = project / "params.yaml"
    value = yaml.safe_load(path.read_text(encoding="utf-8"))
    for section, changes in sections.items():
        if isinstance(changes, dict):
            value[section] = {**(value.get(section) or {}), **changes}
        else:
            value[section] = changes
    path.write_text(yaml.safe_dump(value, sort_keys=False, allow_unicode=True), encoding="utf-8")


def table(title: str, rows: list[dict[str, Any]]) -> None:
    """Prints a Markdown table."""
    names = list(rows[0])
    print(f"\n{title}\n")
    print("| " + " | ".join(names) + " |")
    print("|" + "---|" * len(names))
    for row in rows:
        print("| " + " | ".join(f"{v:.3g}" if isinstance(v, float) else str(v) for v in row.values()) + " |")


def write(name: str, value: Any, folder: Path = RESULTS) -> None:
    """FOLDER/NAME.json, with the machine in words."""
    folder.mkdir(parents=True, exist_ok=True)
    machine = {"cores": os.cpu_count(), "system": platform.system(), "python": platform.python_version()}
    (folder / f"{name}.json").write_text(json.dumps({"machine": machine, "result": value}, indent=1) + "\n")


def tree_of(earlier: str, target: Path, *paths: str) -> Path:
    """The files of an earlier commit of this repository (below `paths`; all without) in the new folder `target`."""
    target.mkdir()
    packed = subprocess.run(["git", "-C", str(REPOSITORY), "archive", earlier, *paths], check=True, capture_output=True)
    subprocess.run(["tar", "-x", "-C", str(target)], input=packed.stdout, check=True)
    return target


def commit(repository: Path) -> str:
    """HEAD; with `+` and a digest of the package's code where that differs from HEAD's, or where there is no git."""
    git = ["git", "-C", str(repository)]
    head = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True)
    changed = subprocess.run([*git, "status", "--porcelain", "--", "sora"], capture_output=True, text=True)
    if not head.returncode and not changed.stdout.strip():
        return head.stdout.strip()
    code = hashlib.sha256()
    for file in sorted((repository / "sora").rglob("*.py")):
        code.update(f"\0{file.relative_to(repository)}\0".encode() + file.read_bytes())
    return f"{head.stdout.strip() or 'no-git'}+{code.hexdigest()[:12]}"
