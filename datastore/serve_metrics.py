"""What /metrics tells, in Prometheus' text format: counts of this server, and the queue's own figures as they are."""

from __future__ import annotations

from collections.abc import Iterator

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from datastore.serve_engine import QueueFigures, ScoringQueue

_SECONDS = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)
_GAUGES = {
    "tokens_in_flight": "Prompt tokens accepted and not answered yet.",
    "documents_waiting": "Documents that the engine has not been given yet.",
    "documents_running": "Documents inside the engine.",
    "tokens_per_sec": "Prompt tokens a second of engine time, over recent work.",
}
_COUNTERS = {
    "documents_done": "Documents scored.",
    "tokens_done": "Prompt tokens scored.",
    "steps": "Batches that the engine has run.",
    "busy_sec": "Seconds inside the engine.",
}


class ServeMetrics:
    """The counters of one server, in a registry of its own (vLLM fills the global one)."""

    def __init__(self, queue: ScoringQueue) -> None:
        self._registry = CollectorRegistry()
        self._requests = Counter(
            "vpmoe_serve_requests", "Answers of /v1/score.", ["status"], registry=self._registry
        )
        self._rejects = Counter(
            "vpmoe_serve_rejects", "Refused requests.", ["reason"], registry=self._registry
        )
        self._seconds = Histogram(
            "vpmoe_serve_request_seconds",
            "From the first byte to the answer, of requests that were scored.",
            buckets=_SECONDS,
            registry=self._registry,
        )
        self._registry.register(_QueueCollector(queue))

    def answered(self, seconds: float) -> None:
        """Count a request that was scored."""
        self._requests.labels("200").inc()
        self._seconds.observe(seconds)

    def refused(self, status: int, reason: str) -> None:
        """Count a request that was not."""
        self._requests.labels(str(status)).inc()
        self._rejects.labels(reason).inc()

    def text(self) -> bytes:
        return generate_latest(self._registry)


class _QueueCollector:
    def __init__(self, queue: ScoringQueue) -> None:
        self._queue = queue

    def collect(self) -> Iterator[Metric]:
        figures: QueueFigures = self._queue.figures()
        ready = float(figures.state == "ready")
        yield GaugeMetricFamily("vpmoe_serve_ready", "1 while the engine takes work.", value=ready)
        for name, text in _GAUGES.items():
            yield GaugeMetricFamily(f"vpmoe_serve_{name}", text, value=getattr(figures, name))
        for name, text in _COUNTERS.items():
            yield CounterMetricFamily(f"vpmoe_serve_{name}", text, value=getattr(figures, name))
