from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import pytest

from sora.config import Project
from sora.core.errors import RunActive, ServiceError
from sora.core.records import ModelVersion
from sora.dataset import versioning
from sora.operations import gc
from sora.operations.lock import run_lock
from sora.operations.needed import Versions, kept_numbers, objects_of
from sora.registry import Registry
from sora.registry.history import Move
from tests.registry.conftest import add_version, answers
from tests.servers import mlflow
from tests.videos import make_video


def tree(folder: Path) -> dict[str, bytes]:
    return {str(f.relative_to(folder)): f.read_bytes() for f in sorted(folder.rglob("*")) if f.is_file()}


def opened(registry: Versions) -> Callable[[], AbstractContextManager[Versions]]:
    return lambda: nullcontext(registry)


def of(version_number: int, *aliases: str, decision: str = "refused") -> ModelVersion:
    return ModelVersion(version_number, aliases, {}, "", "", decision, ())


def promoted(*numbers: int) -> list[Move]:
    return [Move(seq, "promote", number, None, "", "", "") for seq, number in enumerate(numbers, 1)]


def test_served_recent_and_those_a_rollback_leads_to_are_kept() -> None:
    versions = [of(1), of(2), of(3, "champion"), of(4), of(5), of(6, decision="pending"), of(7)]
    assert kept_numbers(versions, [], 1) == {3, 6, 7}
    assert kept_numbers(versions, promoted(1, 2, 3), 2) == {2, 3, 6, 7}
    assert kept_numbers(versions, promoted(1, 9, 3), 3) == {1, 3, 5, 6, 7}  # 9 was deleted before
    assert kept_numbers([], [], 5) == set()


class Unreachable:
    """MLflow is down in the middle."""

    tracking_uri = "http://127.0.0.1:9"

    def versions(self) -> list[ModelVersion]:
        return [of(1, "champion")]

    def history(self) -> list[Move]:
        return []

    def digests(self) -> dict[int, str]:
        return {}

    def restore_state(self, version: int) -> dict[str, Any]:
        raise ServiceError("MLflow does not answer")

    def delete_version(self, version: int) -> None:
        raise AssertionError("nothing may go")


def test_what_is_not_known_is_kept(prepared_project: Project) -> None:
    make_video(prepared_project.data / "wave" / "more.mp4", seed=60)
    versioning.add(prepared_project)
    (prepared_project.data / "wave" / "more.mp4").unlink()
    versioning.add(prepared_project)
    before = tree(prepared_project.root / ".dvc" / "cache")
    with pytest.raises(ServiceError, match="does not answer"):
        gc.collect(prepared_project, opened(Unreachable()), keep=1)
    assert tree(prepared_project.root / ".dvc" / "cache") == before


def test_an_unreadable_list_of_files_stops_it(prepared_project: Project) -> None:
    md5 = versioning.data_version(prepared_project)
    assert md5
    listed = prepared_project.root / ".dvc" / "cache" / "files" / "md5" / md5[:2] / f"{md5[2:]}.dir"
    listed.chmod(0o644)
    listed.write_text("{")
    with pytest.raises(ServiceError, match="is damaged"):
        objects_of(gc._objects(prepared_project), [versioning.state(prepared_project)])


def test_a_cache_that_other_projects_share_is_left_alone(prepared_project: Project, tmp_path: Path) -> None:
    shutil.move(prepared_project.root / ".dvc" / "cache", tmp_path / "shared")
    config = prepared_project.root / ".dvc" / "config"
    config.write_text(config.read_text().replace("[cache]\n", f"[cache]\n    dir = {tmp_path / 'shared'}\n"))
    (tmp_path / "shared" / "files" / "md5" / "ab").mkdir(exist_ok=True)
    draft = tmp_path / "shared" / "files" / "md5" / "ab" / "draft"
    draft.write_bytes(b"x")
    os.utime(draft, (0, 0))
    objects = gc._objects(prepared_project)
    assert objects == tmp_path / "shared" / "files" / "md5"
    assert list(gc._unused_objects(prepared_project, objects, set())) == []
    assert list(gc._unfinished_objects(prepared_project, objects)) == []


def test_what_no_version_needs_goes_before_the_registry_is_asked(
    prepared_project: Project, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    project = prepared_project
    log, work = project.state / "logs" / "mlflow.log", project.state / "work" / "0123"
    for folder in (log.parent, work):
        folder.mkdir(parents=True, exist_ok=True)
    log.write_bytes(b"a" * (gc.LOG_BYTES + 1))
    (work / "table").write_bytes(b"x" * 100)
    damaged = gc._objects(project) / "ab" / f"{'c' * 30}.damaged"
    damaged.parent.mkdir(exist_ok=True)
    damaged.write_bytes(b"x" * 10)
    for place in (work / "table", work, damaged):
        os.utime(place, (0, 0))
    temporary = tmp_path / "sora-tmp-reproduce-1"
    temporary.mkdir()
    (temporary / "copy").write_bytes(b"x" * 1000)
    before = tree(project.state), tree(gc._objects(project))

    def down() -> AbstractContextManager[Versions]:
        raise ServiceError("MLflow does not start")

    with pytest.raises(ServiceError, match="does not start"):
        gc.collect(project, down, dry_run=True)
    assert (tree(project.state), tree(gc._objects(project))) == before and temporary.is_dir()
    with pytest.raises(ServiceError, match="does not start"):
        gc.collect(project, down)
    assert not any(place.exists() for place in (work, damaged, temporary))
    assert log.stat().st_size == gc._LOG_END
    assert f"freed {gc.LOG_BYTES + 1 - gc._LOG_END + 100 + 10 + 1000:,} bytes" in capsys.readouterr().err


def test_the_whole_with_a_real_mlflow(
    prepared_project: Project, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    project = prepared_project
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    with mlflow(project.root) as (uri, _):
        registry = Registry(uri, "collected")
        wave, states = project.data / "wave", {}

        def step(number: int) -> None:
            versioning.add(project)
            states[number] = versioning.state(project)
            made = add_version(registry, tmp_path, f"model {number}".encode() * 1000)
            assert made == number
            registry.runs.log_state(registry.get(number).run_id, states[number])
            registry.set_decision(number, "refused", [])
            registry.fetch(number, project.state / "cache" / "models")

        step(1)
        extra = make_video(wave / "extra.mp4", seed=61)
        bytes_of_extra = hashlib.md5(extra.read_bytes()).hexdigest()
        step(2)
        extra.unlink()
        (wave / "g00_0.mp4").unlink()
        step(3)
        for number in (1, 3):
            registry.promote(number, cache=project.state / "cache" / "models", smoke=answers)
        old = project.state / "work" / "0123"
        young = project.state / "work" / "4567"
        for folder in (old, young):
            folder.mkdir(parents=True)
            (folder / "table.parquet").write_bytes(b"x" * 100)
        long_ago = time.time() - 30 * 86400
        for place in (old / "table.parquet", old):
            os.utime(place, (long_ago, long_ago))
        log = project.state / "logs" / "prefect.log"
        log.parent.mkdir(exist_ok=True)
        log.write_bytes(b"a" * gc.LOG_BYTES + b"the end")

        cache = project.root / ".dvc" / "cache" / "files" / "md5"
        object_of_extra = cache / bytes_of_extra[:2] / bytes_of_extra[2:]
        before = {name: size for name, size in _sizes(project.root).items() if "mlflow.db" not in name}
        dry = gc.collect(project, opened(registry), keep=1, dry_run=True)
        assert before == {name: size for name, size in _sizes(project.root).items() if "mlflow.db" not in name}
        assert any("version 2" in item["what"] for item in dry["items"])
        assert not any("version 1" in item["what"] or "version 3" in item["what"] for item in dry["items"])
        with run_lock(project), pytest.raises(RunActive):
            gc.collect(project, opened(registry), keep=1)
        assert object_of_extra.exists()

        run_of_2 = registry.get(2).run_id
        done = gc.collect(project, opened(registry), keep=1)
        assert done == dry
        freed = sum(before.values()) - sum(v for k, v in _sizes(project.root).items() if "mlflow.db" not in k)
        assert freed >= 0.9 * done["bytes"] > 0.8 * gc.LOG_BYTES
        assert not object_of_extra.exists()
        assert [one.version for one in registry.versions()] == [3, 1]
        assert sum(gc._size(place) for place in gc._artifacts(project.artifacts, run_of_2)) == 0
        assert not old.exists() and young.exists()
        assert log.read_bytes().endswith(b"the end") and log.stat().st_size < gc.LOG_BYTES
        assert len(list((project.state / "cache" / "models").iterdir())) == 2
        for number in (1, 3):
            restored = versioning.restore(project, registry.restore_state(number), tmp_path / f"restored{number}")
            assert tree(restored.prepared) == tree(project.prepared)
            assert (restored.data / "wave" / "g00_0.mp4").exists() == (number == 1)
        with pytest.raises(ServiceError):
            versioning.restore(project, states[2], tmp_path / "restored2")
        assert gc.collect(project, opened(registry), keep=1)["bytes"] == 0
        registry.close()


def _sizes(root: Path) -> dict[str, int]:
    return {str(f.relative_to(root)): f.stat().st_size for f in root.rglob("*") if f.is_file()}
