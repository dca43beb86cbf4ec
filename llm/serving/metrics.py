"""Metrics in Prometheus' text format."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from llm.serving.engine import Engine

COUNTERS = {
    "prompt_tokens": "tokens of prompts",
    "prefix_hit_tokens": "tokens of prompts that came from the prefix cache",
    "generated_tokens": "tokens of answers",
    "cancelled": "requests that their client left",
    "finished_stop": "answers that ended by a stop token or string",
    "finished_length": "answers that ended at max_tokens, the context or the time limit",
    "finished_expired": "requests that ran out of time in the queue",
    "finished_error": "requests that ended by an error of the server",
}


class Metrics:
    """Counters, histograms and gauges of a server, in a registry of its own."""

    def __init__(self) -> None:
        """Make all metrics; they start at zero."""
        from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

        self.registry = CollectorRegistry()
        options: dict[str, Any] = {"namespace": "llm", "registry": self.registry}
        self.requests = Counter("requests", "HTTP requests by path and status", ["path", "status"], **options)
        self.counters = {name: Counter(name, text, ["model"], **options) for name, text in COUNTERS.items()}
        seconds = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0)
        sizes = (1, 2, 4, 8, 16, 32, 64)
        self.histograms = {
            "time_to_first_token": Histogram(
                "time_to_first_token_seconds", "seconds from arrival", ["model"], buckets=seconds, **options
            ),
            "batch_size": Histogram("batch_size", "requests of a decode step", ["model"], buckets=sizes, **options),
        }
        self.queue = Gauge("queue", "requests that wait", ["model"], **options)
        self.running = Gauge("running", "requests being answered", ["model"], **options)
        self.cached = Gauge("prefix_cache_tokens", "tokens in the prefix cache", ["model"], **options)

    def observer(self, model: str) -> Callable[[str, float], None]:
        """Return the function that an engine reports to."""
        counters = {name: counter.labels(model) for name, counter in self.counters.items()}
        histograms = {name: histogram.labels(model) for name, histogram in self.histograms.items()}

        def observe(name: str, value: float) -> None:
            if name in histograms:
                histograms[name].observe(value)
            else:
                counters[name].inc(value)

        return observe

    def render(self, engines: Mapping[str, Engine]) -> bytes:
        """Return all metrics as text."""
        from prometheus_client import generate_latest

        for name, engine in engines.items():
            self.queue.labels(name).set(len(engine.waiting))
            self.running.labels(name).set(len(engine.entering) + len(engine.running))
            self.cached.labels(name).set(engine.prefixes.n_tokens)
        return generate_latest(self.registry)
