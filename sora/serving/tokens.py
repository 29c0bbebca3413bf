"""Bearer tokens: made, listed and revoked by `sora token`, kept hashed in `.sora/tokens.json`, followed by a server.

A token is 32 random bytes: its plain SHA-256 can't be guessed back, so no slow hash is needed. It is shown once.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import logging
import os
import re
import secrets
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path

from sora.core.errors import InputError, ServiceError
from sora.core.files import atomic

log = logging.getLogger("sora.serving")
MAX_TOKENS = 100
ENVIRONMENT = "SORA_API_TOKEN"  # the name for tokens from this variable
_PREFIX = "sora_"  # so that scanners for leaked secrets recognise it
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,31}")


@dataclass(frozen=True, slots=True)
class Token:
    """What is kept about a token."""

    name: str
    sha256: str
    created: str  # ISO 8601, UTC
    review: bool = False  # may accept and reject corrections; tokens older than this right may not


@dataclass(frozen=True, slots=True)
class Caller:
    """Who a request comes from, by its token."""

    name: str
    review: bool = False


class TokenFile:
    """The tokens of a project. No file: there have never been any."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def tokens(self) -> list[Token]:
        """In the order in which they were added.

        Raises:
            ServiceError: the file can't be read, or is damaged.
        """
        try:
            value = json.loads(self.path.read_text(encoding="utf-8"))
            tokens = [Token(**item) for item in value]
        except FileNotFoundError:
            return []
        except (OSError, ValueError, TypeError) as error:
            raise ServiceError(
                f"{self.path} can't be read: {error}", fix="remove it, and add the tokens that are needed again"
            ) from error
        if not all(
            isinstance(one.name, str)
            and re.fullmatch(r"[0-9a-f]{64}", str(one.sha256))
            and isinstance(one.review, bool)
            for one in tokens
        ):
            raise ServiceError(f"{self.path} does not hold tokens", fix="remove it, and add the tokens again")
        return tokens

    def add(self, name: str, *, review: bool = False) -> str:
        """Makes a token and returns it: it can't be shown again. With `review` it may also decide about corrections.

        Raises:
            InputError: the name is taken or invalid, or there are `MAX_TOKENS`.
            ServiceError: the file can't be read or written.
        """
        if not _NAME.fullmatch(name) or name == ENVIRONMENT:
            raise InputError(
                f"{name!r} is not a name for a token", fix="use 1 to 32 letters, digits, dots, dashes and underscores"
            )
        with self._locked():
            known = self.tokens()
            if any(one.name == name for one in known):
                raise InputError(
                    f"there is already a token {name!r}", fix=f"choose another name, or `sora token revoke {name}`"
                )
            if len(known) >= MAX_TOKENS:
                raise InputError(f"there are {MAX_TOKENS} tokens, the maximum", fix="`sora token revoke` unused ones")
            token = _PREFIX + secrets.token_urlsafe(32)
            self._write([*known, Token(name, _digest(token).hex(), _now(), review)])
        return token

    def revoke(self, name: str) -> int:
        """Revokes a token; a running server sees it at its next request. Returns how many are left.

        Raises:
            InputError: there is no token with this name.
            ServiceError: the file can't be read or written.
        """
        with self._locked():
            known = self.tokens()
            left = [one for one in known if one.name != name]
            if len(left) == len(known):
                raise InputError(f"there is no token {name!r}", fix="`sora token list` shows the names")
            self._write(left)
        return len(left)

    def _write(self, tokens: Sequence[Token]) -> None:
        with atomic(self.path) as file:
            os.fchmod(file.fileno(), 0o600)
            file.write(json.dumps([asdict(token) for token in tokens], indent=1).encode())

    @contextmanager
    def _locked(self) -> Iterator[None]:
        from filelock import FileLock, Timeout

        self.path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with FileLock(self.path.with_suffix(".lock"), timeout=10):
                yield
        except Timeout as error:
            raise ServiceError("another `sora token` has been running for 10 s", fix="try again") from error


class Tokens:
    """Who may call: tokens given at the start, and those now in a file.

    Tokens are required (`required`) if any was given, if the file exists, or if `always`. Revoking the last
    one therefore locks everybody out; removing the file lets this machine in again. A file that can't be read lets
    nobody in by its tokens.
    """

    def __init__(self, given: Sequence[str] = (), file: TokenFile | None = None, *, always: bool = False) -> None:
        self._given = [(_digest(token), Caller(ENVIRONMENT)) for token in given]
        self._file = file
        self._always = always
        self._seen: tuple[int, int, int] | None = None  # the file's state when `_kept` was read
        self._kept: list[tuple[bytes, Caller]] = []
        self._follow()

    @property
    def required(self) -> bool:
        self._follow()
        return self._always or bool(self._given) or self._seen is not None

    def caller(self, authorization: str | None) -> Caller | None:
        """Whose token an Authorization header carries; None: it carries none that may call.

        The comparison takes the same time wherever digests differ.
        """
        self._follow()
        scheme, _, token = (authorization or "").partition(" ")
        given = _digest(token.strip())
        callers = [caller for digest, caller in (*self._given, *self._kept) if hmac.compare_digest(given, digest)]
        return callers[0] if callers and scheme.lower() == "bearer" else None

    def _follow(self) -> None:
        """Reads the file again if it changed: a stat call, microseconds per request."""
        if self._file is None:
            return
        try:
            facts = os.stat(self._file.path)
        except FileNotFoundError:
            self._seen, self._kept = None, []
            return
        except OSError as error:
            self._seen, self._kept = (0, 0, 0), []
            log.error("%s can't be checked: %s", self._file.path, error)
            return
        seen = (facts.st_ino, facts.st_mtime_ns, facts.st_size)
        if seen == self._seen:
            return
        self._seen = seen
        try:
            self._kept = [
                (bytes.fromhex(token.sha256), Caller(token.name, token.review)) for token in self._file.tokens()
            ]
        except ServiceError as error:
            self._kept = []
            log.error("no token of the file may call: %s", error.message)


def _digest(token: str) -> bytes:
    return hashlib.sha256(token.encode()).digest()


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
