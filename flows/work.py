"""The work folder of one run: the results of finished steps, so that a killed run continues where it was."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Generic, TypeVar

from sora.core.files import atomic
from sora.core.progress import say
from sora.core.records import Decision
from sora.learning.jobs import TrainResult

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Step(Generic[T]):
    """One step of a run: the name of its result in `steps.json`, and how the result becomes JSON and comes back.

    `read` raises KeyError, TypeError or ValueError for anything that is not such a result.
    """

    name: str
    write: Callable[[T], object]
    read: Callable[[Any], T]


@dataclass(frozen=True, slots=True)
class Evaluated:
    """The champion that the candidate was evaluated against."""

    champion_version: int | None


def _text(value: object) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{value!r} is not a string")
    return value


def _number(value: object) -> int:
    if not isinstance(value, int):
        raise TypeError(f"{value!r} is not a number")
    return value


def _same(value: T) -> T:
    return value


DOUBTS: Step[tuple[str, ...]] = Step("doubts", list, lambda value: tuple(_text(one) for one in value))
SPLITS: Step[str] = Step("splits", _same, _text)
RUN: Step[str] = Step("run", _same, _text)
FIT: Step[TrainResult] = Step("fit", TrainResult.to_dict, TrainResult.from_dict)
EVALUATED: Step[Evaluated] = Step("evaluated", asdict, lambda value: Evaluated(value["champion_version"]))
REGISTER: Step[int] = Step("register", _same, _number)
JUDGE: Step[Decision] = Step(
    "judge",
    lambda decision: {**asdict(decision), "reasons": list(decision.reasons)},
    lambda value: Decision(value["promote"], tuple(value["reasons"]), value["evidence"]),
)
STEPS: tuple[Step[Any], ...] = (DOUBTS, SPLITS, RUN, FIT, EVALUATED, REGISTER, JUDGE)


class Work:
    """The folder and its `steps.json`, which is replaced as a whole after each step.

    If an earlier try's file can't be read, a message says so and all steps run again. Training still resumes from its
    checkpoint in this folder, which has its own check.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._file = folder / "steps.json"
        folder.mkdir(parents=True, exist_ok=True)
        self._results: dict[str, Any] = self._stored()

    @property
    def table(self) -> Path:
        """The table of splits, for training and evaluation."""
        return self.folder / "table.parquet"

    @property
    def fit(self) -> Path:
        """The folder of the training: its checkpoint and its model."""
        return self.folder / "fit"

    @property
    def evaluation(self) -> Path:
        """The folder of the evaluation: reports and the page. The result is in the JSON file beside it."""
        return self.folder / "evaluation"

    def get(self, step: Step[T]) -> T | None:
        """The result of a finished step, or None."""
        stored = self._results.get(step.name)
        return None if stored is None else step.read(stored)

    def once(self, step: Step[T], body: Callable[[], T]) -> T:
        """The result of `body`, which runs only if no earlier try of this run finished it."""
        done = self.get(step)
        return done if done is not None else self.note(step, body())

    def fitted(self, body: Callable[[], TrainResult]) -> TrainResult:
        """`once` of the training. The model is in this folder, even if the project has moved since."""
        done = self.get(FIT)
        if done is None:
            return self.note(FIT, body())
        held_out = done.held_out and str(self.fit / Path(done.held_out).name)
        return replace(done, model=str(self.fit / Path(done.model).name), held_out=held_out)

    def note(self, step: Step[T], result: T) -> T:
        """Stores a result and returns it."""
        self._results[step.name] = step.write(result)
        with atomic(self._file) as file:
            file.write(json.dumps(self._results).encode())
        return result

    def remove(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)

    def _stored(self) -> dict[str, Any]:
        try:
            results = json.loads(self._file.read_text(encoding="utf-8"))
            if not isinstance(results, dict):
                raise TypeError("it does not hold results by name")
            for step in STEPS:
                if results.get(step.name) is not None:
                    step.read(results[step.name])
        except FileNotFoundError:
            return {}
        except (OSError, KeyError, TypeError, ValueError, AttributeError) as error:
            say(f"warning: {self._file} of an interrupted run can't be read ({error!r}): its steps run again")
            return {}
        return results
