"""`sora serve`: the application on a socket, logs, and an MLflow server to follow if nobody else runs one."""

from __future__ import annotations

import logging
import os
import socket
import threading
import time
from collections.abc import Callable

from sora.config import Project, Serve
from sora.config.credentials import Login
from sora.core.addresses import is_loopback
from sora.core.errors import InputError, ServiceError, SoraError
from sora.core.progress import say
from sora.dataset.corrections import Inbox
from sora.operations import servers
from sora.serving.app import create_app
from sora.serving.listener import listen, serve_until_stopped
from sora.serving.source import ModelCache, RegistrySource
from sora.serving.tokens import ENVIRONMENT, TokenFile, Tokens

log = logging.getLogger("sora.serving")
FIRST_WAIT = 60.0  # seconds that a cached champion may take to be ready before MLflow is started
MIN_TOKEN = 16  # characters
THREADS = "TF_NUM_INTRAOP_THREADS"  # TensorFlow reads this at import


def serve(project: Project, host: str | None = None, port: int | None = None) -> None:
    """Serves the project's champion until SIGTERM or Ctrl-C; requests in progress are answered first.

    Raises:
        InputError: an address other than loopback without tokens, or a token that is too short.
        ServiceError: the address is taken or not this machine's, the file of tokens is damaged, or the temporary
            folder can't be written.
    """
    settings = project.settings()
    host = host or settings.serve.host
    given, file = read_tokens(os.environ.get(ENVIRONMENT, "")), TokenFile(project.tokens)
    strangers = not is_loopback(host)
    if not given and not file.tokens() and strangers:
        raise InputError(
            f"other machines can call a server on {host}, and there is no token",
            fix="make one (`sora token add NAME`), or set SORA_API_TOKEN, or serve on 127.0.0.1",
        )
    tokens = Tokens(given, file, always=strangers)
    _log_to_stderr()
    os.environ.setdefault(THREADS, str(model_threads(settings.serve)))
    cache = ModelCache(project.cache.root)
    mlflow = Mlflow(project)
    app = create_app(
        settings.serve,
        RegistrySource(mlflow.address, settings.name, cache, mlflow.login),
        cache,
        tokens=tokens,
        inbox=Inbox(project, settings.serve.inbox_files, settings.serve.inbox_bytes),
    )
    listener = listen(host, settings.serve.port if port is None else port)
    follower = app.state.context.follower
    mlflow.start(lambda: follower.current is not None or _champion_of(cache) is None)
    address = f"http://{_written(listener)}/"
    say(f"Sora answers at {address} once the model is loaded; Ctrl-C ends it")
    try:
        serve_until_stopped(app, listener)
    finally:
        mlflow.close()


def model_threads(settings: Serve) -> int:
    """Threads that share one operation of the model: as many as the decoders leave processors. More would wait
    for each other while a decoder uses the processor of one of them."""
    return max(1, (os.cpu_count() or 1) - settings.decode_workers)


def read_tokens(text: str) -> list[str]:
    """SORA_API_TOKEN: one token or several, separated by spaces or commas.

    Raises:
        InputError: a token is short enough to be guessed, or a header can't carry it.
    """
    tokens = text.replace(",", " ").split()
    if any(len(token) < MIN_TOKEN or not token.isascii() for token in tokens):
        raise InputError(
            f"SORA_API_TOKEN holds a token of fewer than {MIN_TOKEN} ASCII characters",
            fix="use `openssl rand -hex 24`",
        )
    return tokens


class Mlflow:
    """The address of the MLflow server to follow; our own server while there is no other.

    Without one, a champion that `sora promote` or `sora rollback` moves would be seen only if a poll happened to reach
    the server that they start for themselves.
    """

    def __init__(self, project: Project) -> None:
        self._project = project
        self._configured = project.settings().services.mlflow_tracking_uri
        # Set if somebody else runs the server: `sora up`, a container.
        self._given = os.environ.get("MLFLOW_TRACKING_URI")
        self._ended = threading.Event()
        # One thread for the server's whole life: Linux ends children with the thread that started them.
        self._thread: threading.Thread | None = None

    def address(self) -> str | None:
        """The same as `servers.mlflow_address`, but None where that raises."""
        if self._configured:
            return self._configured
        entry = servers.running(self._project).get("mlflow")
        return entry.url if entry else self._given

    def login(self) -> Login | None:
        """The login for the server at `address`. None if the environment has it."""
        return None if self._configured else servers.own_login(self._project, "mlflow")

    def start(self, may_start: Callable[[], bool]) -> None:
        """`may_start()` becomes true once nothing that should be quick would have to share the processors with it."""
        if not self._configured and not self._given:
            self._thread = threading.Thread(target=self._keep, args=(may_start,), name="mlflow", daemon=True)
            self._thread.start()

    def close(self) -> None:
        self._ended.set()
        if self._thread is not None:
            self._thread.join()

    def _keep(self, may_start: Callable[[], bool]) -> None:
        latest = time.monotonic() + FIRST_WAIT
        while not may_start() and time.monotonic() < latest and not self._ended.wait(0.2):
            pass
        while not self._ended.wait(1):
            if "mlflow" in servers.running(self._project):
                continue
            try:
                with servers.servers(self._project, prefect=False, owner="serve", standing=True):
                    while "mlflow" in servers.running(self._project) and not self._ended.wait(1):
                        pass
            except (SoraError, OSError) as error:
                log.warning("MLflow can't be started: %s", error)
                self._ended.wait(30)


def _champion_of(cache: ModelCache) -> object:
    try:
        return cache.champion()
    except ServiceError:
        return None


def _written(listener: socket.socket) -> str:
    host, port = listener.getsockname()[:2]
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def _log_to_stderr() -> None:
    """One line per event on standard error: `sora.serving.access` writes JSON, the rest plain text."""
    # No line shows these fields, and each costs a system call.
    logging.logThreads = logging.logProcesses = logging.logMultiprocessing = False
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    plain = logging.StreamHandler()
    plain.setFormatter(logging.Formatter("%(message)s"))
    for name, own, level in (
        ("sora.core", handler, logging.INFO),
        ("sora.serving", handler, logging.INFO),
        ("sora.serving.access", plain, logging.INFO),
        ("uvicorn.error", handler, logging.WARNING),
    ):
        logger = logging.getLogger(name)
        logger.handlers[:] = [own]
        logger.setLevel(level)
        logger.propagate = False
