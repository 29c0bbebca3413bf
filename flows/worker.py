"""The worker of a project: registers its deployments, then runs what is due. `python -m flows.worker [PROJECT]`.

It becomes Prefect's own worker (the same process), so whoever started it watches and ends the worker itself.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

from sora.config import find_project
from sora.core.errors import InputError, SoraError
from sora.core.progress import say


def main() -> int:
    """Never returns if all goes well. Arguments after the project go to Prefect (`--with-healthcheck`)."""
    try:
        project = find_project(Path(sys.argv[1] if len(sys.argv) > 1 else "."))
        address = os.environ.get("PREFECT_API_URL")
        if not address:
            raise InputError("PREFECT_API_URL is not set", fix="set it to the address of the Prefect server's API")
        from flows.deployments import register

        pool = register(project, address).pool
    except SoraError as error:
        say(str(error))
        return error.exit_code
    command = [sys.executable, "-m", "prefect", "worker", "start", "--pool", pool, "--type", "process", *sys.argv[2:]]
    os.execv(sys.executable, command)


if __name__ == "__main__":
    sys.exit(main())
