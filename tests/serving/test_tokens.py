from __future__ import annotations

import asyncio
import json
import logging
import os
import re
import stat
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from hashlib import sha256
from pathlib import Path

import pytest

from sora.core.errors import InputError, ServiceError
from sora.serving.metrics import Metrics
from sora.serving.source import ModelCache
from sora.serving.tokens import MAX_TOKENS, TokenFile, Tokens
from tests.e2e.conftest import sora
from tests.serving.conftest import Made
from tests.serving.inside import ready, running, send, until

REVIEW_IS_A_WORD = json.dumps([{"name": "a", "sha256": "0" * 64, "created": "", "review": "no"}])


@pytest.fixture
def file(tmp_path: Path) -> TokenFile:
    return TokenFile(tmp_path / ".sora" / "tokens.json")


class Lines(logging.Handler):
    def __init__(self) -> None:
        super().__init__()
        self.messages: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.messages.append(record.getMessage())


@pytest.fixture
def lines() -> Iterator[Lines]:
    """What the server logs. `sora serve` sets its loggers up for itself, so pytest's own capture may miss them."""
    handler = Lines()
    loggers = [logging.getLogger(name) for name in ("sora.serving", "sora.serving.access")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.addHandler(handler)
        logger.setLevel(logging.INFO)
    yield handler
    for logger, level in zip(loggers, levels, strict=True):
        logger.removeHandler(handler)
        logger.setLevel(level)


def test_only_a_hash_is_kept_and_only_the_owner_reads_it(file: TokenFile) -> None:
    token = file.add("phone")
    text = file.path.read_text()
    assert token not in text and sha256(token.encode()).hexdigest() in text
    assert stat.S_IMODE(file.path.stat().st_mode) == 0o600
    assert len(token) >= 43 + len("sora_") and file.add("tablet") != token
    assert [one.name for one in file.tokens()] == ["phone", "tablet"]
    assert file.revoke("phone") == 1 and [one.name for one in file.tokens()] == ["tablet"]
    assert stat.S_IMODE(file.path.stat().st_mode) == 0o600


@pytest.mark.parametrize("name", ["", "a b", "../x", "-x", "x" * 33, "SORA_API_TOKEN", "ä", "a\n"])
def test_names_that_are_none(file: TokenFile, name: str) -> None:
    with pytest.raises(InputError, match="not a name"):
        file.add(name)
    assert not file.path.exists()


def test_a_name_is_given_once_and_revoked_once(file: TokenFile) -> None:
    file.add("phone")
    with pytest.raises(InputError, match="already a token"):
        file.add("phone")
    file.revoke("phone")
    with pytest.raises(InputError, match="no token"):
        file.revoke("phone")


def test_they_are_bounded(file: TokenFile) -> None:
    file.path.parent.mkdir()
    kept = [{"name": f"n{i}", "sha256": "0" * 64, "created": "now"} for i in range(MAX_TOKENS)]
    file.path.write_text(json.dumps(kept))
    with pytest.raises(InputError, match="the maximum"):
        file.add("another")


@pytest.mark.parametrize(
    "damage", ["{", "[1]", '[{"name": "a"}]', '[{"name": "a", "sha256": "", "created": ""}]', REVIEW_IS_A_WORD, "{}x"]
)
def test_a_damaged_file_says_so_and_lets_nobody_in(file: TokenFile, damage: str, lines: Lines) -> None:
    token = file.add("phone")
    tokens = Tokens(["given-at-the-start"], file)
    caller = tokens.caller(f"Bearer {token}")
    assert caller is not None and caller.name == "phone"
    file.path.write_text(damage)
    with pytest.raises(ServiceError, match=r"tokens\.json"):
        file.tokens()
    assert tokens.caller(f"Bearer {token}") is None and tokens.required
    assert "no token of the file may call" in lines.messages[-1]
    given = tokens.caller("Bearer given-at-the-start")
    assert given is not None and given.name == "SORA_API_TOKEN"


def test_none_is_required_where_none_was_ever_made(file: TokenFile) -> None:
    tokens = Tokens((), file)
    assert not tokens.required and tokens.caller("Bearer ") is None
    token = file.add("phone")
    caller = tokens.caller(f"bearer {token}")
    assert tokens.required and caller is not None and caller.name == "phone"
    file.revoke("phone")
    assert tokens.required and tokens.caller(f"Bearer {token}") is None  # nobody, rather than everybody
    file.path.unlink()
    assert not tokens.required
    assert Tokens((), file, always=True).required


def test_two_at_once_lose_none(file: TokenFile) -> None:
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(file.add, [f"n{i}" for i in range(16)]))
    assert {one.name for one in file.tokens()} == {f"n{i}" for i in range(16)}


def test_names_in_metrics_are_bounded() -> None:
    metrics = Metrics()
    for i in range(MAX_TOKENS + 50):
        metrics.count("/v1/predict", "POST", 200, f"n{i}", 0.1)
    names = set(re.findall(r'token="([^"]*)"', metrics.text().decode()))
    assert len(names) == MAX_TOKENS + 1 and "other" in names


def test_a_running_server_follows_them(
    models: list[Made], video: Path, tmp_path: Path, file: TokenFile, lines: Lines
) -> None:
    models[0].promote(ModelCache(tmp_path / "registry"))

    async def story() -> None:
        async with running(tmp_path, tokens=Tokens((), file)) as (client, context):
            await until(ready(client))
            assert (await send(client, video)).status_code == 200  # none yet: this machine may
            token = file.add("phone")
            assert (await send(client, video)).status_code == 401
            client.headers["authorization"] = f"Bearer {token}"
            assert (await send(client, video)).status_code == 200
            assert json.loads(lines.messages[-1])["token"] == "phone" and token not in "".join(lines.messages)
            sample = context.metrics.registry.get_sample_value
            labels = {"route": "/v1/predict", "method": "POST", "status": "200", "token": "phone"}
            assert sample("sora_requests_total", labels) == 1
            # By its token a caller may name the server as it likes: a proxy does.
            assert (await client.get("/v1/model", headers={"host": "sora.example"})).status_code == 200
            file.revoke("phone")
            refused = await send(client, video)
            assert refused.status_code == 401 and "sora token add" in refused.json()["fix"]

    asyncio.run(story())


def test_the_verbs(tmp_path: Path) -> None:
    (tmp_path / "params.yaml").write_text("name: tested\n", encoding="utf-8")
    made = json.loads(sora(tmp_path, "token", "add", "phone", "--json").stdout)
    assert made["name"] == "phone" and made["token"].startswith("sora_")
    printed = sora(tmp_path, "token", "add", "tablet")
    assert printed.returncode == 0 and printed.stdout.strip().startswith("sora_")
    (one, two) = json.loads(sora(tmp_path, "token", "list", "--json").stdout)
    assert set(one) == {"name", "created", "review"} and two["name"] == "tablet" and not two["review"]
    assert "phone" in sora(tmp_path, "token", "list").stdout
    assert json.loads(sora(tmp_path, "token", "add", "boss", "--review", "--json").stdout)["review"] is True
    assert "boss  (may review)" in sora(tmp_path, "token", "list").stdout
    sora(tmp_path, "token", "revoke", "boss")
    again = sora(tmp_path, "token", "add", "phone")
    assert again.returncode == 2 and "fix:" in again.stderr and not again.stdout
    assert json.loads(sora(tmp_path, "token", "revoke", "phone", "--json").stdout) == {"name": "phone", "left": 1}
    assert "nobody may call" in sora(tmp_path, "token", "revoke", "tablet").stdout
    assert sora(tmp_path, "token", "revoke", "tablet").returncode == 2
    assert not os.access(tmp_path / ".sora" / "tokens.json", os.X_OK)
