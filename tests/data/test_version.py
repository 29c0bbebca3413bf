from __future__ import annotations

import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from sora.data import manifest, version
from sora.data.shards import ShardSet
from sora.errors import DiskFull, InputError, NotTrainable, RunActive, ServiceError, SettingsError
from sora.settings import Project
from tests.videos import make_video


def counts(project: Project, stage: str) -> dict[str, int]:
    return json.loads((project.state / "stages" / f"{stage}.json").read_text())


def tree(folder: Path) -> dict[str, bytes]:
    return {str(f.relative_to(folder)): f.read_bytes() for f in sorted(folder.rglob("*")) if f.is_file()}


# --- data -----------------------------------------------------------------------------------------------------------


def test_same_bytes_same_version_and_one_more_video_another(fresh_project: Project) -> None:
    first = version.data_version(fresh_project)
    assert first and version.add(fresh_project) == first
    make_video(fresh_project.data / "wave" / "new é 1.mp4", seed=99)
    second = version.add(fresh_project)
    assert second != first
    (fresh_project.data / "wave" / "new é 1.mp4").unlink()
    assert version.add(fresh_project) == first


def test_links_are_never_replaced_and_lost_ones_are_named(fresh_project: Project, tmp_path: Path) -> None:
    outside = make_video(tmp_path / "outside" / "a.mp4", seed=77)
    link = fresh_project.data / "wave" / "link.mp4"
    link.symlink_to(outside)
    (fresh_project.data / "linked").symlink_to(outside.parent)
    version.add(fresh_project)
    assert link.is_symlink() and outside.is_file()
    outside.unlink()
    with pytest.raises(InputError, match="leads nowhere"):
        version.add(fresh_project)


def test_a_linked_data_folder_is_refused(fresh_project: Project, tmp_path: Path) -> None:
    fresh_project.data.rename(tmp_path / "elsewhere")
    fresh_project.data.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(InputError, match="is a link"):
        version.add(fresh_project)


def test_a_pipe_among_the_videos_is_refused_instead_of_waited_for(fresh_project: Project) -> None:
    os.mkfifo(fresh_project.data / "wave" / "pipe.mp4")
    with pytest.raises(InputError, match="no regular file"):
        version.add(fresh_project)


def test_files_that_dvc_leaves_out_are_noticed(fresh_project: Project) -> None:
    with (fresh_project.root / ".dvcignore").open("a") as ignore:
        ignore.write("g00_0.mp4\n")
    with pytest.raises(ServiceError, match="8 files, but DVC recorded 6"):
        version.add(fresh_project)


def test_a_damaged_data_dvc_is_named(fresh_project: Project) -> None:
    fresh_project.data_dvc.write_text("outs: []\n")
    with pytest.raises(InputError, match=r"data\.dvc"):
        version.data_version(fresh_project)


# --- stages ---------------------------------------------------------------------------------------------------------


def test_unchanged_runs_nothing_and_training_parameters_rerun_nothing(prepared_project: Project) -> None:
    assert version.reproduce(prepared_project) == []
    text = prepared_project.params_file.read_text()
    prepared_project.params_file.write_text(text.replace("epochs: 30", "epochs: 3").replace("workers: 0", "workers: 1"))
    assert version.reproduce(prepared_project) == []
    assert version.status(prepared_project) == {}


def test_an_added_video_is_decoded_alone_and_rewrites_its_bucket_alone(prepared_project: Project) -> None:
    before = {f.name: f.stat().st_ino for f in prepared_project.shards.glob("*.npy")}
    make_video(prepared_project.data / "wave" / "g01_9.mp4", seed=50)
    version.add(prepared_project)
    assert version.reproduce(prepared_project) == ["manifest", "validate", "shards"]
    made = counts(prepared_project, "shards")
    assert (made["decoded"], made["reused"], made["buckets_written"]) == (1, 8, 1)
    after = {f.name: f.stat().st_ino for f in prepared_project.shards.glob("*.npy")}
    assert len(after.keys() - before.keys()) == 1
    assert len(manifest.read(prepared_project.manifest)) == 9
    assert len(ShardSet.open(prepared_project.shards).index) == 9


def test_from_scratch_in_another_folder_the_same_bytes(prepared_project: Project, tmp_path: Path) -> None:
    other = Project(tmp_path / "other")
    shutil.copytree(prepared_project.root, other.root, symlinks=True)
    (other.root / "dvc.lock").unlink()
    assert version.reproduce(other, force=True) == ["manifest", "validate", "shards"]
    assert counts(other, "shards")["decoded"] == 8
    assert tree(other.prepared) == tree(prepared_project.prepared)
    lock = (other.root / "dvc.lock").read_text()
    assert lock == (prepared_project.root / "dvc.lock").read_text() and str(tmp_path) not in lock


def test_verdicts_of_earlier_data_come_with_their_pages(prepared_project: Project) -> None:
    """DVC's run cache would restore quarantine.json and leave the Data Docs of other data beside it."""
    text = prepared_project.params_file.read_text()
    for least in (4, 3):
        prepared_project.params_file.write_text(
            text.replace("min_videos_per_class: 3", f"min_videos_per_class: {least}")
        )
        assert "validate" in version.reproduce(prepared_project)


def test_changed_code_reruns_its_stage_only(prepared_project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    hashes = version.code_hashes()
    monkeypatch.setattr(version, "code_hashes", lambda *_: {**hashes, "shards": "0" * 16})
    assert version.reproduce(prepared_project) == ["shards"]


def test_a_set_that_can_not_be_trained_on_says_why(fresh_project: Project) -> None:
    for file in (fresh_project.data / "wave").iterdir():
        file.unlink()
    version.add(fresh_project)
    with pytest.raises(NotTrainable, match="too_few_classes"):
        version.reproduce(fresh_project)
    assert json.loads((fresh_project.state / "validation_side.json").read_text())["ok"] is False
    assert not fresh_project.quarantine.exists()


def test_missing_parameters_are_named_with_their_default(fresh_project: Project) -> None:
    settings = yaml.safe_load(fresh_project.params_file.read_text())
    del settings["shards"]
    fresh_project.params_file.write_text(yaml.safe_dump(settings))
    with pytest.raises(SettingsError, match=r"lacks shards\.buckets"):
        version.reproduce(fresh_project)


def test_killed_in_each_stage_it_ends_with_its_caller_and_the_next_run_completes(
    prepared_project: Project, tmp_path: Path
) -> None:
    expected = tree(prepared_project.prepared)
    shutil.rmtree(prepared_project.prepared)
    (prepared_project.root / "dvc.lock").unlink()
    call = "import sys; from pathlib import Path; from sora.settings import Project; from sora.data import version; "
    call += "version.reproduce(Project(Path(sys.argv[1])))"
    for stage in version.STAGES:
        started, hook = tmp_path / f"{stage}.started", tmp_path / f"{stage}.hook"
        hook.mkdir()
        (hook / "sitecustomize.py").write_text(  # Python reads it first: this stage begins, and then takes long
            "import os, sys, time\n"
            f"if sys.orig_argv[-2:] == ['sora.stages', {stage!r}]:\n"
            f"    open({str(started)!r}, 'w').write(str(os.getpid()))\n"
            "    import sora.stages\n"
            "    sora.stages._end_with_owner()\n"
            "    time.sleep(300)\n"
        )
        child = subprocess.Popen(
            [sys.executable, "-c", call, str(prepared_project.root)],
            env={**os.environ, "PYTHONPATH": str(hook)},
            stderr=subprocess.DEVNULL,
        )
        _until(lambda started=started: started.exists() and started.read_text())
        child.send_signal(signal.SIGKILL)
        child.wait()
        _until(lambda started=started: not _alive(int(started.read_text())))
    assert version.reproduce(prepared_project) == ["shards"]
    assert tree(prepared_project.prepared) == expected


def _alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().split()[2] != "Z"
    except FileNotFoundError:
        return False


def _until(condition, seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.05)


# --- remotes and states ---------------------------------------------------------------------------------------------


def test_a_clone_gets_data_and_shards_from_the_remote(prepared_project: Project, tmp_path: Path) -> None:
    version.push(prepared_project)
    clone = Project(tmp_path / "clone")
    shutil.copytree(prepared_project.root, clone.root, ignore=shutil.ignore_patterns("data", "prepared", "cache"))
    assert version.ensure_data(clone)
    assert not version.ensure_data(clone)
    assert tree(clone.data) == tree(prepared_project.data)
    version.pull(clone, ["shards"])
    assert tree(clone.shards) == tree(prepared_project.shards)


def test_without_data_the_clear_words(prepared_project: Project) -> None:
    shutil.rmtree(prepared_project.data)
    shutil.rmtree(prepared_project.root / ".dvc" / "cache")
    with pytest.raises(ServiceError, match="neither the cache nor the remote"):
        version.ensure_data(prepared_project)
    prepared_project.data_dvc.unlink()
    with pytest.raises(InputError, match="neither data/"):
        version.ensure_data(prepared_project)


def test_an_earlier_state_comes_back_beside_the_project(prepared_project: Project, tmp_path: Path) -> None:
    saved = json.loads(json.dumps(version.state(prepared_project)))
    assert saved["git_commit"] and saved["git_dirty"] and saved["data_version"]
    old = tree(prepared_project.prepared), tree(prepared_project.data)
    (prepared_project.data / "wave" / "g00_0.mp4").unlink()
    version.add(prepared_project)
    shutil.rmtree(prepared_project.prepared)
    new = tree(prepared_project.root)
    restored = version.restore(prepared_project, saved, tmp_path / "restored")
    assert (tree(restored.prepared), tree(restored.data)) == old
    assert version.data_version(restored) == saved["data_version"]
    assert tree(prepared_project.root) == new
    bare = version.restore(prepared_project, saved, tmp_path / "bare", data=False)
    assert not bare.data.exists() and tree(bare.prepared) == old[0]
    with pytest.raises(InputError, match="not empty"):
        version.restore(prepared_project, saved, tmp_path / "bare")


def test_a_state_whose_objects_left_the_cache_comes_from_the_remote(prepared_project: Project, tmp_path: Path) -> None:
    saved = version.state(prepared_project)
    version.push(prepared_project)
    shutil.rmtree(prepared_project.root / ".dvc" / "cache")
    restored = version.restore(prepared_project, saved, tmp_path / "restored")
    assert tree(restored.data) == tree(prepared_project.data)
    shutil.rmtree(prepared_project.root / ".dvc" / "cache")
    shutil.rmtree(prepared_project.root / ".dvc-remote")
    with pytest.raises(ServiceError, match="neither the cache nor the remote"):
        version.restore(prepared_project, saved, tmp_path / "again")


def test_a_state_of_nothing_is_refused(prepared_project: Project, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="can't be restored"):
        version.restore(prepared_project, {"git_commit": None}, tmp_path / "restored")


# --- what DVC complains about ---------------------------------------------------------------------------------------


def test_a_killed_dvc_that_nobody_has_reaped_holds_nothing(fresh_project: Project) -> None:
    version.add(fresh_project)
    zombie = subprocess.Popen([sys.executable, "-c", ""])
    _until(lambda: not _alive(zombie.pid))  # it has ended, and its parent (this test) has not asked for it
    holder = {"pid": zombie.pid, "cmd": "dvc repro"}
    lock = fresh_project.root / ".dvc" / "tmp" / "rwlock"
    lock.write_text(json.dumps({"read": {}, "write": {str(fresh_project.data): holder}}))
    version.add(fresh_project)
    assert str(zombie.pid) not in lock.read_text()
    alive = {"pid": os.getpid(), "cmd": "dvc repro"}
    lock.write_text(json.dumps({"read": {}, "write": {str(fresh_project.data): alive}}))
    with pytest.raises(RunActive):
        version.add(fresh_project)
    zombie.wait()


def test_another_dvc_command_at_work(fresh_project: Project) -> None:
    (fresh_project.root / ".dvc" / "tmp").mkdir(exist_ok=True)
    with (fresh_project.root / ".dvc" / "tmp" / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(RunActive, match="another DVC command"):
            version.add(fresh_project)


def test_no_repository_and_no_remote(fresh_project: Project) -> None:
    config = fresh_project.root / ".dvc" / "config"
    config.write_text("[core]\n    analytics = false\n")
    with pytest.raises(InputError, match="no remote is configured"):
        version.push(fresh_project)
    shutil.rmtree(fresh_project.root / ".dvc")
    with pytest.raises(InputError, match="no DVC and git repository"):
        version.add(fresh_project)


@pytest.mark.skipif(os.getuid() != 0 or sys.platform != "linux", reason="needs to mount a small disk")
def test_a_full_disk_is_told_and_costs_nothing(fresh_project: Project, tmp_path: Path) -> None:
    cache = fresh_project.root / ".dvc" / "cache"
    shutil.rmtree(cache)
    cache.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(cache)]).returncode:
        pytest.skip("may not mount")
    try:
        before = tree(fresh_project.data)
        for number in range(4):
            (fresh_project.data / "wave" / f"big{number}.mp4").write_bytes(os.urandom(60_000))
        with pytest.raises(DiskFull):
            version.add(fresh_project)
        assert before.items() <= tree(fresh_project.data).items()
    finally:
        subprocess.run(["umount", str(cache)], check=True)
    version.add(fresh_project)
