"""What ``/metrics`` and the line in the log say about a server, in numbers.

Counters live where things happen: the engine counts its tokens and rows, so its numbers are read when they are asked
for; what only the server sees (requests by route and status, the time until a first token is *heard*) is counted here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

from tessera.infer.engine import EngineStats

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_FIRST_S = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
_BETWEEN_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5)
_WHOLE_S = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)

_GAUGES = {
    "running": "answers being generated",
    "waiting": "requests that wait for a place",
    "cache_tokens": "tokens of keys and values promised to running answers",
    "cache_capacity": "tokens of keys and values that there is room for",
    "prefix_tokens": "tokens of earlier prompts that are kept",
    "tower_bytes": "bytes of encoded images that are kept",
}
_COUNTERS = {
    "prompt_tokens": "tokens of prompts",
    "cached_tokens": "tokens of prompts that were known from earlier ones",
    "generated_tokens": "tokens of answers",
    "images_encoded": "images that went through the tower",
    "images_reused": "images that were known from earlier requests",
    "steps": "steps of the engine",
}


class Metrics:
    """The numbers of one server; ``stats`` asks its engine."""

    def __init__(self, stats: Callable[[], EngineStats]) -> None:
        self._registry = CollectorRegistry()
        self._registry.register(_EngineNumbers(stats))
        self.stats = stats
        self.requests = Counter(
            "tessera_requests", "HTTP requests by route and status", ["route", "status"], registry=self._registry
        )
        self.first = Histogram(
            "tessera_time_to_first_token_seconds", "from a request to its first token", buckets=_FIRST_S,
            registry=self._registry,
        )  # fmt: skip
        self.between = Histogram(
            "tessera_time_per_output_token_seconds", "between tokens of an answer", buckets=_BETWEEN_S,
            registry=self._registry,
        )  # fmt: skip
        self.whole = Histogram(
            "tessera_request_seconds", "from a request to the end of its response", ["route"], buckets=_WHOLE_S,
            registry=self._registry,
        )  # fmt: skip
        self.served = self.failed = 0

    def count(self, route: str, status: int, seconds: float) -> None:
        """Note a response."""
        self.requests.labels(route, str(status)).inc()
        if route.startswith("/v1/") and route != "/v1/models":
            self.whole.labels(route).observe(seconds)
            self.served += 1
            self.failed += status >= 400

    def page(self) -> bytes:
        """The text that Prometheus reads."""
        text: bytes = generate_latest(self._registry)
        return text


class _EngineNumbers:
    """Reads the engine when Prometheus asks."""

    def __init__(self, stats: Callable[[], EngineStats]) -> None:
        self._stats = stats

    def collect(self) -> Iterator[Any]:
        """The engine's numbers of this moment."""
        stats = self._stats()
        for name, text in _GAUGES.items():
            yield GaugeMetricFamily(f"tessera_{name}", text, value=getattr(stats, name))
        for name, text in _COUNTERS.items():
            yield CounterMetricFamily(f"tessera_{name}", text, value=getattr(stats, name))
        finished = CounterMetricFamily("tessera_finished", "answers by the reason of their end", labels=["reason"])
        for reason, count in stats.finished.items():
            finished.add_metric([reason], count)
        yield finished


class Summary:
    """Lines about what went on since the last one."""

    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics
        self._before = (metrics.stats(), 0, 0)

    def line(self, seconds: float) -> str | None:
        """The last ``seconds`` in one line; None if nothing happened."""
        old, served, failed = self._before
        new = self._metrics.stats()
        self._before = (new, self._metrics.served, self._metrics.failed)
        answered, refused = self._metrics.served - served, self._metrics.failed - failed
        prompts, known = new.prompt_tokens - old.prompt_tokens, new.cached_tokens - old.cached_tokens
        if not (answered or new.running or new.waiting or prompts):
            return None
        parts = [f"{answered} requests" + (f" ({refused} failed)" if refused else "")]
        parts.append(f"{new.running} running, {new.waiting} waiting")
        out = (new.generated_tokens - old.generated_tokens) / seconds
        parts.append(f"{prompts / seconds:.0f} tokens/s in, {out:.0f} out")
        if prompts:
            parts.append(f"{known / prompts:.0%} of prompts known")
        return " | ".join(parts)
