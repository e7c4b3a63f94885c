"""What happens to requests in, Prometheus' text format out."""

from __future__ import annotations

from collections.abc import Mapping

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from .engine import Engine

_PREFIX = "gpt_2_simple"
_SECONDS = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 25, 50, 100)
_TOKENS_A_SECOND = (1, 2.5, 5, 10, 25, 50, 100, 250, 500)


class Metrics:
    """The metrics of one application; each has the label `model`."""

    def __init__(self, engines: Mapping[str, Engine]) -> None:
        self.registry = CollectorRegistry()
        self._requests = Counter(
            f"{_PREFIX}_requests", "Requests, by HTTP status", ["model", "status"],
            registry=self.registry,
        )  # fmt: skip
        self._prompt_tokens = self._counter("prompt_tokens", "Prompt tokens that were read")
        self._new_tokens = self._counter("generation_tokens", "Tokens that were written")
        self._first_token = self._histogram(
            "time_to_first_token_seconds", "From a request to its first token", _SECONDS
        )
        self._duration = self._histogram(
            "request_duration_seconds", "From a request to its last token", _SECONDS
        )
        self._pace = self._histogram(
            "tokens_per_second", "Tokens a second of a finished request", _TOKENS_A_SECOND
        )
        waiting = self._gauge("requests_waiting", "Prompts that wait to join the batch")
        running = self._gauge("rows_running", "Texts that grow")
        for name, engine in engines.items():
            waiting.labels(name).set_function(lambda engine=engine: engine.n_waiting)  # type: ignore[misc]
            running.labels(name).set_function(lambda engine=engine: engine.n_running)  # type: ignore[misc]
            for metric in (self._prompt_tokens, self._new_tokens):
                metric.labels(name)
            for histogram in (self._first_token, self._duration, self._pace):
                histogram.labels(name)

    def _counter(self, name: str, text: str) -> Counter:
        return Counter(f"{_PREFIX}_{name}", text, ["model"], registry=self.registry)

    def _gauge(self, name: str, text: str) -> Gauge:
        return Gauge(f"{_PREFIX}_{name}", text, ["model"], registry=self.registry)

    def _histogram(self, name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
        return Histogram(
            f"{_PREFIX}_{name}", text, ["model"], buckets=buckets, registry=self.registry
        )

    def answered(self, model: str, status: int) -> None:
        """A request was answered; `model` is '' if it named none that is served."""
        self._requests.labels(model, str(status)).inc()

    def first_token(self, model: str, seconds: float) -> None:
        """A request got its first token."""
        self._first_token.labels(model).observe(seconds)

    def finished(self, model: str, seconds: float, n_prompt_tokens: int, n_new: int) -> None:
        """A request got its last token."""
        self._duration.labels(model).observe(seconds)
        self._prompt_tokens.labels(model).inc(n_prompt_tokens)
        self._new_tokens.labels(model).inc(n_new)
        if n_new and seconds > 0:
            self._pace.labels(model).observe(n_new / seconds)

    def text(self) -> bytes:
        """All metrics, in Prometheus' text format."""
        return generate_latest(self.registry)
