from __future__ import annotations

import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import pytest
import yaml

from sora.config import Project
from sora.core import provenance
from sora.core.errors import DiskFull, InputError, NotTrainable, RunActive, ServiceError, SettingsError
from sora.dataset import manifest, versioning
from sora.dataset.versioning.dvc import dvc, git
from sora.store.shards import ShardSet
from tests.videos import make_video


def counts(project: Project, stage: str) -> dict[str, int]:
    found: dict[str, int] = json.loads((project.state / "stages" / f"{stage}.json").read_text())
    return found


def tree(folder: Path) -> dict[str, bytes]:
    return {str(f.relative_to(folder)): f.read_bytes() for f in sorted(folder.rglob("*")) if f.is_file()}


# --- data -----------------------------------------------------------------------------------------------------------


def test_same_bytes_same_version_and_one_more_video_another(fresh_project: Project) -> None:
    first = versioning.data_version(fresh_project)
    assert first and versioning.add(fresh_project) == first
    make_video(fresh_project.data / "wave" / "new é 1.mp4", seed=99)
    second = versioning.add(fresh_project)
    assert second != first
    (fresh_project.data / "wave" / "new é 1.mp4").unlink()
    assert versioning.add(fresh_project) == first


def test_links_are_never_replaced_and_lost_ones_are_named(fresh_project: Project, tmp_path: Path) -> None:
    outside = make_video(tmp_path / "outside" / "a.mp4", seed=77)
    link = fresh_project.data / "wave" / "link.mp4"
    link.symlink_to(outside)
    (fresh_project.data / "linked").symlink_to(outside.parent)
    versioning.add(fresh_project)
    assert link.is_symlink() and outside.is_file()
    outside.unlink()
    with pytest.raises(InputError, match="leads nowhere"):
        versioning.add(fresh_project)


def test_a_linked_data_folder_is_refused(fresh_project: Project, tmp_path: Path) -> None:
    fresh_project.data.rename(tmp_path / "elsewhere")
    fresh_project.data.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(InputError, match="is a link"):
        versioning.add(fresh_project)


def test_a_pipe_among_the_videos_is_refused_instead_of_waited_for(fresh_project: Project) -> None:
    os.mkfifo(fresh_project.data / "wave" / "pipe.mp4")
    with pytest.raises(InputError, match="not a regular file"):
        versioning.add(fresh_project)


def test_files_that_dvc_leaves_out_are_noticed(fresh_project: Project) -> None:
    with (fresh_project.root / ".dvcignore").open("a") as ignore:
        ignore.write("g00_0.mp4\n")
    with pytest.raises(ServiceError, match="8 files, but DVC recorded 6"):
        versioning.add(fresh_project)


def test_a_damaged_data_dvc_is_named(fresh_project: Project) -> None:
    fresh_project.data_dvc.write_text("outs: []\n")
    with pytest.raises(InputError, match=r"data\.dvc"):
        versioning.data_version(fresh_project)


# --- stages ---------------------------------------------------------------------------------------------------------


def test_unchanged_runs_nothing_and_training_parameters_rerun_nothing(prepared_project: Project) -> None:
    assert versioning.reproduce(prepared_project) == []
    text = prepared_project.params_file.read_text()
    prepared_project.params_file.write_text(text.replace("epochs: 30", "epochs: 3").replace("workers: 0", "workers: 1"))
    assert versioning.reproduce(prepared_project) == []
    assert versioning.status(prepared_project) == {}


def test_an_added_video_is_decoded_alone_and_rewrites_its_bucket_alone(prepared_project: Project) -> None:
    before = {f.name: f.stat().st_ino for f in prepared_project.shards.glob("*.npy")}
    make_video(prepared_project.data / "wave" / "g01_9.mp4", seed=50)
    versioning.add(prepared_project)
    assert versioning.reproduce(prepared_project) == ["manifest", "validate", "shards", "features"]
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
    assert versioning.reproduce(other, force=True) == ["manifest", "validate", "shards", "features"]
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
        assert "validate" in versioning.reproduce(prepared_project)


def test_changed_code_reruns_its_stage_only(prepared_project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(provenance.STAGES, "shards", "shards-of-other-code")
    assert versioning.reproduce(prepared_project) == ["shards"]


def test_a_set_that_can_not_be_trained_on_says_why(fresh_project: Project) -> None:
    for file in (fresh_project.data / "wave").iterdir():
        file.unlink()
    versioning.add(fresh_project)
    with pytest.raises(NotTrainable, match="too_few_classes"):
        versioning.reproduce(fresh_project)
    assert json.loads((fresh_project.state / "validation_side.json").read_text())["ok"] is False
    assert not fresh_project.quarantine.exists()


def test_missing_parameters_are_named_with_their_default(fresh_project: Project) -> None:
    settings = yaml.safe_load(fresh_project.params_file.read_text())
    del settings["shards"]
    fresh_project.params_file.write_text(yaml.safe_dump(settings))
    with pytest.raises(SettingsError, match=r"lacks shards\.buckets"):
        versioning.reproduce(fresh_project)


def test_killed_in_each_stage_it_ends_with_its_caller_and_the_next_run_completes(
    prepared_project: Project, tmp_path: Path
) -> None:
    expected = tree(prepared_project.prepared)
    shutil.rmtree(prepared_project.prepared)
    (prepared_project.root / "dvc.lock").unlink()
    call = "import sys; from pathlib import Path; from sora.config import Project\n"
    call += "from sora.dataset import versioning; versioning.reproduce(Project(Path(sys.argv[1])))"
    for stage in versioning.stages_of(prepared_project):
        started, hook = tmp_path / f"{stage}.started", tmp_path / f"{stage}.hook"
        hook.mkdir()
        (hook / "sitecustomize.py").write_text(  # Python reads it first: this stage begins, and then takes long
            "import os, sys, time\n"
            f"if sys.orig_argv[-2:] == ['sora.stages', {stage!r}]:\n"
            f"    open({str(started)!r}, 'w').write(str(os.getpid()))\n"
            "    from sora.dataset.versioning import stages\n"
            "    stages._end_with_owner()\n"
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
    assert versioning.reproduce(prepared_project) == ["features"]
    assert tree(prepared_project.prepared) == expected


def _alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().split()[2] != "Z"
    except FileNotFoundError:
        return False


def _until(condition: Callable[..., object], seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.05)


# --- remotes and states ---------------------------------------------------------------------------------------------


def test_a_clone_gets_data_and_shards_from_the_remote(prepared_project: Project, tmp_path: Path) -> None:
    versioning.push(prepared_project)
    clone = Project(tmp_path / "clone")
    shutil.copytree(prepared_project.root, clone.root, ignore=shutil.ignore_patterns("data", "prepared", "cache"))
    assert versioning.ensure_data(clone)
    assert not versioning.ensure_data(clone)
    assert tree(clone.data) == tree(prepared_project.data)
    versioning.pull(clone, ["shards"])
    assert tree(clone.shards) == tree(prepared_project.shards)


def test_without_data_the_clear_words(prepared_project: Project) -> None:
    shutil.rmtree(prepared_project.data)
    shutil.rmtree(prepared_project.root / ".dvc" / "cache")
    with pytest.raises(ServiceError, match="neither the cache nor the remote"):
        versioning.ensure_data(prepared_project)
    prepared_project.data_dvc.unlink()
    with pytest.raises(InputError, match="neither data/"):
        versioning.ensure_data(prepared_project)


def test_an_earlier_state_comes_back_beside_the_project(prepared_project: Project, tmp_path: Path) -> None:
    saved = json.loads(json.dumps(versioning.state(prepared_project)))
    assert saved["git_commit"] and saved["git_dirty"] and saved["data_version"]
    old = tree(prepared_project.prepared), tree(prepared_project.data)
    (prepared_project.data / "wave" / "g00_0.mp4").unlink()
    versioning.add(prepared_project)
    shutil.rmtree(prepared_project.prepared)
    new = tree(prepared_project.root)
    restored = versioning.restore(prepared_project, saved, tmp_path / "restored")
    assert (tree(restored.prepared), tree(restored.data)) == old
    assert versioning.data_version(restored) == saved["data_version"]
    assert tree(prepared_project.root) == new
    bare = versioning.restore(prepared_project, saved, tmp_path / "bare", data=False)
    assert not bare.data.exists() and tree(bare.prepared) == old[0]
    with pytest.raises(InputError, match="not empty"):
        versioning.restore(prepared_project, saved, tmp_path / "bare")


def test_a_state_whose_objects_left_the_cache_comes_from_the_remote(prepared_project: Project, tmp_path: Path) -> None:
    saved = versioning.state(prepared_project)
    versioning.push(prepared_project)
    shutil.rmtree(prepared_project.root / ".dvc" / "cache")
    restored = versioning.restore(prepared_project, saved, tmp_path / "restored")
    assert tree(restored.data) == tree(prepared_project.data)
    shutil.rmtree(prepared_project.root / ".dvc" / "cache")
    shutil.rmtree(prepared_project.root / ".dvc-remote")
    with pytest.raises(ServiceError, match="neither the cache nor the remote"):
        versioning.restore(prepared_project, saved, tmp_path / "again")


def test_a_state_of_nothing_is_refused(prepared_project: Project, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="can't be restored"):
        versioning.restore(prepared_project, {"git_commit": None}, tmp_path / "restored")


# --- what DVC complains about ---------------------------------------------------------------------------------------


def test_a_killed_dvc_that_nobody_has_reaped_holds_nothing(fresh_project: Project) -> None:
    versioning.add(fresh_project)
    zombie = subprocess.Popen([sys.executable, "-c", ""])
    _until(lambda: not _alive(zombie.pid))  # it has ended, and its parent (this test) has not asked for it
    holder = {"pid": zombie.pid, "cmd": "dvc repro"}
    lock = fresh_project.root / ".dvc" / "tmp" / "rwlock"
    lock.write_text(json.dumps({"read": {}, "write": {str(fresh_project.data): holder}}))
    versioning.add(fresh_project)
    assert str(zombie.pid) not in lock.read_text()
    alive = {"pid": os.getpid(), "cmd": "dvc repro"}
    lock.write_text(json.dumps({"read": {}, "write": {str(fresh_project.data): alive}}))
    with pytest.raises(RunActive):
        versioning.add(fresh_project)
    zombie.wait()


def test_another_dvc_command_at_work(fresh_project: Project) -> None:
    (fresh_project.root / ".dvc" / "tmp").mkdir(exist_ok=True)
    with (fresh_project.root / ".dvc" / "tmp" / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(RunActive, match="another DVC command"):
            versioning.add(fresh_project)


def test_no_repository_and_no_remote(fresh_project: Project) -> None:
    config = fresh_project.root / ".dvc" / "config"
    config.write_text("[core]\n    analytics = false\n")
    with pytest.raises(InputError, match="no remote is configured"):
        versioning.push(fresh_project)
    shutil.rmtree(fresh_project.root / ".dvc")
    with pytest.raises(InputError, match="no DVC and git repository"):
        versioning.add(fresh_project)


def test_a_remote_whose_package_is_missing_names_it(fresh_project: Project) -> None:
    if find_spec("dvc_s3"):
        pytest.skip("dvc-s3 is installed")
    versioning.add(fresh_project)
    dvc(fresh_project.root, "remote", "add", "--default", "team", "s3://bucket/sora")
    with pytest.raises(InputError, match="dvc-s3") as refused:
        versioning.push(fresh_project, ["data.dvc"])
    assert refused.value.fix == "pip install 'sora-video[s3]'"


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
            versioning.add(fresh_project)
        assert before.items() <= tree(fresh_project.data).items()
    finally:
        subprocess.run(["umount", str(cache)], check=True)
    versioning.add(fresh_project)


# --- damaged clips --------------------------------------------------------------------------------------------------


def overwrite(file: Path, *, quietly: bool = False) -> None:
    """7/8 of a file become noise, in place. `quietly`: as a disk forgets bits; size, time and inode stay the same."""
    before = file.stat()
    file.chmod(0o644)
    with file.open("r+b") as stream:
        stream.seek(before.st_size // 8)
        stream.write(os.urandom(before.st_size - before.st_size // 8))
    if quietly:
        os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    file.chmod(before.st_mode)


@pytest.mark.parametrize("quietly", [False, True])
def test_noise_in_the_shards_never_becomes_the_recorded_state(
    prepared_project: Project, quietly: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    before, lock = tree(prepared_project.prepared), (prepared_project.root / "dvc.lock").read_text()
    assert versioning.reproduce(prepared_project) == []
    for file in prepared_project.shards.glob("bucket-*.npy"):
        overwrite(file, quietly=quietly)
    assert versioning.reproduce(prepared_project) == ["shards"]
    assert tree(prepared_project.prepared) == before
    assert (prepared_project.root / "dvc.lock").read_text() == lock
    assert versioning.status(prepared_project) == {}
    assert counts(prepared_project, "shards")["damaged"] == 8
    assert "clips of 1 of its 1 videos are damaged; they are made again" in capsys.readouterr().err


def test_noise_in_the_shards_and_a_new_video(prepared_project: Project, tmp_path: Path) -> None:
    for file in prepared_project.shards.glob("bucket-*.npy"):
        overwrite(file)
    make_video(prepared_project.data / "wave" / "g01_9.mp4", seed=50)
    versioning.add(prepared_project)
    assert versioning.reproduce(prepared_project) == ["manifest", "validate", "shards", "features"]
    assert not ShardSet.open(prepared_project.shards).damage()
    repaired, lock = tree(prepared_project.prepared), (prepared_project.root / "dvc.lock").read_text()
    versioning.reproduce(prepared_project, force=True)
    assert (tree(prepared_project.prepared), (prepared_project.root / "dvc.lock").read_text()) == (repaired, lock)


def test_damage_found_by_dvc_repro_by_hand(prepared_project: Project) -> None:
    before = tree(prepared_project.prepared)
    lock = (prepared_project.root / "dvc.lock").read_text()
    next(prepared_project.shards.glob("bucket-*.npy")).unlink()
    (prepared_project.shards / "index.parquet").write_bytes(b"PAR1 half")
    dvc(prepared_project.root, "repro", "--no-run-cache")
    assert tree(prepared_project.prepared) == before
    assert (prepared_project.root / "dvc.lock").read_text() == lock
    # The buckets that were left are known by the MD5s that DVC recorded: one video alone was decoded.
    assert counts(prepared_project, "shards")["decoded"] == 1


# --- torn files of DVC ----------------------------------------------------------------------------------------------

CONFLICT = "<<<<<<< HEAD\nouts: []\n=======\nouts: {}\n>>>>>>> theirs\n"
TEARS: dict[str, Callable[[str], str | bytes]] = {
    "half": lambda text: text[: len(text) // 2],
    "cut in an MD5": lambda text: text[: text.rindex("md5: ") + 15],
    "empty": lambda text: "",
    "no YAML": lambda text: "outs: [",
    "another YAML": lambda text: "- 1\n",
    "conflict": lambda text: CONFLICT,
    "zeros": lambda text: "\0" * len(text),
    "no text": lambda text: b"\xff\xfe\x00",
}


@pytest.mark.parametrize("name", ["data.dvc", "dvc.lock"])
@pytest.mark.parametrize("tear", TEARS)
def test_torn_files_are_named_with_the_way_back(prepared_project: Project, name: str, tear: str) -> None:
    file = prepared_project.root / name
    torn = TEARS[tear](file.read_text())
    file.write_bytes(torn if isinstance(torn, bytes) else torn.encode())
    calls: list[Callable[[Project], object]] = [
        versioning.add,
        versioning.reproduce,
        versioning.state,
        versioning.status,
        versioning.require_whole,
    ]
    if name == "data.dvc":
        calls.append(versioning.data_version)
    for call in calls:
        with pytest.raises(InputError) as caught:
            call(prepared_project)
        assert str(file) in caught.value.message
        # `sora init` leaves data.dvc to git, and nobody has committed a dvc.lock yet.
        wanted = "git checkout HEAD -- data.dvc" if name == "data.dvc" else "remove dvc.lock"
        assert wanted in caught.value.fix


def test_the_way_back_that_is_named_works(prepared_project: Project) -> None:
    lock = prepared_project.root / "dvc.lock"
    whole = prepared_project.data_dvc.read_text(), lock.read_text()
    prepared_project.data_dvc.write_text(CONFLICT)
    git(prepared_project.root, "checkout", "HEAD", "--", "data.dvc")
    lock.write_text(whole[1][:300])
    lock.unlink()
    versioning.add(prepared_project)
    versioning.reproduce(prepared_project)
    assert (prepared_project.data_dvc.read_text(), lock.read_text()) == whole
    assert counts(prepared_project, "shards")["decoded"] == 0


def test_a_version_comes_back_beside_torn_files(prepared_project: Project, tmp_path: Path) -> None:
    """Its own data.dvc and dvc.lock are stored with it: what stands in the project does not matter."""
    saved = versioning.state(prepared_project)
    for name in ("data.dvc", "dvc.lock"):
        (prepared_project.root / name).write_text("outs: [")
    restored = versioning.restore(prepared_project, saved, tmp_path / "restored")
    assert tree(restored.data) == tree(prepared_project.data)
    assert versioning.code_notes(prepared_project, saved) == ["there were uncommitted changes then"]


def test_without_data_and_git_a_torn_data_dvc_is_said_to_be_lost(prepared_project: Project) -> None:
    prepared_project.data_dvc.write_text("outs:\n- md5: 12")
    shutil.rmtree(prepared_project.data)
    shutil.rmtree(prepared_project.root / ".git")
    with pytest.raises(InputError, match="is torn") as caught:
        versioning.ensure_data(prepared_project)
    assert "from another clone" in caught.value.fix


# --- damaged objects of the cache -----------------------------------------------------------------------------------


def object_of(project: Project, md5: str) -> Path:
    return project.root / ".dvc" / "cache" / "files" / "md5" / md5[:2] / md5[2:]


def data_object(project: Project) -> Path:
    """Of data/wave/g00_0.mp4."""
    listing = json.loads(object_of(project, f"{versioning.data_version(project)}.dir").read_text())
    [md5] = [entry["md5"] for entry in listing if entry["relpath"] == "wave/g00_0.mp4"]
    return object_of(project, md5)


def test_a_damaged_object_is_replaced_from_the_projects_own_files(
    prepared_project: Project, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    saved = versioning.state(prepared_project)
    overwrite(data_object(prepared_project), quietly=True)
    restored = versioning.restore(prepared_project, saved, tmp_path / "restored")
    assert tree(restored.data) == tree(prepared_project.data)
    said = capsys.readouterr().err
    assert str(data_object(prepared_project)) in said and "data/wave/g00_0.mp4" in said and "damaged" in said


def test_damaged_objects_are_fetched_from_the_remote(
    prepared_project: Project, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of a video, of the list of videos, of all buckets; the project has moved on and has none of them itself."""
    saved = versioning.state(prepared_project)
    old = tree(prepared_project.data), tree(prepared_project.prepared)
    versioning.push(prepared_project)
    listing = object_of(prepared_project, f"{saved['data_version']}.dir")
    overwrite(data_object(prepared_project), quietly=True)
    for file in versioning.recorded_files(prepared_project, prepared_project.shards).values():
        overwrite(object_of(prepared_project, file), quietly=True)
    overwrite(listing, quietly=True)
    shutil.rmtree(prepared_project.data)
    shutil.rmtree(prepared_project.prepared)
    restored = versioning.restore(prepared_project, saved, tmp_path / "restored")
    assert (tree(restored.data), tree(restored.prepared)) == old
    assert capsys.readouterr().err.count("was replaced with a whole copy") == 2 + len(list(restored.shards.iterdir()))
    assert data_object(prepared_project).with_name(f"{data_object(prepared_project).name}.damaged").exists()


def test_an_object_that_is_damaged_everywhere_is_named(prepared_project: Project, tmp_path: Path) -> None:
    saved, object_ = versioning.state(prepared_project), data_object(prepared_project)
    shutil.rmtree(prepared_project.data)
    overwrite(object_, quietly=True)
    with pytest.raises(ServiceError, match=r"no remote has them.*data/wave/g00_0\.mp4") as caught:
        versioning.restore(prepared_project, saved, tmp_path / "restored")
    assert str(object_) in caught.value.message and "dvc push" in caught.value.fix


def test_a_remote_whose_copy_is_damaged_too_is_named(prepared_project: Project, tmp_path: Path) -> None:
    saved, object_ = versioning.state(prepared_project), data_object(prepared_project)
    versioning.push(prepared_project)
    shutil.rmtree(prepared_project.data)
    [theirs] = (prepared_project.root / ".dvc-remote").rglob(object_.name)
    overwrite(theirs)
    overwrite(object_, quietly=True)
    with pytest.raises(ServiceError, match=r"damaged too"):
        versioning.restore(prepared_project, saved, tmp_path / "restored")
