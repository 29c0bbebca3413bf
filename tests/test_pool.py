from __future__ import annotations

import os
import signal
import time
from contextlib import closing

import pytest

from sora import pool
from sora.errors import DiskFull, ServiceError, VideoError


def square(number: int) -> int:
    if number == -1:
        os.kill(os.getpid(), signal.SIGSEGV)
    if number == -2:
        raise VideoError("no", rule="unreadable", mend="try")
    if number == -3:
        os._exit(7)
    if number == -4:
        time.sleep(60)
    return number * number


def test_every_item_once():
    assert dict(pool.each(square, range(30), workers=2)) == {n: n * n for n in range(30)}


def test_nothing_starts_no_process():
    assert list(pool.each(square, [], workers=2)) == []


def test_a_crash_costs_one_item():
    told = []
    found = dict(pool.each(square, [1, -1, 2, -3, 3, 4], workers=2, crashed=lambda item, how: told.append(how) or 0))
    assert found == {1: 1, -1: 0, 2: 4, -3: 0, 3: 9, 4: 16}
    assert sorted(told) == ["ended with 7", "was killed by signal 11 (SIGSEGV)"]


def test_a_crash_without_a_mend_is_an_error():
    with pytest.raises(ServiceError, match="SIGSEGV"):
        list(pool.each(square, [-1], workers=1))


def test_errors_come_through_whole():
    with pytest.raises(VideoError) as caught:
        list(pool.each(square, [-2], workers=1))
    assert (caught.value.rule, caught.value.mend) == ("unreadable", "try")


def test_leaving_ends_the_processes_at_once():
    import multiprocessing

    start = time.monotonic()
    with closing(pool.each(square, [1, -4, -4], workers=2)) as results:
        assert next(results) == (1, 1)
    assert time.monotonic() - start < 20
    assert multiprocessing.active_children() == []


def test_items_are_taken_as_needed():
    taken = []

    def items():
        for number in range(100):
            taken.append(number)
            yield number

    with closing(pool.each(square, items(), workers=2)) as results:
        next(results)
        assert len(taken) < 10


def test_disk_full_is_its_own_error(tmp_path):
    import errno

    from sora.files import atomic

    target = tmp_path / "a"
    target.write_bytes(b"old")
    with pytest.raises(DiskFull), atomic(target) as file:
        file.write(b"new")
        raise OSError(errno.ENOSPC, "No space left on device")
    assert target.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [target]
    with atomic(target) as file:
        file.write(b"new")
    assert target.read_bytes() == b"new"
