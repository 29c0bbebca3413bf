"""`python -m sora.config`: writes the files of this repository that follow from the settings' code.

These are the template of params.yaml, this repository's own params.yaml (with its present values), and
docs/settings.md.
"""

from __future__ import annotations

from pathlib import Path

from sora.config.project import Project
from sora.config.render import params_yaml, settings_page
from sora.config.settings import of_new_project


def generated(repository: Path) -> dict[Path, str]:
    """Each file that is written from the code, with its text."""
    own = Project(repository)
    return {
        own.params_file: params_yaml(own.settings()),
        repository / "sora" / "templates" / "params.yaml": params_yaml(of_new_project()),
        repository / "docs" / "settings.md": settings_page(),
    }


if __name__ == "__main__":
    for file, text in generated(Path(__file__).resolve().parents[2]).items():
        file.write_text(text, encoding="utf-8")
