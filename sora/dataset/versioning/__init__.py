"""Data versions and the preprocessing pipeline, by DVC.

Other rooms use what is exported here; `dvc` (the child process) and `stages` (what dvc.yaml runs) are separate modules.
"""

from sora.dataset.versioning.cache import cache_folder, checkout, pull, push, recorded_files
from sora.dataset.versioning.data import add, data_version, ensure_data, init
from sora.dataset.versioning.integrity import require_whole
from sora.dataset.versioning.pipeline import CODE_LOCK, code_hash, reproduce, stages_of, status, write_code_lock
from sora.dataset.versioning.states import STATE_FILES, code_notes, restore, state

__all__ = [
    "CODE_LOCK",
    "STATE_FILES",
    "add",
    "cache_folder",
    "checkout",
    "code_hash",
    "code_notes",
    "data_version",
    "ensure_data",
    "init",
    "pull",
    "push",
    "recorded_files",
    "reproduce",
    "require_whole",
    "restore",
    "stages_of",
    "state",
    "status",
    "write_code_lock",
]
