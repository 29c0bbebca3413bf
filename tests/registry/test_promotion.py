from __future__ import annotations

import multiprocessing
import os
import signal
from pathlib import Path
from types import SimpleNamespace

import pytest

from sora.core.errors import PromotionFailed, ServiceError
from sora.core.records import Recipe
from sora.registry import Move, Registry
from sora.registry.history import line
from tests.registry.conftest import add_version, answers, fails


def move(seq: int, kind: str, version: int) -> Move:
    return Move(seq, kind, version, None, "", "", "")  # type: ignore[arg-type]


def promoted(registry: Registry, folder: Path, count: int) -> list[int]:
    """So many versions, each promoted after the one before."""
    versions = []
    for number in range(count):
        version = add_version(registry, folder, f"model {number}".encode())
        registry.set_decision(version, "promoted", [f"number {number}"])
        registry.promote(version, cache=folder / "cache", smoke=answers)
        versions.append(version)
    return versions


@pytest.mark.parametrize(
    ("moves", "expected"),
    [
        ([], []),
        ([("promote", 1), ("promote", 3)], [1, 3]),
        ([("promote", 1), ("promote", 3), ("rollback", 1)], [1]),
        ([("promote", 1), ("promote", 3), ("rollback", 1), ("promote", 3)], [1, 3]),
        ([("promote", 1), ("promote", 2), ("promote", 1), ("promote", 5), ("rollback", 1)], [1, 2, 1]),
        ([("rollback", 4)], [4]),
    ],
)
def test_line_of_champions(moves: list[tuple[str, int]], expected: list[int]) -> None:
    assert line([move(i, *item) for i, item in enumerate(moves)]) == expected


def test_promote_and_roll_back_twice_goes_further_back(registry: Registry, tmp_path: Path) -> None:
    first, second, third = promoted(registry, tmp_path, 3)
    cache = tmp_path / "cache"
    assert (registry.champion(), registry.previous()) == (third, second)
    assert registry.rollback(cache=cache, smoke=answers) == {"champion": second, "previous": third}
    assert registry.rollback(cache=cache, smoke=answers) == {"champion": first, "previous": second}
    with pytest.raises(PromotionFailed, match="no earlier champion"):
        registry.rollback(cache=cache, smoke=answers)
    assert registry.champion() == first
    assert [(m.kind, m.version, m.left) for m in registry.history()] == [
        ("promote", first, None),
        ("promote", second, first),
        ("promote", third, second),
        ("rollback", second, third),
        ("rollback", first, second),
    ]
    assert [m.seq for m in registry.history()] == [1, 2, 3, 4, 5]
    assert all(m.by and m.at for m in registry.history())


def test_what_was_rolled_back_is_marked_until_it_is_promoted_again(registry: Registry, tmp_path: Path) -> None:
    _, second = promoted(registry, tmp_path, 2)
    registry.rollback(cache=tmp_path / "cache", smoke=answers, reason="complaints")
    assert registry.was_rolled_back(second)
    assert registry.get(second).decision == "rolled_back"
    assert registry.get(second).reasons == ("complaints",)
    twin = add_version(registry, tmp_path, b"model 1")  # trained again, the same bytes
    assert registry.was_rolled_back(twin)
    assert registry.promote(second, cache=tmp_path / "cache", smoke=answers, reason="it was the camera") == {
        "champion": second,
        "previous": 1,
    }
    assert not registry.was_rolled_back(second)
    assert registry.get(second).decision == "manual"


def test_roll_back_to_a_version(registry: Registry, tmp_path: Path) -> None:
    first, second, third = promoted(registry, tmp_path, 3)
    never = add_version(registry, tmp_path, b"never champion")
    cache = tmp_path / "cache"
    for wrong in (never, third):
        with pytest.raises(PromotionFailed, match="was not champion before"):
            registry.rollback(wrong, cache=cache, smoke=answers)
    assert registry.rollback(first, cache=cache, smoke=answers) == {"champion": first, "previous": third}
    assert [registry.was_rolled_back(v) for v in (first, second, third, never)] == [False, True, True, False]


def test_a_failed_smoke_test_puts_the_old_champion_back(registry: Registry, tmp_path: Path) -> None:
    first, second = promoted(registry, tmp_path, 2)
    third = add_version(registry, tmp_path, b"broken")
    cache = tmp_path / "cache"
    seen = []

    def smoke(file: Path, recipe: Recipe) -> None:
        seen.append(registry.champion())
        raise RuntimeError("golden answers differ")

    with pytest.raises(PromotionFailed, match="golden answers differ"):
        registry.promote(third, cache=cache, smoke=smoke)
    assert seen == [third]  # the smoke test follows the move
    assert (registry.champion(), registry.previous()) == (second, first)
    with pytest.raises(PromotionFailed):
        registry.rollback(cache=cache, smoke=fails)
    assert (registry.champion(), registry.previous()) == (second, first)
    assert [m.version for m in registry.history()] == [first, second]
    assert not registry.was_rolled_back(second)


def test_a_first_champion_that_fails_leaves_none(registry: Registry, tmp_path: Path) -> None:
    version = add_version(registry, tmp_path, b"first")
    with pytest.raises(PromotionFailed, match="no champion"):
        registry.promote(version, cache=tmp_path / "cache", smoke=fails)
    assert registry.champion() is None
    assert registry.champion_ref() is None


def test_ctrl_c_during_the_smoke_test_restores(registry: Registry, tmp_path: Path) -> None:
    first, second = promoted(registry, tmp_path, 2)

    def smoke(file: Path, recipe: Recipe) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        registry.rollback(cache=tmp_path / "cache", smoke=smoke)
    assert (registry.champion(), registry.previous()) == (second, first)


def test_promoting_the_champion_changes_nothing(registry: Registry, tmp_path: Path) -> None:
    first, second = promoted(registry, tmp_path, 2)
    assert registry.promote(second, cache=tmp_path, smoke=fails) == {"champion": second, "previous": first}
    assert len(registry.history()) == 2


def test_an_altered_model_never_becomes_champion(registry: Registry, server: SimpleNamespace, tmp_path: Path) -> None:
    promoted(registry, tmp_path, 1)
    second = add_version(registry, tmp_path, b"to be altered")
    newest = max(server.artifacts.rglob("model.keras"), key=lambda p: p.stat().st_mtime_ns)
    newest.write_bytes(b"altered")
    with pytest.raises(ServiceError, match="altered"):
        registry.promote(second, cache=tmp_path / "empty", smoke=answers)
    assert registry.champion() == 1


def test_deleted_versions_are_no_way_back(registry: Registry, tmp_path: Path) -> None:
    first, second, third = promoted(registry, tmp_path, 3)
    registry.rollback(cache=tmp_path / "cache", smoke=answers)  # champion second, previous third
    registry.delete_version(first)
    with pytest.raises(PromotionFailed, match="no earlier champion"):
        registry.rollback(cache=tmp_path / "cache", smoke=answers)
    assert registry.champion() == second
    assert third in [item.version for item in registry.versions()]


def test_an_alias_moved_by_hand_can_be_rolled_back(registry: Registry, tmp_path: Path) -> None:
    promoted(registry, tmp_path, 1)
    by_hand = add_version(registry, tmp_path, b"set in the page")
    registry._model.set_alias("champion", by_hand)
    assert registry.rollback(cache=tmp_path / "cache", smoke=answers) == {"champion": 1, "previous": by_hand}
    assert registry.was_rolled_back(by_hand)


def _promote_and_die(uri: str, name: str, version: int, cache: str, moment: str) -> None:
    registry = Registry(uri, name)

    def die(*_: object, **__: object) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    if moment == "history":  # recorded, but the rest is not done
        registry._champion._complete = die  # type: ignore[method-assign]
        registry.promote(version, cache=Path(cache), smoke=answers)
    registry.promote(version, cache=Path(cache), smoke=die)


@pytest.mark.parametrize(("moment", "champion", "previous"), [("smoke", 2, 1), ("history", 3, 2)])
def test_sigkill_during_a_promotion(
    registry: Registry, server: SimpleNamespace, tmp_path: Path, moment: str, champion: int, previous: int
) -> None:
    promoted(registry, tmp_path, 2)
    third = add_version(registry, tmp_path, b"third")
    arguments = (server.uri, registry.name, third, str(tmp_path / "cache"), moment)
    child = multiprocessing.get_context("fork").Process(target=_promote_and_die, args=arguments)
    child.start()
    child.join(30)
    assert child.exitcode == -signal.SIGKILL
    assert registry.champion() == third  # nobody was left to put it back
    assert registry.recover() is True
    assert (registry.champion(), registry.previous()) == (champion, previous)
    assert registry.recover() is False
    assert registry.rollback(cache=tmp_path / "cache", smoke=answers)["champion"] == previous


def test_many_moves_fit(registry: Registry, tmp_path: Path) -> None:
    """A tag holds 5,000 characters; the history has a tag a move."""
    first = add_version(registry, tmp_path, b"a")
    second = add_version(registry, tmp_path, b"b")
    for number in range(4):
        version = (first, second)[number % 2]
        registry.promote(version, cache=tmp_path / "cache", smoke=answers, reason="x" * 3000)
    assert [m.seq for m in registry.history()] == [1, 2, 3, 4]
