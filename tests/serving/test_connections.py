"""Connections that bring no request don't take the places of those that do: a real server, real sockets."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from sora.serving.connections import peer_of
from sora.serving.source import ModelCache
from tests.serving.conftest import Made
from tests.serving.standing import Standing, standing

HALF = b"GET /healthz HTTP/1.1\r\nHost: 127.0.0.1\r\nX-Slow: "
WHOLE = b"GET /healthz HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n"
HEADER_TIMEOUT = 3


@pytest.fixture(scope="module")
def server(models: list[Made], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Standing]:
    folder = tmp_path_factory.mktemp("connections")
    models[0].promote(ModelCache(folder / "registry"))
    with standing(folder, poll_seconds=0.1, header_timeout=HEADER_TIMEOUT, upload_timeout=5) as it:
        it.until_ready()
        yield it


def connect(server: Standing, text: bytes = b"", source: str = "127.0.0.1") -> socket.socket:
    made = socket.create_connection(("127.0.0.1", server.port), timeout=20, source_address=(source, 0))
    made.sendall(text)
    return made


def read(connection: socket.socket) -> bytes:
    """One whole answer."""
    answer = b""
    while b"\r\n\r\n" not in answer:
        answer += connection.recv(65536) or pytest.fail(f"closed after {answer!r}")
    head, _, body = answer.partition(b"\r\n\r\n")
    length = int(head.lower().partition(b"content-length: ")[2].split(b"\r\n")[0])
    while len(body) < length:
        body += connection.recv(65536) or pytest.fail(f"closed after {answer!r}")
    return head + b"\r\n\r\n" + body


def closed(server: Standing, reason: str) -> float:
    lines = server.client.get("/metrics").text.splitlines()
    name = f'sora_connections_closed_total{{reason="{reason}"}} '
    return next((float(line.removeprefix(name)) for line in lines if line.startswith(name)), 0.0)


@contextmanager
def half_open(server: Standing, count: int, source: str = "127.0.0.1") -> Iterator[list[socket.socket]]:
    with ExitStack() as stack:
        yield [stack.enter_context(connect(server, HALF, source)) for _ in range(count)]


def statuses(server: Standing, seconds: float) -> set[int]:
    """What health checks got, each on a connection of its own, as a probe makes them."""
    found = set()
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        for path in ("/healthz", "/readyz"):
            found.add(server.client.get(path, headers={"connection": "close"}).status_code)
        time.sleep(0.05)
    return found


def test_530_half_headers_take_nothing_from_others(server: Standing, video: Path) -> None:
    """Row 5 of the review: they got 503 for 40 s."""
    with half_open(server, 530):
        assert statuses(server, 1) == {200}
        assert server.send(video).status_code == 200
        assert statuses(server, HEADER_TIMEOUT + 1) == {200}
    assert closed(server, "peer") >= 530 - 128 and closed(server, "headers") > 0


def test_530_half_headers_of_many_peers_take_nothing_either(server: Standing, video: Path) -> None:
    """Each below the bound of a peer, together above the bound of all."""
    before = closed(server, "all")
    with ExitStack() as stack:
        for number in range(2, 8):
            stack.enter_context(half_open(server, 100, f"127.0.0.{number}"))
        assert statuses(server, 1) == {200}
        assert server.send(video).status_code == 200
    assert closed(server, "all") > before


def test_headers_that_drip_are_answered_408_in_time(server: Standing) -> None:
    with connect(server, HALF) as dripping:
        start = time.monotonic()
        answer = b""
        dripping.settimeout(0.3)
        while time.monotonic() - start < 15:
            try:
                dripping.sendall(b"x")
                answer += dripping.recv(4096)
                break
            except TimeoutError:
                continue
        assert answer.startswith(b"HTTP/1.1 408 ") and HEADER_TIMEOUT - 1 < time.monotonic() - start < 10


def test_a_second_request_is_timed_like_the_first(server: Standing) -> None:
    """uvicorn's own timeout for idle connections ends with the first byte of another request."""
    with connect(server, WHOLE) as kept:
        assert read(kept).startswith(b"HTTP/1.1 200")
        kept.sendall(HALF)
        start = time.monotonic()
        assert read(kept).startswith(b"HTTP/1.1 408")
        assert time.monotonic() - start < 8


def test_a_connection_that_says_nothing_is_closed(server: Standing) -> None:
    with connect(server) as silent:
        start = time.monotonic()
        assert silent.recv(4096) == b"" and time.monotonic() - start < 8


def test_a_slow_client_with_whole_requests_keeps_its_connection(server: Standing) -> None:
    with connect(server) as slow:
        for _ in range(4):
            slow.sendall(WHOLE[:20])
            time.sleep(HEADER_TIMEOUT / 2)
            slow.sendall(WHOLE[20:])
            assert read(slow).startswith(b"HTTP/1.1 200")


def test_a_body_that_nobody_reads_has_an_end_too(server: Standing) -> None:
    """The answer is out before the body has come: dripping on would keep the connection for good."""
    head = b"POST /healthz HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: 1000000\r\n\r\n"
    with connect(server, head) as dripping:
        assert read(dripping).startswith(b"HTTP/1.1 405")
        start = time.monotonic()
        with pytest.raises(OSError):
            while time.monotonic() - start < 20:
                dripping.sendall(b"x")
                time.sleep(0.2)
        assert 3 < time.monotonic() - start < 15


def test_a_slow_upload_is_ended_and_frees_its_place(server: Standing) -> None:
    head = (
        b"POST /v1/predict HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: 1000000\r\n"
        b"Content-Type: multipart/form-data; boundary=x\r\n\r\n--x\r\n"
    )
    with connect(server, head) as slow:
        assert read(slow).startswith(b"HTTP/1.1 408")  # serve.upload_timeout


def test_many_clients_at_once_are_all_answered(server: Standing) -> None:
    """More than a peer's places, one after the other and together: requests are never closed for others."""
    found: list[int] = []

    def ask() -> None:
        for _ in range(5):
            found.append(server.client.get("/healthz").status_code)

    threads = [threading.Thread(target=ask) for _ in range(60)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [200] * 300


def test_a_websocket_is_no_way_around_the_count(server: Standing) -> None:
    upgrade = WHOLE[:-2] + b"Connection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Version: 13\r\n"
    with connect(server, upgrade + b"Sec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\n\r\n") as asking:
        assert read(asking).startswith(b"HTTP/1.1 200")


def test_who_is_one_peer() -> None:
    assert peer_of("192.0.2.1") == peer_of("::ffff:192.0.2.1") == "192.0.2.1"
    assert peer_of("2001:db8::1") == peer_of("2001:db8::ffff") != peer_of("2001:db8:0:1::1")
    assert peer_of("::1") == "::1" and peer_of("fe80::1%eth0") == peer_of("fe80::2") and peer_of("") == ""
