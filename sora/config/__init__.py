"""params.yaml: every setting with its default and range, presets, and the paths and secret of a project."""

from sora.config.settings import (
    Alert,
    Backup,
    Clip,
    Gate,
    Model,
    Project,
    Schedule,
    Serve,
    Settings,
    Train,
    Validate,
    find_project,
    parse,
)

__all__ = [
    "Alert",
    "Backup",
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
