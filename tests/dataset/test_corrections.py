"""The inbox of corrections: one entry a clip, a quota, and the way into data/."""

from __future__ import annotations

import errno
import json
import shutil
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest

from sora.config import Project
from sora.core.errors import DiskFull, InputError, ServiceError
from sora.dataset import corrections as inboxes
from sora.dataset.corrections import Inbox, InboxFull, NoEntry, suffix_of
from sora.dataset.scan import scan
from tests.e2e.conftest import sora
from tests.videos import make_video

SAID: dict[str, Any] = {"filename": "klein ö.mp4", "label": "wave", "predicted": "jump", "version": 3}


@pytest.fixture
def project(tmp_path: Path) -> Project:
    root = tmp_path / "project"
    for label in ("jump", "wave"):
        make_video(root / "data" / label / "old.mp4", seed=len(label))
    (root / "params.yaml").write_text("classes: [jump, wave]\n", encoding="utf-8")
    return Project(root)


@pytest.fixture
def inbox(project: Project) -> Inbox:
    return Inbox(project, 3, 10_000_000)


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("clips")
    return [make_video(folder / f"{seed}.mp4", seed=seed) for seed in (21, 22, 23, 24)]


def test_a_clip_is_kept_under_its_digest(inbox: Inbox, clips: list[Path]) -> None:
    entry = inbox.add(clips[0], **SAID)
    content = clips[0].read_bytes()
    assert entry.id == sha256(content).hexdigest() and entry.suffix == ".mp4" and entry.bytes == len(content)
    assert inbox.file(entry).read_bytes() == content and clips[0].exists()
    assert inbox.entries() == [entry]
    assert inbox.folder.stat().st_mode & 0o077 == 0


def test_the_same_bytes_are_one_entry(inbox: Inbox, clips: list[Path]) -> None:
    first = inbox.add(clips[0], **SAID)
    again = inbox.add(clips[0], **{**SAID, "label": "jump", "filename": "other.mp4"})
    assert inbox.entries() == [again]
    assert again.label == "jump" and again.said == {"wave": 1, "jump": 1}
    assert (again.id, again.filename, again.received) == (first.id, first.filename, first.received)


def test_the_quota_of_clips_and_of_bytes(project: Project, inbox: Inbox, clips: list[Path]) -> None:
    for clip in clips[:3]:
        inbox.add(clip, **SAID)
    with pytest.raises(InboxFull, match="3 of 3") as caught:
        inbox.add(clips[3], **SAID)
    assert "sora data review" in caught.value.fix
    inbox.add(clips[0], **SAID)  # what waits already takes no room
    assert len(inbox.entries()) == 3
    small = Inbox(project, 10, clips[3].stat().st_size - 1)
    for entry in inbox.entries():
        small.reject(entry.id)
    with pytest.raises(InboxFull):
        small.add(clips[3], **SAID)
    assert small.entries() == []


def test_what_a_crash_left_does_not_count_and_goes(
    inbox: Inbox, clips: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    inbox.add(clips[0], **SAID)
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "copyfileobj", full)
        with pytest.raises(DiskFull):
            inbox.add(clips[1], **SAID)
    (inbox.folder / f"{'a' * 64}.mp4").write_bytes(b"its entry was not written")
    (inbox.folder / ".b.part").write_bytes(b"a draft")
    (inbox.folder / f"{'c' * 64}.json").write_text("{", encoding="utf-8")  # not ours to remove
    assert len(inbox.entries()) == 1
    inbox.add(clips[1], **SAID)
    assert len(inbox.entries()) == 2
    assert {file.suffix for file in inbox.folder.iterdir()} == {".mp4", ".json", ""}
    assert len(list(inbox.folder.iterdir())) == 6


def test_accepting_puts_it_where_the_next_run_finds_it(project: Project, inbox: Inbox, clips: list[Path]) -> None:
    entry = inbox.add(clips[0], **SAID)
    path = inbox.accept(entry.id[:8])
    assert path.as_posix() == f"wave/corrections/{entry.id[:12]}.mp4"
    assert (project.data / path).read_bytes() == clips[0].read_bytes()
    assert inbox.entries() == [] and not inbox.file(entry).exists()
    found = {one.path: one for one in scan(project.data, project.settings())}
    assert found[path.as_posix()].label == "wave" and found[path.as_posix()].problem is None
    with pytest.raises(NoEntry):
        inbox.accept(entry.id)


def test_accepting_under_another_label(project: Project, inbox: Inbox, clips: list[Path]) -> None:
    entry = inbox.add(clips[0], **SAID)
    with pytest.raises(InputError, match="not one of the classes"):
        inbox.accept(entry.id, "swim")
    assert inbox.accept(entry.id, "jump").parts[0] == "jump"


@pytest.mark.parametrize("end", ["\n", "\r\n", ""])
def test_accepting_into_a_table(project: Project, inbox: Inbox, clips: list[Path], end: str) -> None:
    rows = ["label, path,group", 'jump,"jump/old.mp4",anna', "wave,wave/old.mp4,"]
    table = project.data / "labels.csv"
    table.write_bytes(("\ufeff" + (end or "\n").join(rows) + end).encode())
    (project.root / "params.yaml").write_text("classes: [jump, wave, 'a/b']\n", encoding="utf-8")
    entry = inbox.add(clips[0], **SAID)
    path = inbox.accept(entry.id, "a/b")  # a label of a table need not be the name of a folder
    assert path.as_posix() == f"corrections/{entry.id[:12]}.mp4"
    found = {one.path: one for one in scan(project.data, project.settings())}
    assert found[path.as_posix()].label == "a/b" and found["jump/old.mp4"].group == "anna"
    lines = table.read_bytes().decode().splitlines(keepends=True)
    assert len(lines) == 4 and all(line.endswith(end or "\n") for line in lines)


def test_accepting_several_labels(project: Project, inbox: Inbox, clips: list[Path]) -> None:
    entry = inbox.add(clips[0], **{**SAID, "label": "jump|wave"})
    (project.root / "params.yaml").write_text("classes: [jump, wave]\nmodel: {head: multilabel}\n", encoding="utf-8")
    with pytest.raises(InputError, match="a folder gives one label"):
        inbox.accept(entry.id)
    table = project.data / "labels.csv"
    table.write_text("path,label\njump/old.mp4,jump\nwave/old.mp4,wave\n", encoding="utf-8")
    with pytest.raises(InputError, match="'swim' is not one of the classes"):
        inbox.accept(entry.id, "jump|swim")
    path = inbox.accept(entry.id)
    found = {one.path: one for one in scan(project.data, project.settings())}
    assert found[path.as_posix()].label == "jump|wave" and found[path.as_posix()].problem is None


def test_accepting_again_after_a_crash_completes_it(
    project: Project, inbox: Inbox, clips: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    table = project.data / "labels.csv"
    table.write_text("path,label\njump/old.mp4,jump\nwave/old.mp4,wave\n", encoding="utf-8")
    entry = inbox.add(clips[0], **SAID)

    def crash(*_: object) -> None:
        raise KeyboardInterrupt

    for step in ("_append_row", "_remove"):
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(inboxes if step == "_append_row" else Inbox, step, crash)
            inbox.accept(entry.id)
        assert inbox.find(entry.id) == entry
    with pytest.raises(InputError, match="already"):
        inbox.accept(entry.id, "jump")
    path = inbox.accept(entry.id)
    assert table.read_text(encoding="utf-8").count(path.as_posix()) == 1
    assert all(one.problem is None for one in scan(project.data, project.settings()))


def test_bytes_that_data_holds_already_are_refused(project: Project, inbox: Inbox) -> None:
    entry = inbox.add(project.data / "jump" / "old.mp4", **SAID)
    with pytest.raises(InputError, match=r"jump/old\.mp4"):
        inbox.accept(entry.id)
    assert inbox.entries() == [entry] and not (project.data / "wave" / "corrections").exists()
    inbox.reject(entry.id)
    assert inbox.entries() == [] and (project.data / "jump" / "old.mp4").exists()


@pytest.mark.parametrize("label", ["", ".", "..", "../out", "a/b", "a\\b"])
def test_a_label_is_never_a_path(project: Project, inbox: Inbox, clips: list[Path], label: str) -> None:
    (project.root / "params.yaml").write_text("classes: []\n", encoding="utf-8")
    entry = inbox.add(clips[0], **SAID)
    with pytest.raises(InputError, match="name of a folder"):
        inbox.accept(entry.id, label)


@pytest.mark.parametrize("ident", ["", "*", "../x", "a" * 65, "A" * 64, "abc", "0" * 64])
def test_ids_that_name_nothing(inbox: Inbox, clips: list[Path], ident: str) -> None:
    inbox.add(clips[0], **SAID)
    for action in (inbox.find, inbox.accept, inbox.reject):
        with pytest.raises(NoEntry):
            action(ident)


def test_an_inbox_that_cannot_be_written(project: Project, clips: list[Path]) -> None:
    project.state.write_text("a file where a folder should be", encoding="utf-8")
    with pytest.raises(ServiceError):
        Inbox(project, 3, 10_000_000).add(clips[0], **SAID)


@pytest.mark.parametrize(
    ("head", "suffix"),
    [
        (b"\0\0\0\x20ftypisom", ".mp4"),
        (b"\0\0\0\x14ftypqt  ", ".mov"),
        (b"\x1a\x45\xdf\xa3\x9f\x42\x86\x81\x01\x42\x82\x84webm", ".webm"),
        (b"\x1a\x45\xdf\xa3\x9f\x42\x86\x81\x01\x42\x82\x88matroska", ".mkv"),
        (b"RIFF\0\0\0\0AVI ", ".avi"),
        (b"<html>", ".video"),
        (b"", ".video"),
    ],
)
def test_the_suffix_comes_from_the_bytes(head: bytes, suffix: str) -> None:
    assert suffix_of(head) == suffix


def test_review_at_the_terminal(project: Project, inbox: Inbox, clips: list[Path]) -> None:
    for clip in clips[:2]:
        inbox.add(clip, **SAID)
    first, second = inbox.entries()
    listed = sora(project.root, "data", "review", "--json")
    assert listed.returncode == 0, listed.stderr
    assert json.loads(listed.stdout) == [{**one.to_dict(), "sent_by": []} for one in (first, second)]
    words = sora(project.root, "data", "review").stdout
    assert first.id[:12] in words and "wave" in words and "klein ö.mp4" in words
    accepted = sora(project.root, "data", "review", "--accept", first.id[:8], "--label", "jump", "--json")
    assert json.loads(accepted.stdout)["path"] == f"jump/corrections/{first.id[:12]}.mp4"
    rejected = sora(project.root, "data", "review", "--reject", second.id)
    assert rejected.returncode == 0 and "rejected" in rejected.stdout
    assert "nothing is waiting" in sora(project.root, "data", "review").stdout
    gone = sora(project.root, "data", "review", "--accept", first.id)
    assert gone.returncode == 2 and "fix:" in gone.stderr
    both = sora(project.root, "data", "review", "--accept", first.id, "--reject", first.id)
    assert both.returncode == 2


def test_records_of_sources_are_bounded_and_never_in_the_way(
    project: Project, inbox: Inbox, clips: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(inboxes, "_MOST_SOURCES", 2)
    monkeypatch.setattr(inboxes, "_MOST_SAID", 3)
    for name in ("a", "b", "c", "d", "e"):
        entry = inbox.add(clips[0], **SAID, source=name)
    assert list(entry.sources) == ["c", "d", "e"]
    inbox.reject(entry.id)
    assert list(inbox.sources()) == ["d", "e"] and inbox.sources()["e"].refused == 1
    entry = inbox.add(clips[0], **SAID, source="d")
    assert inbox.sources()["d"].refused == 1  # what sweeps after crashes keeps the records
    inbox.accept(entry.id)
    assert inbox.sources()["d"] == inboxes.Source("d", accepted=1, refused=1) and list(inbox.sources()) == ["e", "d"]
    for damage in ("{", "[1]", '[{"name": "x"}]'):
        (inbox.folder / "sources.json").write_text(damage)
        assert inbox.sources() == {}
        entry = inbox.add(clips[1], **SAID, source="d")
        assert inbox.entries() == [entry]
        inbox.reject(entry.id)
        assert inbox.sources()["d"].refused == 1


def test_entries_from_before_sources_are_reviewed_like_others(inbox: Inbox, clips: list[Path]) -> None:
    entry = inbox.add(clips[0], **SAID, source="phone")
    file = inbox.folder / f"{entry.id}.json"
    old = {name: value for name, value in json.loads(file.read_text()).items() if name != "sources"}
    file.write_text(json.dumps(old))
    (entry,) = inbox.entries()
    assert inbox.sent_by(entry) == []
    inbox.reject(entry.id)
    assert inbox.sources() == {}


def test_the_verb_names_who_is_refused_often(project: Project, inbox: Inbox, clips: list[Path]) -> None:
    for _ in range(3):
        inbox.reject(inbox.add(clips[0], **SAID, source="phone").id)
    inbox.add(clips[0], **SAID, source="phone")
    shown = sora(project.root, "data", "review")
    assert "refused often: phone, of whose corrections 3 of 3 were refused" in shown.stdout, shown
    (entry,) = json.loads(sora(project.root, "data", "review", "--json").stdout)
    assert entry["sent_by"] == [{"name": "phone", "accepted": 0, "refused": 3, "often_refused": True}]
