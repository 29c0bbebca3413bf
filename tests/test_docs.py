"""Facts that documents repeat from the code."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import yaml

from sora.dataset.quality.rules import REJECTING


def test_readme_lists_every_rule_with_its_fix(repository: Path) -> None:
    readme = (repository / "README.md").read_text(encoding="utf-8")
    assert dict(re.findall(r"^\| `(\w+)` \| (.+) \|$", readme, re.MULTILINE)) == REJECTING


def test_links_in_documents_lead_somewhere(repository: Path) -> None:
    for document in [*repository.glob("*.md"), *repository.glob("docs/*.md"), *repository.glob("infra/*.md")]:
        for target in re.findall(r"\]\(([^)#:]+)\)", document.read_text(encoding="utf-8")):
            assert (document.parent / target).exists(), f"{document.name} links to {target}"


def test_pre_commit_runs_what_lint_runs(repository: Path) -> None:
    (lint,) = re.findall(
        r"^lint: .*\n((?:\t.+\n)+)", (repository / "Makefile").read_text(encoding="utf-8"), re.MULTILINE
    )
    commands = [line.strip().replace("$(BIN)/", ".venv/bin/").removesuffix(" .") for line in lint.splitlines()]
    (local,) = yaml.safe_load((repository / ".pre-commit-config.yaml").read_text(encoding="utf-8"))["repos"]
    assert local["repo"] == "local"
    assert [hook["entry"] for hook in local["hooks"]] == commands
    assert {hook["language"] for hook in local["hooks"]} == {"system"}, "a hook would download"


def test_codespell_finds_what_is_misspelt(repository: Path, tmp_path: Path) -> None:
    file = tmp_path / "words.md"
    file.write_text("It " + "rec" + "ieves one clip.\n", encoding="utf-8")
    done = subprocess.run(
        [sys.executable, "-m", "codespell_lib", "--toml", str(repository / "pyproject.toml"), str(file)],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 65 and "receives" in done.stdout


def test_the_table_of_advisories_names_the_locked_versions(repository: Path) -> None:
    """A lock that moves on must take the table with it: its date and its judgements are about these versions."""
    text = (repository / "docs" / "security.md").read_text(encoding="utf-8").split("## Dependencies", 1)[1]
    lock = (repository / "requirements.lock").read_text(encoding="utf-8")
    pins = dict(re.findall(r"^([A-Za-z0-9_.\-]+)==(\S+)", lock, re.MULTILINE))
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line[:2] == "| "]
    judged = 0
    for row in rows:
        if row[0] == "advisory":
            package, locked = row.index("package"), row.index("locked")
            continue
        names = [name for name in re.findall(r"[\w.-]+", row[package]) if name in pins]
        known = [name for name in names if row[locked].startswith(pins[name])]
        bundled = re.findall(r"PyAV ([\d.]+)|^([\d.]+) with", row[locked])
        assert known or (bundled and any(pins["av"] in found for found in bundled)), row
        judged += 1
    assert judged >= 20
