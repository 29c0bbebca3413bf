"""Looking whether a run is active does not get in the way of one that starts."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from sora.config import Project
from sora.operations.lock import run_lock

_LOOK = """
import sys
from pathlib import Path
from sora.operations.lock import holder
from sora.config import Project
print("looking", flush=True)
while True:
    holder(Project(Path(sys.argv[1])))
"""


def test_doctors_look_cancels_no_nightly(tmp_path: Path) -> None:
    project = Project(tmp_path)
    with run_lock(project):
        pass
    command = [sys.executable, "-c", _LOOK, str(tmp_path)]
    lookers = [subprocess.Popen(command, stdout=subprocess.PIPE) for _ in range(2)]
    try:
        for looker in lookers:
            assert looker.stdout is not None and looker.stdout.readline()
        for _ in range(800):
            with run_lock(project):
                pass
    finally:
        for looker in lookers:
            looker.kill()
            looker.wait()
            assert looker.stdout is not None
            looker.stdout.close()
