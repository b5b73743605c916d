"""What a server counts, in Prometheus' text format; the names are vLLM's where it has them."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300)


class Metrics:
    """The counters, gauges and histograms of one server. Any thread may count."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()

        def counter(name: str, about: str, *labels: str) -> Counter:
            return Counter(f"limbeck:{name}", about, labels, registry=self.registry)

        def gauge(name: str, about: str, *labels: str) -> Gauge:
            return Gauge(f"limbeck:{name}", about, labels, registry=self.registry)

        def seconds(name: str, about: str) -> Histogram:
            return Histogram(f"limbeck:{name}_seconds", about, buckets=SECONDS, registry=self.registry)

        self.http_requests = counter("http_requests", "Answers by path and status.", "path", "status")
        self.requests_finished = counter("request_success", "Rows that ended, by reason.", "finished_reason")
        self.requests_failed = counter("request_failure", "Requests that were not answered, by reason.", "reason")
        self.prompt_tokens = counter("prompt_tokens", "Prompt tokens that were taken.")
        self.cached_tokens = counter("prefix_cache_hits", "Prompt tokens found in the cache of an earlier prompt.")
        self.generation_tokens = counter("generation_tokens", "Tokens that were generated.")
        self.requests_waiting = gauge("num_requests_waiting", "Requests that wait for their first row.")
        self.rows_running = gauge("num_rows_running", "Rows that are read or decoded.")
        self.preemptions = counter(
            "num_preemptions", "Rows that gave up their place for want of memory, to be read again."
        )
        self.queue_time = seconds("request_queue_time", "From a request's arrival to its first row.")
        self.time_to_first_token = seconds("time_to_first_token", "From a request's arrival to its first token.")
        self.inter_token_latency = seconds("inter_token_latency", "From one token of a row to the next.")
        self.request_latency = seconds("e2e_request_latency", "From a request's arrival to its last token.")
        self.model_info = gauge("model_info", "1 for the artifact that takes requests.", "name", "version", "digest")
        self.models_loaded = gauge(
            "models_loaded", "Artifacts in memory: more than one while an old one ends its requests."
        )
        self.model_swaps = counter("model_swaps", "Artifacts that took the place of another.")
        self.models_refused = counter("model_refused", "New artifacts that could not be loaded; the old one stayed.")

    def text(self) -> bytes:
        """All of them, as Prometheus reads them."""
        return generate_latest(self.registry)
