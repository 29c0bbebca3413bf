"""One night from start to end: the steps in order, and what a resumed run does not repeat.

`Steps` are plain functions by default; `flows.nightly` gives the same ones as Prefect tasks.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass, replace
from pathlib import Path

from flows import steps as plain
from flows.records import Case, Evaluation, Night, NightResult, Past, RunKey, SplitFacts
from flows.work import DOUBTS, JUDGE, REGISTER, RUN, SPLITS, Work
from sora.config import Project
from sora.core.errors import ServiceError
from sora.core.files import atomic
from sora.core.ledger import Recorded
from sora.core.progress import say
from sora.core.records import Decision
from sora.learning.jobs import TrainResult
from sora.registry import JudgedRun, RegistryPort, Smoke

NO_HISTORY = "no_history"  # tag of a run that found assigned splits, but no run that assigned them
NO_HISTORY_WORDS = (
    "splits.csv held {rows} videos' splits before this run, but MLflow knows no run that was judged on them: version "
    "numbers start again, and how often this test split has judged is not known; fine in a new clone, otherwise .sora/ "
    "or its mlflow.db was lost (`sora restore` restores a backup)"
)
_RUNS = 1000  # most runs whose tags are read


def _smoke() -> AbstractContextManager[Smoke]:
    from sora.runtime.predictor import Smoke

    return Smoke()


@dataclass(frozen=True, slots=True)
class Steps:
    """What the cycle calls: functions of `flows.steps` by default."""

    version_data: Callable[[Project], str] = plain.version_data
    reproduce: Callable[[Project], list[str]] = plain.reproduce
    assign: Callable[[Night, Path, Recorded | None], SplitFacts] = plain.assign
    open_run: Callable[[Night, Case], str] = plain.open_run
    fit: Callable[[Night, str, Work], TrainResult] = plain.fit
    smoke: Callable[[], AbstractContextManager[Smoke]] = _smoke
    evaluate: Callable[[Night, Work, TrainResult], Evaluation] = plain.evaluate
    register: Callable[[Night, Case, str, TrainResult, Evaluation], int] = plain.register
    judge: Callable[[Night, Case, Evaluation, int], Decision] = plain.judge
    promote: Callable[[Night, int, Sequence[str], Smoke], str | None] = plain.promote
    publish: Callable[[Night, Case, NightResult, Evaluation], tuple[str, ...]] = plain.publish


def run(night: Night, *, force: bool = False, steps: Steps | None = None) -> NightResult:
    """The whole cycle once; the caller holds the run lock.

    Raises:
        SplitsLost: the split ledger lacks rows that a judged run recorded.
        SoraError: what stopped a step.
    """
    from sora.dataset import ledger
    from sora.runtime.lifecycle import alias_lock

    steps = steps or Steps()
    project, registry = night.project, night.registry
    with alias_lock(project):
        registry.recover()  # a promotion that a crash interrupted
    recorded = registry.judged_ledger()
    judged = registry.last_judged()
    rows = ledger.require(project.splits_file, recorded, judged=judged is not None)
    if recorded is not None:
        ledger.remember(project, recorded)
    key = RunKey.of(night.settings, steps.version_data(project))
    if judged is not None and not force and key.is_of(judged):
        say("nothing changed since the last judged run: data, parameters and code are the same")
        # It may have been killed after its verdict, before it removed what it worked in.
        Work(project.work / key.name).remove()
        reason = "data, parameters and code are as in the last judged run; --force trains anyway"
        return NightResult("unchanged", key.data_version, judged.run_id, judged.version, (reason,), judged.metrics)
    steps.reproduce(project)
    past = Past(judged, recorded, doubts_of(registry, judged, recorded, len(rows)))
    return _learn(night, steps, key, past, force)


def doubts_of(
    registry: RegistryPort, judged: JudgedRun | None, recorded: Recorded | None, rows: int
) -> tuple[str, ...]:
    """Warnings about a history that is missing although the ledger, which outlives servers, shows that one existed."""
    if recorded is not None or not rows:
        return ()
    if judged is not None:
        return ("no judged run's copy of splits.csv can be read in MLflow: it was not compared with anything",)
    tags = registry.runs.own_tags(_RUNS)
    if tags and not any(NO_HISTORY in one for one in tags):
        return ()  # the first run of this history did not finish: it assigned these splits
    return (NO_HISTORY_WORDS.format(rows=rows),)


def _learn(night: Night, steps: Steps, key: RunKey, past: Past, force: bool) -> NightResult:
    from sora.dataset import ledger

    project, registry = night.project, night.registry
    work, doubts, facts = _splits(night, steps, key, past)
    case = Case(key, facts, past.judged, force)
    run_id = work.once(RUN, lambda: steps.open_run(night, case))
    if doubts:
        registry.runs.set_tags(run_id, {NO_HISTORY: "true"})
    say(f"splits: {facts.train} train, {facts.val} val, {facts.test} test; {facts.rejected} quarantined")
    try:
        registry.runs.resume(run_id)
        result, evaluation = _candidate(night, steps, case, work, run_id, doubts)
        registry.runs.finish(run_id, "FINISHED")
    except KeyboardInterrupt:
        registry.runs.finish(run_id, "KILLED")
        raise
    except Exception:
        registry.runs.finish(run_id, "FAILED")
        raise
    with atomic(project.reference) as file:  # the next validation reads it
        file.write(json.dumps(dict(facts.counts)).encode())
    with suppress(ServiceError):  # a copy for `sora check` and `sora doctor`; the decision does not need it
        if (recorded := registry.judged_ledger()) is not None:
            ledger.remember(project, recorded)
    result = replace(result, pages=steps.publish(night, case, result, evaluation))
    work.remove()
    return result


def _splits(night: Night, steps: Steps, key: RunKey, past: Past) -> tuple[Work, tuple[str, ...], SplitFacts]:
    """The work folder of this run, its warnings about the history, and its splits."""
    folder = night.project.work / key.name
    while True:
        work = Work(folder)
        doubts = work.once(DOUBTS, lambda: past.doubts)  # before splits are assigned: new rows would hide it
        for warning in doubts:
            say(f"warning: {warning}")
        facts = steps.assign(night, work.table, past.recorded)
        known = work.get(SPLITS) or work.note(SPLITS, facts.digest)
        if known == facts.digest:
            return work, doubts, facts
        # The ledger changed under an interrupted run: its results are for other splits.
        work.remove()


def _candidate(
    night: Night, steps: Steps, case: Case, work: Work, run_id: str, doubts: tuple[str, ...]
) -> tuple[NightResult, Evaluation]:
    """Trains, evaluates, registers and judges the candidate, and promotes it if the gate says so."""
    fitted = work.fitted(lambda: steps.fit(night, run_id, work))
    with steps.smoke() as smoke:  # its child imports while the candidate is evaluated
        evaluation = steps.evaluate(night, work, fitted)
        version = work.once(REGISTER, lambda: steps.register(night, case, run_id, fitted, evaluation))
        decision = work.once(JUDGE, lambda: steps.judge(night, case, evaluation, version))
        reasons = (*decision.reasons, *plain.in_words(fitted.tried), *fitted.notes, *doubts)
        result = NightResult("refused", case.key.data_version, run_id, version, reasons, evaluation.test_metrics())
        if decision.promote:
            failure = steps.promote(night, version, reasons, smoke)
            if failure is None:
                result = replace(result, outcome="promoted")
            else:
                result = replace(result, reasons=(*reasons, failure))
    night.registry.set_decision(version, result.outcome, result.reasons)
    return result, evaluation
