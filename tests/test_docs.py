"""Facts that documents repeat from the code."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from sora.dataset.quality.rules import REJECTING

REPOSITORY = Path(__file__).resolve().parent.parent
FOLDERS = r"sora|flows|benchmarks|tests|infra|docs|demo"
DOCUMENTS = sorted(
    path for pattern in ("*.md", "docs/*.md", "docs/decisions/*.md", "infra/*.md") for path in REPOSITORY.glob(pattern)
)


@pytest.fixture(params=DOCUMENTS, ids=lambda path: str(path.relative_to(REPOSITORY)))
def document(request: pytest.FixtureRequest) -> Path:
    path: Path = request.param
    return path


def test_readme_lists_every_rule_with_its_fix(repository: Path) -> None:
    readme = (repository / "README.md").read_text(encoding="utf-8")
    assert dict(re.findall(r"^\| `(\w+)` \| (.+) \|$", readme, re.MULTILINE)) == REJECTING


def test_links_in_documents_lead_somewhere(document: Path) -> None:
    for target in re.findall(r"\]\(([^)#:]+)\)", document.read_text(encoding="utf-8")):
        assert (document.parent / target).exists(), f"{document.name} links to {target}"


def test_paths_in_documents_exist(repository: Path, document: Path) -> None:
    text = document.read_text(encoding="utf-8")
    for path, name in re.findall(rf"`((?:{FOLDERS})/[\w./-]*)(?:::(\w+))?`", text):
        if "NNNN" in path:  # a name to be given
            continue
        assert (repository / path).exists(), f"{document.name} names {path}"
        assert not name or f"def {name}(" in (repository / path).read_text(encoding="utf-8"), f"{path} lacks {name}"


def test_modules_and_names_in_documents_exist(repository: Path, document: Path) -> None:
    """`sora.store.building.build` in backticks, or <i>in a picture</i>, is a module or stands in one."""
    text = document.read_text(encoding="utf-8")
    for dotted in re.findall(rf"(?:`|<i>)(?:python -m )?((?:{FOLDERS})(?:\.\w+)+)", text):
        parts = dotted.split(".")
        for length in range(len(parts), 0, -1):
            place = repository.joinpath(*parts[:length])
            module = place.with_suffix(".py") if place.with_suffix(".py").is_file() else place / "__init__.py"
            if module.is_file():
                break
        else:
            pytest.fail(f"{document.name} names {dotted}")
        source = module.read_text(encoding="utf-8")
        for name in parts[length:]:
            known = rf"^\s*(?:(?:async )?def |class )?{name}\b(?: =|:|\(|$)|import .*\b{name}\b"
            assert re.search(known, source, re.MULTILINE), f"{document.name} names {dotted}; {module} has no {name}"


def test_tests_in_documents_exist(repository: Path, document: Path) -> None:
    code = "".join(path.read_text(encoding="utf-8") for path in (repository / "tests").rglob("test_*.py"))
    for name in re.findall(r"`(test_\w+)`", document.read_text(encoding="utf-8")):
        assert f"def {name}(" in code, f"{document.name} names {name}"


def test_the_map_of_the_state_is_complete(repository: Path) -> None:
    """Everything that the code puts below .sora/ has a row in docs/architecture.md."""
    text = (
        (repository / "docs" / "architecture.md").read_text(encoding="utf-8").split("## What lies in a project", 1)[1]
    )
    code = "".join(path.read_text() for folder in ("sora", "flows") for path in (repository / folder).rglob("*.py"))
    names = set(re.findall(r"\b(?:project|here|clone|self)\.state / \"([^\"]+)\"", code))
    assert len(names) > 15
    assert not {name for name in names if f"`{name}" not in text}


def test_every_decision_is_in_the_index(repository: Path) -> None:
    folder = repository / "docs" / "decisions"
    listed = re.findall(
        r"^\| \[(\d{4})\]\((\S+)\) \| (.+) \| (\d{4}-\d\d-\d\d) \|$", (folder / "README.md").read_text(), re.M
    )
    assert [name for _, name, _, _ in listed] == sorted(path.name for path in folder.glob("[0-9]*.md"))
    for number, name, title, date in listed:
        text = (folder / name).read_text(encoding="utf-8")
        assert text.startswith(f"# {number}. {title}\n\nDate: {date}"), name
        assert "**Context.**" in text and "**Decision.**" in text, name


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
