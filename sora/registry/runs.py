"""Runs: one training, its data and its machine, as MLflow shows them."""

from __future__ import annotations

import getpass
import json
import math
import os
import platform
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from importlib.metadata import distributions
from pathlib import Path
from typing import Any, Literal

from sora.core.errors import InputError, ServiceError
from sora.core.files import temporary_folder
from sora.core.records import Tried
from sora.registry.live import MetricBuffer, system_metrics
from sora.registry.rest import NotFound, Rest

RunStatus = Literal["FINISHED", "FAILED", "KILLED"]
STATE_FOLDER = "state"
_FACTS = "state.json"  # the parts of the state that are not files: git commit, dirty
_PARAMS = 100  # that MLflow accepts in one request
_PARAM_CHARS = 6000
_TAG_CHARS = 8000
_OWN = "sora."  # prefix of Sora's own tags
_OWN_NAMES = {"git_commit": "mlflow.source.git.commit"}  # tags for which MLflow has its own name
_NOT_IN_NAMES = re.compile(r"[^\w.\- /:]")  # MLflow refuses these in names of metrics and parameters


class Runs:
    """The runs of one experiment, which is created with the first run.

    Tags without a dot in their name are Sora's and stored as `sora.<name>`.

    Args:
        rest: the MLflow server.
        name: the experiment's name.

    Raises (every method):
        ServiceError: MLflow does not answer, or refuses. `log_metrics` keeps what it could not send.
    """

    def __init__(self, rest: Rest, name: str) -> None:
        self.name = name
        self._rest = rest
        self._metrics = MetricBuffer(rest)
        self._experiment: str | None = None
        self._roots: dict[str, str] = {}  # run → its artifact root

    def experiment_id(self) -> str:
        """MLflow's number of the experiment; it is created if there is none."""
        if self._experiment is None:
            existing = self._find_experiment()
            created = existing or self._rest.post("experiments/create", {"name": self.name})["experiment_id"]
            self._experiment = str(created)
        return self._experiment

    def start_run(
        self, run_name: str = "", *, params: Mapping[str, Any] | None = None, tags: Mapping[str, str] | None = None
    ) -> str:
        """Starts a run and returns its id. The environment (Python, machine, every installed package) is stored with
        it; MLflow has its own tag for `git_commit`."""
        labels = {"mlflow.user": user(), "mlflow.source.type": "LOCAL", "mlflow.source.name": "sora run"}
        body = {
            "experiment_id": self.experiment_id(),
            "start_time": _now(),
            "tags": _tags({**labels, **(tags or {})}),
            **({"run_name": run_name} if run_name else {}),
        }
        run_id = str(self._rest.post("runs/create", body)["run"]["info"]["run_id"])
        self.log_text(run_id, "environment.json", json.dumps(_environment(), indent=1))
        self.log_params(run_id, params or {})
        return run_id

    def resume(self, run_id: str) -> None:
        """Marks a run that was interrupted as running again.

        Raises:
            InputError: MLflow has no such run.
        """
        try:
            self._rest.post("runs/update", {"run_id": run_id, "status": "RUNNING"})
        except NotFound as error:
            raise InputError(f"MLflow has no run {run_id}", fix="start a new one: `sora run`") from error

    def finish(self, run_id: str, status: RunStatus = "FINISHED") -> None:
        """Sends the kept metrics and ends the run.

        Raises:
            ServiceError: metrics could not be stored. The run's results are still on disk: the same command resumes.
        """
        try:
            self._metrics.flush(run_id)
        except ServiceError as error:
            raise ServiceError(
                f"the run's metrics could not be stored: {error.message}",
                fix="start MLflow again and repeat the command: the trained model is kept and reused",
            ) from error
        self._rest.post("runs/update", {"run_id": run_id, "status": status, "end_time": _now()})

    def log_params(self, run_id: str, params: Mapping[str, Any]) -> None:
        """Stores parameters; nested ones get dotted names (`train.epochs`)."""
        flat = [
            {"key": _name(key), "value": str(value)[:_PARAM_CHARS]} for key, value in _flat(params) if str(value) != ""
        ]
        for start in range(0, len(flat), _PARAMS):
            self._rest.post("runs/log-batch", {"run_id": run_id, "params": flat[start : start + _PARAMS]})

    def log_metrics(self, run_id: str, metrics: Mapping[str, float], step: int = 0) -> None:
        """Stores metrics of one step. Raises nothing while MLflow is away: they are kept and sent later."""
        now = _now()
        batch = [
            {"key": _name(key), "value": _number(value), "timestamp": now, "step": step}
            for key, value in metrics.items()
        ]
        self._metrics.add(run_id, batch)

    def system_metrics(self, run_id: str, interval: float = 10.0) -> AbstractContextManager[None]:
        """While it is open: logs this machine's processor, memory, disk and GPUs every `interval` seconds."""
        return system_metrics(lambda values, step: self.log_metrics(run_id, values, step), interval)

    def set_tags(self, run_id: str, tags: Mapping[str, str]) -> None:
        self._rest.post("runs/log-batch", {"run_id": run_id, "tags": _tags(tags)})

    def log_text(self, run_id: str, name: str, text: str) -> None:
        """Stores a text as the artifact `name`."""
        with temporary_folder("text") as folder:
            file = folder / "text"
            file.write_text(text, encoding="utf-8")
            self._rest.upload(self._root(run_id), name, file)

    def log_path(self, run_id: str, path: Path, under: str = "") -> None:
        """Stores a file, or every file below a folder (plots, pages, reports), as artifacts below `under`."""
        files = [path] if path.is_file() else sorted(file for file in path.rglob("*") if file.is_file())
        for file in files:
            name = file.name if path.is_file() else file.relative_to(path).as_posix()
            self._rest.upload(self._root(run_id), f"{under}/{name}" if under else name, file)

    def fetch_file(self, run_id: str, name: str, target: Path) -> str:
        """Fetches the artifact `name` into the file `target`; returns the sha256 of what arrived."""
        return self._rest.download(self._root(run_id), name, target)

    def flush(self, run_id: str) -> None:
        """Sends the kept metrics without ending the run.

        Raises:
            ServiceError: MLflow does not accept them; they stay kept.
        """
        self._metrics.flush(run_id)

    def log_dataset(
        self, run_id: str, *, data_version: str, counts: Mapping[str, int], source: str, context: str = "training"
    ) -> None:
        """Stores the data as an input of the run: its DVC hash as the digest, its place, videos of each class."""
        dataset = {
            "name": "data",
            "digest": data_version[:36],  # the most that MLflow accepts; an md5 has 32
            "source_type": "dvc",
            "source": json.dumps({"uri": source}),
            "profile": json.dumps({"num_rows": sum(counts.values()), "videos": dict(counts)}, ensure_ascii=False),
        }
        tags = [{"key": "mlflow.data.context", "value": context}]
        self._rest.post("runs/log-inputs", {"run_id": run_id, "datasets": [{"tags": tags, "dataset": dataset}]})

    def run_page(self, run_id: str) -> str:
        """The address of the run's page."""
        return f"{self._rest.uri}/#/experiments/{self.experiment_id()}/runs/{run_id}"

    def log_state(self, run_id: str, state: Mapping[str, Any]) -> None:
        """Stores what restores a version: texts under a file's name (`data.dvc`, `params.yaml`, …) as files of their
        own, everything else (git commit, dirty) in one JSON file."""
        for key, value in state.items():
            if _is_file(key, value):
                self.log_text(run_id, f"{STATE_FOLDER}/{key}", value)
        facts = {key: value for key, value in state.items() if not _is_file(key, value)}
        self.log_text(run_id, f"{STATE_FOLDER}/{_FACTS}", json.dumps(facts))

    def run_state(self, run_id: str, only: str = "") -> dict[str, Any]:
        """What `log_state` stored; `only`: just this file.

        Raises:
            InputError: the run has none.
        """
        root = self._root(run_id)
        names = [path.rsplit("/", 1)[-1] for path in self._rest.names(root, STATE_FOLDER)]
        if _FACTS not in names:
            raise InputError(f"run {run_id} has no stored state", fix="choose a version that a full `sora run` made")
        wanted = [name for name in names if only in ("", name) or name == _FACTS]
        texts = {name: self._rest.text(root, f"{STATE_FOLDER}/{name}") for name in wanted}
        return {**json.loads(texts.pop(_FACTS)), **texts}

    def search_runs(self, filter_string: str = "", limit: int | None = None) -> Iterator[dict[str, Any]]:
        """Runs of the experiment, newest first, as MLflow describes them."""
        experiment = self._find_experiment()
        if experiment is None:
            return
        query = {
            "experiment_ids": [experiment],
            "filter": filter_string,
            "order_by": ["attributes.start_time DESC"],
            "max_results": min(limit or 1000, 1000),
        }
        for number, run in enumerate(self._rest.pages("POST", "runs/search", "runs", query)):
            if limit is not None and number >= limit:
                return
            yield run

    def log_candidates(self, run_id: str, tried: Sequence[Tried]) -> None:
        """Stores what a search compared as finished child runs: no judged runs, since they have none of Sora's tags."""
        for one in tried:
            body = {
                "experiment_id": self.experiment_id(),
                "start_time": _now(),
                "run_name": f"tried: {one.name}",
                "tags": _tags({"mlflow.user": user(), "mlflow.parentRunId": run_id}),
            }
            child = str(self._rest.post("runs/create", body)["run"]["info"]["run_id"])
            self.log_params(child, {"candidate": one.name, "chosen": one.chosen, **one.settings})
            names = ("accuracy", "low", "high", "log_loss", "videos", "seconds")
            self.log_metrics(child, {f"held_out/{name}": getattr(one, name) for name in names})
            self.finish(child)

    def own_tags(self, limit: int) -> list[dict[str, str]]:
        """Sora's tags (their names without `sora.`) of the newest runs, newest first."""
        return [own_tags(run) for run in self.search_runs(limit=limit)]

    def _find_experiment(self) -> str | None:
        if self._experiment is not None:
            return self._experiment
        try:
            experiment = self._rest.get("experiments/get-by-name", experiment_name=self.name)["experiment"]
        except NotFound:
            return None
        if experiment.get("lifecycle_stage") == "deleted":
            raise ServiceError(
                f"MLflow's experiment {self.name!r} was deleted",
                fix=f"restore it: mlflow experiments restore -x {experiment['experiment_id']}",
            )
        self._experiment = str(experiment["experiment_id"])
        return self._experiment

    def _root(self, run_id: str) -> str:
        if run_id not in self._roots:
            self._roots[run_id] = self._rest.get("runs/get", run_id=run_id)["run"]["info"]["artifact_uri"]
        return self._roots[run_id]


def tags_of(item: Mapping[str, Any]) -> dict[str, str]:
    """MLflow's list of {key, value} under "tags" as a dictionary."""
    return {tag["key"]: tag.get("value", "") for tag in item.get("tags", [])}


def own_tags(run: Mapping[str, Any]) -> dict[str, str]:
    """Sora's tags of a run as MLflow describes it; their names without `sora.`."""
    tags = tags_of(run["data"])
    return {key.removeprefix(_OWN): value for key, value in tags.items() if key.startswith(_OWN)}


def _now() -> int:
    return time.time_ns() // 1_000_000


def user() -> str:
    """The user who runs this."""
    try:
        return getpass.getuser()
    except (OSError, KeyError):  # a container without a passwd entry
        return str(os.getuid())


def _tags(tags: Mapping[str, str]) -> list[dict[str, str]]:
    named = {_OWN_NAMES.get(key, key if "." in key else f"{_OWN}{key}"): value for key, value in tags.items()}
    return [{"key": key, "value": str(value)[:_TAG_CHARS]} for key, value in named.items()]


def _name(name: str) -> str:
    return _NOT_IN_NAMES.sub("_", name)[:250]


def _number(value: float) -> float | str:
    number = float(value)
    if math.isfinite(number):
        return number
    return "NaN" if math.isnan(number) else ("Infinity" if number > 0 else "-Infinity")  # JSON has no such numbers


def _flat(params: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, object]]:
    for key, value in params.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _is_file(key: str, value: object) -> bool:
    return isinstance(value, str) and "." in key and "/" not in key and key != _FACTS


def _environment() -> dict[str, Any]:
    packages = {one.metadata["Name"]: one.version for one in distributions() if one.metadata["Name"]}
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "processors": os.cpu_count(),
        "packages": dict(sorted(packages.items(), key=lambda item: item[0].lower())),
    }
