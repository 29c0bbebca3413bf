"""What must hold after any fault, once the same command has run again: one function, a typed record of findings."""

from __future__ import annotations

import re
import time
from collections.abc import Sequence
from dataclasses import dataclass

from benchmarks.faults.processes import Case, Verb, role_of
from sora.config import Project
from sora.core.errors import SoraError
from sora.core.records import ModelVersion
from sora.dataset import versioning
from sora.operations import doctor
from sora.runtime import lifecycle

# Of the machine, not of the project: a busy machine or a small disk is no harm that a fault did.
_MACHINE = frozenset({"python", "packages", "git", "dvc", "ffmpeg", "memory", "gpu", "disk"})
_SECONDS_TO_END = 15.0  # that processes may need to end by themselves
# How Sora, DVC and MLflow name what is not complete yet.
_UNFINISHED = re.compile(r"(\.part|\.partial|\.tmp|\.temp)$|\.json\.\d+$|^\.dvc_tmp|^tmp[a-z0-9_]{8}$")
_STANDING = ("matplotlib-",)  # a cache that is made where the home folder can't be written


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that was looked at."""

    what: str
    ok: bool
    detail: str = ""


@dataclass(frozen=True, slots=True)
class Invariants:
    findings: tuple[Finding, ...]

    @property
    def broken(self) -> tuple[Finding, ...]:
        return tuple(one for one in self.findings if not one.ok)

    def __str__(self) -> str:
        return "\n".join(f"{'holds ' if one.ok else 'BROKEN'} {one.what}: {one.detail}" for one in self.findings)


def check(case: Case, *, had_champion: bool, reproduce: bool, finished: bool = True) -> Invariants:
    """Looks at everything; changes nothing. No verb of the case may be under way.

    Args:
        had_champion: there was one before the fault, so there must be one now.
        reproduce: also evaluates the champion anew (the dear part).
        finished: a run has ended well since the fault, so no work of an interrupted one is left.
    """
    project = Project(case.root)
    findings = [_orphans(case)]
    with case.inside():
        findings.append(_temporary(case, project, finished))
        try:
            with lifecycle.open_registry(project) as registry:
                champion = registry.champion()
                findings.append(_champion(registry.versions(), champion, had_champion))
                if champion is not None:
                    file, _ = registry.fetch(champion, lifecycle.model_cache(project))
                    findings.append(Finding("champion's file", file.is_file(), file.name[:12]))
                findings.append(_doctor(project, champion is not None))
                if reproduce and champion is not None:
                    again = lifecycle.reproduce(project, champion)
                    findings.append(Finding("reproduce", bool(again["matches"]), str(again["metrics"])))
        except SoraError as error:
            findings.append(Finding("registry", False, str(error)))
        findings.append(_status(project))
    findings.append(_orphans(case))
    return Invariants(tuple(findings))


def spoken(verb: Verb) -> Finding:
    """A verb that failed says why and what to do: no traceback, a message with its fix. One that was killed can't."""
    code, said = verb.process.returncode, verb.err
    what = f"message of `sora {verb.arguments[0]}`"
    if code is None:
        return Finding(what, False, f"not ended after {verb.seconds:.0f} s")
    if code <= 0 or code == 130:
        return Finding(what, "Traceback" not in said, f"ended with {code}")
    helps = re.search(r"^\s*fix: \S", said, re.MULTILINE) is not None
    fine = helps and "Traceback" not in said and code in (1, 2, 3)
    lines = [line for line in said.strip().splitlines() if line.strip()]
    return Finding(what, fine, f"ended with {code}: " + " | ".join(lines[-6:])[-600:])


def _orphans(case: Case) -> Finding:
    until = time.monotonic() + _SECONDS_TO_END
    while (left := case.processes()) and time.monotonic() < until:
        time.sleep(0.2)
    return Finding("no orphan", not left, ", ".join(f"{one.pid} {role_of(one)}" for one in left))


def _temporary(case: Case, project: Project, finished: bool) -> Finding:
    left = [str(one.relative_to(case.folder)) for one in case.temporary.iterdir() if not one.name.startswith(_STANDING)]
    folders = [project.root]
    while folders:
        for one in folders.pop().iterdir():
            if _UNFINISHED.search(one.name):
                left.append(str(one.relative_to(case.folder)))
            elif one.is_dir() and not one.is_symlink() and one.name != ".git":
                folders.append(one)
    if finished:
        work = project.work
        left += [str(one.relative_to(case.folder)) for one in (work.iterdir() if work.is_dir() else ())]
    return Finding("no temporary file", not left, ", ".join(sorted(left)[:12]))


def _champion(versions: Sequence[ModelVersion], champion: int | None, had_champion: bool) -> Finding:
    holders = [one.version for one in versions if "champion" in one.aliases]
    if champion is None:
        return Finding("one champion", not had_champion and not holders, "none")
    return Finding("one champion", holders == [champion], f"version {champion}, alias on {holders}")


def _doctor(project: Project, has_champion: bool) -> Finding:
    spared = _MACHINE if has_champion else _MACHINE | {"champion"}
    bad = [one for one in doctor.doctor(project)["checks"] if not one["ok"] and one["name"] not in spared]
    return Finding("doctor", not bad, "; ".join(f"{one['name']}: {one['detail']}" for one in bad))


def _status(project: Project) -> Finding:
    try:
        changed = versioning.status(project)
    except SoraError as error:
        return Finding("dvc status", False, str(error))
    return Finding("dvc status", not changed, str(changed) if changed else "")
