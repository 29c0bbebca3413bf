"""params.yaml: every setting with its default, range and meaning, presets, and the paths and secret of a project."""

from sora.config.data import Clip, Shards, Split, Validate
from sora.config.edit import changed, edited
from sora.config.evaluation import Eval, Gate, Unsure
from sora.config.model import Model
from sora.config.operations import Alert, Backup, Schedule, Services
from sora.config.presets import PRESETS, Preset
from sora.config.project import CacheFolder, Project, find_project
from sora.config.render import params_yaml, settings_page
from sora.config.serve import Serve
from sora.config.settings import ADDED, NOT_OF_LEARNING, Settings, of_new_project, parse
from sora.config.train import Train

__all__ = [
    "ADDED",
    "NOT_OF_LEARNING",
    "PRESETS",
    "Alert",
    "Backup",
    "CacheFolder",
    "Clip",
    "Eval",
    "Gate",
    "Model",
    "Preset",
    "Project",
    "Schedule",
    "Serve",
    "Services",
    "Settings",
    "Shards",
    "Split",
    "Train",
    "Unsure",
    "Validate",
    "changed",
    "edited",
    "find_project",
    "of_new_project",
    "params_yaml",
    "parse",
    "settings_page",
]
