"""MLflow, Prefect or the DVC remote does not answer, or answers 500: for a while, or until the command gives up."""

from __future__ import annotations

import http.server
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest

from benchmarks.faults.inject import proxied, until
from benchmarks.faults.processes import Case, Verb
from benchmarks.faults.proxy import Mode, Proxy
from benchmarks.faults.scenes import LIMIT, Scenes, case_of
from sora.config import Project
from sora.dataset import versioning
from tests.faults.conftest import holds, runs, speaks

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


@pytest.fixture(scope="module")
def behind(scenes: Scenes, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Case, dict[str, Proxy]]]:
    """A project whose servers are up, each behind a proxy."""
    with case_of(scenes, "fitted", tmp_path_factory.mktemp("away") / "case") as case, proxied(case) as proxies:
        yield case, proxies


@pytest.mark.parametrize("mode", ["away", "failing"])
@pytest.mark.parametrize("name", ["mlflow", "prefect"])
def test_for_a_while(behind: tuple[Case, dict[str, Proxy]], scenes: Scenes, name: str, mode: Mode) -> None:
    """Some seconds in the middle of a run: it goes on, or it ends in words."""
    case, proxies = behind
    with Verb(case, "run", "--json") as verb:
        until(verb, 0.4 * scenes.seconds["fitted"])
        proxies[name].turn(mode)
        until(verb, 4.0, since=time.monotonic())
        proxies[name].turn("pass")
        verb.wait(LIMIT)
    speaks(verb)


@pytest.mark.parametrize("mode", ["away", "failing"])
@pytest.mark.parametrize("name", ["mlflow", "prefect"])
def test_from_the_start(behind: tuple[Case, dict[str, Proxy]], name: str, mode: Mode) -> None:
    """It ends within a minute or so, with a message."""
    case, proxies = behind
    proxies[name].turn(mode)
    try:
        with Verb(case, "run", "--json") as verb:
            assert verb.wait(150) == 3, verb.err[-2000:]
        speaks(verb)
    finally:
        proxies[name].turn("pass")


def test_all_is_well_after(behind: tuple[Case, dict[str, Proxy]]) -> None:
    """Last of these."""
    case, _ = behind
    runs(case)
    with case.inside():
        from sora.runtime.lifecycle import open_registry

        with open_registry(Project(case.root)) as registry:
            assert registry.champion() is not None
            assert "RUNNING" not in {run["info"]["status"] for run in registry.runs.search_runs()}


class _Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_: object) -> None:
        pass


@pytest.mark.parametrize("mode", ["away", "failing"])
def test_the_remote(case: Callable[[str], Case], tmp_path: Path, mode: Mode) -> None:
    """A clone has no data: it comes from the remote, or the run says that it does not, and comes once it is back."""
    here = case("unchanged")
    with here.inside():
        versioning.push(Project(here.root))
    store = here.root / ".dvc-remote"
    shutil.move(store, here.folder / "store")
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), partial(_Quiet, directory=str(here.folder / "store")))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        with Proxy(f"http://127.0.0.1:{server.server_address[1]}") as proxy:
            dvc = [sys.executable, "-m", "dvc", "remote", "modify", "local", "url", proxy.url]
            subprocess.run(dvc, cwd=here.root, env=here.environment(), check=True, capture_output=True)
            for lost in (here.root / "data", here.root / ".dvc" / "cache"):
                shutil.rmtree(lost)
            proxy.turn(mode)
            with Verb(here, "run", "--json") as verb:
                assert verb.wait(LIMIT) == 3, verb.err[-2000:]
            speaks(verb)
            assert not (here.root / "data").exists() or not any((here.root / "data").rglob("*.mp4"))
            proxy.turn("pass")
            runs(here)
            holds(here)
    finally:
        server.shutdown()
        server.server_close()
