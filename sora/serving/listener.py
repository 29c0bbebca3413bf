"""A socket, and the application that answers on it until SIGTERM or Ctrl-C."""

from __future__ import annotations

import asyncio
import signal
import socket
import threading
from contextlib import AsyncExitStack
from types import FrameType
from typing import cast

import uvicorn
from fastapi import FastAPI

from sora.core.errors import ServiceError
from sora.serving.connections import Connections
from sora.serving.context import Context

FINISH_SECONDS = 30  # that requests in progress get when the server stops


def listen(host: str, port: int) -> socket.socket:
    """A socket that accepts connections.

    Raises:
        ServiceError: the address is taken or not this machine's.
    """
    listener = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    try:
        # Accepted sockets inherit it. asyncio sets it on sockets that report their protocol number, which these do
        # not; without it an answer's second packet waits 40 ms for the client's acknowledgement of the first.
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((host, port))
        listener.listen(256)
    except OSError as error:
        listener.close()
        raise ServiceError(
            f"can't listen on {host} port {port}: {error.strerror or error}",
            fix="stop what uses the port, or set --port (0: any free one) and an address of this machine",
        ) from error
    return listener


def serve_until_stopped(app: FastAPI, listener: socket.socket) -> None:
    """Serves an application of `create_app` until SIGTERM or Ctrl-C; requests in progress are answered first.

    SIGTERM is first shown to proxies for `serve.drain_seconds`: `/readyz` says 503, everything else continues. Without
    that, a proxy would send a call on a connection that is just closing. A second signal stops at once.

    Raises:
        DiskFull, ServiceError: the temporary folder can't be written.
    """
    context: Context = app.state.context
    settings = context.settings
    connections = Connections(
        most=settings.queue * 4 + 256,  # predictions have their own bound
        most_a_peer=settings.max_connections_per_peer,
        header_timeout=settings.header_timeout,
        body_timeout=settings.upload_timeout,
        on_closed=lambda reason: context.metrics.closed.labels(reason).inc(),
    )
    config = uvicorn.Config(
        app,
        # asyncio and h11 even if uvloop and httptools are installed: with them a killed decoder costs more than one
        # request, and the fuzzer breaks a connection.
        loop="asyncio",
        http=cast("type[asyncio.Protocol]", connections.protocol),
        ws="none",  # there are none; an upgrade would remove a connection from the count
        lifespan="off",  # see `_Server.startup`
        log_config=None,
        access_log=False,
        server_header=False,
        timeout_keep_alive=10,
        timeout_graceful_shutdown=FINISH_SECONDS,
    )
    # uvicorn raises the signal again after its shutdown; a requested stop is not a failure.
    before = signal.signal(signal.SIGTERM, lambda *_: None)
    try:
        _Server(config, context).run(sockets=[listener])
    finally:
        signal.signal(signal.SIGTERM, before)
        listener.close()


class _Server(uvicorn.Server):
    def __init__(self, config: uvicorn.Config, context: Context) -> None:
        super().__init__(config)
        self._context = context
        self._running = AsyncExitStack()

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Starts the context first. As the application's lifespan, its failure would be a traceback in uvicorn's log,
        and the server would end as if it had been asked to."""
        async with AsyncExitStack() as started:
            await started.enter_async_context(self._context.running())
            await super().startup(sockets)
            self._running = started.pop_all()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        async with self._running:
            await super().shutdown(sockets)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        seconds = self._context.settings.drain_seconds
        if sig != signal.SIGTERM or not seconds or self._context.stopping:
            super().handle_exit(sig, frame)
            return
        self._context.stopping = True
        timer = threading.Timer(seconds, super().handle_exit, (sig, None))
        timer.daemon = True
        timer.start()
