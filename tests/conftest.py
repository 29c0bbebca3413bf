from __future__ import annotations

from pathlib import Path

import pytest

from tests.programs import pytest_make_collect_report, pytest_runtest_makereport  # noqa: F401
from tests.projects import _prepared_template, _template, fresh_project, prepared_project  # noqa: F401
from tests.searches import _split_template, made_up, split_project  # noqa: F401
from tests.tiers import pytest_collection_modifyitems  # noqa: F401

REPOSITORY = Path(__file__).resolve().parent.parent
SHARED = REPOSITORY.parent / "shared" / "data"


@pytest.fixture(scope="session")
def repository() -> Path:
    return REPOSITORY


@pytest.fixture(scope="session")
def shared() -> Path:
    """Real footage beside the checkout; tests that use it skip where it is absent."""
    if not SHARED.is_dir():
        pytest.skip("../shared/data (real footage) is not here")
    return SHARED
