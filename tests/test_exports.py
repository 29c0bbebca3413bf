"""What a package offers: `__all__` names what is there, and nobody imports what another module keeps to itself."""

from __future__ import annotations

import ast
import importlib
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parent.parent
MODULES = sorted(path for folder in ("sora", "flows") for path in (REPOSITORY / folder).rglob("*.py"))


def _curated() -> list[str]:
    named = (path for path in MODULES if "\n__all__ = " in path.read_text(encoding="utf-8"))
    return [".".join(path.relative_to(REPOSITORY).with_suffix("").parts).removesuffix(".__init__") for path in named]


@pytest.mark.parametrize("name", _curated())
def test_every_export_is_there_once(name: str) -> None:
    module = importlib.import_module(name)
    assert len(set(module.__all__)) == len(module.__all__)
    for export in module.__all__:
        assert hasattr(module, export), export
        assert not export.startswith("_")


@pytest.mark.parametrize("path", MODULES, ids=lambda path: path.relative_to(REPOSITORY).as_posix())
def test_no_private_name_of_another_module_is_imported(path: Path) -> None:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] in ("sora", "flows"):
            private = [one.name for one in node.names if one.name.startswith("_") and not one.name.startswith("__")]
            assert not private, f"{path}:{node.lineno} imports {', '.join(private)} from {node.module}"
