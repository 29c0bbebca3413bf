"""MLflow's REST interface over plain HTTP: the only place where its errors become Sora's.

Sora talks to MLflow without MLflow's own client: importing that takes 2–5 s of every command and would slow down
a server that must be ready quickly (figures: docs/decisions/0006-servers.md). What Sora needs of the interface
(runs, logged models, registered models, proxied artifacts) is public and versioned in its addresses.
"""

from __future__ import annotations

import errno
import hashlib
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote, unquote, urlsplit

import httpx

from sora.config.credentials import Login
from sora.core.errors import DiskFull, InputError, ServiceError
from sora.core.redaction import without_login

_CHUNK = 1 << 20  # bytes
_RETRY_AFTER = (0.2, 1.0)  # seconds before the second and the third attempt
_GATEWAY = (502, 503, 504)  # a proxy in front of a server that is restarting
_LOOPBACK = ("127.0.0.1", "localhost", "::1")


class NotFound(ServiceError):
    """MLflow has no such thing (RESOURCE_DOES_NOT_EXIST)."""


class AlreadyExists(ServiceError):
    """MLflow already has such a thing (RESOURCE_ALREADY_EXISTS)."""


class Unreachable(ServiceError):
    """MLflow did not answer: nothing listens, or the answer came too late."""


class Rest:
    """One MLflow server.

    Without a login, the one in the address (`http://user:password@host`) counts, or MLFLOW_TRACKING_USERNAME and
    MLFLOW_TRACKING_PASSWORD, or MLFLOW_TRACKING_TOKEN, as with MLflow's own client. `uri` never holds a password.

    Args:
        tracking_uri: `http://` or `https://` address of the server.
        login: what the server asks for.
        timeout: seconds that one answer may take.

    Raises:
        InputError: the address is not http (a local folder or database can't hand models to other machines).
    """

    def __init__(self, tracking_uri: str, login: Login | None = None, *, timeout: float = 60.0) -> None:
        parts = urlsplit(tracking_uri)
        if parts.scheme not in ("http", "https") or not parts.netloc:
            raise InputError(
                f"MLflow's address must be http://… or https://…, received {without_login(tracking_uri)!r}",
                fix="set services.mlflow_tracking_uri to the address of an MLflow server, or omit it",
            )
        self.uri = without_login(tracking_uri).rstrip("/")
        headers = {}
        auth = None
        if login is not None:
            auth = httpx.BasicAuth(*login.pair)
        elif parts.username is not None:
            auth = httpx.BasicAuth(unquote(parts.username), unquote(parts.password or ""))
        elif token := os.environ.get("MLFLOW_TRACKING_TOKEN"):
            headers["Authorization"] = f"Bearer {token}"
        elif user := os.environ.get("MLFLOW_TRACKING_USERNAME"):
            auth = httpx.BasicAuth(user, os.environ.get("MLFLOW_TRACKING_PASSWORD", ""))
        self._client = httpx.Client(
            base_url=self.uri,
            auth=auth,
            headers=headers,
            timeout=httpx.Timeout(timeout, connect=min(timeout, 5.0)),
            trust_env=parts.hostname not in _LOOPBACK,  # a proxy setting must not catch a server on this machine
        )

    def close(self) -> None:
        self._client.close()

    def get(self, path: str, **query: Any) -> dict[str, Any]:
        return self._call("GET", path, params=query)

    def post(self, path: str, body: dict[str, Any], *, timeout: float | None = None) -> dict[str, Any]:
        return self._call("POST", path, json=body, timeout=timeout)

    def patch(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        return self._call("PATCH", path, json=body)

    def delete(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        return self._call("DELETE", path, json=body)

    def pages(self, method: str, path: str, key: str, query: dict[str, Any]) -> Iterator[dict[str, Any]]:
        """Every item under `key` of a search, page by page."""
        token = None
        while True:
            asked = {**query, **({"page_token": token} if token else {})}
            answer = self.get(path, **asked) if method == "GET" else self.post(path, asked)
            yield from answer.get(key, [])
            token = answer.get("next_page_token")
            if not token:
                return

    # -- artifacts: through the server's proxy, so that only HTTP is needed --

    def upload(self, root: str, name: str, source: Path) -> None:
        """Sends one file to `name` below the artifact root (`mlflow-artifacts:/…`) as a stream.

        Raises:
            ServiceError: the server keeps artifacts elsewhere, does not answer, or refuses.
        """

        def chunks() -> Iterator[bytes]:
            with source.open("rb") as file:
                while chunk := file.read(_CHUNK):
                    yield chunk

        size = str(source.stat().st_size)
        self._send("PUT", self._artifact(root, name), content=chunks, headers={"Content-Length": size})

    def download(self, root: str, name: str, target: Path) -> str:
        """Fetches one artifact into the file `target` as a stream and returns the sha256 of what arrived.

        Raises:
            NotFound: there is no such artifact.
            DiskFull: no room for it.
            ServiceError: the server does not answer or refuses.
        """
        address = self._artifact(root, name)
        digest = hashlib.sha256()
        try:
            with self._client.stream("GET", address) as answer:
                if answer.status_code >= 400:
                    answer.read()
                    raise self._refused("GET", address, answer)
                with target.open("wb") as file:
                    for chunk in answer.iter_bytes(_CHUNK):
                        digest.update(chunk)
                        file.write(chunk)
        except httpx.HTTPError as error:
            raise self._unreachable(error) from error
        except OSError as error:
            if error.errno == errno.ENOSPC:
                raise DiskFull(
                    f"no room for the model in {target.parent}", fix="make room: `sora gc --dry-run` shows what can go"
                ) from error
            raise ServiceError(f"can't write {target}: {error}", fix="make the folder writable") from error
        return digest.hexdigest()

    def text(self, root: str, name: str) -> str:
        """One small artifact as text."""
        return self._send("GET", self._artifact(root, name)).text

    def names(self, root: str, folder: str) -> list[str]:
        """The files directly in `folder` below the artifact root; none if there is no such folder."""
        path = f"{self._proxied(root)}/{folder}"
        answer = self._call("GET", "/api/2.0/mlflow-artifacts/artifacts", params={"path": path})
        return [str(file["path"]) for file in answer.get("files", []) if not file.get("is_dir")]

    def _artifact(self, root: str, name: str) -> str:
        return f"/api/2.0/mlflow-artifacts/artifacts/{quote(f'{self._proxied(root)}/{name}')}"

    def _proxied(self, root: str) -> str:
        parts = urlsplit(root)
        if parts.scheme != "mlflow-artifacts":
            raise ServiceError(
                f"MLflow at {self.uri} keeps artifacts at {root}, which can't be reached through the server",
                fix="start it with --serve-artifacts and --artifacts-destination, and use a new experiment",
            )
        return parts.path.strip("/")

    # -- one request --

    def _call(self, method: str, path: str, **options: Any) -> dict[str, Any]:
        if not path.startswith("/"):
            path = f"/api/2.0/mlflow/{path}"
        answer = self._send(method, path, **options)
        try:
            return dict(answer.json())
        except ValueError as error:
            raise ServiceError(
                f"{self.uri} is not an MLflow server: {path} is not JSON",
                fix="correct services.mlflow_tracking_uri",
            ) from error

    def _send(self, method: str, path: str, *, timeout: float | None = None, **options: Any) -> httpx.Response:
        """Sends; repeats after a pause if that can't do anything twice: nothing arrived, or nothing is changed."""
        content = options.pop("content", None)
        if timeout is not None:
            options["timeout"] = timeout
        for pause in (*_RETRY_AFTER, None):
            if content is not None:
                options["content"] = content()  # a stream can be read only once
            try:
                answer = self._client.request(method, path, **options)
            except httpx.HTTPError as error:
                again = isinstance(error, httpx.ConnectError) or method in ("GET", "PUT")
                if pause is None or timeout is not None or not again:
                    raise self._unreachable(error) from error
            else:
                if answer.status_code < 400:
                    return answer
                if pause is None or answer.status_code not in _GATEWAY or method not in ("GET", "PUT"):
                    raise self._refused(method, path, answer)
            time.sleep(pause)
        raise AssertionError("the last attempt returns or raises")

    def _unreachable(self, error: httpx.HTTPError) -> Unreachable:
        detail = str(error) or type(error).__name__
        return Unreachable(
            f"MLflow at {self.uri} does not answer: {detail}",
            fix="start it (`sora up`), or correct services.mlflow_tracking_uri in params.yaml",
        )

    def _refused(self, method: str, path: str, answer: httpx.Response) -> ServiceError:
        if answer.status_code in (401, 403):
            return ServiceError(
                f"MLflow at {self.uri} refused {method} {path} with {answer.status_code}: {answer.text[:200]}",
                fix="set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD to an account that may do this; for a "
                "server of `sora up` they are the two halves of its project's .sora/secret",
            )
        try:
            body = answer.json()
            code, message = body.get("error_code", ""), body.get("message", "")
        except (ValueError, AttributeError):
            code, message = "", answer.text[:300]
        kind: type[ServiceError] = ServiceError
        if code == "RESOURCE_DOES_NOT_EXIST" or answer.status_code == 404:
            kind = NotFound
        elif code == "RESOURCE_ALREADY_EXISTS":
            kind = AlreadyExists
        fix = "see the MLflow server's log (.sora/logs/mlflow.log)" if answer.status_code >= 500 else ""
        return kind(f"MLflow refused {method} {path} with {answer.status_code} {code}: {message[:500]}", fix=fix)
