"""What the stages of dvc.yaml run: `python -m sora.stages manifest|validate|shards|features`, in the project's folder.

Each calls one function below and writes its result. An error goes whole to `versioning.reproduce`, through the file
that SORA_STAGE_ERROR names; by hand (`dvc repro`) it is printed.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import shutil
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import asdict
from functools import cache
from importlib import resources
from pathlib import Path

from sora.config import Project
from sora.core.errors import InputError, SoraError
from sora.core.files import atomic
from sora.core.processes import die_with_parent, error_event
from sora.core.progress import Bar, bar, echo, say
from sora.core.sandbox import hide_memory

BALANCE = "balance_shifted"  # the expectation against the last judged run: not a function of the bytes alone


def manifest(project: Project) -> dict[str, int]:
    """Decodes every video whose bytes are new, and writes manifest.parquet."""
    from sora.dataset import manifest as manifests

    journal = project.journal
    if _from_scratch():
        journal.unlink(missing_ok=True)
        project.manifest.unlink(missing_ok=True)
    previous = manifests.read(project.manifest) if project.manifest.exists() else None
    with _bar("Decoding") as update:
        built = manifests.build(project.data, project.settings(), previous=previous, journal=journal, progress=update)
    project.prepared.mkdir(exist_ok=True)
    manifests.write(built, project.manifest)
    journal.unlink(missing_ok=True)
    return {"videos": len(built)}


def validate(project: Project) -> dict[str, int]:
    """Judges the manifest; writes quarantine.json, validation.json and, not versioned, the Data Docs.

    Raises:
        NotTrainable: a rule about the whole set does not hold.
    """
    from sora.dataset import manifest as manifests
    from sora.dataset.quality import docs, judge, quarantine

    reference = reference_counts(project)
    judgement = judge(manifests.read(project.manifest), project.settings(), reference=reference)
    docs.write(project.docs, judgement)
    report = judgement.report
    contents = report.to_dict()
    _write_json(side_file(project), contents)
    report.require()
    quarantine.write(project, report.rejected)
    # The stage must be a pure function of its inputs: a verdict against another run is kept outside.
    contents["expectations"] = [one for one in contents["expectations"] if one["rule"] != BALANCE]
    _write_json(project.validation, contents)
    return {"accepted": report.accepted, "rejected": len(report.rejected)}


def shards(project: Project) -> dict[str, int]:
    """Writes the clips of accepted videos; only the buckets of changed videos and of damaged clips."""
    from sora.dataset import manifest as manifests
    from sora.dataset import versioning
    from sora.dataset.quality import quarantine
    from sora.store import building

    if _from_scratch():
        shutil.rmtree(project.shards, ignore_errors=True)
    settings = project.settings()
    rejected = quarantine.rejected_paths(project)
    with _bar("Clips") as update:
        made = building.build(
            manifests.read(project.manifest),
            rejected,
            project.data,
            project.shards,
            settings.clip.spec(),
            buckets=settings.shards.buckets,
            workers=settings.shards.workers,
            rules=settings.validate_,
            progress=update,
            recorded=cache(lambda: versioning.recorded_files(project, project.shards)),
        )
    return asdict(made)


def features(project: Project) -> dict[str, int]:
    """Writes what a frozen backbone sees in every clip; nothing where the model does not read it."""
    from sora.core import provenance
    from sora.model.bank import Bank
    from sora.store.derived import derive
    from sora.store.shards import ShardSet

    model = project.settings().model
    if _from_scratch() or not model.bank:
        shutil.rmtree(project.features, ignore_errors=True)
    if not model.bank:
        project.features.mkdir(parents=True)
        project.features.joinpath("none").write_text("the model reads no features of a backbone\n", encoding="utf-8")
        return {"computed": 0}
    shards = ShardSet.open(project.shards)
    bank = Bank(model.backbone, shards.spec)
    with _bar("Features") as update:
        made = derive(
            shards, project.features, bank.tensors, provenance.features(model.backbone), bank.compute, progress=update
        )
    return asdict(made)


def side_file(project: Project) -> Path:
    """The last validation's report with the class balance against the last judged run; JSON, not versioned."""
    return project.validation_side


def reference_counts(project: Project) -> dict[str, int] | None:
    """Videos per class of the last judged run, which the nightly leaves in .sora/reference.json."""
    try:
        counts: dict[str, int] = json.loads(project.reference.read_text(encoding="utf-8"))
        return counts
    except FileNotFoundError:
        return None


# --- the command ----------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _bar(title: str) -> Iterator[Bar]:
    """A progress bar on the terminal of the process that called DVC: our own standard error is a pipe."""
    terminal = os.environ.get("SORA_STAGE_TTY")
    if not terminal:
        with bar(title) as update:
            yield update
        return
    with open(terminal, "w", encoding="utf-8") as stream, contextlib.redirect_stderr(stream), bar(title) as update:
        yield update


def _end_with_owner() -> None:
    """Ends this process when the one that called DVC ends, however it ends: else two runs could write one output."""
    die_with_parent()
    owner = os.environ.get("SORA_STAGE_OWNER")
    if not owner or not hasattr(os, "pidfd_open"):
        return
    try:
        handle = os.pidfd_open(int(owner))
    except ProcessLookupError:
        os._exit(1)

    def watch() -> None:
        select.select([handle], [], [])
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _write_json(path: Path, value: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic(path) as file:
        file.write((json.dumps(value, indent=1, sort_keys=True, ensure_ascii=False) + "\n").encode())


def _from_scratch() -> bool:
    """Whether to ignore what an earlier run left (`versioning.reproduce(force=True)`)."""
    return bool(os.environ.get("SORA_STAGE_FRESH"))


STAGES: dict[str, Callable[[Project], dict[str, int]]] = {
    "manifest": manifest,
    "validate": validate,
    "shards": shards,
    "features": features,
}


def main(arguments: list[str] | None = None) -> int:
    """Runs the named stage; returns the exit code."""
    (name,) = sys.argv[1:] if arguments is None else arguments
    if name == "template":  # for a project whose dvc.yaml an earlier Sora wrote
        sys.stdout.write((resources.files("sora") / "templates" / "dvc.yaml").read_text(encoding="utf-8"))
        return 0
    _end_with_owner()
    hide_memory()
    try:
        project = Project(Path.cwd())
        if name not in STAGES:
            raise InputError(f"no stage {name}: the stages are {', '.join(STAGES)}")
        counts = STAGES[name](project)
        _write_json(project.stage_counts(name), counts)
    except (SoraError, OSError) as error:
        say(f"{name}: {error}")
        place = os.environ.get("SORA_STAGE_ERROR")
        if place:
            with suppress(OSError):  # on a full disk the caller reads the line above
                Path(place).write_text(json.dumps(error_event(error)), encoding="utf-8")
        return error.exit_code if isinstance(error, SoraError) else 3
    echo(", ".join(f"{what} {number}" for what, number in counts.items()))
    return 0
