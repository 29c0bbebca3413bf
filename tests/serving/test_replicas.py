"""Two servers that share one folder, as behind a reverse proxy."""

from __future__ import annotations

import json

from sora.client import Client
from sora.serving.source import ModelCache
from sora.serving.tokens import TokenFile
from tests.serving.standing import standing


def test_two_replicas_follow_one_champion_and_one_file_of_tokens(api, models, video):
    registry = ModelCache(api.folder / "registry")
    with standing(api.folder, poll_seconds=0.1) as other:
        other.until_ready()
        both = [api, other]
        answers = [Client(str(it.client.base_url)).predict(video) for it in both]
        assert {(one.version, one.label) for one in answers} == {(1, answers[0].label)}
        try:
            for made in (models[1], models[0], models[1]):
                made.promote(registry)
                for it in both:
                    it.until(lambda it=it, made=made: it.client.get("/readyz").json()["version"] == made.version)
            remembered = json.loads((api.folder / "cache" / "champion.json").read_text())
            assert remembered["version"] == 2 and not list((api.folder / "cache").glob("*.part"))
        finally:
            models[0].promote(registry)
        for it in both:
            it.until(lambda it=it: it.client.get("/readyz").json()["version"] == 1)
        file = TokenFile(api.folder / "tokens.json")
        try:
            token = file.add("proxy")
            for it in both:
                assert it.client.get("/v1/model").status_code == 401
                with Client(str(it.client.base_url), token=token) as client:
                    assert client.model().version == 1
        finally:
            file.path.unlink(missing_ok=True)
        with Client(str(other.client.base_url), retries=0) as client:
            other.process.terminate()
            assert other.process.wait(30) in (0, -15)
            assert not client.ready()
        assert api.client.get("/readyz").status_code == 200
    assert (
        not list((api.folder / "tmp").glob("sora-serve-*")) or len(list((api.folder / "tmp").glob("sora-serve-*"))) == 1
    )
