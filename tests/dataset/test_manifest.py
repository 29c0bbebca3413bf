from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import fields
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from sora.config import Settings
from sora.core.errors import InputError
from sora.core.records import VideoRecord
from sora.dataset import manifest
from sora.dataset.scan import ignored, scan
from tests.videos import make_folder, make_video

SETTINGS = Settings()


def build(*args: Any, **options: Any) -> pd.DataFrame:
    """With one process: starting them is what takes time here."""
    return manifest.build(*args, **{"workers": 1, **options})


def rows(folder: Path, settings: Settings = SETTINGS) -> dict[str, tuple[str | None, str | None, str | None]]:
    return {one.path: (one.label, one.group, one.problem) for one in scan(folder, settings)}


def touch(folder: Path, *paths: str) -> Path:
    for path in paths:
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_bytes(b"x")
    return folder


# --- which files, which labels ----------------------------------------------------------------------------------------


def test_the_first_folder_is_the_label(tmp_path: Path) -> None:
    touch(tmp_path, "run/a.mp4", "run/deep/er/b.avi", "jump high/ü 日本\n.mp4", "c.mp4")
    assert rows(tmp_path) == {
        "run/a.mp4": ("run", None, None),
        "run/deep/er/b.avi": ("run", None, None),
        "jump high/ü 日本\n.mp4": ("jump high", None, None),
        "c.mp4": (None, None, "unlabelled"),
    }
    assert [one.path for one in scan(tmp_path, SETTINGS)] == sorted(rows(tmp_path))


def test_files_that_are_no_video_by_name_are_ignored(tmp_path: Path) -> None:
    names = "README readme.md LICENSE LICENCE.txt LICENSE-MIT notes.txt labels.json .hidden.mp4 .git/a.mp4 Thumbs.db"
    touch(tmp_path, "run/a.mp4", *(f"run/{name}" for name in names.split()))
    assert list(rows(tmp_path)) == ["run/a.mp4"]


@pytest.mark.parametrize("name", ["readme.mp4", "license.avi", "a.jpg", "a", "a.zip", "log", "my.readme.mov"])
def test_other_names_are_looked_at(name: str) -> None:
    assert not ignored(name)


def test_a_class_may_have_a_documents_name(tmp_path: Path) -> None:
    touch(tmp_path, "log/a.mp4", "license/b.mp4", "x.md/c.mp4")
    assert {label for label, *_ in rows(tmp_path).values()} == {"log", "license", "x.md"}


def test_classes_outside_the_settings_are_unknown(tmp_path: Path) -> None:
    touch(tmp_path, "run/a.mp4", "jump/b.mp4")
    found = rows(tmp_path, Settings(classes=("run",)))
    assert found["run/a.mp4"][2] is None
    assert found["jump/b.mp4"] == ("jump", None, "unknown_label")


def test_groups_come_from_the_pattern(tmp_path: Path) -> None:
    touch(tmp_path, "run/person07_a.mp4", "run/b.mp4")
    found = rows(tmp_path, Settings.model_validate({"split": {"group_pattern": r"(person\d+)"}}))
    assert found["run/person07_a.mp4"][1] == "person07"
    assert found["run/b.mp4"][1] is None


def test_labels_csv_decides(tmp_path: Path) -> None:
    touch(tmp_path, "x/a.mp4", "x/b c.mp4", "x/d.mp4", "e.mp4")
    text = "\ufeffpath, label ,group\nx/a.mp4,run,g1\n./x\\b c.mp4, jump ,\ne.mp4,,\n"
    (tmp_path / "labels.csv").write_text(text, encoding="utf-8")
    found = rows(tmp_path, Settings.model_validate({"split": {"group_pattern": r"([ab])[. ]"}}))
    assert found == {
        "x/a.mp4": ("run", "g1", None),
        "x/b c.mp4": ("jump", "b", None),
        "x/d.mp4": (None, None, "unlabelled"),
        "e.mp4": (None, None, "unlabelled"),
    }


def test_labels_csv_meets_either_unicode_form(tmp_path: Path) -> None:
    touch(tmp_path, "x/u\u0308.mp4")
    (tmp_path / "labels.csv").write_text("path,label\nx/\u00fc.mp4,run\n", encoding="utf-8")
    assert rows(tmp_path) == {"x/u\u0308.mp4": ("run", None, None)}


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("path,label\nx/a.mp4,run\nx/gone.mp4,run\n", "1 files that don't exist: 'x/gone.mp4'"),
        ("path,label\n../../etc/passwd,run\n", "don't exist"),
        ("file,class\nx/a.mp4,run\n", "columns"),
        ("", "columns"),
        ("path,label\nx/a.mp4,run\nx/a.mp4,jump\n", "twice"),
        (b"path,label\nx/\xff.mp4,run\n", "can't be read"),
    ],
)
def test_a_bad_labels_csv_is_an_input_error(tmp_path: Path, text: str | bytes, words: str) -> None:
    touch(tmp_path, "x/a.mp4")
    (tmp_path / "labels.csv").write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(InputError, match=words) as caught:
        scan(tmp_path, SETTINGS)
    assert caught.value.fix


def test_a_missing_folder_is_an_input_error(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="not a folder"):
        scan(tmp_path / "none", SETTINGS)


def test_links_are_reported_and_never_followed(tmp_path: Path) -> None:
    outside = make_folder(tmp_path / "outside", classes=("run",), groups=1, frames=4)
    data = touch(tmp_path / "data", "run/a.mp4")
    (data / "run" / "link.mp4").symlink_to(outside / "run" / "g00_0.mp4")
    (data / "jump").symlink_to(outside / "run")
    (data / "run" / "loop").symlink_to(data)
    built = build(data, SETTINGS).set_index("path")
    assert list(built.index) == ["jump", "run/a.mp4", "run/link.mp4", "run/loop"]
    links = built.drop("run/a.mp4")
    assert set(links["error"]) == {"symlink"} and set(links["sha256"]) == {""}
    assert "g00_0.mp4" in built.loc["run/link.mp4", "detail"]


def test_pipes_and_names_that_are_not_utf8(tmp_path: Path) -> None:
    touch(tmp_path, "run/a.mp4")
    os.mkfifo(tmp_path / "run" / "pipe.mp4")
    (Path(os.fsdecode(os.fsencode(tmp_path / "run") + b"/\xff.mp4"))).write_bytes(b"x")
    found = rows(tmp_path)
    assert found["run/pipe.mp4"][2] == "not_a_video"
    assert found["run/\\xff.mp4"][2] == "bad_name"
    manifest.write(build(tmp_path, SETTINGS), tmp_path / "m.parquet")


def test_what_may_not_be_read_is_unreadable(tmp_path: Path) -> None:
    """As another user where the tests run as root, whom permissions don't stop."""
    code = (
        "import os, sys; from pathlib import Path\n"
        "from sora.dataset import manifest; from sora.config import Settings\n"
        "manifest.build(Path(sys.argv[2]), Settings())\n"  # imports all; the other user may not see this Python
        "if os.geteuid() == 0: os.seteuid(65534)\n"
        "built = manifest.build(Path(sys.argv[1]), Settings())\n"
        "print(built[['path', 'error', 'detail']].to_json(orient='records'))"
    )
    with tempfile.TemporaryDirectory() as name:
        Path(name).chmod(0o755)
        data = touch(Path(name), "run/a.mp4", "closed/b.mp4")
        (data / "run" / "a.mp4").chmod(0)
        (data / "closed").chmod(0)
        done = subprocess.run([sys.executable, "-c", code, name, str(tmp_path)], capture_output=True, text=True)
        (data / "closed").chmod(0o755)
    assert done.returncode == 0, done.stderr
    closed, unreadable = json.loads(done.stdout)
    assert (closed["path"], closed["error"]) == ("closed", "unreadable")
    assert (unreadable["path"], unreadable["error"]) == ("run/a.mp4", "unreadable")
    assert "Permission denied" in closed["detail"] and "Permission denied" in unreadable["detail"]


# --- facts ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four good videos, a copy, and files of every bad kind."""
    data = tmp_path_factory.mktemp("manifest") / "data"
    make_folder(data, classes=("jump", "wave"), groups=2, frames=12)
    shutil.copy(data / "jump" / "g00_0.mp4", data / "jump" / "copy.mp4")
    touch(data, "wave/text.mp4", "loose.txt", "loose.bin")
    (data / "wave" / "empty.mp4").write_bytes(b"")
    (data / "wave" / "broken.mp4").write_bytes((data / "jump" / "g00_0.mp4").read_bytes()[:-300])
    shutil.copy(data / "jump" / "g01_0.mp4", data / "loose.mp4")
    return data


@pytest.fixture(scope="module")
def built(folder: Path) -> pd.DataFrame:
    return build(folder, SETTINGS)


def test_the_table_has_the_records_columns(built: pd.DataFrame) -> None:
    assert list(built.columns) == [field.name for field in fields(VideoRecord)]
    assert list(built["path"]) == sorted(built["path"])
    for row in built.to_dict("records"):
        VideoRecord(**row)


def test_verdicts(built: pd.DataFrame) -> None:
    errors = dict(zip(built["path"], built["error"], strict=True))
    assert {path: error for path, error in errors.items() if error} == {
        "loose.bin": "not_a_video",
        "loose.mp4": "unlabelled",
        "wave/broken.mp4": "unreadable",
        "wave/empty.mp4": "not_a_video",
        "wave/text.mp4": "not_a_video",
    }
    loose = built.set_index("path").loc["loose.mp4"]
    assert loose["frames"] == 12 and loose["label"] is None  # decoded all the same


def test_it_survives_the_file_and_is_the_same_bytes(built: pd.DataFrame, tmp_path: Path) -> None:
    manifest.write(built, tmp_path / "a.parquet")
    again = manifest.read(tmp_path / "a.parquet")
    assert again.equals(built) and again.attrs == built.attrs
    manifest.write(again, tmp_path / "b.parquet")
    assert (tmp_path / "a.parquet").read_bytes() == (tmp_path / "b.parquet").read_bytes()
    assert [p.name for p in sorted(tmp_path.iterdir())] == ["a.parquet", "b.parquet"]


def test_reading_what_is_none_is_an_input_error(tmp_path: Path) -> None:
    with pytest.raises(InputError):
        manifest.read(tmp_path / "none.parquet")
    (tmp_path / "x.parquet").write_bytes(b"PAR1")
    with pytest.raises(InputError):
        manifest.read(tmp_path / "x.parquet")


def decodes(journal: Path) -> int:
    return len(journal.read_text().splitlines())


def test_known_bytes_are_not_decoded_again(folder: Path, built: pd.DataFrame, tmp_path: Path) -> None:
    data = shutil.copytree(folder, tmp_path / "data")
    journal = tmp_path / "journal"
    assert build(data, SETTINGS, previous=built, journal=journal).equals(built)
    assert decodes(journal) == 0
    for path in data.rglob("*.mp4"):  # times and names don't matter
        os.utime(path, (1, 1))
    (data / "jump" / "g00_0.mp4").rename(data / "wave" / "moved.mp4")
    make_video(data / "wave" / "new.mp4", frames=5, seed=77)
    after = build(data, SETTINGS, previous=built, journal=journal)
    assert decodes(journal) == 1
    assert after.set_index("path").loc["wave/moved.mp4", "frames"] == 12
    classed = build(data, Settings(classes=("jump",)), previous=after, journal=journal)
    assert decodes(journal) == 1
    assert (classed["error"] == "unknown_label").sum() == 4
    assert build(data, SETTINGS, previous=classed, journal=journal).equals(after)


def test_copies_are_decoded_once(folder: Path, built: pd.DataFrame, tmp_path: Path) -> None:
    journal = tmp_path / "journal"
    assert build(folder, SETTINGS, journal=journal).equals(built)
    assert decodes(journal) == built["sha256"].nunique()


def test_an_interrupted_build_resumes_from_its_journal(folder: Path, built: pd.DataFrame, tmp_path: Path) -> None:
    journal = tmp_path / "journal"
    build(folder, SETTINGS, journal=journal)
    lines = journal.read_bytes().splitlines(keepends=True)
    journal.write_bytes(b"".join(lines[:3]) + lines[3][:40])  # cut off within a line
    assert build(folder, SETTINGS, journal=journal).equals(built)
    assert decodes(journal) == len(lines) + 1  # the half line, and what lacked
    assert build(folder, SETTINGS, journal=journal).equals(built)
    assert decodes(journal) == len(lines) + 1


def test_facts_of_other_code_are_not_reused(
    folder: Path, built: pd.DataFrame, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    journal = tmp_path / "journal"
    monkeypatch.setattr("sora.core.provenance.facts", lambda: "other")
    after = build(folder, SETTINGS, previous=built, journal=journal)
    assert decodes(journal) == built["sha256"].nunique()
    monkeypatch.undo()
    build(folder, SETTINGS, previous=after, journal=journal)
    assert decodes(journal) == 2 * built["sha256"].nunique()


def test_progress_goes_from_none_to_all(folder: Path) -> None:
    seen = []
    build(folder, SETTINGS, progress=lambda done, total: seen.append((done, total)))
    assert seen[0] == (0, len(seen) - 1) and seen[-1] == (len(seen) - 1,) * 2
    assert [done for done, _ in seen] == list(range(len(seen)))


def test_an_empty_folder_gives_an_empty_table(tmp_path: Path) -> None:
    built = build(tmp_path, SETTINGS)
    assert len(built) == 0 and list(built.columns) == list(manifest.COLUMNS)
    manifest.write(built, tmp_path / "m.parquet")
    assert len(manifest.read(tmp_path / "m.parquet")) == 0


# --- faults -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def long_video(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Takes a second or more to decode."""
    return make_video(tmp_path_factory.mktemp("long") / "long.mp4", frames=250, size=(640, 480), codec="mpeg4")


def kill_whoever_reads(path: Path, stop: threading.Event) -> None:
    """Kills the child process of this one that has `path` open."""
    me = str(os.getpid())
    while not stop.is_set():
        for process in Path("/proc").glob("[0-9]*"):
            try:
                if process.joinpath("stat").read_text().rsplit(")", 1)[1].split()[1] != me:
                    continue
                if any(os.readlink(descriptor) == str(path) for descriptor in process.joinpath("fd").iterdir()):
                    os.kill(int(process.name), signal.SIGKILL)
                    return
            except OSError:
                continue


def test_a_decoder_that_dies_costs_one_file(folder: Path, long_video: Path, tmp_path: Path) -> None:
    data = shutil.copytree(folder, tmp_path / "data")
    victim = data / "jump" / "victim.mp4"
    shutil.copy(long_video, victim)
    stop, journal = threading.Event(), tmp_path / "journal"
    killer = threading.Thread(target=kill_whoever_reads, args=(victim, stop))
    killer.start()
    built = build(data, SETTINGS, journal=journal, workers=1).set_index("path")
    stop.set()
    killer.join()
    assert built.loc["jump/victim.mp4", "error"] == "unreadable"
    assert "killed by signal 9" in built.loc["jump/victim.mp4", "detail"]
    assert built.loc["jump/g00_0.mp4", "frames"] == built.loc["wave/g01_0.mp4", "frames"] == 12
    # It may have been the machine's fault: the next run tries again.
    again = build(data, SETTINGS, previous=built.reset_index(), journal=journal).set_index("path")
    assert again.loc["jump/victim.mp4", "frames"] == 250


def test_ctrl_c_ends_it_promptly(long_video: Path, tmp_path: Path) -> None:
    for number in range(6):
        (tmp_path / "data" / "run").mkdir(parents=True, exist_ok=True)
        (tmp_path / "data" / "run" / f"{number}.mp4").write_bytes(long_video.read_bytes() + bytes([number]))
    code = (
        "import sys; from pathlib import Path; from sora.dataset import manifest; from sora.config import Settings\n"
        "said = lambda done, total: print(done, flush=True)\n"
        "manifest.build(Path(sys.argv[1]), Settings(), workers=2, journal=Path(sys.argv[2]), progress=said)"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "data"), str(tmp_path / "journal")]
    child = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True)
    assert child.stdout and child.stdout.readline() == "0\n" and child.stdout.readline() == "1\n"
    os.killpg(child.pid, signal.SIGINT)
    start = time.monotonic()
    _, complaint = child.communicate(timeout=20)  # ends only when no worker holds the pipes
    assert time.monotonic() - start < 10
    assert child.returncode != 0 and complaint.count("Traceback") == 1
    assert decodes(tmp_path / "journal") >= 1
