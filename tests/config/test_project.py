"""The project owns its paths: nobody else spells what lies below it."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from sora.config import CacheFolder, Project, find_project
from sora.core.errors import SettingsError

REPOSITORY = Path(__file__).resolve().parent.parent.parent
PATHS = {name for name, value in vars(Project).items() if isinstance(value, property)} | {"root"}
CALLS = {"server_home", "database", "log", "stage_counts"}
HELD_IN = ("project", "_project", "clone")  # variables and attributes that hold a Project
MODULES = sorted(
    path
    for folder in ("sora", "flows")
    for path in (REPOSITORY / folder).rglob("*.py")
    if not path.is_relative_to(REPOSITORY / "sora" / "config")
)


def _is_project(node: ast.expr) -> bool:
    if isinstance(node, ast.Call):
        return isinstance(node.func, ast.Name) and node.func.id == "Project"
    return (node.id if isinstance(node, ast.Name) else getattr(node, "attr", "")) in HELD_IN


def _of_a_project(node: ast.expr) -> bool:
    """Whether this is a place that a project names: `project.logs`, `project.log("x")`, `project.cache.models`."""
    if isinstance(node, ast.Call):
        node = node.func
    if not isinstance(node, ast.Attribute):
        return False
    if node.attr == "state":
        return not isinstance(node.value, ast.Name) or node.value.id not in ("self", "app", "request")
    return (node.attr in PATHS | CALLS and _is_project(node.value)) or _of_a_project(node.value)


def _literal(node: ast.expr) -> bool:
    return isinstance(node, ast.JoinedStr) or (isinstance(node, ast.Constant) and isinstance(node.value, str))


def _spelled(text: str) -> list[str]:
    """Path parts below a project that this code spells."""
    spelled = []
    for node in ast.walk(ast.parse(text)):
        if not (isinstance(node, ast.BinOp) and isinstance(node.op, ast.Div) and _literal(node.right)):
            continue
        place = ast.unparse(node.right)
        if _of_a_project(node.left) or place.strip("'\"").split("/")[0] == ".sora":
            spelled.append(f"{node.lineno}: {ast.unparse(node)}")
    return spelled


@pytest.mark.parametrize("path", MODULES, ids=lambda path: path.relative_to(REPOSITORY).as_posix())
def test_nobody_else_spells_a_path_of_the_project(path: Path) -> None:
    spelled = _spelled(path.read_text(encoding="utf-8"))
    assert not spelled, f"{path}: a property of sora.config.Project is to name {'; '.join(spelled)}"


@pytest.mark.parametrize(
    "code",
    [
        "project.state / 'run.lock'",
        "self.project.state / 'x'",
        "self._project.logs / f'{name}.log'",
        "project.cache.models / 'x'",
        "Project(root).prepared / 'x'",
        "project.server_home('mlflow') / 'mlflow.db'",
        "root / '.sora'",
        "(project.state / 'cache') / 'models'",
        "open(clone.root / 'dvc.lock')",
    ],
)
def test_a_spelled_path_is_seen(code: str) -> None:
    assert _spelled(code)


@pytest.mark.parametrize("code", ["project.logs / name", "work / 'fit'", "look.state == 'x'", "request.state / 2"])
def test_another_path_is_not(code: str) -> None:
    assert not _spelled(code)


def test_every_place_has_a_name_of_its_own() -> None:
    project = Project(Path("/p"))
    places = [getattr(project, name) for name in PATHS]
    flat = [place.root if isinstance(place, CacheFolder) else place for place in places]
    flat += [project.cache.models, project.cache.champion, *(project.database(name) for name in ("mlflow", "prefect"))]
    assert all(place.is_relative_to("/p") for place in flat)
    assert len(set(flat)) == len(flat)


def test_places_on_disk_stay() -> None:
    """Projects that older versions made go on: these places are a contract."""
    project = Project(Path())
    assert project.cache.models == Path(".sora/cache/models")
    assert project.cache.champion == Path(".sora/cache/champion.json")
    assert project.database("mlflow") == Path(".sora/mlflow/mlflow.db")
    assert project.database("prefect") == Path(".sora/prefect/prefect.db")
    assert project.artifacts == Path(".sora/mlflow/artifacts")
    assert project.log("worker") == Path(".sora/logs/worker.log")
    assert project.tune_study("log_loss-1") == Path(".sora/tune/log_loss-1.db")
    assert project.stage_counts("shards") == Path(".sora/stages/shards.json")
    names = {
        "secret": "secret",
        "tokens": "tokens.json",
        "init_note": "init.json",
        "run_lock": "run.lock",
        "run_note": "run.json",
        "up_lock": "up.lock",
        "alias_lock": "alias.lock",
        "backup_lock": "backup.lock",
        "services_lock": "services.lock",
        "services_use": "services.use",
        "services": "services.json",
        "journal": "stages/manifest.jsonl",
        "docs": "data_docs",
        "validation_side": "validation_side.json",
        "reference": "reference.json",
        "judged_splits": "judged_splits.json",
        "splits_copies": "splits",
        "check": "check",
        "audit": "audit",
        "tune": "tune",
        "tune_folds": "tune/folds",
        "tune_page": "tune/index.html",
        "tune_lock": "tune.lock",
        "inbox": "inbox",
        "work": "work",
        "training": "training",
        "last_evaluation": "last_evaluation",
        "last_nightly": "last_nightly.json",
        "alerted": "alerted.json",
        "last_backup": "last_backup.json",
    }
    assert {name: getattr(project, name) for name in names} == {
        name: Path(".sora") / place for name, place in names.items()
    }


def test_the_project_is_found_from_below(tmp_path: Path) -> None:
    below = tmp_path / "data" / "walk"
    below.mkdir(parents=True)
    with pytest.raises(SettingsError, match=r"no params\.yaml"):
        find_project(below)
    (tmp_path / "params.yaml").write_text("")
    assert find_project(below) == Project(tmp_path)


def test_a_project_without_readable_settings(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="can't read"):
        Project(tmp_path).settings()
