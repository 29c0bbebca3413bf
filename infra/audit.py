"""Asks an advisory service about every package of the locks (`make audit`); runs in pip-audit's own environment.

Exit status: 0 nothing is known, 1 something is known, 3 nothing could be asked. pip-audit itself ends with 1 for both
of the latter, and "no network" must never read as "no vulnerability".
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
LOCKS = (
    "requirements.lock",
    "requirements-dev.lock",
    "infra/requirements-server.lock",
    "infra/requirements-gpu.lock",
    "requirements-release.lock",
    "requirements-audit.lock",
)
KNOWN, UNREACHED = 1, 3


def main() -> int:
    parser = argparse.ArgumentParser(description="Ask an advisory service about every package of the locks.")
    parser.add_argument("locks", nargs="*", type=Path, default=[ROOT / name for name in LOCKS])
    parser.add_argument("--service", choices=("pypi", "osv"), default="pypi")
    parser.add_argument("--osv-url", help="a mirror of OSV's query address, with --service osv")
    parser.add_argument("--timeout", type=int, default=15, help="seconds for one request")
    options = parser.parse_args()
    known = 0
    for lock in options.locks:
        answer = ask(lock, options.service, options.osv_url, options.timeout)
        if isinstance(answer, str):
            print(
                f"audit: NOTHING WAS CHECKED: the advisory service {options.service} did not answer for {lock.name}.\n"
                f"  {answer}\n"
                "  Run `make audit` on a machine that reaches the service. What was looked up by hand stands, with its "
                "date, in docs/security.md under Dependencies.",
                file=sys.stderr,
            )
            return UNREACHED
        packages = answer["dependencies"]
        unasked = [each["name"] for each in packages if "skip_reason" in each]
        hits = [(each, advisory) for each in packages for advisory in each.get("vulns", [])]
        print(f"{lock.name}: {len(packages) - len(unasked)} packages asked about, {len(hits)} advisories")
        for each, advisory in hits:
            names = ", ".join([advisory["id"], *advisory["aliases"]])
            print(
                f"  {each['name']} {each['version']}: {names}; fixed in {', '.join(advisory['fix_versions']) or 'none'}"
            )
        if unasked:
            print(f"  not known to the service: {', '.join(unasked)}")
        known += len(hits)
    if known:
        print("Compare with docs/security.md under Dependencies: what is new there must be judged and written down.")
    return KNOWN if known else 0


def ask(lock: Path, service: str, osv_url: str | None, timeout: int) -> dict[str, Any] | str:
    """pip-audit's report about one lock, or why there is none."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.json"
        done = subprocess.run(
            [
                *(sys.executable, "-m", "pip_audit", "--requirement", str(lock), "--disable-pip", "--require-hashes"),
                *("--vulnerability-service", service, "--timeout", str(timeout), "--progress-spinner", "off"),
                *(("--osv-url", osv_url) if osv_url else ()),
                *("--format", "json", "--output", str(report), "--cache-dir", str(Path(folder) / "cache")),
            ],
            capture_output=True,
            text=True,
        )
        if report.is_file() and (text := report.read_text(encoding="utf-8")).strip():
            report_of: dict[str, Any] = json.loads(text)
            return report_of
    lines = [line for line in done.stderr.splitlines() if line.strip()]
    return lines[-1] if lines else f"pip-audit ended with {done.returncode} and said nothing"


if __name__ == "__main__":
    sys.exit(main())
