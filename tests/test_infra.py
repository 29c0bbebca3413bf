"""infra/: what can be held without a Docker engine. What was checked with other tools stands in infra/README.md."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
import yaml
from packaging.requirements import Requirement

from flows.slots import LEASE_STORAGE
from sora.config import Serve
from tests.programs import find, needs

SECRETS = ("PASSWORD", "SECRET", "TOKEN", "ACCESS_KEY", "AUTH_STRING")


@pytest.fixture(scope="module")
def infra(repository: Path) -> Path:
    return repository / "infra"


@pytest.fixture(scope="module")
def compose(infra: Path) -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load((infra / "compose.yaml").read_text())
    return found


@pytest.fixture(scope="module")
def services(compose: dict[str, Any]) -> dict[str, dict[str, Any]]:
    found: dict[str, dict[str, Any]] = compose["services"]
    return found


def test_compose_holds_to_the_specification(infra: Path) -> None:
    pytest.importorskip("check_jsonschema", reason="the specification's schema comes with check-jsonschema")
    command = ["check_jsonschema", "--builtin-schema", "vendor.compose-spec", str(infra / "compose.yaml")]
    done = subprocess.run([sys.executable, "-m", *command], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_every_part_is_there(services: dict[str, dict[str, Any]]) -> None:
    assert {"postgres", "storage", "prefect", "mlflow", "worker", "gpu-worker", "api"} <= set(services)
    assert services["gpu-worker"]["profiles"] == ["gpu"]
    (device,) = services["gpu-worker"]["deploy"]["resources"]["reservations"]["devices"]
    assert device["driver"] == "nvidia" and device["capabilities"] == ["gpu"]


def test_ports_are_on_loopback(services: dict[str, dict[str, Any]]) -> None:
    ports = [port for service in services.values() for port in service.get("ports", [])]
    assert ports and all(port.startswith("127.0.0.1:") for port in ports)


def test_no_secret_has_a_value_or_a_default(infra: Path) -> None:
    text = (infra / "compose.yaml").read_text()
    for name, rest in re.findall(r"\$\{(\w+)([^}]*)\}", text):
        if any(word in name for word in SECRETS):
            assert rest.startswith(":?"), f"{name} may be left out"
    for line in text.splitlines():
        key, _, value = line.strip().partition(": ")
        if any(word in key for word in SECRETS) and value and not key.startswith("#"):
            assert "${" in value, line
    given = dict(line.split("=", 1) for line in (infra / "env.example").read_text().splitlines() if "=" in line)
    assert not any(value for key, value in given.items() if not key.startswith("#"))
    required = set(re.findall(r"\$\{(\w+):\?", text))
    assert required <= set(given), required - set(given)


def test_containers_have_no_more_rights_than_they_need(services: dict[str, dict[str, Any]]) -> None:
    for name, service in services.items():
        assert service["security_opt"] == ["no-new-privileges:true"], name
        assert "privileged" not in service and service.get("network_mode") != "host", name
        if name != "postgres":  # its image changes the owner of an empty volume, then leaves root
            assert service["cap_drop"] == ["ALL"], name


def test_images_are_pinned_and_run_as_a_user(infra: Path, services: dict[str, dict[str, Any]]) -> None:
    for name, service in services.items():
        assert re.search(r":v?\d+\.\d+", service["image"]), name
    for file in ("Dockerfile", "Dockerfile.storage"):
        text = (infra / file).read_text()
        stages = re.findall(r"^FROM (\S+)(?: AS (\S+))?", text, re.MULTILINE)
        names = {stage for _, stage in stages}
        for image, _ in stages:
            assert image in names or re.search(r":v?\d+\.\d+", image), image
        assert re.search(r"^USER \d+:\d+$", text, re.MULTILINE), file
        assert "HEALTHCHECK" in text


def test_what_others_wait_for_can_be_healthy(services: dict[str, dict[str, Any]]) -> None:
    for name, service in services.items():
        for needed, how in service.get("depends_on", {}).items():
            assert needed in services, f"{name} waits for {needed}"
            if how["condition"] == "service_healthy":
                assert services[needed]["healthcheck"]["test"], needed
            else:
                assert how["condition"] == "service_completed_successfully" and services[needed]["restart"] == "no"


def test_health_checks_are_python_that_parses(infra: Path, services: dict[str, dict[str, Any]]) -> None:
    for service in services.values():
        test = service.get("healthcheck", {}).get("test", [])
        if test[1:3] == ["python", "-c"]:
            ast.parse(test[3])
    ast.parse((infra / "buckets.py").read_text())


def test_authentication_is_on_and_leases_are_on_disk(services: dict[str, dict[str, Any]], infra: Path) -> None:
    prefect = services["prefect"]["environment"]
    assert prefect["PREFECT_SERVER_API_AUTH_STRING"] == "sora:${PREFECT_PASSWORD:?set it in infra/.env}"
    assert prefect["PREFECT_SERVER_CSRF_PROTECTION_ENABLED"] == "true"
    assert "*" not in prefect["PREFECT_SERVER_CORS_ALLOWED_ORIGINS"]
    for name in ("worker", "api", "gpu-worker"):
        assert {"PREFECT_API_AUTH_STRING", "MLFLOW_TRACKING_PASSWORD"} <= services[name]["environment"].keys(), name
    assert LEASE_STORAGE.items() <= prefect.items()
    assert any(place.endswith(":/var/lib/sora") for place in services["prefect"]["volumes"])
    assert "--app-name=basic-auth" in services["mlflow"]["command"]
    assert "admin_password" not in (infra / "mlflow-auth.ini").read_text()
    assert "SORA_API_TOKEN" in services["api"]["environment"]


def test_files_that_are_mounted_or_copied_exist(repository: Path, services: dict[str, dict[str, Any]]) -> None:
    for service in services.values():
        for volume in service.get("volumes", []):
            source = volume.split(":")[0]
            if source.startswith("./infra"):
                assert (repository / source).is_file(), source
    allowed = (repository / ".dockerignore").read_text()
    for line in (repository / "infra" / "Dockerfile").read_text().splitlines():
        if line.startswith("COPY ") and "--from" not in line:
            for source in line.split()[1:-1]:
                assert (repository / source).exists(), source
                assert f"!{source.removeprefix('./')}" in allowed.splitlines(), source


@pytest.mark.parametrize(
    "name", ["requirements-dev.lock", "infra/requirements-server.lock", "infra/requirements-gpu.lock"]
)
def test_locks_have_hashes_and_no_index_addresses(repository: Path, name: str) -> None:
    main = _pins((repository / "requirements.lock").read_text())
    text = (repository / name).read_text()
    pins = _pins(text)
    assert pins and not (set(pins) & set(main)), "a package stands in two locks"
    assert "http" not in text and "--index" not in text
    for block in re.split(r"\n(?=[A-Za-z0-9])", text)[1:]:
        assert "--hash=sha256:" in block, block.split()[0]


def test_the_gpu_lock_has_what_tensorflow_asks_for_with_cuda(repository: Path) -> None:
    pins = _pins((repository / "infra" / "requirements-gpu.lock").read_text())
    asked = [Requirement(text) for text in metadata.requires("tensorflow") or []]
    cuda = [each for each in asked if each.marker and "and-cuda" in str(each.marker)]
    assert cuda
    for each in cuda:
        assert each.specifier.contains(pins[each.name]), each


def _pins(text: str) -> dict[str, str]:
    return dict(re.findall(r"^([A-Za-z0-9_.\-]+)(?:\[[^]]*\])?==(\S+)", text, re.MULTILINE))


def test_the_init_script_is_shell_that_parses(infra: Path) -> None:
    assert subprocess.run(["sh", "-n", str(infra / "postgres-init.sh")]).returncode == 0


def test_the_proxy_asks_what_the_api_answers(infra: Path) -> None:
    text = (infra / "haproxy.cfg").read_text()
    assert re.findall(r"^\s+(?:bind|server \w+) (\S+):\d+$", text, re.MULTILINE) == ["127.0.0.1"] * 3
    serve = Serve()
    seconds = {name: int(value) for name, value in re.findall(r"timeout (client|server) (\d+)s", text)}
    assert seconds["client"] > serve.upload_timeout and seconds["server"] > serve.request_timeout
    assert "uri /readyz hdr Host localhost" in text


@needs("haproxy")
def test_the_proxy_takes_its_configuration(infra: Path) -> None:
    haproxy = str(find("haproxy"))
    done = subprocess.run([haproxy, "-c", "-f", str(infra / "haproxy.cfg")], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
