"""What /openapi.json names, fuzzed over a real socket: never a 5xx, and every answer is one that it describes."""

from __future__ import annotations

import json
import re
import socket
from pathlib import Path
from typing import Any
from urllib.parse import quote

import httpx
import pytest
from hypothesis import HealthCheck, event, given, settings
from hypothesis import strategies as st
from jsonschema import Draft202012Validator

from tests.serving.standing import Standing

# The server does real work for each example, beside whatever else this machine does.
RUN = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])
HEADER = st.text(st.characters(min_codepoint=32, max_codepoint=126), max_size=60).map(str.strip)
WORD = st.text(max_size=20)


@pytest.fixture(scope="session")
def document(api: Standing) -> dict[str, Any]:
    found: dict[str, Any] = api.client.get("/openapi.json").json()
    return found


def _check(document: dict[str, Any], operation: dict[str, Any], answer: httpx.Response) -> None:
    """The answer's status, content type and body are described."""
    assert answer.status_code < 500, answer.text
    described = operation["responses"].get(str(answer.status_code))
    assert described, f"{answer.status_code} is not described: {answer.text}"
    kind = answer.headers["content-type"].split(";")[0]
    assert kind in described["content"], f"{kind} is not described for {answer.status_code}"
    schema = described["content"][kind]["schema"]
    value = answer.json() if kind.endswith("json") else answer.text
    Draft202012Validator({**schema, "components": document.get("components", {})}).validate(value)
    assert answer.headers["x-request-id"] and answer.headers["x-content-type-options"] == "nosniff"


def test_the_document_is_a_schema(document: dict[str, Any]) -> None:
    for path in document["paths"].values():
        for operation in path.values():
            for described in operation["responses"].values():
                for content in described["content"].values():
                    assert content["schema"]
                    Draft202012Validator.check_schema({**content["schema"], "components": document["components"]})
    assert document["paths"].keys() >= {"/v1/predict", "/v1/model", "/healthz", "/readyz", "/metrics"}


@settings(RUN, max_examples=100)
@given(data=st.data())
def test_asking(api: Standing, document: dict[str, Any], data: st.DataObject) -> None:
    reading = [(path, each["get"]) for path, each in document["paths"].items() if "get" in each]
    path, operation = data.draw(st.sampled_from(reading))
    query = data.draw(st.dictionaries(WORD, WORD, max_size=3))
    headers = data.draw(
        st.dictionaries(
            st.sampled_from(["authorization", "x-request-id", "host", "accept", "range", "if-none-match", "origin"]),
            HEADER,
            max_size=3,
        )
    )
    if not re.fullmatch(r"[\w.:\[\]-]+", headers.get("host", "localhost"), re.ASCII):
        headers["host"] = "a.example"  # what is no name at all does not get past HTTP itself
    _check(document, operation, api.client.get(path, params=query, headers=headers))


@st.composite
def bodies(draw: st.DrawFn, video: bytes) -> tuple[bytes, str]:
    """A body and its content type: multipart of videos, damaged ones and others, or damaged itself."""
    damaged = st.builds(_flipped, st.just(video), st.lists(st.tuples(st.integers(0), st.integers(0, 255)), max_size=30))
    cut = st.integers(0, len(video)).map(lambda end: video[:end])
    content = st.one_of(st.just(video), damaged, cut, st.binary(max_size=400))
    odd = draw(st.integers(0, 2)) == 0  # in its form too, not only in what the files hold
    parts = b""
    for _ in range(draw(st.integers(0 if odd else 1, 5))):
        name = draw(st.sampled_from(["file", "file", "path", "", "file\x00"])) if odd else "file"
        filename = draw(st.one_of(st.none(), WORD)) if odd else draw(st.sampled_from(["a.mp4", "ö", "../x", "<b>"]))
        disposition = f'form-data; name="{name}"' + (f'; filename="{filename}"' if filename is not None else "")
        parts += b"--b\r\nContent-Disposition: " + disposition.encode("utf-8", "replace") + b"\r\n"
        if odd:
            parts += b"Content-Type: " + draw(st.binary(max_size=20)) + b"\r\n"
        parts += b"\r\n" + draw(content) + b"\r\n"
    if not odd:
        return parts + b"--b--\r\n", "multipart/form-data; boundary=b"
    body = parts + draw(st.sampled_from([b"--b--\r\n", b"--b--", b"--b", b""]))
    body = draw(
        st.sampled_from([body, body, _flipped(body, [(draw(st.integers(0)), 0)]), draw(st.binary(max_size=300))])
    )
    kind = draw(
        st.sampled_from(["multipart/form-data; boundary=b"] * 4 + ["multipart/form-data", "text/plain", "", "*"])
    )
    return body, kind


def _flipped(content: bytes, places: list[tuple[int, int]]) -> bytes:
    changed = bytearray(content)
    for place, value in places:
        if changed:
            changed[place % len(changed)] = value
    return bytes(changed)


@settings(RUN, max_examples=150)
@given(data=st.data())
def test_predicting(api: Standing, document: dict[str, Any], video: Path, data: st.DataObject) -> None:
    body, kind = data.draw(bodies(video.read_bytes()))
    timeline = data.draw(st.sampled_from([None, None, None, "1", "1", "0", "true", "x", ""]))
    answer = api.client.post(
        "/v1/predict",
        content=body,
        headers={"content-type": kind} if kind else {},
        params={} if timeline is None else {"timeline": timeline},
    )
    _check(document, document["paths"]["/v1/predict"]["post"], answer)
    event(f"status {answer.status_code}")
    if answer.status_code == 200:
        for one in answer.json().get("answers", [answer.json()]):
            assert "fix" in one or abs(sum(one["probabilities"].values()) - 1) < 1e-6


@settings(RUN, max_examples=60)
@given(method=st.sampled_from(["GET", "POST", "PUT", "PATCH", "DELETE", "HEAD", "OPTIONS", "TRACE", "X"]), path=WORD)
def test_other_methods_and_addresses(api: Standing, document: dict[str, Any], method: str, path: str) -> None:
    for each in (*document["paths"], "/v1/" + quote(path, safe="")):
        if method.lower() in document["paths"].get(each, {}):
            continue
        answer = api.client.request(method, each)
        assert answer.status_code in (404, 405)
        if method != "HEAD":
            problem = answer.json()
            assert problem["status"] == answer.status_code and problem["fix"]


@settings(RUN, max_examples=40)
@given(
    sent=st.one_of(st.binary(max_size=300), st.binary(max_size=200).map(lambda b: b"POST /v1/predict HTTP/1.1\r\n" + b))
)
def test_what_is_no_http(api: Standing, sent: bytes) -> None:
    with socket.create_connection(("127.0.0.1", api.port), timeout=10) as line:
        line.sendall(sent + b"\r\n\r\n")
        line.shutdown(socket.SHUT_WR)
        try:
            answer = line.recv(100)
        except ConnectionResetError:
            answer = b""
    assert not answer or re.match(rb"HTTP/1\.[01] [1234]", answer), answer
    assert api.client.get("/healthz").status_code == 200


def test_nothing_is_left_of_it(api: Standing) -> None:
    api.until(lambda: not api.leftovers(), 10)
    text = api.client.get("/metrics").text
    assert 'status="500"' not in text
    assert json.loads(api.client.get("/healthz").text) == {"status": "alive"}
