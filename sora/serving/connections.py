"""Connections without a request: bounded in time, per peer, and in total.

uvicorn has a timeout for idle connections and none for headers: a client that opens connections and sends half headers
takes every place, and health checks get a 503. Here such a connection has `serve.header_timeout`, and if
places are short, the one that has waited longest without a request in progress makes room for a new one. So a new
connection is always accepted, unless requests that are being answered take every place.
"""

from __future__ import annotations

import asyncio
import ipaddress
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

_LATE = (
    b"HTTP/1.1 408 Request Timeout\r\nContent-Type: text/plain; charset=utf-8\r\nContent-Length: 32\r\n"
    b"Connection: close\r\n\r\nThe request's headers are late.\n"
)


@dataclass(slots=True)
class Connections:
    """The open connections of one server, and what they may do.

    Attributes:
        most: connections of all peers together.
        most_a_peer: connections of one address; 0 for no such bound, as behind a proxy, where all have one address.
        header_timeout: seconds from a request's first byte, or from the connection's start, to the end of its headers.
        body_timeout: seconds for the rest of a body that nobody reads, since its request is already answered.
        on_closed: called with the reason when a connection is closed: `headers`, `body`, `peer`, `all`.
    """

    most: int
    most_a_peer: int
    header_timeout: float
    body_timeout: float
    on_closed: Callable[[str], None] = lambda reason: None
    open: dict[str, set[_Protocol]] = field(default_factory=dict)  # by peer
    count: int = 0

    def protocol(self, **arguments: Any) -> _Protocol:
        """For `uvicorn.Config(http=…)`, which expects a callable that makes a protocol."""
        return _Protocol(self, **arguments)

    def enter(self, connection: _Protocol) -> bool:
        """Counts a new connection; closes a waiting one if places are short. False: there is no place."""
        of_peer = self.open.setdefault(connection.peer, set())
        self.count += 1
        of_peer.add(connection)
        if self.most_a_peer and len(of_peer) > self.most_a_peer:
            return self._make_room(connection, of_peer, "peer")
        if self.count > self.most:
            return self._make_room(connection, {one for peer in self.open.values() for one in peer}, "all")
        return True

    def leave(self, connection: _Protocol) -> None:
        of_peer = self.open.get(connection.peer, set())
        if connection in of_peer:
            of_peer.remove(connection)
            self.count -= 1
            if not of_peer:
                del self.open[connection.peer]

    def _make_room(self, new: _Protocol, among: set[_Protocol], reason: str) -> bool:
        waiting = [one for one in among if one is not new and not one.busy]
        # First those that began a request and stopped, then idle ones, which a client may be about to use.
        oldest = min(waiting, key=lambda one: (one.idle, one.since), default=None)
        (oldest or new).end(reason)
        return oldest is not None


class _Protocol(H11Protocol):
    """uvicorn's own protocol, with a timer for what is not (yet) a request."""

    def __init__(self, connections: Connections, **arguments: Any) -> None:
        super().__init__(**arguments)
        self._connections = connections
        self._timer: asyncio.TimerHandle | None = None
        self.peer = ""
        self.since = 0.0  # when it began to wait, by the loop's clock

    @property
    def busy(self) -> bool:
        """A request is being answered."""
        return self.cycle is not None and not self.cycle.response_complete

    @property
    def idle(self) -> bool:
        """An answer was sent, and no part of another request has arrived."""
        return self.cycle is not None and not self.busy and not self._begun

    @property
    def _begun(self) -> bool:
        return bool(self.conn.trailing_data[0]) or self.conn.their_state is h11.SEND_BODY

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self.peer = peer_of(self.client[0] if self.client else "")
        self.since = self.loop.time()
        if self._connections.enter(self):
            self._timer = self.loop.call_later(self._connections.header_timeout, self._late)

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_timer()
        self._connections.leave(self)
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._look()

    def on_response_complete(self) -> None:
        self.since = self.loop.time()
        super().on_response_complete()
        self._look()

    def end(self, reason: str) -> None:
        """Closes it at once, whatever it was about to send."""
        self._stop_timer()
        self._connections.leave(self)  # now, so that the count is right before the loop calls `connection_lost`
        self._connections.on_closed(reason)
        self.transport.abort()

    def _look(self) -> None:
        """The timer runs while a request is incomplete; an idle connection has uvicorn's timer."""
        if self.transport.is_closing() or self.busy or not self._begun:
            self._stop_timer()
        elif self._timer is None:
            self.since = self.loop.time()
            unread = self.conn.their_state is h11.SEND_BODY
            seconds = self._connections.body_timeout if unread else self._connections.header_timeout
            self._timer = self.loop.call_later(seconds, self._late)

    def _late(self) -> None:
        self._timer = None
        answered = self.conn.their_state is h11.SEND_BODY
        if self._begun and not answered:
            self.transport.write(_LATE)
        self._connections.on_closed("body" if answered else "headers")
        self.transport.close()

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None


def peer_of(address: str) -> str:
    """Who counts as one peer: an IPv4 address, however written, or the /64 network that one IPv6 subscriber has."""
    try:
        peer = ipaddress.ip_address(address.partition("%")[0])
    except ValueError:
        return address
    if isinstance(peer, ipaddress.IPv6Address):
        if peer.ipv4_mapped is not None:
            return str(peer.ipv4_mapped)
        if not peer.is_loopback:
            return str(ipaddress.ip_network((peer, 64), strict=False))
    return str(peer)
