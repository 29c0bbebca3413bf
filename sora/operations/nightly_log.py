"""When the last good nightly was, and whether one is overdue. Written by the nightly, read by alerts and `sora doctor`.

One small file, `.sora/last_nightly.json`: {"finished": ISO 8601 UTC, "outcome": str, "run_id": str}. Registering the
schedule writes it too (outcome "registered"), so that a project whose very first nightly never comes is noticed.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

from sora.config import Project, Schedule
from sora.core.files import atomic

REGISTERED = "registered"


@dataclass(frozen=True, slots=True)
class Nightly:
    """The last nightly that ended well (promoted, refused, unchanged), or when the schedule began."""

    finished: datetime  # aware, UTC
    outcome: str
    run_id: str = ""


def path(project: Project) -> Path:
    return project.last_nightly


def write(project: Project, outcome: str, run_id: str = "", *, finished: datetime | None = None) -> Nightly:
    """Records a nightly that ended well; atomic, so that a reader never sees half of it."""
    entry = Nightly((finished or datetime.now(UTC)).astimezone(UTC), outcome, run_id)
    target = path(project)
    target.parent.mkdir(parents=True, exist_ok=True)
    with atomic(target, shared=True) as file:
        file.write(json.dumps({**asdict(entry), "finished": entry.finished.isoformat()}).encode())
    return entry


def read(project: Project) -> Nightly | None:
    """The last entry; None if there is none or it can't be read (then nothing is claimed)."""
    try:
        value = json.loads(path(project).read_text(encoding="utf-8"))
        finished = datetime.fromisoformat(value["finished"])
        return Nightly(finished.astimezone(UTC), str(value["outcome"]), str(value.get("run_id", "")))
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def due(schedule: Schedule, now: datetime) -> datetime:
    """The last time at or before `now` (aware) at which the schedule fires, in the schedule's own time zone."""
    from zoneinfo import ZoneInfo

    from croniter import croniter

    local = now.astimezone(ZoneInfo(schedule.timezone))
    # get_prev is strict: one second later, so that the exact moment counts as fired.
    fired: datetime = croniter(schedule.cron, local + timedelta(seconds=1)).get_prev(datetime)
    return fired


def missed(last: Nightly | None, now: datetime, schedule: Schedule) -> datetime | None:
    """The time of the nightly that should have ended well by now and did not; None if all is in order.

    A nightly is overdue `schedule.grace_minutes` after its time. Nothing is overdue before the schedule began
    (`last` is None).
    """
    if last is None:
        return None
    expected = due(schedule, now - timedelta(minutes=schedule.grace_minutes))
    return expected if last.finished < expected else None
