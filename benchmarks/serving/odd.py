"""What is no video, or no longer one, sent to a server: `python -m benchmarks.serving.odd [--uploads 5000]`.

The files of `odd`, and truncations and bit flips of those and of real footage, made from a seed. Asked: no 5xx, no
file or process left, memory flat. Memory is that of the server and of its decoders, RssAnon, after every tenth of the
uploads.
"""

from __future__ import annotations

import http.client
import json
import random
import threading
import time
from collections import Counter
from pathlib import Path
from urllib.parse import urlsplit

import psutil

from benchmarks import common
from benchmarks.common import SHARED, anonymous_bytes, table
from benchmarks.serving.load import multipart
from benchmarks.serving.served import Server, arguments, settled, workplace

CLIENTS = 4


def changed(random_: random.Random, whole: bytes) -> tuple[str, bytes]:
    """(what was done to them, the bytes)."""
    kind = random_.choice(("truncated", "flipped", "both", "whole"))
    data = bytearray(whole)
    if kind in ("truncated", "both"):
        data = data[: random_.randrange(len(data) + 1)]
    if kind in ("flipped", "both") and data:
        # Half of the flips strike the first kilobytes, where the headers are.
        for _ in range(random_.choice((1, 8, 64))):
            reach = min(len(data), 4096) if random_.random() < 0.5 else len(data)
            data[random_.randrange(reach)] ^= 1 << random_.randrange(8)
    return kind, bytes(data)


def sources(most: int = 2_000_000) -> list[Path]:
    odd = [file for file in sorted((SHARED / "odd").iterdir()) if file.suffix != ".csv"]
    real = [file for name in ("fights300", "kth9", "steps27") for file in sorted((SHARED / name).rglob("*.*"))]
    videos = [file for file in real if file.suffix in (".mp4", ".avi") and file.stat().st_size <= most]
    return odd + random.Random(0).sample(videos, min(60, len(videos)))


class Senders:
    """`CLIENTS` threads that send upload after upload; every one of them is made from its own number."""

    def __init__(self, server: Server, seed: int) -> None:
        where = urlsplit(server.address)
        self._host, self._port = str(where.hostname), where.port
        self._seed = seed
        self._files = [(file.name, file.read_bytes()) for file in sources()]
        self._next = self._end = 0
        self._lock = threading.Lock()
        self.answers: Counter[tuple[str, int]] = Counter()
        self.failed: list[str] = []

    def send(self, until: int) -> None:
        """Sends those up to number `until`."""
        self._end = until
        threads = [threading.Thread(target=self._work) for _ in range(CLIENTS)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    def _take(self) -> int | None:
        with self._lock:
            if self._next >= self._end:
                return None
            self._next += 1
            return self._next - 1

    def _work(self) -> None:
        connection = http.client.HTTPConnection(self._host, self._port, timeout=200)
        while (number := self._take()) is not None:
            random_ = random.Random(f"{self._seed} {number}")
            name, whole = random_.choice(self._files)
            kind, data = changed(random_, whole)
            body, content_type = multipart(name, data)
            try:
                connection.request("POST", "/v1/predict", body, {"Content-Type": content_type})
                answer = connection.getresponse()
                text, status = answer.read(), answer.status
            except (OSError, http.client.HTTPException) as error:
                connection.close()
                text, status = repr(error).encode(), 0
            with self._lock:
                self.answers[kind, status] += 1
                if status == 0 or status >= 500:
                    self.failed.append(f"{number} {name} {kind}: {status} {text[:300].decode(errors='replace')}")
        connection.close()


def state(server: Server, temporary: Path) -> dict[str, float]:
    process = psutil.Process(server.process.pid)
    decoders = [child for child in process.children() if "sora.media.decoder" in child.cmdline()]
    return {
        "server MB": (anonymous_bytes(process.pid) - sum(anonymous_bytes(c.pid) for c in process.children())) / 1e6,
        "decoders MB": sum(anonymous_bytes(child.pid) for child in decoders) / 1e6,
        "decoders": len(decoders),
        "open files": process.num_fds(),
        "uploads left": len(list(temporary.glob("sora-tmp-uploads-*/*"))),
    }


def main() -> None:
    options = arguments(__doc__)
    options.add_argument("--uploads", type=int, default=5000)
    options.add_argument("--seed", type=int, default=0)
    given = options.parse_args()
    with workplace(given.project) as (place, project):
        temporary = place / "tmp"
        temporary.mkdir()
        with settled(project, place / "serve.log", TMPDIR=str(temporary)) as server:
            senders = Senders(server, given.seed)
            rows = []
            start = time.monotonic()
            for tenth in range(1, 11):
                senders.send(given.uploads * tenth // 10)
                time.sleep(2)  # decoders that were replaced start
                rows.append({"uploads": given.uploads * tenth // 10, **state(server, temporary)})
                print(json.dumps(rows[-1]), flush=True)
            spent = time.monotonic() - start
            metrics = server.get("/metrics")[1].decode()
        replaced = next(line.split()[1] for line in metrics.splitlines() if line.startswith("sora_decoders_replaced "))
    by_status = Counter[int]()
    for (_, status), count in senders.answers.items():
        by_status[status] += count
    table("state after so many uploads", rows)
    print(f"\n{dict(sorted(by_status.items()))} in {spent:.0f} s; decoders replaced: {replaced}")
    print("\n".join(senders.failed[:20]))
    common.write(
        "serving_odd",
        {
            "uploads": given.uploads,
            "seconds": spent,
            "statuses": {str(status): count for status, count in sorted(by_status.items())},
            "failed": senders.failed,
            "decoders replaced": float(replaced),
            "states": rows,
        },
    )
    raise SystemExit(bool(senders.failed))


if __name__ == "__main__":
    main()
