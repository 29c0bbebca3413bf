"""The floors: imports point down only, heavy libraries stay behind their one owner, and the front door is light."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parent.parent
DRAWING = REPOSITORY / "docs" / "architecture.md"
BEGIN, END = "<!-- arrows: begin -->", "<!-- arrows: end -->"  # around the picture that this module draws
ROOM = re.compile(r"(\d) +(\S+) {2,}\S")  # a line of the table in docs/architecture.md
# library → modules that may import it
OWNERS = {
    "av": ("sora.media.video.ffmpeg",),
    "cv2": ("sora.media.video", "sora.judging.report"),
    "great_expectations": ("sora.dataset.quality.expectations", "sora.dataset.quality.docs"),
    "mlflow": ("sora.registry",),
    "dvc": (),  # a subprocess only
    "prefect": ("flows",),
    "optuna": ("sora.learning.study",),
    "fastapi": ("sora.serving",),
    "tensorflow": ("sora.learning.training", "sora.runtime.predictor", "sora.judging.evaluation"),
    "pickle": (),
    "cloudpickle": (),
}
MODULES = sorted(path for folder in ("sora", "flows", "benchmarks") for path in (REPOSITORY / folder).rglob("*.py"))


def _name(path: Path) -> str:
    parts = path.relative_to(REPOSITORY).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


@cache
def _rooms() -> dict[str, int]:
    """Room (a package or module) → its floor, as docs/architecture.md draws them."""
    text = DRAWING.read_text(encoding="utf-8")
    lines = [match for line in text.splitlines() if (match := ROOM.match(line))]
    return {match[2].rstrip("/").removesuffix(".py").replace("/", "."): int(match[1]) for match in lines}


def _room(module: str) -> str | None:
    found = [room for room in _rooms() if f"{module}.".startswith(f"{room}.")]
    return max(found, key=len, default=None)


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
    own = _room(_name(path))
    if own is None:
        assert path == REPOSITORY / "sora" / "__init__.py", f"{_name(path)} is in no room of docs/architecture.md"
        return
    for imported, line in _imports(path):
        if imported.split(".")[0] not in ("sora", "flows", "benchmarks") or imported in ("sora", "sora.__version__"):
            continue
        room = _room(imported)
        assert room is not None, f"{path}:{line} imports {imported}, which is in no room"
        assert room == own or _rooms()[room] < _rooms()[own], (
            f"{path}:{line} imports {imported} (floor {_rooms()[room]}) from floor {_rooms()[own]}"
        )


def _arrows() -> set[tuple[str, str]]:
    """(room, room that it imports), from the code."""
    arrows = set()
    for path in MODULES:
        own = _room(_name(path))
        rooms = {_room(imported) for imported, _ in _imports(path)}
        arrows |= {(own, other) for other in rooms if own is not None and other not in (None, own)}
    return arrows


def _picture(arrows: set[tuple[str, str]]) -> str:
    """A matrix: a row a room, a column for each room below it, a dot for an arrow."""
    rooms = list(_rooms())
    short = [room.rpartition(".")[2] for room in rooms]
    width, height = max(map(len, short)), max(map(len, short[1:]))
    head = [
        f"{'':{width}}  " + " ".join(name.rjust(height)[row] for name in short[1:]).rstrip() for row in range(height)
    ]
    rows = [
        f"{name:{width}}  " + " ".join("●" if (room, other) in arrows else "·" for other in rooms[1:]).rstrip()
        for room, name in zip(rooms, short, strict=True)
    ]
    return "```\n" + "\n".join([*head, *rows]) + f"\n```\n\n{len(rooms)} rooms, {len(arrows)} arrows.\n"


def _drawn() -> tuple[str, str, str]:
    """docs/architecture.md before the picture of the arrows, the picture, and what follows."""
    text = DRAWING.read_text(encoding="utf-8")
    before, _, rest = text.partition(f"{BEGIN}\n")
    picture, _, after = rest.partition(END)
    return f"{before}{BEGIN}\n", picture, f"{END}{after}"


def test_the_picture_has_the_arrows_of_the_imports() -> None:
    assert _drawn()[1] == _picture(_arrows()), "run `python -m tests.test_architecture` and look at what has changed"


def test_every_room_of_the_picture_is_there() -> None:
    for room in _rooms():
        place = REPOSITORY / room.replace(".", "/")
        assert place.is_dir() or place.with_suffix(".py").is_file(), f"docs/architecture.md draws {room}, which is gone"


@pytest.mark.parametrize("path", MODULES, ids=_name)
def test_libraries_have_one_owner(path: Path) -> None:
    if path.is_relative_to(REPOSITORY / "benchmarks"):
        return  # measures the libraries themselves, too
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
    "optuna",
    "fastapi",
    "pandas",
    "numpy",
    "cv2",
    "av",
)


@pytest.mark.parametrize("arguments", [["--help"], ["run", "--help"], ["tune", "--help"], ["--version"]])
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


if __name__ == "__main__":
    before, _, after = _drawn()
    DRAWING.write_text(before + _picture(_arrows()) + after, encoding="utf-8")
