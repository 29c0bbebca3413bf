"""The same model and clip behind other servers: `python -m benchmarks.serving.peers [--project DIR]`.

- `mlflow models serve` of the registered version, asked with the decoded clip as JSON: it takes no videos.
- LitServe with Sora's decoding and model in its workers (`benchmarks.serving.litserve`), by 1 and by 2 workers. It is
  not in the lock: `.venv/bin/python -m pip install --no-deps --target .peers litserve==0.2.19 pyzmq`.

16 clients each, in rounds that take turns: one server runs at a time.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path
from statistics import median

from benchmarks import common
from benchmarks.common import table
from benchmarks.serving.served import (
    CLIENTS,
    arguments,
    champion_files,
    clip_file,
    load,
    rate,
    serving,
    settled,
    workplace,
)
from sora.config import Project
from sora.core.records import Recipe
from sora.media.video.transform import prepare_clips

PEERS = common.REPOSITORY / ".peers"
# MLflow's scoring server knows nothing of Sora's layers; registering them is all that this adds to it.
REGISTER = "import sora.model.classifier\n"


@contextmanager
def process(command: list[str], address: str, log: Path, **env: str) -> Iterator[str]:
    """A server until the block ends; yields its address when it answers."""
    with log.open("w") as stream:
        child = subprocess.Popen(
            command, env={**os.environ, "TF_CPP_MIN_LOG_LEVEL": "3", **env}, stdout=stream, stderr=stream,
            start_new_session=True,
        )  # fmt: skip
    try:
        end = time.monotonic() + 180
        while not answers(address):
            if child.poll() is not None or time.monotonic() > end:
                raise SystemExit(f"{' '.join(command)} does not answer:\n{log.read_text()[-3000:]}")
            time.sleep(0.5)
        yield address
    finally:
        with suppress(ProcessLookupError):
            os.killpg(child.pid, signal.SIGTERM)
        try:
            child.wait(30)
        except subprocess.TimeoutExpired:
            os.killpg(child.pid, signal.SIGKILL)
            child.wait()


def answers(address: str) -> bool:
    try:
        with urllib.request.urlopen(f"{address}/health", timeout=5) as answer:
            return bool(answer.status == 200)
    except OSError:
        return False


def measured(address: str, file: Path, seconds: float, *options: str) -> float:
    """Requests a second by 16 clients, after a few to warm up."""
    load(address, file, "--clients", "4", "--requests", "8", *options)
    return rate(load(address, file, "--clients", str(CLIENTS), "--seconds", str(seconds), *options))


def main() -> None:
    options = arguments(__doc__)
    options.add_argument("--rounds", type=int, default=3)
    options.add_argument("--seconds", type=float, default=15)
    given = options.parse_args()
    with workplace(given.project) as (place, project):
        video = clip_file(project)
        with serving(project, place / "serve.log") as server:  # fills the cache
            server.until_ready()
        model, recipe_file = champion_files(project)
        recipe = Recipe.from_dict(json.loads(recipe_file.read_text(encoding="utf-8")))
        clip = place / "clip.json"
        clip.write_text(json.dumps({"inputs": prepare_clips(video, recipe.clip)[:1].tolist()}))
        (place / "sitecustomize.py").write_text(REGISTER)
        registered = place / "registered"
        export(project, registered)

        def sora() -> float:
            with settled(project, place / "serve.log") as server:
                return measured(server.address, video, given.seconds)

        def mlflow() -> float:
            command = [sys.executable, "-m", "mlflow", "models", "serve", "-m", str(registered), "-p", "5199"]
            path = os.pathsep.join([str(place), *filter(None, [os.environ.get("PYTHONPATH")])])
            tools = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])  # it calls uvicorn by name
            with process(
                [*command, "--env-manager", "local"],
                "http://127.0.0.1:5199",
                place / "mlflow.log",
                PYTHONPATH=path,
                PATH=tools,
            ) as address:
                return measured(address, clip, given.seconds, "--path", "/invocations", "--json-body")

        def litserve(workers: int) -> Callable[[], float]:
            def run() -> float:
                path = os.pathsep.join([*filter(None, [os.environ.get("PYTHONPATH")]), str(PEERS)])
                command = [sys.executable, "-m", "benchmarks.serving.litserve", str(model), str(recipe_file), "5198"]
                started: AbstractContextManager[str] = process(
                    [*command, str(workers)], "http://127.0.0.1:5198", place / "litserve.log", PYTHONPATH=path
                )
                with started as address:
                    return measured(address, video, given.seconds)

            return run

        servers: dict[str, Callable[[], float]] = {"sora": sora, "mlflow models serve": mlflow}
        if PEERS.is_dir():
            servers |= {f"LitServe, {workers} workers": litserve(workers) for workers in (1, 2)}
        else:
            print(f"{PEERS} is absent: without LitServe")
        found: dict[str, list[float]] = {which: [] for which in servers}
        for _ in range(given.rounds):
            for which, measure in servers.items():
                found[which].append(measure())
                print(json.dumps({which: found[which][-1]}), flush=True)
    table(
        f"{CLIENTS} clients, requests/s, 2 cores",
        [
            {
                "server": which,
                "median of the rounds": median(rates),
                "Sora's, ×": median(own / other for own, other in zip(found["sora"], rates, strict=True)),
            }
            for which, rates in found.items()
        ],
    )
    common.write("serving_peers", found)


def export(project: Path, folder: Path) -> None:
    """The champion's folder, as MLflow keeps it."""
    import mlflow

    from sora.runtime.lifecycle import open_registry

    home = Project(project)
    with open_registry(home):
        from sora.operations.servers import login, running

        own = login(home, "mlflow")
        assert own is not None
        os.environ["MLFLOW_TRACKING_USERNAME"], os.environ["MLFLOW_TRACKING_PASSWORD"] = own.pair
        mlflow.set_tracking_uri(running(home)["mlflow"].url)
        mlflow.artifacts.download_artifacts(f"models:/{home.settings().name}@champion", dst_path=str(folder))


if __name__ == "__main__":
    main()
