"""The stages of dvc.yaml, which make `prepared/`: run by DVC, and run again when data, parameters or code change.

`dvc.lock` says from which bytes, parameters and code `prepared/` was made. A stage that fails hands over its whole
error.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import sys
from pathlib import Path
from typing import Any

import yaml

from sora.config import Project, Settings, parse
from sora.core import provenance
from sora.core.errors import InputError, SettingsError, SoraError
from sora.core.files import temporary_folder, write_if_different
from sora.core.processes import rebuild_error
from sora.dataset.versioning.dvc import dvc
from sora.dataset.versioning.integrity import require_whole

CODE_LOCK = "preprocessing.lock"
_CODE_HEADER = "# Hashes of the code behind each stage of dvc.yaml. Sora writes this file; git keeps it.\n"


def reproduce(project: Project, *, force: bool = False) -> list[str]:
    """Brings `prepared/` up to date; returns the names of the stages that ran. `force`: all of them, from scratch.

    The clips that training reads next are those that were written: damaged ones are made again, here or in the stage.

    Raises:
        NotTrainable: a rule about the whole set does not hold.
        SettingsError: params.yaml lacks a section that dvc.yaml names.
        SoraError: what a stage raised.
        RunActive: another DVC command is running in this project.
        InputError: data.dvc or dvc.lock is damaged.
    """
    require_whole(project)
    _check_parameters(project)
    write_code_lock(project)
    ran = _repro(project, *(["--force"] if force else []), fresh=force)
    # The stage compares clips with their digests. But DVC knows files by size and time: if a disk corrupted bits,
    # DVC sees nothing to do.
    for stage, folder in (("shards", project.shards), ("features", project.features)):
        if stage not in ran and (stage == "shards" or project.settings().model.bank) and _damaged(folder):
            ran += _repro(project, "--force", "--single-item", stage)
    return ran


def _damaged(folder: Path) -> bool:
    from sora.store.shards import ShardSet

    try:
        return bool(ShardSet.open(folder).damage())
    except InputError:
        return True


def _repro(project: Project, *options: str, fresh: bool = False) -> list[str]:
    with temporary_folder("stage") as folder:
        error_file = folder / "error.json"
        more = {"SORA_STAGE_ERROR": str(error_file), "SORA_STAGE_OWNER": str(os.getpid())}
        if fresh:
            more["SORA_STAGE_FRESH"] = "1"
        if sys.stderr.isatty():
            more["SORA_STAGE_TTY"] = os.ttyname(sys.stderr.fileno())
        try:
            # DVC's run cache would restore verdicts without their Data Docs.
            output = dvc(project.root, "repro", "--no-run-cache", *options, relay=True, env=more)
        except SoraError as error:
            if error_file.exists():
                raise rebuild_error(json.loads(error_file.read_text(encoding="utf-8"))) from error
            raise
    return re.findall(r"^Running stage '([^']+)'", output, re.MULTILINE)


def status(project: Project) -> dict[str, Any]:
    """What `dvc status` says: {} if data and stages are up to date, else {stage: [what changed]}."""
    require_whole(project)
    changed: dict[str, Any] = json.loads(dvc(project.root, "status", "--json"))
    return changed


def code_hash() -> str:
    """One name for the preprocessing code as a whole."""
    return hashlib.sha256(code_lock_text().encode()).hexdigest()[:16]


def write_code_lock(project: Project) -> None:
    """Writes preprocessing.lock if it differs: DVC depends on it, since it can't depend on installed packages."""
    settings = project.settings()
    backbone = None
    if "features" in stages_of(project):
        backbone = settings.model.backbone if settings.model.bank else ""
    text = code_lock_text(settings.task.stage_suffix, bounds_of(settings), backbone)
    write_if_different(project.root / CODE_LOCK, text)


def stages_of(project: Project) -> list[str]:
    """The stages of the project's dvc.yaml that are Sora's. `features` is missing in projects of earlier versions.

    Raises:
        InputError: dvc.yaml is not a pipeline.
    """
    there = _stages(project)
    return [name for name in provenance.STAGES if name in there]


def _stages(project: Project) -> dict[str, Any]:
    try:
        stages: dict[str, Any] = yaml.safe_load(project.dvc_yaml.read_text(encoding="utf-8"))["stages"]
    except (OSError, yaml.YAMLError, KeyError, TypeError) as error:
        raise InputError(
            f"{project.dvc_yaml} is not a pipeline: {error!r}",
            fix="restore it from git, or from a new `sora init`",
        ) from error
    return stages


def code_lock_text(suffix: str = "", bounds: str = "", backbone: str | None = None) -> str:
    """The content of preprocessing.lock; see `provenance.stages`."""
    names = provenance.stages(suffix, bounds, backbone)
    return _CODE_HEADER + "".join(f"{stage}: {name}\n" for stage, name in names.items())


def bounds_of(settings: Settings) -> str:
    """The bounds that the manifest depends on; "" for the defaults. They are not in dvc.yaml: they may be left out."""
    bounds = settings.validate_.decoding()
    return "" if bounds == parse("").validate_.decoding() else json.dumps(bounds, sort_keys=True)


def _check_parameters(project: Project) -> None:
    """dvc.yaml names keys of params.yaml; DVC needs each to exist, although Sora has defaults for all."""
    given = yaml.safe_load(project.params_file.read_text(encoding="utf-8")) or {}
    stages = _stages(project)
    if project.settings().model.bank and "features" not in stages:
        raise InputError(
            f"model.preset {project.settings().model.preset} reads features of a backbone, and {project.dvc_yaml} has "
            "no stage that computes them: an earlier Sora wrote it",
            fix=f"`python -m sora.stages template > dvc.yaml` in {project.root} writes today's",
        )
    defaults = project.settings().to_dict()
    for stage in stages.values():
        for key in stage.get("params", []):
            if not isinstance(key, str):
                continue
            value: object = given
            default: object = defaults
            for part in key.split("."):
                default = default.get(part) if isinstance(default, dict) else None
                if not isinstance(value, dict) or part not in value:
                    line = yaml.safe_dump({key: default}, default_flow_style=True, width=1000).strip()
                    raise SettingsError(
                        f"{project.params_file} lacks {key}, which dvc.yaml depends on",
                        fix=f"add it (default: {line})",
                    )
                value = value[part]
