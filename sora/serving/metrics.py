"""What the server counts, for Prometheus. One registry per application, so that two in one process don't mix."""

from __future__ import annotations

from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from sora.serving.tokens import MAX_TOKENS

_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)
CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
STAGES = ("upload", "wait", "decode", "queue", "model")


class Metrics:
    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self._tokens: set[str] = set()
        r = self.registry
        self.requests = Counter(
            "sora_requests_total",
            "Requests by route, method, status and name of the token",
            ["route", "method", "status", "token"],
            registry=r,
        )
        self.latency = Histogram(
            "sora_request_seconds", "From the first byte to the last", ["route"], buckets=_SECONDS, registry=r
        )
        self.stage = Histogram(
            "sora_predict_stage_seconds", "One prediction, by stage", ["stage"], buckets=_SECONDS, registry=r
        )
        self.batch = Histogram("sora_batch_clips", "Clips in one call of the model", buckets=(1, 2, 3, 4), registry=r)
        self.predictions = Counter("sora_predictions_total", "Answers by version", ["version"], registry=r)
        self.version = Gauge("sora_model_version", "The served version; 0: none", registry=r)
        self.changes = Counter("sora_model_changes_total", "Champions taken over since the start", registry=r)
        self.refusals = Counter("sora_model_refusals_total", "Versions refused since the start", registry=r)
        self.closed = Counter(
            "sora_connections_closed_total",
            "Connections closed without a request: late headers, an unread body, a peer's or all places",
            ["reason"],
            registry=r,
        )
        for stage in STAGES:
            self.stage.labels(stage)

    def count(self, route: str, method: str, status: int, token: str, seconds: float) -> None:
        """One request. Names of tokens come and go while a server runs: beyond `MAX_TOKENS` they count as "other"."""
        if token not in self._tokens and len(self._tokens) < MAX_TOKENS:
            self._tokens.add(token)
        shown = token if token in self._tokens else "other"
        self.requests.labels(route, method, str(status), shown).inc()
        self.latency.labels(route).observe(seconds)

    def watch(self, name: str, text: str, value: Callable[[], float]) -> None:
        """A gauge that is computed when it is read."""
        Gauge(name, text, registry=self.registry).set_function(value)

    def text(self) -> bytes:
        return generate_latest(self.registry)
