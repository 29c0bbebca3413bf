"""The clock goes a day back or forth: over the nightly's hour, over daylight saving, in the middle of a run."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from zoneinfo import ZoneInfo

import pytest

from benchmarks.faults.inject import DAY, fake_clock, set_clock, until
from benchmarks.faults.processes import Case, Verb
from benchmarks.faults.scenes import LIMIT, Scenes
from sora.config import Project, Schedule
from sora.operations import servers as services
from sora.operations.nightly_log import Nightly, due, missed
from tests.faults.conftest import holds, runs, speaks

BERLIN = ZoneInfo("Europe/Berlin")
# In 2026 clocks go forward on 29 March (02:00 → 03:00) and back on 25 October (03:00 → 02:00).


def berlin(text: str, *, second: bool = False) -> datetime:
    """A local time; `second`: the later of two that are called alike."""
    return datetime.fromisoformat(text).replace(tzinfo=BERLIN, fold=int(second))


def schedule(cron: str = "30 2 * * *", grace: int = 90) -> Schedule:
    return Schedule(cron=cron, timezone="Europe/Berlin", grace_minutes=grace)


@pytest.mark.parametrize("cron", ["0 2 * * *", "30 2 * * *", "0 3 * * *", "0 0 * * *"])
@pytest.mark.parametrize("day", ["2026-03-29", "2026-10-25"])
def test_no_false_alarm_over_daylight_saving(cron: str, day: str) -> None:
    """Every night from a week before to a week after is done 20 minutes after it fires: nothing is ever overdue."""
    plan = schedule(cron)
    middle = datetime.fromisoformat(day).replace(tzinfo=UTC)
    now = middle - timedelta(days=7)
    last = Nightly(due(plan, now).astimezone(UTC) + timedelta(minutes=20), "promoted")
    while now < middle + timedelta(days=7):
        fired = due(plan, now).astimezone(UTC)
        assert fired <= now
        if now >= fired + timedelta(minutes=20):
            last = Nightly(fired + timedelta(minutes=20), "promoted")
        assert missed(last, now, plan) is None, now
        now += timedelta(minutes=10)


@pytest.mark.parametrize("cron", ["0 2 * * *", "30 2 * * *", "0 3 * * *"])
@pytest.mark.parametrize("day", ["2026-03-29", "2026-10-25"])
def test_a_night_that_did_not_run_is_noticed_once(cron: str, day: str) -> None:
    """None after the one before the change of clocks: by noon exactly one time is named, and it stays the same."""
    plan = schedule(cron)
    eve = berlin(f"{day} 12:00") - timedelta(days=1)
    last = Nightly(eve.astimezone(UTC), "promoted")
    noon = berlin(f"{day} 12:00").astimezone(UTC)
    named = {missed(last, noon + timedelta(minutes=10 * n), plan) for n in range(30)}
    assert len(named) == 1 and None not in named


def test_every_day_has_one_nightly_over_daylight_saving() -> None:
    """Where 02:30 does not exist, or exists twice, the day still has a moment that counts."""
    for day in ("2026-03-29", "2026-10-25"):
        for cron in ("30 2 * * *", "0 2 * * *"):
            fired = due(schedule(cron), berlin(f"{day} 12:00"))
            assert berlin(f"{day} 00:00").astimezone(UTC) <= fired.astimezone(UTC), (day, cron, fired)


def test_a_clock_set_back_raises_no_alarm() -> None:
    """The last nightly lies in the future then; that is no missed one."""
    plan, now = schedule(), berlin("2026-07-10 12:00").astimezone(UTC)
    last = Nightly(now, "promoted")
    for back in (timedelta(hours=1), timedelta(days=1), timedelta(days=400)):
        assert missed(last, now - back, plan) is None


def test_a_clock_set_forth_names_one_night_and_none_when_set_back() -> None:
    plan, now = schedule(), berlin("2026-07-10 12:00").astimezone(UTC)
    last = Nightly(berlin("2026-07-10 03:00").astimezone(UTC), "promoted")
    ahead = missed(last, now + timedelta(days=1), plan)
    assert ahead is not None and ahead.astimezone(UTC).date().isoformat() == "2026-07-11"
    assert missed(last, now, plan) is None


def test_servers_are_known_after_the_clock_was_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A process's creation time moves with the clock, since Linux reckons it from the time of the boot. A server
    would be taken for a dead one, and a second be started on the same database."""
    import psutil

    project = Project(tmp_path)
    project.state.mkdir()
    services.record(project, "mlflow", os.getpid(), "http://127.0.0.1:1", owner="up")
    for jump in (-DAY, -1, 1, DAY):
        true = psutil._pslinux.boot_time()
        monkeypatch.setattr(psutil._pslinux, "boot_time", lambda moved=true + jump: moved)
        assert services.running(project), f"forgotten when the clock moved by {jump} s"
        monkeypatch.undo()


@pytest.mark.slow
def test_doctor_a_day_off(case: Callable[[str], Case]) -> None:
    """Behind, ahead and in time: it answers; ahead it may say that a nightly did not happen, and no more."""
    here = case("unchanged")
    for offset in (-DAY, 0, 2 * DAY):
        env = {**here.environment(), **faked(here, offset)}
        command = [sys.executable, "-m", "sora.cli", "doctor", "--json"]
        done = subprocess.run(command, cwd=here.root, env=env, capture_output=True, text=True, timeout=LIMIT)
        bad = {one["name"] for one in json.loads(done.stdout)["checks"] if not one["ok"]}
        spared = {"memory", "disk"} | ({"nightly"} if offset > 0 else set())
        assert bad <= spared, (offset, done.stdout)


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("jump", [-DAY, DAY])
def test_in_the_middle_of_a_run(case: Callable[[str], Case], scenes: Scenes, jump: int) -> None:
    here = case("fitted")
    with Verb(here, "run", "--json", env=faked(here, 0)) as verb:
        until(verb, 0.4 * scenes.seconds["fitted"])
        set_clock(here, jump)
        verb.wait(LIMIT)
    speaks(verb)
    runs(here)  # by the right clock again
    holds(here)


def faked(case: Case, offset: int) -> dict[str, str]:
    try:
        return fake_clock(case, offset)
    except FileNotFoundError as error:
        pytest.skip(str(error))
