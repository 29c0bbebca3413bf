"""A real server for tests: `python -m tests.serving.standing FOLDER '{"port": …, …}'` (keys of the section `serve`).

Its registry is the folder FOLDER/registry (a `ModelCache`), so a test moves the champion by writing there. Its tokens
are those of SORA_API_TOKEN and of FOLDER/tokens.json. Where FOLDER/project is a project, it takes corrections for it.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx

from sora.config import Project, Serve
from sora.core.processes import start_child
from sora.dataset.corrections import Inbox
from sora.serving.source import ModelCache


def main() -> None:
    import logging

    from sora.serving.app import create_app
    from sora.serving.listener import listen, serve_until_stopped
    from sora.serving.tokens import TokenFile, Tokens

    logging.basicConfig(stream=sys.stderr, level=logging.INFO)
    folder = Path(sys.argv[1])
    settings = Serve(**json.loads(sys.argv[2]))
    tokens = Tokens(os.environ.get("SORA_API_TOKEN", "").split(), TokenFile(folder / "tokens.json"))
    project = Project(folder / "project")
    inbox = Inbox(project, settings.inbox_files, settings.inbox_bytes) if project.params_file.is_file() else None
    registry, cache = ModelCache(folder / "registry"), ModelCache(folder / "cache")
    app = create_app(settings, registry, cache, tokens=tokens, inbox=inbox)
    serve_until_stopped(app, listen("127.0.0.1", settings.port))


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextmanager
def standing(folder: Path, *, env: dict[str, str] | None = None, **settings: Any) -> Iterator[Standing]:
    """A server over FOLDER/registry; its temporary files lie in FOLDER/tmp."""
    port = free_port()
    (folder / "tmp").mkdir(exist_ok=True, parents=True)
    environment = {**os.environ, "TMPDIR": str(folder / "tmp"), "TF_CPP_MIN_LOG_LEVEL": "3", **(env or {})}
    with (folder / "server.log").open("ab") as log:
        child = start_child(
            [sys.executable, "-m", "tests.serving.standing", str(folder), json.dumps({"port": port, **settings})],
            env=environment, stdout=log, stderr=log,
        )  # fmt: skip
    try:
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60, trust_env=False) as client:
            yield Standing(child, client, folder)
    finally:
        child.terminate()
        try:
            child.wait(20)
        except subprocess.TimeoutExpired:
            child.kill()
            child.wait()


class Standing:
    def __init__(self, process: subprocess.Popen[bytes], client: httpx.Client, folder: Path) -> None:
        self.process, self.client, self.folder = process, client, folder

    @property
    def port(self) -> int:
        return int(self.client.base_url.port or 0)

    def until(self, condition: Callable[..., object], seconds: float = 90) -> None:
        """Waits until `condition()` is true; connection errors count as false."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            assert self.process.poll() is None, self.log()
            try:
                if condition():
                    return
            except httpx.TransportError:
                pass
            time.sleep(0.05)
        raise AssertionError(f"not within {seconds} s\n{self.log()}")

    def until_ready(self) -> None:
        self.until(lambda: self.client.get("/readyz").status_code == 200)

    def send(self, path: Path, name: str | None = None, **options: Any) -> httpx.Response:
        with path.open("rb") as stream:
            return self.client.post("/v1/predict", files={"file": (name or path.name, stream)}, **options)

    def log(self) -> str:
        return (self.folder / "server.log").read_text(encoding="utf-8", errors="replace")[-3000:]

    def leftovers(self) -> list[Path]:
        return list((self.folder / "tmp").glob("sora-tmp-uploads-*/*"))


if __name__ == "__main__":
    main()
