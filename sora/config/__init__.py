"""params.yaml: every setting with its default and range, presets, and the paths and secret of a project."""

from sora.config.presets import PRESETS
from sora.config.project import CacheFolder, Project, find_project
from sora.config.settings import (
    Alert,
    Backup,
    Clip,
    Gate,
    Model,
    Schedule,
    Serve,
    Settings,
    Train,
    Validate,
    parse,
)

__all__ = [
    "PRESETS",
    "Alert",
    "Backup",
    "CacheFolder",
    "Clip",
    "Gate",
    "Model",
    "Project",
    "Schedule",
    "Serve",
    "Settings",
    "Train",
    "Validate",
    "find_project",
    "parse",
]
