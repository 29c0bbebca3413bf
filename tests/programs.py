"""Programs of Debian that some tests drive, and the one rule for a machine that lacks one.

A test that needs such a program is skipped where the program is absent. With SORA_CI=1, as `.ci/run` sets it, the same
skip is a failure: otherwise nobody would notice that the tests of the page or of the replicas never ran.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Generator
from typing import TypeVar

import pytest

# Names of the executable (the first one found is used), by Debian package.
PROGRAMS = {
    "chromium": ("chromium", "chromium-browser", "google-chrome"),
    "haproxy": ("haproxy",),
    "faketime": ("faketime",),
    "curl": ("curl",),
}
Report = TypeVar("Report", pytest.TestReport, pytest.CollectReport)
_NAMED = re.compile("|".join(PROGRAMS), re.IGNORECASE)


def find(package: str) -> str | None:
    """The path of a program of `PROGRAMS`; also where only root has it in its PATH."""
    path = os.pathsep.join([os.environ.get("PATH", os.defpath), "/usr/sbin", "/usr/local/sbin"])
    return next((found for name in PROGRAMS[package] if (found := shutil.which(name, path=path))), None)


def needs(package: str) -> pytest.MarkDecorator:
    """A mark for tests that drive a program of `PROGRAMS`."""
    return pytest.mark.skipif(
        find(package) is None, reason=f"{package} is not installed (Debian: apt install {package})"
    )


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    return _refused(report)


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(
    collector: pytest.Collector,
) -> Generator[None, pytest.CollectReport, pytest.CollectReport]:
    report = yield
    return _refused(report)


def _refused(report: Report) -> Report:
    """The report itself, or a failure where it skips for want of a program and SORA_CI forbids that."""
    if report.skipped and os.environ.get("SORA_CI") == "1" and isinstance(report.longrepr, tuple):
        reason = report.longrepr[2].removeprefix("Skipped: ")
        if _NAMED.search(reason):
            report.outcome = "failed"
            report.longrepr = f"SORA_CI=1 allows no skip for want of a program. {reason}"
    return report
