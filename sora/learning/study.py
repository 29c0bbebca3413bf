"""The search of `sora tune`: Optuna's TPE sampler and median pruning over an SQLite file that survives any kill.

The only module that knows Optuna. What a trial does with its values is `sora.learning.tuning.judge`.

TPE: Bergstra et al. 2011, "Algorithms for Hyper-Parameter Optimization". Median pruning: Golovin et al. 2017, "Google
Vizier". Importance: fANOVA, Hutter et al. 2014.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sora.core.errors import DiskFull, InputError, ReadOnly, ServiceError, SoraError
from sora.core.files import disk_failure
from sora.core.progress import say
from sora.core.trials import Ended, Metric, Setting, Trial, TrialState
from sora.learning import space
from sora.learning.space import Choice, Parameter, Whole
from sora.learning.tuning import Report, TimeIsUp

if TYPE_CHECKING:
    import optuna

SEARCH = "tpe-1"  # a new name for another algorithm: a study's trials come from one
STARTUP = 8  # trials at random before the model of TPE says anything
UNPRUNED = 5  # complete trials before any is given up
_FAILURES = 3  # failed trials in a row, after which the reason is not their values
_BASELINE, _FAILED, _AGAIN, _RUN, _SECONDS = "baseline", "failed", "again", "run", "seconds"


@dataclass(frozen=True, slots=True)
class Candidate:
    """What to try next. `values` are empty for the project's present settings."""

    number: int  # as in `Trial`: its place among the finished ones
    values: Mapping[str, Setting]
    baseline: bool
    run: str | None  # the MLflow run of an earlier try that was interrupted


Judge = Callable[[Candidate, Report], Sequence[float]]


def require() -> None:
    """Early: that Optuna is installed.

    Raises:
        InputError: it is not.
    """
    from importlib.util import find_spec

    if find_spec("optuna") is None:
        raise InputError(
            "`sora tune` needs Optuna, which is not installed",
            fix="run `make setup` again, or: pip install 'optuna>=5,<6'",
        )


class Study:
    """A search in one SQLite file. Only one process may have it open: the caller holds `tuning.alone`.

    Args:
        file: is made if it is not there.
        name: of the study in it.
        own: the project's values of the parameters; they are the first trial.
        folds: after as many a trial is complete.
        seed: with it every trial's values follow from the trials before it, however often the search was killed.

    Raises (every method):
        ServiceError, DiskFull: the file is damaged, or can't be written.
    """

    def __init__(
        self,
        file: Path,
        name: str,
        parameters: Sequence[Parameter],
        own: Mapping[str, Setting],
        *,
        metric: Metric,
        folds: int,
        seed: int,
    ) -> None:
        require()
        import optuna

        optuna.logging.set_verbosity(optuna.logging.ERROR)
        self.file, self.parameters, self.folds, self.seed = file, tuple(parameters), folds, seed
        self._own = dict(own)
        self._trial: optuna.Trial | None = None  # that is being tried
        with self._stored():
            self._study = optuna.create_study(
                storage=optuna.storages.RDBStorage(f"sqlite:///{file}"),
                study_name=name,
                direction="maximize" if metric == "accuracy" else "minimize",
                pruner=optuna.pruners.MedianPruner(n_startup_trials=UNPRUNED),
                load_if_exists=True,
            )
            self.requeue()
            waits = optuna.trial.TrialState.WAITING
            if not any(_is(one, _BASELINE) for one in (*self._finished(), *self._all(waits))):
                raw = {one.name: _raw(one, space.nearest(one, self._own[one.name])) for one in self.parameters}
                self._study.enqueue_trial(raw, user_attrs={_BASELINE: True})

    def search(self, judge: Judge, *, trials: int) -> Ended:
        """Tries values until the study has `trials` finished trials, or `judge` raises `TimeIsUp`; returns which.

        A trial whose training fails counts as failed, and the search goes on. Any other end, a kill too, leaves the
        trial to be tried again by the next call.

        Raises:
            SoraError: the present settings failed, or three trials in a row did; a full disk.
        """
        failures = 0
        while len(self._finished()) < trials:
            trial, candidate = self._next()
            begun = time.monotonic()
            try:
                means = judge(candidate, self._reporting(trial, candidate))
            except TimeIsUp:
                self.requeue()
                return "minutes"
            except (DiskFull, ReadOnly):
                raise
            except SoraError as error:
                failures += 1
                if candidate.baseline or failures >= _FAILURES:
                    raise
                say(f"trial {candidate.number} failed: {error.message}")
                self._tell(trial, "failed", None, begun)
            else:
                failures = 0
                self._tell(trial, "complete" if len(means) == self.folds else "pruned", means[-1], begun)
        return "trials"

    def trials(self) -> tuple[Trial, ...]:
        """All finished trials, by number."""
        return tuple(self._told(number, one) for number, one in enumerate(self._finished()))

    def note_run(self, run: str) -> None:
        """Keeps the MLflow run of the trial that is being tried."""
        assert self._trial is not None
        with self._stored():
            self._trial.set_user_attr(_RUN, run)

    @property
    def run(self) -> str | None:
        """The MLflow run of the study."""
        with self._stored():
            found: str | None = self._study.user_attrs.get(_RUN)
            return found

    @run.setter
    def run(self, run: str) -> None:
        with self._stored():
            self._study.set_user_attr(_RUN, run)

    def importance(self) -> dict[str, float]:
        """The share of the metric's variance over the complete trials that each parameter explains, the largest first.

        Empty with fewer complete trials than `STARTUP`, or if all are equally good: nothing can be said then.
        """
        import optuna

        done = self._all(optuna.trial.TrialState.COMPLETE)
        if len(done) < STARTUP or len({one.value for one in done}) < 2:
            return {}
        evaluator = optuna.importance.FanovaImportanceEvaluator(seed=self.seed)
        found = optuna.importance.get_param_importances(self._study, evaluator=evaluator)
        return {name: float(share) for name, share in found.items()}

    def requeue(self) -> None:
        """Marks what a dead process was trying as failed, and puts its values in line again."""
        import optuna

        with self._stored():
            again = self._again()
            for one in self._all(optuna.trial.TrialState.RUNNING):
                # First the new one: a kill between the two must not lose the values.
                if one.params and one.number not in again:
                    kept = {name: one.user_attrs[name] for name in (_BASELINE, _RUN) if name in one.user_attrs}
                    self._study.enqueue_trial(dict(one.params), user_attrs={**kept, _AGAIN: one.number})
                self._study.tell(one.number, state=optuna.trial.TrialState.FAIL)

    # --- one trial ---------------------------------------------------------------------------------------------------

    def _next(self) -> tuple[optuna.Trial, Candidate]:
        import optuna

        with self._stored():
            # Drawn from the seed and the trial's place, not from a generator that a kill would set back.
            place = len(self._finished())
            seed = int(hashlib.sha256(f"{self.seed} {place}".encode()).hexdigest()[:8], 16)
            self._study.sampler = optuna.samplers.TPESampler(seed=seed, n_startup_trials=STARTUP)
            trial = self._study.ask({one.name: _distribution(one) for one in self.parameters})
            attributes = trial.user_attrs
        self._trial = trial
        baseline = bool(attributes.get(_BASELINE))
        values = {} if baseline else {one.name: _value(one, trial.params[one.name]) for one in self.parameters}
        return trial, Candidate(place, values, baseline, attributes.get(_RUN))

    def _reporting(self, trial: optuna.Trial, candidate: Candidate) -> Report:
        def report(fold: int, mean: float) -> bool:
            with self._stored():
                trial.report(mean, fold)
                # Without the present settings there is nothing to compare with.
                return not candidate.baseline and trial.should_prune()

        return report

    def _tell(self, trial: optuna.Trial, state: TrialState, value: float | None, begun: float) -> None:
        import optuna

        ends = optuna.trial.TrialState
        with self._stored():
            trial.set_user_attr(_SECONDS, round(time.monotonic() - begun, 1))
            if state == "complete":
                self._study.tell(trial, value)
            elif state == "pruned":
                self._study.tell(trial, state=ends.PRUNED)
            else:
                trial.set_user_attr(_FAILED, True)
                self._study.tell(trial, state=ends.FAIL)

    def _told(self, number: int, one: optuna.trial.FrozenTrial) -> Trial:
        states: dict[str, TrialState] = {"COMPLETE": "complete", "PRUNED": "pruned"}
        baseline = _is(one, _BASELINE)
        drawn = {} if baseline else {p.name: _value(p, one.params[p.name]) for p in self.parameters}
        return Trial(
            number=number,
            state=states.get(one.state.name, "failed"),
            values=self._own if baseline else drawn,
            folds=tuple(one.intermediate_values[step] for step in sorted(one.intermediate_values)),
            baseline=baseline,
            seconds=float(one.user_attrs.get(_SECONDS, 0.0)),
        )

    def _all(self, *states: optuna.trial.TrialState) -> list[optuna.trial.FrozenTrial]:
        with self._stored():
            found: list[optuna.trial.FrozenTrial] = self._study.get_trials(deepcopy=False, states=states or None)
            return found

    def _finished(self) -> list[optuna.trial.FrozenTrial]:
        """Trials that count: not those in line, nor those that a dead process left."""
        again = self._again()
        return [
            one
            for one in self._all()
            if one.state.is_finished() and (one.state.name != "FAIL" or (_is(one, _FAILED) and one.number not in again))
        ]

    def _again(self) -> set[int]:
        """Numbers of the interrupted trials that were put in line again."""
        return {one.user_attrs[_AGAIN] for one in self._all() if _AGAIN in one.user_attrs}

    @contextmanager
    def _stored(self) -> Iterator[None]:
        import optuna
        from sqlalchemy.exc import SQLAlchemyError

        try:
            yield
        except (SQLAlchemyError, optuna.exceptions.StorageInternalError) as error:
            said = f"{error} {error.__cause__ or ''}"
            raise (
                disk_failure(self.file.parent, said)
                or ServiceError(
                    f"the study {self.file} can't be used: {said.strip()}",
                    fix="remove that file: a new search starts, and reuses the finished folds",
                )
            ) from error


def _is(one: optuna.trial.FrozenTrial, attribute: str) -> bool:
    return bool(one.user_attrs.get(attribute))


def _distribution(parameter: Parameter) -> optuna.distributions.BaseDistribution:
    from optuna import distributions

    if isinstance(parameter, Choice):
        return distributions.CategoricalDistribution([_raw(parameter, option) for option in parameter.options])
    if isinstance(parameter, Whole):
        return distributions.IntDistribution(parameter.low, parameter.high, log=parameter.log)
    return distributions.FloatDistribution(parameter.low, parameter.high, log=parameter.log)


def _raw(parameter: Parameter, value: Setting) -> Any:
    """What Optuna stores: it has no lists."""
    return json.dumps(value) if isinstance(parameter, Choice) else value


def _value(parameter: Parameter, raw: Any) -> Setting:
    """The setting that Optuna's value stands for."""
    if isinstance(parameter, Choice):
        value = json.loads(raw)
        return tuple(value) if isinstance(value, list) else value
    return int(raw) if isinstance(parameter, Whole) else space.rounded(float(raw))
