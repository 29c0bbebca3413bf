from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from sora.core.errors import AnswerIsNo, DiskFull, InputError, ServiceError
from sora.registry import Registry, champion_over_rest, fetch_over_rest
from tests.registry.conftest import add_version, answers, recipe, report


def test_an_empty_registry_has_no_versions(registry: Registry) -> None:
    assert registry.versions() == []
    assert registry.champion() is None
    assert registry.previous() is None
    assert registry.champion_ref() is None
    assert registry.last_judged() is None
    assert registry.times_judged("abc") == 0
    assert registry.history() == []


def test_register_stores_model_recipe_and_metrics(registry: Registry, tmp_path: Path) -> None:
    version = add_version(registry, tmp_path, b"weights", 0.75, data="0a1b")
    found = registry.get(version)
    assert found.metrics == {"test/accuracy": 0.75, "test/macro_f1": 0.75, "test/ece": 0.05}
    assert (found.version, found.aliases, found.decision, found.reasons) == (1, (), "pending", ())
    assert found.data_version == "0a1b"
    assert found.created.endswith("+00:00")
    assert registry.versions() == [found]


def test_a_servers_refusal_is_kept_with_the_version(
    registry: Registry, server: SimpleNamespace, tmp_path: Path
) -> None:
    version = add_version(registry, tmp_path, b"weights")
    registry.set_decision(version, "promoted", ["better"])
    registry.note_refusal(version, "answers differ " + "x" * 10_000)
    better, refused = registry.get(version).reasons
    assert better == "better" and refused.startswith("a server refused it: answers differ") and len(refused) < 2100
    registry.note_refusal(version, "now it does not load")
    assert registry.versions()[0].reasons == ("better", "a server refused it: now it does not load")
    with pytest.raises(ServiceError):
        Registry("http://127.0.0.1:9", registry.name).note_refusal(version, "nobody hears it")


def test_register_again_returns_the_same_version(registry: Registry, tmp_path: Path) -> None:
    file = tmp_path / "model.keras"
    file.write_bytes(b"once")
    run_id = registry.runs.start_run()
    first = registry.register(run_id, file, recipe(), report(), "d")
    assert registry.register(run_id, file, recipe(), report(), "d") == first
    assert len(registry.versions()) == 1


def test_a_recipe_of_another_model_is_refused(registry: Registry, tmp_path: Path) -> None:
    file = tmp_path / "model.keras"
    file.write_bytes(b"one")
    with pytest.raises(InputError, match="sha256"):
        registry.register("0" * 32, file, recipe(model_sha256="f" * 64), report(), "d")


def test_fetch_gives_the_bytes_and_the_recipe(registry: Registry, server: SimpleNamespace, tmp_path: Path) -> None:
    version = add_version(registry, tmp_path, b"weights" * 300_000)
    file, found = registry.fetch(version, tmp_path / "cache")
    digest = hashlib.sha256(b"weights" * 300_000).hexdigest()
    assert file == tmp_path / "cache" / digest / "model.keras"
    assert file.read_bytes() == b"weights" * 300_000
    assert found == recipe(model_sha256=digest)
    assert sorted(p.name for p in file.parent.iterdir()) == ["model.keras", "recipe.json"]
    assert fetch_over_rest(server.uri, registry.name, version, tmp_path / "cache") == (file, found)


def test_fetch_from_the_cache_sends_nothing_twice(registry: Registry, tmp_path: Path) -> None:
    version = add_version(registry, tmp_path, b"cached")
    file, _ = registry.fetch(version, tmp_path / "cache")
    before = file.stat().st_mtime_ns
    assert registry.fetch(version, tmp_path / "cache")[0].stat().st_mtime_ns == before


def test_a_damaged_cache_is_fetched_again(registry: Registry, tmp_path: Path) -> None:
    version = add_version(registry, tmp_path, b"whole")
    file, _ = registry.fetch(version, tmp_path / "cache")
    file.write_bytes(b"who")
    assert registry.fetch(version, tmp_path / "cache")[0].read_bytes() == b"whole"


@pytest.mark.parametrize("name", ["model.keras", "recipe.json"])
def test_an_altered_artifact_is_refused_and_leaves_nothing(
    registry: Registry, server: SimpleNamespace, tmp_path: Path, name: str
) -> None:
    version = add_version(registry, tmp_path, f"for {name}".encode())
    newest = max(server.artifacts.rglob(name), key=lambda p: p.stat().st_mtime_ns)
    newest.write_bytes(newest.read_bytes() + b" ")
    with pytest.raises(ServiceError, match="altered"):
        registry.fetch(version, tmp_path / "cache")
    assert not [p for p in (tmp_path / "cache").rglob("*") if p.name == name or p.name.endswith(".part")]


def test_a_full_disk_leaves_no_half_a_model(registry: Registry, tmp_path: Path) -> None:
    version = add_version(registry, tmp_path, b"x" * 5_000_000)
    small = tmp_path / "small"
    small.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", small], capture_output=True)
    if mounted.returncode:
        pytest.skip("needs the right to mount")
    try:
        with pytest.raises(DiskFull):
            registry.fetch(version, small)
        assert [p for p in small.rglob("*") if p.is_file() and p.name != "recipe.json"] == []
    finally:
        subprocess.run(["umount", small], check=True)


def test_a_version_that_sora_did_not_register_is_refused(registry: Registry, tmp_path: Path) -> None:
    add_version(registry, tmp_path, b"ours")
    run_id = registry.runs.start_run()
    source = registry._rest.get("runs/get", run_id=run_id)["run"]["info"]["artifact_uri"]
    registry._rest.post("model-versions/create", {"name": registry.name, "source": source, "run_id": run_id})
    with pytest.raises(ServiceError, match="no recorded digest"):
        registry.fetch(2, tmp_path / "cache")


@pytest.mark.parametrize("version", [7, -1, 0, 10**30])
def test_an_unknown_version_is_the_users_mistake(registry: Registry, tmp_path: Path, version: int) -> None:
    add_version(registry, tmp_path, b"only")
    with pytest.raises(InputError, match="no version"):
        registry.get(version)
    with pytest.raises(InputError, match="no version"):
        registry.promote(version, cache=tmp_path, smoke=answers)
    assert registry.champion() is None


def test_decisions_mark_runs_as_judged(registry: Registry, tmp_path: Path) -> None:
    add_version(registry, tmp_path, b"1")
    second = add_version(registry, tmp_path, b"2", 0.8, data="d2")
    assert registry.last_judged() is None
    registry.runs.set_tags(registry.get(second).run_id, {"test_digest": "ab12"})
    registry.runs.log_metrics(registry.get(second).run_id, {"test/accuracy": 0.8, "train/loss": 1.0})
    registry.set_decision(second, "refused", ["Genauigkeit 2 points lower"])
    judged = registry.last_judged()
    assert judged is not None
    assert (judged.version, judged.data_version, judged.decision) == (second, "d2", "refused")
    assert judged.metrics == {"test/accuracy": 0.8}
    assert judged.run_id == registry.get(second).run_id
    assert registry.get(second).reasons == ("Genauigkeit 2 points lower",)
    assert registry.times_judged("ab12") == 1
    assert registry.times_judged("cd34") == 0


def test_a_digest_can_not_carry_a_query(registry: Registry) -> None:
    with pytest.raises(InputError):
        registry.times_judged("x' OR '1'='1")


def test_delete_version_keeps_what_serves(registry: Registry, tmp_path: Path) -> None:
    first = add_version(registry, tmp_path, b"1")
    second = add_version(registry, tmp_path, b"2")
    third = add_version(registry, tmp_path, b"3")
    registry.promote(second, cache=tmp_path, smoke=answers)
    registry.promote(third, cache=tmp_path, smoke=answers)
    for kept in (second, third):
        with pytest.raises(AnswerIsNo):
            registry.delete_version(kept)
    registry.delete_version(first)
    assert [item.version for item in registry.versions()] == [third, second]


def test_champion_over_rest_says_what_a_server_shows(
    registry: Registry, server: SimpleNamespace, tmp_path: Path
) -> None:
    version = add_version(registry, tmp_path, b"served", 0.6, data="d9")
    assert champion_over_rest(server.uri, registry.name) is None
    registry.promote(version, cache=tmp_path, smoke=answers)
    found = champion_over_rest(server.uri, registry.name)
    assert found is not None
    assert (found.version, found.data_version, found.metrics["test/accuracy"]) == (version, "d9", 0.6)
    assert found.digest == hashlib.sha256(b"served").hexdigest()
    assert found.run_id == registry.get(version).run_id


def test_mlflow_itself_reads_the_model(registry: Registry, server: SimpleNamespace, tmp_path: Path) -> None:
    """In a process of its own: MLflow's client takes seconds to import, and Sora never does."""
    version = add_version(registry, tmp_path, b"mlflow's view")
    registry.promote(version, cache=tmp_path, smoke=answers)
    code = """
import json, sys, mlflow
from mlflow.models import Model
uri, name = sys.argv[1:]
mlflow.set_tracking_uri(uri)
folder = mlflow.artifacts.download_artifacts(f"models:/{name}@champion")
model = Model.load(folder)
found = mlflow.MlflowClient().get_model_version_by_alias(name, "champion")
logged = mlflow.get_logged_model(model.model_id)
print(json.dumps({
    "flavors": sorted(model.flavors), "recipe": model.metadata["recipe"],
    "shape": model.signature.inputs.inputs[0].shape,
    "file": open(f"{folder}/data/model.keras").read(), "status": str(logged.status), "run": found.run_id,
    "outputs": [o.model_id for o in mlflow.get_run(found.run_id).outputs.model_outputs] == [model.model_id],
}))
"""
    done = subprocess.run(
        [sys.executable, "-c", code, server.uri, registry.name], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    seen = json.loads(done.stdout.splitlines()[-1])
    assert seen["flavors"] == ["keras", "python_function"]
    assert seen["recipe"]["classes"] == ["läuft", "steht"]
    assert seen["shape"] == [-1, 4, 16, 16, 3]
    assert seen["file"] == "mlflow's view"
    assert seen["outputs"] is True
    assert seen["status"].endswith("READY")


def test_the_registry_imports_neither_mlflow_nor_tensorflow() -> None:
    code = "import sys, sora.registry; print({'mlflow', 'tensorflow', 'keras', 'pandas'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
