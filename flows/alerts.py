"""Tells a webhook (SORA_ALERT_WEBHOOK in the environment, or `alert.webhook`) that a nightly failed or did not happen.

The address is often a secret itself (chat services put the token into the path), so no log line holds more of it than
the host, and the environment is the better place for it: params.yaml is in git. Redirects are not followed, and a name
that stands for this machine or its link (where clouds keep their metadata) is not called: only an address that is
written out may lead there.

An alert that can't be delivered is logged and nothing else: it must not fail the flow that it reports on.

`python -m flows.alerts [PROJECT]` checks once whether a nightly is overdue, for cron or a container beside the worker:
a worker that is down can't report that it is down.
"""

from __future__ import annotations

import ipaddress
import json
import logging
import os
import socket
import sys
import time
import urllib.error
import urllib.request
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal
from urllib.parse import urlsplit

from sora.config import Project, find_project
from sora.core.errors import SoraError
from sora.core.progress import say
from sora.operations import nightly_log

if TYPE_CHECKING:
    from prefect import Flow
    from prefect.client.schemas.objects import FlowRun, State

_log = logging.getLogger(__name__)
ENVIRONMENT = "SORA_ALERT_WEBHOOK"
_TIMEOUT = 10.0  # seconds, each try
_PAUSES = (1.0, 4.0)  # seconds before the second and the third try
_LONGEST_REASON = 4000  # characters; a training's log tail would be refused by most chat services


@dataclass(frozen=True, slots=True)
class Alert:
    """What the webhook gets, as JSON; fields that are None are left out. A new field of the payload belongs here."""

    event: Literal["nightly_failed", "nightly_missed", "backup_failed"]
    project: str  # its folder
    flow_run: str | None = None  # nightly_failed: its name in Prefect
    reason: str | None = None  # of a failure
    fix: str | None = None  # of a failure: "" if none is known
    expected: str | None = None  # nightly_missed: when it should have begun; ISO 8601
    last: str | None = None  # nightly_missed: when the last good one ended; ISO 8601

    def to_dict(self) -> dict[str, str]:
        return {name: value for name, value in asdict(self).items() if value is not None}


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """A redirected POST would arrive as a GET without its body; a logged failure is better."""

    def redirect_request(self, *args: Any, **options: Any) -> None:
        return None


def redacted(url: str) -> str:
    """Scheme and host of an address: no user, password, path or query."""
    try:
        parts = urlsplit(url)
        port = f":{parts.port}" if parts.port else ""
    except ValueError:
        return "an address that can't be read"
    return f"{parts.scheme}://{parts.hostname or '?'}{port}/…"


def send(webhook: str | None, alert: Alert) -> bool:
    """POSTs the alert as JSON: three tries, then a log line. Never raises. Returns whether it was delivered.

    It tries again after no connection, no answer, 429 and 5xx. Any other refusal is final.
    """
    if not webhook:
        return False
    try:
        if urlsplit(webhook).scheme not in ("http", "https"):  # urllib would also open files
            raise ValueError("scheme")
        if _leads_inside(webhook):
            raise _Inside
        request = urllib.request.Request(
            webhook,
            data=json.dumps(alert.to_dict()).encode(),
            headers={"Content-Type": "application/json", "User-Agent": "sora"},
            method="POST",
        )
        # urllib, not httpx: the latter logs the whole address of every request.
        opener = urllib.request.build_opener(_NoRedirect)
        for pause in (*_PAUSES, None):
            try:
                with opener.open(request, timeout=_TIMEOUT):
                    return True
            except urllib.error.HTTPError as error:
                reason, again = f"it answered {error.code}", error.code == 429 or error.code >= 500
                error.close()
            except OSError as error:  # includes URLError, timeouts and resets
                reason, again = type(getattr(error, "reason", error)).__name__, True
            if not again or pause is None:
                break
            time.sleep(pause)
    except _Inside:
        reason = "its name stands for this machine or its link: write the address itself if you mean it"
    except Exception as error:  # a webhook that is not an address
        reason = type(error).__name__
    _log.warning("alert %s was not delivered to %s: %s", alert.event, redacted(webhook), reason)
    return False


class _Inside(Exception):
    """A name leads to this machine or its link."""


def _leads_inside(webhook: str) -> bool:
    """Whether the host is a name, other than localhost, of a loopback, link-local or unspecified address."""
    name = urlsplit(webhook).hostname or ""
    try:
        ipaddress.ip_address(name)
        return False  # an address that is written out
    except ValueError:
        pass  # a name, which is looked up below
    if name == "localhost":
        return False
    try:
        texts = {str(entry[4][0]).partition("%")[0] for entry in socket.getaddrinfo(name, None)}
    except OSError:
        return False  # the call reports it and tries again
    every = [ipaddress.ip_address(text) for text in texts]
    addresses = [getattr(address, "ipv4_mapped", None) or address for address in every]
    return any(address.is_loopback or address.is_link_local or address.is_unspecified for address in addresses)


def nightly_failed(project: Project, *, flow_run: str, reason: str, fix: str = "") -> bool:
    """Sends `nightly_failed`. The webhook comes from the environment and params.yaml as of now."""
    root = str(project.root)
    alert = Alert("nightly_failed", root, flow_run=flow_run, reason=reason[-_LONGEST_REASON:], fix=fix)
    return send(_webhook(project), alert)


def backup_failed(project: Project, *, reason: str, fix: str = "") -> bool:
    """Sends `backup_failed`: the nightly itself may have ended well."""
    alert = Alert("backup_failed", str(project.root), reason=reason[-_LONGEST_REASON:], fix=fix)
    return send(_webhook(project), alert)


def on_failure(flow: Flow[..., Any], flow_run: FlowRun, state: State) -> None:
    """Hook for the nightly flow's `on_failure` and `on_crashed`; its parameter `project` says which project."""
    root = (flow_run.parameters or {}).get("project")
    if not root:
        return
    reason, fix = state.message or state.name or "", ""
    error = _error_of(state)
    if isinstance(error, SoraError):
        reason, fix = error.message, error.fix
    nightly_failed(Project(Path(root)), flow_run=flow_run.name, reason=reason, fix=fix)


on_crashed = on_failure


def _error_of(state: State) -> BaseException | None:
    """The exception behind a failed state; None if it stayed in another process (a crash)."""
    try:
        result = state.result(raise_on_failure=False)
    except Exception:
        return None
    return result if isinstance(result, BaseException) else None


def check_missed(project: Project, now: datetime | None = None) -> datetime | None:
    """Alerts when a nightly is overdue, once per nightly. Returns the time of the overdue one.

    A delivered alert is remembered in `.sora/alerted.json`; one that was not is tried again at the next check.
    """
    settings = project.settings()
    last = nightly_log.read(project)
    expected = nightly_log.missed(last, now or datetime.now(UTC), settings.schedule)
    if expected is None or last is None:
        return None
    memory = project.alerted
    stamp = expected.isoformat()
    if _remembered(memory) != stamp:
        alert = Alert("nightly_missed", str(project.root), expected=stamp, last=last.finished.isoformat())
        if send(os.environ.get(ENVIRONMENT) or settings.alert.webhook, alert):
            memory.write_text(json.dumps({"expected": stamp}), encoding="utf-8")
    return expected


def _remembered(memory: Path) -> str | None:
    try:
        return str(json.loads(memory.read_text(encoding="utf-8"))["expected"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _webhook(project: Project) -> str | None:
    if given := os.environ.get(ENVIRONMENT):
        return given
    try:
        return project.settings().alert.webhook
    except SoraError as error:
        _log.warning("no alert could be sent: %s", error.message)
        return None


def main() -> int:
    """0: in order; 1: a nightly is overdue; the error's own code when the project can't be read."""
    try:
        project = find_project(Path(sys.argv[1] if len(sys.argv) > 1 else "."))
        overdue = check_missed(project)
    except SoraError as error:
        say(str(error))
        return error.exit_code
    if overdue is None:
        return 0
    say(f"the nightly of {overdue.isoformat()} did not end well")
    return 1


if __name__ == "__main__":
    sys.exit(main())
