"""A registry in memory, for tests of what uses one. `test_contract.py` holds it to what the real one does."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from sora.core.errors import InputError, PromotionFailed
from sora.core.ledger import Recorded, parse
from sora.core.records import EvalReport, Recipe, Tried
from sora.registry import JudgedRun, RunStatus, Smoke


@dataclass
class FakeRun:
    status: str = "RUNNING"
    tags: dict[str, str] = field(default_factory=dict)
    metrics: dict[str, float] = field(default_factory=dict)
    state: dict[str, Any] = field(default_factory=dict)
    files: dict[str, bytes] = field(default_factory=dict)


@dataclass
class FakeVersion:
    run_id: str
    content: bytes
    recipe: Recipe
    decision: str = "pending"
    reasons: tuple[str, ...] = ()


class FakeRuns:
    def __init__(self) -> None:
        self.all: dict[str, FakeRun] = {}
        self._numbers = itertools.count(1)

    def start_run(
        self, run_name: str = "", *, params: Mapping[str, Any] | None = None, tags: Mapping[str, str] | None = None
    ) -> str:
        run_id = f"{next(self._numbers):032x}"
        self.all[run_id] = FakeRun(tags=dict(tags or {}))
        return run_id

    def log_candidates(self, run_id: str, tried: Sequence[Tried]) -> None:
        for one in tried:
            self.all[f"{run_id}-{one.name}"] = FakeRun(metrics={"held_out/accuracy": one.accuracy})

    def resume(self, run_id: str) -> None:
        if run_id not in self.all:
            raise InputError(f"MLflow has no run {run_id}")
        self.all[run_id].status = "RUNNING"

    def finish(self, run_id: str, status: RunStatus = "FINISHED") -> None:
        self.all[run_id].status = status

    def log_metrics(self, run_id: str, metrics: Mapping[str, float], step: int = 0) -> None:
        self.all[run_id].metrics.update(metrics)

    @contextmanager
    def system_metrics(self, run_id: str, interval: float = 10.0) -> Iterator[None]:
        yield

    def set_tags(self, run_id: str, tags: Mapping[str, str]) -> None:
        self.all[run_id].tags.update(tags)

    def own_tags(self, limit: int) -> list[dict[str, str]]:
        return [dict(run.tags) for run in list(self.all.values())[::-1][:limit]]

    def log_text(self, run_id: str, name: str, text: str) -> None:
        self.all[run_id].files[name] = text.encode()

    def log_path(self, run_id: str, path: Path, under: str = "") -> None:
        files = [path] if path.is_file() else sorted(file for file in path.rglob("*") if file.is_file())
        for file in files:
            name = file.name if path.is_file() else file.relative_to(path).as_posix()
            self.all[run_id].files[f"{under}/{name}" if under else name] = file.read_bytes()

    def fetch_file(self, run_id: str, name: str, target: Path) -> str:
        content = self.all[run_id].files[name]
        target.write_bytes(content)
        return hashlib.sha256(content).hexdigest()

    def flush(self, run_id: str) -> None:
        pass

    def log_dataset(
        self, run_id: str, *, data_version: str, counts: Mapping[str, int], source: str, context: str = "training"
    ) -> None:
        pass

    def log_state(self, run_id: str, state: Mapping[str, Any]) -> None:
        self.all[run_id].state = dict(state)

    def run_page(self, run_id: str) -> str:
        return f"http://fake/#/experiments/1/runs/{run_id}"


class FakeRegistry:
    """`recovered` counts the calls of `recover`; nothing here can be left half done."""

    def __init__(self) -> None:
        self.tracking_uri = "http://fake"
        self.runs = FakeRuns()
        self.known: dict[int, FakeVersion] = {}
        self.recovered = 0
        self._champion: int | None = None

    def register(
        self,
        run_id: str,
        model_file: Path,
        recipe: Recipe,
        reports: EvalReport | Mapping[str, EvalReport],
        data_version: str,
    ) -> int:
        content = model_file.read_bytes()
        digest = hashlib.sha256(content).hexdigest()
        if recipe.model_sha256 not in ("", digest):
            raise InputError(f"the recipe is for a model with sha256 {recipe.model_sha256}")
        for number, there in self.known.items():
            if (there.run_id, there.content) == (run_id, content):
                return number
        number = len(self.known) + 1
        self.known[number] = FakeVersion(run_id, content, replace(recipe, model_sha256=digest))
        self.runs.set_tags(run_id, {"version": str(number)})
        return number

    def set_decision(self, version: int, decision: str, reasons: Sequence[str]) -> None:
        one = self._version(version)
        one.decision, one.reasons = decision, tuple(reasons)
        if decision in ("promoted", "refused"):
            self.runs.set_tags(one.run_id, {"decision": decision, "judged": "true"})

    def fetch(self, version: int, cache: Path) -> tuple[Path, Recipe]:
        one = self._version(version)
        file = cache / one.recipe.model_sha256 / "model.keras"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(one.content)
        return file, one.recipe

    def was_rolled_back(self, version: int) -> bool:
        return self._version(version).decision == "rolled_back"

    def champion(self) -> int | None:
        return self._champion

    def promote(
        self, version: int, *, cache: Path, smoke: Smoke, reason: str = "", by: str = ""
    ) -> dict[str, int | None]:
        file, recipe = self.fetch(version, cache)
        before = self._champion
        if version != before:
            self._champion = version
            try:
                smoke(file, recipe)
            except BaseException as error:
                self._champion = before
                if not isinstance(error, Exception):
                    raise
                raise PromotionFailed(f"version {version} failed its smoke test: {error}") from error
        return {"champion": self._champion, "previous": before}

    def recover(self) -> bool:
        self.recovered += 1
        return False

    def last_judged(self) -> JudgedRun | None:
        for run_id, run in self._judged():
            metrics = {name: value for name, value in run.metrics.items() if name.startswith("test/")}
            version = int(run.tags["version"]) if "version" in run.tags else None
            return JudgedRun(run_id, version, metrics, dict(run.tags))
        return None

    def judged_ledger(self) -> Recorded | None:
        for run_id, run in self._judged():
            try:
                rows = parse(run.state["splits.csv"].encode(), "splits.csv")
            except (KeyError, InputError):
                continue
            return Recorded(run_id, int(run.tags["version"]), tuple(rows))
        return None

    def times_judged(self, test_digest: str) -> int:
        if not test_digest.isalnum():
            raise InputError(f"{test_digest!r} is not a digest")
        return sum(run.tags.get("test_digest") == test_digest for _, run in self._judged())

    def _judged(self) -> list[tuple[str, FakeRun]]:
        return [one for one in reversed(self.runs.all.items()) if one[1].tags.get("judged") == "true"]

    def _version(self, version: int) -> FakeVersion:
        if version not in self.known:
            raise InputError(f"there is no version {version}")
        return self.known[version]
