"""Facts that documents repeat from the code."""

from __future__ import annotations

import re
from pathlib import Path

from sora.records import RULES


def test_readme_lists_every_rule_with_its_mend(repository: Path) -> None:
    readme = (repository / "README.md").read_text(encoding="utf-8")
    assert dict(re.findall(r"^\| `(\w+)` \| (.+) \|$", readme, re.MULTILINE)) == RULES


def test_links_in_documents_lead_somewhere(repository: Path) -> None:
    for document in [*repository.glob("*.md"), *repository.glob("docs/*.md"), *repository.glob("infra/*.md")]:
        for target in re.findall(r"\]\(([^)#:]+)\)", document.read_text(encoding="utf-8")):
            assert (document.parent / target).exists(), f"{document.name} links to {target}"


def test_code_lock_is_current(repository: Path) -> None:
    """A clean clone's `make run` must leave git's status clean: run it and commit dvc.lock when the code changed."""
    from sora.data import version

    recorded = (repository / "preprocessing.lock").read_text(encoding="utf-8")
    for stage, digest in version.code_hashes().items():
        assert f"{stage}: {digest}" in recorded, "commit what `make run` makes of dvc.lock and preprocessing.lock"
        assert digest in (repository / "dvc.lock").read_text(encoding="utf-8")
