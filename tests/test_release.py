"""`make release` and `make audit`, with their own locked tools (installed once, from the package index)."""

from __future__ import annotations

import json
import os
import re
import subprocess
import tarfile
import threading
import zipfile
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from tests.serving.standing import free_port

pytestmark = pytest.mark.slow

VALIDATE = """
import sys
from cyclonedx.schema import SchemaVersion
from cyclonedx.validation.json import JsonStrictValidator
error = JsonStrictValidator(SchemaVersion.V1_6).validate_str(open(sys.argv[1], encoding="utf-8").read())
sys.exit(f"the schema refuses it: {error}" if error else 0)
"""


def _make(repository: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["make", "-s", *arguments],
        cwd=repository,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=600,
    )


@pytest.fixture(scope="module")
def tools(repository: Path) -> None:
    done = _make(repository, ".venv-release/installed", ".venv-audit/installed")
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.fixture(scope="module")
def archives(repository: Path, tools: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("dist")
    done = _make(repository, "release", f"DIST={folder}")
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


@pytest.mark.parametrize("name", ["requirements-release.lock", "requirements-audit.lock"])
def test_the_tools_are_locked_by_hash_and_name_no_index(repository: Path, name: str) -> None:
    text = (repository / name).read_text(encoding="utf-8")
    assert "http" not in text and "--index" not in text
    blocks = re.split(r"\n(?=[A-Za-z0-9])", text)[1:]
    assert blocks and all("--hash=sha256:" in block for block in blocks)


def test_beside_the_archives_lies_a_bill_of_materials_of_the_lock(repository: Path, archives: Path) -> None:
    assert sorted(it.name for it in archives.iterdir()) == [
        "sora-video-0.1.0.cdx.json", "sora_video-0.1.0-py3-none-any.whl", "sora_video-0.1.0.tar.gz",
    ]  # fmt: skip
    bill = archives / "sora-video-0.1.0.cdx.json"
    python = repository / ".venv-release" / "bin" / "python"
    done = subprocess.run([python, "-c", VALIDATE, str(bill)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr

    value = json.loads(bill.read_text(encoding="utf-8"))
    assert (value["bomFormat"], value["metadata"]["component"]["name"]) == ("CycloneDX", "sora-video")
    assert value["metadata"]["component"]["version"] == "0.1.0"
    listed = {
        (it["name"], it["version"]): {
            each["content"] for reference in it["externalReferences"] for each in reference.get("hashes", [])
        }
        for it in value["components"]
    }
    lock = (repository / "requirements.lock").read_text(encoding="utf-8")
    blocks = re.findall(r"^([A-Za-z0-9_.\-]+)==(\S+)((?: \\\n +--hash=sha256:\w+)+)", lock, re.MULTILINE)
    assert len(blocks) == len(re.findall(r"^[A-Za-z0-9]", lock, re.MULTILINE)) > 200
    locked = {(name, version): set(re.findall(r"sha256:(\w{64})", hashes)) for name, version, hashes in blocks}
    assert listed == locked
    assert {it["purl"] for it in value["components"]} == {f"pkg:pypi/{name}@{version}" for name, version in locked}


def test_the_archives_hold_the_packages_with_their_data(repository: Path, archives: Path) -> None:
    with zipfile.ZipFile(archives / "sora_video-0.1.0-py3-none-any.whl") as wheel:
        names = set(wheel.namelist())
    wanted = {str(it.relative_to(repository)) for top in ("sora", "flows") for it in (repository / top).rglob("*.py")}
    data = {"sora/templates/params.yaml", "sora/py.typed"} | {
        str(it.relative_to(repository)) for it in (repository / "sora" / "serving" / "page").iterdir() if it.is_file()
    }
    assert wanted | data <= names
    assert not any(name.startswith(("tests/", "benchmarks/")) for name in names)
    with tarfile.open(archives / "sora_video-0.1.0.tar.gz") as source:
        assert wanted | data <= {name.split("/", 1)[1] for name in source.getnames() if "/" in name}


@pytest.fixture
def lock(tmp_path: Path) -> Path:
    file = tmp_path / "one.lock"
    file.write_text(f"iniconfig==2.3.1 \\\n    --hash=sha256:{'0' * 64}\n", encoding="utf-8")
    return file


def test_where_no_advisory_service_answers_the_audit_says_that_nothing_was_checked(
    repository: Path, tools: None, lock: Path
) -> None:
    done = _make(repository, "audit", f"ARGS={lock} --timeout 5", HTTPS_PROXY=f"http://127.0.0.1:{free_port()}")
    assert done.returncode != 0 and "Error 3" in done.stderr
    assert "NOTHING WAS CHECKED: the advisory service pypi did not answer for one.lock" in done.stderr
    assert "docs/security.md" in done.stderr and "0 advisories" not in done.stdout


@pytest.fixture
def osv() -> Iterator[str]:
    """A service that speaks OSV's protocol and knows one advisory, about iniconfig 2.3.1."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            asked: dict[str, Any] = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            advisory = {
                "schema_version": "1.6.0", "id": "TEST-1", "aliases": ["TEST-ALIAS"],
                "modified": "2026-01-01T00:00:00Z",
                "summary": "made up", "affected": [{
                    "package": {"ecosystem": "PyPI", "name": "iniconfig"}, "versions": ["2.3.1"],
                    "ranges": [{"type": "ECOSYSTEM", "events": [{"introduced": "0"}, {"fixed": "9.9"}]}],
                }],
            }  # fmt: skip
            known = asked["package"]["name"] == "iniconfig"
            body = json.dumps({"vulns": [advisory]} if known else {}).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}/v1/query"
        finally:
            server.shutdown()
            thread.join()


def test_known_advisories_are_listed_and_fail(repository: Path, tools: None, lock: Path, osv: str) -> None:
    asked = f"{lock} --service osv --osv-url {osv}"
    done = _make(repository, "audit", f"ARGS={asked}", NO_PROXY="127.0.0.1", no_proxy="127.0.0.1")
    assert "one.lock: 1 packages asked about, 1 advisories" in done.stdout, done.stderr
    assert "iniconfig 2.3.1: TEST-1, TEST-ALIAS; fixed in 9.9" in done.stdout
    assert "Error 1" in done.stderr

    lock.write_text(lock.read_text().replace("iniconfig==2.3.1", "pluggy==1.7.0"), encoding="utf-8")
    done = _make(repository, "audit", f"ARGS={asked}", NO_PROXY="127.0.0.1", no_proxy="127.0.0.1")
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout == "one.lock: 1 packages asked about, 0 advisories\n"


def test_the_audit_covers_every_lock(repository: Path) -> None:
    text = (repository / "infra" / "audit.py").read_text(encoding="utf-8")
    locks = {str(it.relative_to(repository)) for it in [*repository.glob("*.lock"), *repository.glob("infra/*.lock")]}
    assert all(f'"{name}"' in text for name in locks if "requirements" in name)
