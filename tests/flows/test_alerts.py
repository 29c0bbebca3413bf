from __future__ import annotations

import json
import logging
import threading
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from flows import alerts
from sora.config import Project, Schedule
from sora.core.errors import NotTrainable
from sora.operations import nightly_log

SECRET = "T0KEN-in-the-path"
ALERT = alerts.Alert("nightly_failed", "/p")


class Receiver:
    """A real HTTP server that answers with the codes given, the last one for good."""

    def __init__(self) -> None:
        self.codes = [200]
        self.delay = 0.0
        self.location = "/elsewhere"
        self.received: list[dict[str, Any]] = []
        self.methods: list[str] = []
        receiver = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                receiver.methods.append(self.command)
                code = receiver.codes.pop(0) if len(receiver.codes) > 1 else receiver.codes[0]
                threading.Event().wait(receiver.delay)
                if code == 200:
                    receiver.received.append(json.loads(body))
                self.send_response(code)
                if 300 <= code < 400:
                    self.send_header("Location", receiver.location)
                self.end_headers()

            def do_GET(self) -> None:
                receiver.methods.append(self.command)
                self.send_response(200)
                self.end_headers()

            def log_message(self, *args: object) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}/hook/{SECRET}?key={SECRET}"

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()


@pytest.fixture
def receiver(monkeypatch: pytest.MonkeyPatch) -> Iterator[Receiver]:
    monkeypatch.setattr(alerts, "_PAUSES", (0.01, 0.01))
    it = Receiver()
    yield it
    it.close()


def _project(root: Path, webhook: str | None, more: str = "") -> Project:
    root.mkdir(exist_ok=True)
    alert = f"alert: {{webhook: '{webhook}'}}\n" if webhook else ""
    (root / "params.yaml").write_text(f"name: alerts\n{alert}{more}")
    return Project(root)


def test_an_event_arrives_as_json(receiver: Receiver) -> None:
    assert alerts.send(receiver.url, alerts.Alert("nightly_failed", "/p", reason="Größe"))
    assert receiver.received == [{"event": "nightly_failed", "project": "/p", "reason": "Größe"}]


def test_a_server_that_is_busy_is_asked_again(receiver: Receiver) -> None:
    receiver.codes = [503, 429, 200]
    assert alerts.send(receiver.url, ALERT)
    assert len(receiver.methods) == 3


@pytest.mark.parametrize(("code", "tries"), [(500, 3), (404, 1), (302, 1)])
def test_a_refusal_is_logged_without_the_secret(
    receiver: Receiver, caplog: pytest.LogCaptureFixture, code: int, tries: int
) -> None:
    receiver.codes = [code]
    with caplog.at_level(logging.DEBUG):
        assert not alerts.send(receiver.url, ALERT)
    assert receiver.methods == ["POST"] * tries  # a redirect is not followed as a GET
    assert str(code) in caplog.text and "127.0.0.1" in caplog.text
    assert SECRET not in caplog.text


@pytest.mark.parametrize(
    "url",
    [
        "http://127.0.0.1:9/" + SECRET,
        "http://nowhere.invalid/" + SECRET,
        "http://[broken/" + SECRET,
        SECRET,
        "file:///etc/hostname?" + SECRET,
        "file:///etc/hostname",
    ],
)
def test_an_address_that_leads_nowhere_never_raises(
    url: str, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(alerts, "_PAUSES", (0.01, 0.01))
    with caplog.at_level(logging.DEBUG):
        assert not alerts.send(url, ALERT)
    assert "not delivered" in caplog.text
    assert SECRET not in caplog.text


@pytest.mark.parametrize("code", [301, 302, 303, 307, 308])
def test_a_redirect_is_not_followed(receiver: Receiver, caplog: pytest.LogCaptureFixture, code: int) -> None:
    """Not even where the webhook itself may lead: an address of this machine, written as such."""
    inside = Receiver()
    receiver.codes, receiver.location = [code], inside.url
    try:
        with caplog.at_level(logging.DEBUG):
            assert not alerts.send(receiver.url, ALERT)
        assert receiver.methods == ["POST"] and inside.methods == []
        assert f"it answered {code}" in caplog.text and SECRET not in caplog.text
    finally:
        inside.close()


@pytest.mark.parametrize("name", ["2130706433", "0x7f.1", "017700000001"])
def test_a_name_that_stands_for_this_machine_is_not_called(
    receiver: Receiver, caplog: pytest.LogCaptureFixture, name: str
) -> None:
    assert not alerts.send(receiver.url.replace("127.0.0.1", name), ALERT)
    assert receiver.methods == []
    assert "write the address itself" in caplog.text and SECRET not in caplog.text
    assert alerts.send(receiver.url.replace("127.0.0.1", "localhost"), ALERT)  # as plain as the address


def test_the_environment_goes_before_the_file(
    receiver: Receiver, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    project = _project(tmp_path, "http://127.0.0.1:9/old", "schedule: {cron: '0 2 * * *'}\n")
    monkeypatch.setenv(alerts.ENVIRONMENT, receiver.url)
    assert alerts.nightly_failed(project, flow_run="r", reason="x")
    nightly_log.write(project, "promoted", "r", finished=datetime.now(UTC) - timedelta(days=3))
    assert alerts.check_missed(project) is not None
    assert [event["event"] for event in receiver.received] == ["nightly_failed", "nightly_missed"]


def test_a_server_that_never_answers_is_given_up(
    receiver: Receiver, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(alerts, "_TIMEOUT", 0.1)
    receiver.delay = 0.5
    assert not alerts.send(receiver.url, ALERT)
    assert "imeout" in caplog.text


def test_no_webhook_no_alert(tmp_path: Path) -> None:
    assert not alerts.nightly_failed(_project(tmp_path, None), flow_run="r", reason="x")
    (tmp_path / "params.yaml").write_text("alert: 7")
    assert not alerts.nightly_failed(Project(tmp_path), flow_run="r", reason="x")


def test_the_hook_tells_why_a_flow_failed_and_what_fixes_it(
    prefect_server: str, receiver: Receiver, tmp_path: Path
) -> None:
    from prefect import flow

    @flow(on_failure=[alerts.on_failure], on_crashed=[alerts.on_crashed])
    def nightly(project: str) -> None:
        raise NotTrainable("too few classes: 1", fix="add a second class")

    project = _project(tmp_path, receiver.url)
    with pytest.raises(NotTrainable):
        nightly(str(project.root))
    (event,) = receiver.received
    assert event["event"] == "nightly_failed"
    assert event["project"] == str(tmp_path)
    assert event["reason"] == "too few classes: 1"
    assert event["fix"] == "add a second class"
    assert event["flow_run"]


def _at(text: str) -> datetime:
    return datetime.fromisoformat(text).replace(tzinfo=UTC)


NIGHTLY_AT_TWO = Schedule(cron="0 2 * * *", grace_minutes=90)


@pytest.mark.parametrize(
    ("finished", "now", "expected"),
    [
        ("2025-03-03T02:10", "2025-03-04T01:59", None),  # not due yet
        ("2025-03-03T02:10", "2025-03-04T03:29", None),  # due, within grace
        ("2025-03-03T02:10", "2025-03-04T03:30", "2025-03-04T02:00"),  # overdue from this moment
        ("2025-03-04T02:10", "2025-03-04T09:00", None),  # done
        ("2025-03-04T08:10", "2025-03-04T09:00", None),  # done late
        ("2025-03-01T02:10", "2025-03-04T09:00", "2025-03-04T02:00"),  # of several the last
    ],
)
def test_missed(finished: str, now: str, expected: str | None) -> None:
    last = nightly_log.Nightly(_at(finished), "unchanged")
    assert nightly_log.missed(last, _at(now), NIGHTLY_AT_TWO) == (_at(expected) if expected else None)


def test_nothing_is_missed_before_the_schedule_began() -> None:
    assert nightly_log.missed(None, _at("2025-03-04T09:00"), NIGHTLY_AT_TWO) is None


def test_missed_counts_in_the_schedules_time_zone_over_a_clock_change() -> None:
    schedule = Schedule(cron="0 2 * * *", timezone="Europe/Berlin", grace_minutes=1)
    assert nightly_log.due(schedule, _at("2025-01-10T12:00")) == _at("2025-01-10T01:00")
    assert nightly_log.due(schedule, _at("2025-07-10T12:00")) == _at("2025-07-10T00:00")
    # 30 March 2025: 02:00 does not exist in Berlin. Whatever stands for it, a night done after it is not missed.
    done = nightly_log.Nightly(_at("2025-03-30T01:30"), "unchanged")
    assert nightly_log.missed(done, _at("2025-03-30T12:00"), schedule) is None


def test_the_log_is_written_whole_and_read_back(tmp_path: Path) -> None:
    project = _project(tmp_path, None)
    assert nightly_log.read(project) is None
    entry = nightly_log.write(project, "promoted", "run7")
    assert nightly_log.read(project) == entry
    assert [file.name for file in project.state.iterdir()] == ["last_nightly.json"]
    for broken in ("", "[]", "{}", '{"finished": 3}', "null", '{"finished": "yesterday", "outcome": "x"}'):
        nightly_log.path(project).write_text(broken)
        assert nightly_log.read(project) is None


def test_a_missed_nightly_is_told_once_and_tried_again_until_delivered(receiver: Receiver, tmp_path: Path) -> None:
    project = _project(tmp_path, receiver.url, "schedule: {cron: '0 2 * * *'}\n")
    now = _at("2025-03-04T09:00")
    assert alerts.check_missed(project, now) is None  # never registered
    nightly_log.write(project, "promoted", finished=_at("2025-03-02T02:20"))
    receiver.codes = [404, 200]
    for _ in range(3):
        assert alerts.check_missed(project, now) == _at("2025-03-04T02:00")
    (event,) = receiver.received
    assert event == {
        "event": "nightly_missed",
        "project": str(tmp_path),
        "expected": "2025-03-04T02:00:00+00:00",
        "last": "2025-03-02T02:20:00+00:00",
    }
    alerts.check_missed(project, now + timedelta(days=1))
    assert len(receiver.received) == 2  # the next night is another


def test_the_module_as_a_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    project = _project(tmp_path, None)
    monkeypatch.setattr("sys.argv", ["alerts", str(tmp_path)])
    assert alerts.main() == 0
    nightly_log.write(project, "promoted", finished=datetime.now(UTC) - timedelta(days=3))
    assert alerts.main() == 1
    assert "did not end well" in capsys.readouterr().err
    (tmp_path / "params.yaml").write_text("nonsense: 1")
    assert alerts.main() == 2
