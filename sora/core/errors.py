"""Every error that Sora raises on purpose.

Each names the rule, what was received and the fix; the command line prints it without a traceback and ends with
`exit_code` (the contract: 1 the answer is no, 2 bad usage or input, 3 a server, disk or child process failed).
Foreign exceptions are translated at the seam of the module that calls the foreign library.

    SoraError
    ├── InputError          2  something that the user gave is wrong
    │   ├── SettingsError      params.yaml
    │   └── VideoError         one video; carries the rule that it breaks
    ├── AnswerIsNo          1  everything worked, and the answer is no
    │   ├── NotTrainable       validation stopped the run
    │   │   └── SplitsLost     the split ledger lacks what was judged
    │   ├── RunActive          another run holds the project
    │   └── PromotionFailed    smoke test failed, nothing to go back to
    └── ServiceError        3  a server, disk or child process failed
        ├── DatabaseDamaged    MLflow's or Prefect's SQLite file
        ├── DiskFull
        ├── ReadOnly
        └── ApiProblem         Sora's API answered with a problem document
"""

from __future__ import annotations

from typing import Any


class SoraError(Exception):
    """Base of all. `message` names the rule and what was received, `fix` what to do about it."""

    exit_code = 3

    def __init__(self, message: str, *, fix: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.fix = fix

    def __str__(self) -> str:
        return f"{self.message}\n  fix: {self.fix}" if self.fix else self.message

    def __reduce__(self) -> tuple[Any, ...]:  # crosses process pools, keyword argument included
        return _rebuild, (type(self), self.message, self.__dict__)


def _rebuild(cls: type[SoraError], message: str, state: dict[str, Any]) -> SoraError:
    error = cls.__new__(cls)
    Exception.__init__(error, message)
    error.__dict__.update(state)
    return error


class InputError(SoraError):
    """Something that the user gave is wrong: an argument, a file, a folder."""

    exit_code = 2


class SettingsError(InputError):
    """`params.yaml` is missing, is not YAML, or has a value out of range."""


class VideoError(InputError):
    """One video can't be used. `rule` is the name that reports and quarantine show (see `records.RULES`)."""

    def __init__(self, message: str, *, rule: str, fix: str = "") -> None:
        super().__init__(message, fix=fix)
        self.rule = rule


class AnswerIsNo(SoraError):
    """Everything worked, and the answer is no."""

    exit_code = 1


class NotTrainable(AnswerIsNo):
    """Validation stopped the run: a rule about the whole set does not hold."""


class SplitsLost(NotTrainable):
    """The split ledger lacks rows that a judged run recorded: assigning them anew would leak training into the test."""


class RunActive(AnswerIsNo):
    """Another run holds the project's lock."""


class PromotionFailed(AnswerIsNo):
    """The alias did not move, or moved and was restored."""


class ServiceError(SoraError):
    """A server, a disk or a child process failed; the same call may work later."""

    exit_code = 3


class ApiProblem(ServiceError):
    """The API said no. `status` is the answer's, `problem` its document (RFC 9457)."""

    def __init__(self, message: str, *, fix: str = "", status: int, problem: dict[str, Any]) -> None:
        super().__init__(message, fix=fix)
        self.status = status
        self.problem = problem

    @property
    def kind(self) -> str:
        """The last part of the document's `type`: `too-large`, `not-a-video`, `queue-full`, `deadline`, …"""
        return str(self.problem.get("type", "")).rpartition(":")[2]


class DatabaseDamaged(ServiceError):
    """A server's database is no longer a whole SQLite file."""


class DiskFull(ServiceError):
    """No space left where Sora writes; what was complete before remains."""


class ReadOnly(ServiceError):
    """The file system that Sora writes to is mounted read-only."""
