"""The night's cycle and its notes, with plain steps and a registry in memory: no Prefect, no server, no training."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest

from flows import cycle, steps
from flows.records import Case, Evaluation, Night, NightResult, RunKey, SplitFacts
from flows.work import DOUBTS, EVALUATED, FIT, JUDGE, REGISTER, RUN, SPLITS, Evaluated, Work
from sora.config import Project
from sora.core.errors import ServiceError
from sora.core.ledger import Recorded
from sora.core.records import Decision, Recipe
from sora.judging.evaluation import EvalOutcome
from sora.learning.jobs import TrainResult
from sora.registry import Smoke
from tests.registry.conftest import answers, fails, recipe, report
from tests.registry.fake import FakeRegistry

FACTS = SplitFacts(6, 1, 3, 1, 1, {"a": 3, "b": 2}, "digest", "ab12")
LEDGER = f"sha256,split,group\n{1:064x},train,\n"
FITTED = TrainResult("model.keras", 1, 2, [{"loss": 1.0}], 3.0, 4.0, 5, 0)


class Played:
    """Steps that need neither data nor a child process; `calls` tells which ran."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.calls: list[str] = []
        self.facts = FACTS
        self.promote = True
        self.smoke: Smoke = answers
        self.broken = ""  # the step that fails

    def _call(self, name: str) -> None:
        self.calls.append(name)
        if name == self.broken:
            raise ServiceError(f"{name} failed")

    def assign(self, night: Night, target: Path, recorded: Recorded | None) -> SplitFacts:
        self._call("assign")
        night.project.splits_file.write_text(LEDGER)
        return self.facts

    def open_run(self, night: Night, case: Case) -> str:
        self._call("open_run")
        runs = night.registry.runs
        run_id = runs.start_run(tags={**case.key.to_tags(), "test_digest": case.facts.test_digest})
        runs.log_state(run_id, {"splits.csv": LEDGER})
        return run_id

    def fit(self, night: Night, run_id: str, work: Work) -> TrainResult:
        self._call("fit")
        model = work.fit / "model.keras"
        model.parent.mkdir(exist_ok=True)
        model.write_bytes(run_id.encode())
        return replace(FITTED, model=str(model))

    def evaluate(self, night: Night, work: Work, fitted: TrainResult) -> Evaluation:
        self._call("evaluate")
        page = self.folder / "evaluation"
        page.mkdir(exist_ok=True)
        (page / "index.html").write_text("page")
        return Evaluation(EvalOutcome(recipe(), {"test": report()}, page), None, night.registry.champion())

    def register(self, night: Night, case: Case, run_id: str, fitted: TrainResult, evaluation: Evaluation) -> int:
        self._call("register")
        return steps.register(night, case, run_id, fitted, evaluation)

    def judge(self, night: Night, case: Case, evaluation: Evaluation, version: int) -> Decision:
        self._call("judge")
        return Decision(self.promote, ("because",), {"p": 0.5})

    @contextmanager
    def _smoke(self) -> Iterator[Smoke]:
        yield self.smoke

    def steps(self) -> cycle.Steps:
        return cycle.Steps(
            version_data=lambda project: "d1",
            reproduce=lambda project: [],
            assign=self.assign,
            open_run=self.open_run,
            fit=self.fit,
            smoke=self._smoke,
            evaluate=self.evaluate,
            register=self.register,
            judge=self.judge,
        )


@pytest.fixture
def night(tmp_path: Path) -> Night:
    (tmp_path / "params.yaml").write_text("name: n\nclasses: [a, b]\n")
    project = Project(tmp_path)
    project.state.mkdir(exist_ok=True)
    return Night(project, project.settings(), FakeRegistry())


@pytest.fixture
def played(tmp_path: Path) -> Played:
    return Played(tmp_path)


def _status(night: Night) -> list[str]:
    assert isinstance(night.registry, FakeRegistry)
    return [run.status for run in night.registry.runs.all.values()]


def test_a_night_promotes_and_the_next_has_nothing_to_do(night: Night, played: Played) -> None:
    result = cycle.run(night, steps=played.steps())
    value = result.to_dict()
    assert list(value) == ["outcome", "data_version", "run_id", "version", "reasons", "metrics", "pages"]
    assert (value["outcome"], value["version"], value["reasons"]) == ("promoted", 1, ["because"])
    assert value["metrics"] == {"test/accuracy": 0.9, "test/macro_f1": 0.9, "test/ece": 0.05}
    assert night.registry.champion() == 1 and _status(night) == ["FINISHED"]
    assert json.loads((night.project.state / "reference.json").read_text()) == {"a": 3, "b": 2}
    assert (night.project.state / "last_evaluation" / "index.html").read_text() == "page"
    assert not list((night.project.state / "work").iterdir())
    before = list(played.calls)
    # A run that is killed after its verdict leaves its folder behind.
    left = night.project.work / RunKey.of(night.settings, value["data_version"]).name
    left.mkdir()
    again = cycle.run(night, steps=played.steps()).to_dict()
    assert not left.exists()
    assert (again["outcome"], again["version"], again["pages"]) == ("unchanged", 1, [])
    assert played.calls == before
    assert cycle.run(night, force=True, steps=played.steps()).version == 2


def test_a_refused_one_and_one_that_fails_its_smoke_test(night: Night, played: Played) -> None:
    played.promote = False
    assert cycle.run(night, steps=played.steps()).outcome == "refused"
    assert night.registry.champion() is None
    played.promote, played.smoke = True, fails
    result = cycle.run(night, force=True, steps=played.steps())
    assert result.outcome == "refused" and "golden answers differ" in result.reasons[-1]
    assert night.registry.champion() is None


@pytest.mark.parametrize("broken", ["fit", "evaluate", "register", "judge"])
def test_what_is_done_is_not_done_again(night: Night, played: Played, broken: str) -> None:
    played.broken = broken
    with pytest.raises(ServiceError):
        cycle.run(night, steps=played.steps())
    assert _status(night) == ["FAILED"]
    played.broken = ""
    assert cycle.run(night, steps=played.steps()).outcome == "promoted"
    assert played.calls.count("open_run") == 1 and _status(night) == ["FINISHED"]
    assert played.calls.count("fit") == (2 if broken == "fit" else 1)
    assert played.calls.count("register") == (2 if broken == "register" else 1)


def test_other_splits_begin_the_run_anew(night: Night, played: Played) -> None:
    played.broken = "judge"
    with pytest.raises(ServiceError):
        cycle.run(night, steps=played.steps())
    played.broken, played.facts = "", replace(FACTS, digest="other")
    assert cycle.run(night, steps=played.steps()).outcome == "promoted"
    assert (played.calls.count("open_run"), played.calls.count("fit")) == (2, 2)


# What the code before these records wrote.
OLD = {
    "doubts": ["a doubt"],
    "splits": "digest",
    "run": "0" * 32,
    "fit": FITTED.to_dict(),
    "evaluated": {"champion_version": None},
    "register": 7,
    "judge": {"promote": True, "reasons": ["because"], "evidence": {"p": 0.5}},
}


def test_the_notes_of_earlier_code_are_read(tmp_path: Path) -> None:
    (tmp_path / "steps.json").write_text(json.dumps(OLD))
    work = Work(tmp_path)
    assert (work.get(DOUBTS), work.get(SPLITS), work.get(RUN)) == (("a doubt",), "digest", "0" * 32)
    assert (work.get(FIT), work.get(EVALUATED), work.get(REGISTER)) == (FITTED, Evaluated(None), 7)
    decision = work.get(JUDGE)
    assert decision == Decision(True, ("because",), {"p": 0.5})
    work.note(JUDGE, decision)
    assert json.loads((tmp_path / "steps.json").read_text()) == OLD


def test_the_model_is_found_where_the_project_is_now(tmp_path: Path) -> None:
    """An interrupted run continues in a project that was moved or copied."""
    (tmp_path / "before").mkdir()
    work = Work(tmp_path / "before")
    noted = replace(FITTED, model=str(work.fit / "model.keras"))
    assert work.fitted(lambda: noted) == noted
    moved = Work((tmp_path / "before").rename(tmp_path / "after"))
    assert moved.fitted(pytest.fail) == replace(noted, model=str(tmp_path / "after" / "fit" / "model.keras"))


def test_an_evaluation_that_had_not_ended_is_not_done(tmp_path: Path) -> None:
    (tmp_path / "steps.json").write_text(json.dumps({**OLD, "evaluated": None}))
    assert Work(tmp_path).get(EVALUATED) is None


@pytest.mark.parametrize("text", ["{", "[]", '{"fit": {"epochs": 3}}', '{"run": 3}', '{"judge": []}', '{"splits": {}}'])
def test_notes_that_can_not_be_read_are_said_and_done_anew(
    tmp_path: Path, text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "steps.json").write_text(text)
    work = Work(tmp_path)
    assert "steps.json" in capsys.readouterr().err
    assert work.once(RUN, lambda: "new") == "new" and Work(tmp_path).get(RUN) == "new"


def test_an_evaluation_comes_back_from_its_file(tmp_path: Path) -> None:
    one = EvalOutcome(Recipe.from_dict(recipe().to_dict()), {"test": report()}, tmp_path)
    for evaluation in (Evaluation(one, None, None), Evaluation(one, one, 3)):
        assert Evaluation.from_dict(json.loads(json.dumps(evaluation.to_dict()))) == evaluation


def test_the_key_is_that_of_earlier_runs(night: Night) -> None:
    key = RunKey.of(night.settings, "d1")
    assert list(key.to_tags()) == ["data_version", "params_hash", "code_hash"] and len(key.name) == 16


def test_the_contract_of_an_unchanged_night() -> None:
    result = NightResult("unchanged", "d", "r", None, ("why",), {"test/accuracy": 1.0})
    assert result.to_dict() == {"outcome": "unchanged", "data_version": "d", "run_id": "r", "version": None,
                                "reasons": ["why"], "metrics": {"test/accuracy": 1.0}, "pages": []}  # fmt: skip


def test_the_plain_steps_know_no_prefect() -> None:
    code = "import sys, flows.cycle; print([m for m in ('prefect', 'mlflow', 'tensorflow') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
