"""The project's own secret, which Prefect's and MLflow's servers ask for, and the folder that only its owner can read.

`.sora/secret` (mode 0600) holds one line, `sora:TOKEN`. It is made once, and is Prefect's auth string and MLflow's user
and password. It is never on a command line or in a database: processes get it from this file or their environment.
"""

from __future__ import annotations

import os
import re
import secrets
import stat
from dataclasses import dataclass, field
from pathlib import Path

from sora.config.project import Project
from sora.core.errors import ServiceError
from sora.core.files import writing

USER = "sora"
_FORM = re.compile(r"[A-Za-z0-9._-]{1,64}:[\x21-\x7e]{16,256}")


@dataclass(frozen=True, slots=True)
class Login:
    """The user and password for a server."""

    user: str
    password: str = field(repr=False)

    @classmethod
    def parse(cls, text: str) -> Login:
        """The login from `user:password`, which must contain a colon."""
        user, _, password = text.partition(":")
        return cls(user, password)

    @property
    def auth_string(self) -> str:
        """`user:password`, as Prefect expects it."""
        return f"{self.user}:{self.password}"

    @property
    def pair(self) -> tuple[str, str]:
        """(user, password), as httpx expects it."""
        return self.user, self.password


def secret_file(project: Project) -> Path:
    return project.secret


def private_state(project: Project) -> None:
    """Makes `.sora`, and closes it to everybody but its owner if an older Sora left it open.

    Raises:
        ServiceError: it can't be made, or belongs to another user.
    """
    with writing(project.state):
        project.state.mkdir(mode=0o700, parents=True, exist_ok=True)
        if stat.S_IMODE(project.state.stat().st_mode) & 0o077:
            project.state.chmod(0o700)


def secret(project: Project) -> Login:
    """The project's login; the first process that calls this makes it.

    Raises:
        ServiceError: the file is damaged, or can't be written or read.
    """
    private_state(project)
    file = secret_file(project)
    with writing(file):
        if not file.exists():
            _make(file)
        if stat.S_IMODE(file.stat().st_mode) & 0o077:
            file.chmod(0o600)
        text = file.read_text(encoding="utf-8", errors="replace").strip()
    if not _FORM.fullmatch(text):
        raise ServiceError(
            f"{file} does not hold a secret (`user:password`, at least 16 characters of password)",
            fix="stop everything of this project that runs, remove the file, and start again: a new secret is made",
        )
    return Login.parse(text)


def _make(file: Path) -> None:
    """Writes the file whole or not at all: another process that reads it now must not see half a secret."""
    draft = file.with_name(f".{file.name}.{os.getpid()}.{secrets.token_hex(4)}")
    descriptor = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8") as out:
            out.write(f"{USER}:{secrets.token_urlsafe(32)}\n")
            out.flush()
            os.fsync(out.fileno())
        try:
            os.link(draft, file)
        except FileExistsError:
            pass  # another process was quicker: its secret counts
        except OSError:  # a file system without links
            os.replace(draft, file)
    finally:
        draft.unlink(missing_ok=True)
