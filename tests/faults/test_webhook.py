"""The webhook redirects, or leads to an address inside: the alert is a failed alert, and nothing more happens."""

from __future__ import annotations

import http.server
import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from flows import alerts

SECRET = "s3cr3t-answer"


class _Receiver(http.server.BaseHTTPRequestHandler):
    def _answer(self) -> None:
        length = int(self.headers.get("Content-Length") or 0)
        self.server.seen.append((self.command, self.path, self.rfile.read(length)))  # type: ignore[attr-defined]
        status, headers, body = self.server.answer  # type: ignore[attr-defined]
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    do_GET = do_POST = do_PUT = do_HEAD = _answer

    def log_message(self, *_: object) -> None:
        pass


class _Server(http.server.ThreadingHTTPServer):
    def __init__(self, status: int, headers: dict[str, str], body: bytes) -> None:
        super().__init__(("127.0.0.1", 0), _Receiver)
        self.answer = (status, headers, body)
        self.seen: list[tuple[str, str, bytes]] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


@contextmanager
def server(status: int, headers: dict[str, str] | None = None, body: bytes = b"") -> Iterator[_Server]:
    with _Server(status, headers or {}, body) as one:
        threading.Thread(target=one.serve_forever, daemon=True).start()
        try:
            yield one
        finally:
            one.shutdown()


ALERT = alerts.Alert("nightly_failed", "p", reason="r")


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_a_redirect_is_not_followed(status: int, caplog: pytest.LogCaptureFixture) -> None:
    """Not anywhere: 307 and 308 would carry the event to the address inside, 301 to 303 ask it for a page."""
    with server(200, body=SECRET.encode()) as inside:
        with server(status, {"Location": f"{inside.url}/latest/meta-data"}) as outside:
            assert alerts.send(f"{outside.url}/hooks/token-in-path", ALERT) is False
            assert len(outside.seen) == 1, "a redirect is no failure that passes: it is not tried again"
        assert not inside.seen
    assert "token-in-path" not in caplog.text and "meta-data" not in caplog.text
    assert str(status) in caplog.text, "the log does not say why"


@pytest.mark.parametrize("location", ["file:///etc/hostname", "ftp://127.0.0.1/x", "gopher://127.0.0.1/x", "//", ""])
def test_a_redirect_to_another_scheme(location: str) -> None:
    with server(302, {"Location": location}) as outside:
        assert alerts.send(outside.url, ALERT) is False


def test_an_address_inside_learns_no_more_than_the_event(caplog: pytest.LogCaptureFixture) -> None:
    """The webhook is the project owner's own setting, and teams do run receivers on loopback: it is called. It gets one
    POST of the event, and what it answers is neither kept nor logged."""
    with server(403, body=SECRET.encode()) as inside:
        assert alerts.send(f"{inside.url}/latest/meta-data", ALERT) is False
        assert [(kind, json.loads(body)) for kind, _, body in inside.seen] == [("POST", ALERT.to_dict())]
    assert SECRET not in caplog.text


@pytest.mark.parametrize("address", ["http://127.0.0.1:1/x", "http://[::1]:1/x", "http://0.0.0.0:1/x"])
def test_an_address_where_nothing_listens_costs_seconds(address: str) -> None:
    began = time.monotonic()
    assert alerts.send(address, ALERT) is False
    assert time.monotonic() - began < 20


def test_an_answer_without_end_is_not_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """A receiver that sends gigabytes costs neither memory nor time: its status is all that counts."""
    with server(200, body=b"x" * (64 << 20)) as big:
        began = time.monotonic()
        assert alerts.send(big.url, ALERT) is True
        assert time.monotonic() - began < 10
