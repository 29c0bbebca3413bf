"""The floors: imports point down only, heavy libraries stay behind their one owner, and the front door is light."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parent.parent
FLOORS: list[tuple[int, str]] = [
    # the longest matching prefix decides
    (0, "sora.core.errors"),
    (0, "sora.core.records"),
    (0, "sora.config.presets"),
    (0, "sora.config.settings"),
    (0, "sora.core.processes"),
    (0, "sora.core.progress"),
    (0, "sora.operations.lock"),
    (0, "sora.core.files"),
    (0, "sora.core.provenance"),
    (0, "sora.media.pool"),
    (0, "sora.config.credentials"),
    (0, "sora.core.doorkeeper"),
    (0, "sora.core.redaction"),
    (0, "sora.core.sandbox"),
    (1, "sora.client"),
    (1, "sora.video"),
    (1, "sora.data"),
    (2, "sora.model"),
    (3, "sora.stages"),
    (3, "sora.dataset.check"),
    (3, "sora.project"),
    (3, "sora.learning.training"),
    (3, "sora.judging.evaluation"),
    (3, "sora.learning.crossval"),
    (3, "sora.learning.audit"),
    (3, "sora.judging.report"),
    (3, "sora.judging.gate"),
    (3, "sora.registry"),
    (3, "sora.operations.nightly_log"),
    (3, "sora.operations.databases"),
    (4, "sora.operations.empty_database"),
    (4, "sora.operations.servers"),
    (4, "sora.serving"),
    (4, "sora.operations.doctor"),
    (4, "sora.operations.gc"),
    (4, "sora.operations.backup"),
    (4, "sora.operations.restore"),
    (5, "sora.runtime.lifecycle"),
    (5, "sora.runtime.representation"),
    (5, "sora.cli.supervisor"),
    (6, "sora.cli"),
    (6, "flows"),
]
# library → modules that may import it
OWNERS = {
    "av": ("sora.media.video.decode",),
    "cv2": ("sora.video", "sora.dataset.manifest", "sora.demo", "sora.judging.report"),
    "great_expectations": ("sora.dataset.quality.expectations", "sora.dataset.quality.docs"),
    "mlflow": ("sora.registry",),
    "dvc": (),  # a subprocess only
    "prefect": ("flows",),
    "fastapi": ("sora.serving",),
    "tensorflow": ("sora.learning.training", "sora.runtime.predictor", "sora.judging.evaluation"),
    "pickle": (),
    "cloudpickle": (),
}
MODULES = sorted(path for folder in ("sora", "flows") for path in (REPOSITORY / folder).rglob("*.py"))


def _name(path: Path) -> str:
    parts = path.relative_to(REPOSITORY).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def _floor(module: str) -> int | None:
    if module in ("sora", "sora.__version__"):
        return 0
    found = [(len(prefix), floor) for floor, prefix in FLOORS if f"{module}.".startswith(f"{prefix}.")]
    return max(found)[1] if found else None


def _imports(path: Path) -> list[tuple[str, int]]:
    found = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found += [(alias.name, node.lineno) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno} imports relatively"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
            is_package = (REPOSITORY / str(node.module).replace(".", "/")).is_dir()
            found += [(name, node.lineno) for name in names] if is_package else [(str(node.module), node.lineno)]
    return found


@pytest.mark.parametrize("path", MODULES, ids=_name)
def test_imports_point_down(path: Path) -> None:
    own = _floor(_name(path))
    assert own is not None, f"{_name(path)} has no floor"
    for imported, line in _imports(path):
        if imported.split(".")[0] in ("sora", "flows"):
            floor = _floor(imported)
            assert floor is not None and floor <= own, (
                f"{path}:{line} imports {imported} (floor {floor}) from floor {own}"
            )


@pytest.mark.parametrize("path", MODULES, ids=_name)
def test_libraries_have_one_owner(path: Path) -> None:
    for imported, line in _imports(path):
        allowed = OWNERS.get(imported.split(".")[0])
        if allowed is not None:
            ok = any(_name(path) == owner or _name(path).startswith(owner + ".") for owner in allowed)
            assert ok, f"{path}:{line} imports {imported}"


HEAVY = (
    "tensorflow",
    "keras",
    "great_expectations",
    "mlflow",
    "prefect",
    "dvc",
    "fastapi",
    "pandas",
    "numpy",
    "cv2",
    "av",
)


@pytest.mark.parametrize("arguments", [["--help"], ["run", "--help"], ["--version"]])
def test_help_imports_nothing_heavy(arguments: list[str]) -> None:
    code = (
        "import sys\nfrom sora.cli import main\n"
        f"try:\n    main({arguments!r})\nexcept SystemExit as end:\n    assert not end.code\n"
        f"print([name for name in {HEAVY!r} if name in sys.modules], file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stderr.strip().endswith("[]")


@pytest.mark.parametrize("path", MODULES, ids=_name)
def test_nothing_happens_at_import(path: Path) -> None:
    """Only imports, definitions and constants stand at module level: no calls whose result is thrown away."""
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        assert not (isinstance(node, ast.Expr) and isinstance(node.value, ast.Call)), (
            f"{path}:{node.lineno} calls at import"
        )
