"""The load generator: `python -m benchmarks.serving.load ADDRESS FILE --clients N (--seconds S | --requests N)`.

A process of its own with nothing but the standard library, so that it takes as little of the machine as it can. Each
client sends the same prepared request over a connection that stays open, and asks again when it has its answer.
Standard output gets one JSON document: `rows` of [start, seconds, status, version]; start is the monotonic clock's,
which processes of one machine share, and version is null where the answer has none. A broken connection is a row of
status 0.
"""

from __future__ import annotations

import argparse
import http.client
import json
import re
import sys
import threading
import time
from pathlib import Path
from urllib.parse import urlsplit

BOUNDARY = "sora-benchmark"
_VERSION = re.compile(rb'"version":\s*(\d+)')


def multipart(name: str, data: bytes) -> tuple[bytes, str]:
    """(body, content type) of an upload."""
    head = f'--{BOUNDARY}\r\nContent-Disposition: form-data; name="file"; filename="{name}"\r\n\r\n'
    body = head.encode() + data + f"\r\n--{BOUNDARY}--\r\n".encode()
    return body, f"multipart/form-data; boundary={BOUNDARY}"


class Load:
    """`clients` threads that ask until `seconds` are over, or `requests` are answered."""

    def __init__(self, address: str, body: bytes, kind: str, path: str) -> None:
        where = urlsplit(address)
        self._host, self._port, self._path = str(where.hostname), where.port, path
        self._body, self._headers = body, {"Content-Type": kind}
        self._left = 0
        self._end = 0.0
        self._lock = threading.Lock()
        self.rows: list[tuple[float, float, int, int | None]] = []

    def run(self, clients: int, seconds: float | None, requests: int | None) -> None:
        self._left = requests if requests is not None else sys.maxsize
        self._end = time.monotonic() + seconds if seconds is not None else float("inf")
        threads = [threading.Thread(target=self._client) for _ in range(clients)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    def _takes(self) -> bool:
        with self._lock:
            self._left -= 1
            return self._left >= 0 and time.monotonic() < self._end

    def _client(self) -> None:
        connection = http.client.HTTPConnection(self._host, self._port, timeout=120)
        while self._takes():
            start = time.monotonic()
            try:
                connection.request("POST", self._path, self._body, self._headers)
                answer = connection.getresponse()
                text, status = answer.read(), answer.status
            except (OSError, http.client.HTTPException):
                connection.close()
                text, status = b"", 0
            found = _VERSION.search(text)
            self.rows.append((start, time.monotonic() - start, status, int(found[1]) if found else None))
        connection.close()


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("address")
    options.add_argument("file", type=Path)
    options.add_argument("--clients", type=int, default=1)
    options.add_argument("--seconds", type=float)
    options.add_argument("--requests", type=int)
    options.add_argument("--path", default="/v1/predict")
    options.add_argument("--json-body", action="store_true", help="FILE is the body itself, JSON")
    given = options.parse_args()
    if given.seconds is None and given.requests is None:
        options.error("give --seconds or --requests")
    data = given.file.read_bytes()
    body, kind = (data, "application/json") if given.json_body else multipart(given.file.name, data)
    load = Load(given.address, body, kind, given.path)
    load.run(given.clients, given.seconds, given.requests)
    json.dump({"rows": load.rows}, sys.stdout)


if __name__ == "__main__":
    main()
