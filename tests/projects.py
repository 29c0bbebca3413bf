"""Small real projects for tests: `sora init` over tiny videos, made once and copied."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from sora.config import Project
from tests.videos import make_folder


@pytest.fixture(scope="session")
def _template(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    from sora.operations import project as projects

    folder = tmp_path_factory.mktemp("template")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DVC_SITE_CACHE_DIR", str(folder / "site"))
        videos = make_folder(folder / "videos", groups=4, frames=16)
        projects.init(folder / "project", videos)
        params = folder / "project" / "params.yaml"
        text = params.read_text().replace("height: 224", "height: 32").replace("width: 224", "width: 32")
        # A network, without features and optical flow: `tests/e2e/test_auto.py` has what `sora init` writes.
        text = text.replace("preset: auto", "preset: small").replace("flow: 16", "flow: 0")
        params.write_text(text.replace("group_pattern: null", "group_pattern: '/g(\\d+)_'"))
        yield folder / "project"


@pytest.fixture
def fresh_project(_template: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Project:
    """A project of eight videos (two classes, four groups), clips of 16x32x32, nothing prepared yet."""
    monkeypatch.setenv("DVC_SITE_CACHE_DIR", str(tmp_path / "site"))
    shutil.copytree(_template, tmp_path / "project", symlinks=True)
    return Project(tmp_path / "project")


@pytest.fixture(scope="session")
def _prepared_template(_template: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    from sora.dataset import versioning

    folder = tmp_path_factory.mktemp("prepared")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DVC_SITE_CACHE_DIR", str(folder / "site"))
        shutil.copytree(_template, folder / "project", symlinks=True)
        versioning.reproduce(Project(folder / "project"))
    return folder / "project"


@pytest.fixture
def prepared_project(_prepared_template: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Project:
    """`fresh_project` after its stages ran."""
    monkeypatch.setenv("DVC_SITE_CACHE_DIR", str(tmp_path / "site"))
    shutil.copytree(_prepared_template, tmp_path / "project", symlinks=True)
    return Project(tmp_path / "project")
