"""What a server counts, for Prometheus."""

from collections.abc import Callable, Iterator

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.registry import Collector

from convai_fast.generation.engine import Load

_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
_SECONDS_A_TOKEN = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1)


class Metrics:
    """Counters of one server.

    Args:
        load: asked at each look for what the engine has to do.
    """

    def __init__(self, load: Callable[[], Load]) -> None:
        registry = self._registry = CollectorRegistry()
        self.requests = Counter(
            "convai_fast_requests",
            "Requests that were answered, by path and status.",
            ["path", "status"],
            registry=registry,
        )
        self.prompt_tokens = Counter(
            "convai_fast_prompt_tokens", "Tokens of prompts that were answered.", registry=registry
        )
        self.reply_tokens = Counter(
            "convai_fast_reply_tokens", "Tokens of replies.", registry=registry
        )
        self.first_token_seconds = Histogram(
            "convai_fast_time_to_first_token_seconds",
            "From a request for a stream to its first token.",
            buckets=_SECONDS,
            registry=registry,
        )
        self.token_seconds = Histogram(
            "convai_fast_time_per_token_seconds",
            "Between tokens of a stream, on average over its reply.",
            buckets=_SECONDS_A_TOKEN,
            registry=registry,
        )
        self.request_seconds = Histogram(
            "convai_fast_request_seconds",
            "From a request to the end of its answer.",
            buckets=_SECONDS,
            registry=registry,
        )
        registry.register(_OfEngine(load))

    def page(self) -> bytes:
        """All of them, in Prometheus' format of text."""
        return generate_latest(self._registry)


class _OfEngine(Collector):
    def __init__(self, load: Callable[[], Load]) -> None:
        self._load = load

    def collect(self) -> Iterator[GaugeMetricFamily | CounterMetricFamily]:
        """See `Collector`."""
        load = self._load()
        yield GaugeMetricFamily(
            "convai_fast_running_replies", "Replies that are being written.", load.running
        )
        yield GaugeMetricFamily(
            "convai_fast_waiting_replies", "Replies that wait for a slot.", load.waiting
        )
        yield CounterMetricFamily(
            "convai_fast_computed_or_copied_prompt_tokens",
            "Tokens of prompts that the engine has taken up.",
            load.prompt_tokens,
        )
        yield CounterMetricFamily(
            "convai_fast_copied_prompt_tokens",
            "Those of them that another prompt had in common (cache hits).",
            load.copied_tokens,
        )
