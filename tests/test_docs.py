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
