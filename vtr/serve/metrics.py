"""Metrics in Prometheus' format."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)


class Metrics:
    """The metrics of one server, in a separate registry."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.requests = Counter(
            "vtr_requests",
            "Chat completions by HTTP status; 499: the client left",
            ["status"],
            registry=self.registry,
        )
        self.in_flight = Gauge(
            "vtr_requests_in_flight", "Chat completions in flight", registry=self.registry
        )
        self.before = Counter(
            "vtr_visual_tokens_before",
            "Visual tokens of the prompts, dense",
            registry=self.registry,
        )
        self.after = Counter(
            "vtr_visual_tokens_after",
            "Visual tokens left in the last layer of the model",
            registry=self.registry,
        )
        self.prompt = Counter(
            "vtr_prompt_tokens", "Tokens of the prompts, dense", registry=self.registry
        )
        self.completion = Counter(
            "vtr_completion_tokens", "Tokens of the answers", registry=self.registry
        )
        self.first = Histogram(
            "vtr_time_to_first_token_seconds",
            "From the arrival of a request to its first text, waiting included",
            buckets=SECONDS,
            registry=self.registry,
        )
        self.whole = Histogram(
            "vtr_request_seconds",
            "From the arrival of a request to the end of its answer",
            buckets=SECONDS,
            registry=self.registry,
        )

    def text(self) -> bytes:
        """Write all metrics as Prometheus reads them."""
        return generate_latest(self.registry)
