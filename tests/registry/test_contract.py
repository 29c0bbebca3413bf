"""What the nightly relies on of a registry: the real one and the one of the tests behave alike."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

import sora.registry
from sora.core.errors import InputError, PromotionFailed
from sora.core.ledger import Row
from sora.core.records import Recipe
from sora.dataset import ledger
from sora.registry import Registry, RegistryPort
from tests.registry.conftest import answers, fails, recipe, report
from tests.registry.fake import FakeRegistry


@pytest.fixture(params=["fake", pytest.param("mlflow", marks=pytest.mark.slow)])
def port(request: pytest.FixtureRequest) -> Iterator[RegistryPort]:
    if request.param == "fake":
        yield FakeRegistry()
        return
    server: SimpleNamespace = request.getfixturevalue("server")
    name = "".join(c if c.isalnum() else "-" for c in request.node.name)
    registry = Registry(server.uri, f"contract-{name}")
    yield registry
    registry.close()


def added(port: RegistryPort, folder: Path, content: bytes) -> tuple[str, int]:
    """Run and version of a model file that holds `content`."""
    file = folder / "model.keras"
    file.write_bytes(content)
    run_id = port.runs.start_run(tags={"data_version": "d1", "test_digest": "ab12"})
    return run_id, port.register(run_id, file, recipe(), report(), "d1")


def test_an_empty_one(port: RegistryPort) -> None:
    assert (port.champion(), port.last_judged(), port.judged_ledger()) == (None, None, None)
    assert port.times_judged("ab12") == 0
    assert port.runs.own_tags(10) == []
    assert port.recover() is False


def test_a_decision_makes_a_run_a_judged_one(port: RegistryPort, tmp_path: Path) -> None:
    run_id, version = added(port, tmp_path, b"1")
    assert port.last_judged() is None
    port.runs.log_metrics(run_id, {"test/accuracy": 0.75, "val/accuracy": 0.5})
    port.set_decision(version, "refused", ["worse"])
    port.runs.finish(run_id)
    judged = port.last_judged()
    assert judged is not None
    assert (judged.run_id, judged.version, judged.decision) == (run_id, version, "refused")
    assert (judged.data_version, judged.metrics) == ("d1", {"test/accuracy": 0.75})
    assert (port.times_judged("ab12"), port.times_judged("cd34")) == (1, 0)
    with pytest.raises(InputError):
        port.times_judged("x' OR '1'='1")


def test_registered_again_it_is_the_same_version(port: RegistryPort, tmp_path: Path) -> None:
    run_id, version = added(port, tmp_path, b"once")
    assert port.register(run_id, tmp_path / "model.keras", recipe(), report(), "d1") == version
    with pytest.raises(InputError, match="sha256"):
        port.register(run_id, tmp_path / "model.keras", recipe(model_sha256="f" * 64), report(), "d1")


def test_what_is_fetched_is_what_was_registered(port: RegistryPort, tmp_path: Path) -> None:
    _, version = added(port, tmp_path, b"weights")
    file, its_recipe = port.fetch(version, tmp_path / "cache")
    digest = hashlib.sha256(b"weights").hexdigest()
    assert file == tmp_path / "cache" / digest / "model.keras" and file.read_bytes() == b"weights"
    assert its_recipe == recipe(model_sha256=digest)
    with pytest.raises(InputError, match="no version"):
        port.fetch(9, tmp_path / "cache")


def test_a_promotion_counts_only_after_its_smoke_test(port: RegistryPort, tmp_path: Path) -> None:
    (_, first), (_, second) = added(port, tmp_path, b"1"), added(port, tmp_path, b"2")
    cache = tmp_path / "cache"
    assert port.promote(first, cache=cache, smoke=answers)["champion"] == first
    with pytest.raises(PromotionFailed, match="golden answers differ"):
        port.promote(second, cache=cache, smoke=fails)
    assert port.champion() == first

    def interrupt(file: Path, recipe: Recipe) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        port.promote(second, cache=cache, smoke=interrupt)
    assert port.champion() == first
    assert port.promote(first, cache=cache, smoke=fails)["champion"] == first  # it is: nothing is tried
    assert not port.was_rolled_back(first)


def test_the_last_whole_ledger_counts(port: RegistryPort, tmp_path: Path) -> None:
    rows = [Row(f"{n:064x}", "train", "") for n in range(3)]
    for content, text in ((b"1", ledger.text(rows)), (b"2", "half a li")):
        run_id, version = added(port, tmp_path, content)
        port.runs.log_state(run_id, {"splits.csv": text, "git_commit": None})
        port.set_decision(version, "refused", [])
    recorded = port.judged_ledger()
    assert recorded is not None and (recorded.version, list(recorded.rows)) == (1, rows)


def test_runs(port: RegistryPort, tmp_path: Path) -> None:
    run_id = port.runs.start_run(tags={"data_version": "d1"})
    port.runs.set_tags(run_id, {"no_history": "true"})
    assert port.runs.own_tags(1) == [{"data_version": "d1", "no_history": "true"}]
    port.runs.log_text(run_id, "folder/name.txt", "text")
    assert port.runs.fetch_file(run_id, "folder/name.txt", tmp_path / "it") == hashlib.sha256(b"text").hexdigest()
    assert port.runs.run_page(run_id).endswith(f"/runs/{run_id}")
    port.runs.finish(run_id, "FAILED")
    port.runs.resume(run_id)
    with pytest.raises(InputError, match="no run"):
        port.runs.resume("0" * 32)


def test_exports() -> None:
    assert sorted(sora.registry.__all__) == sora.registry.__all__
    assert all(hasattr(sora.registry, name) for name in sora.registry.__all__)
    assert "Rest" not in sora.registry.__all__  # how it is spoken to is its own affair
