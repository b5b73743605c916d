"""A server's metrics in Prometheus' text format; names are as in vLLM if it has the metric."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300)


class Metrics:
    """The counters, gauges and histograms of one server. Thread-safe."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()

        def counter(name: str, about: str, *labels: str) -> Counter:
            return Counter(f"limbeck:{name}", about, labels, registry=self.registry)

        def gauge(name: str, about: str, *labels: str) -> Gauge:
            return Gauge(f"limbeck:{name}", about, labels, registry=self.registry)

        def seconds(name: str, about: str) -> Histogram:
            return Histogram(f"limbeck:{name}_seconds", about, buckets=SECONDS, registry=self.registry)

        self.http_requests = counter("http_requests", "Answers by path and status.", "path", "status")
        self.requests_finished = counter("request_success", "Rows that finished, by reason.", "finished_reason")
        self.requests_failed = counter("request_failure", "Requests that failed, by reason.", "reason")
        self.prompt_tokens = counter("prompt_tokens", "Prompt tokens.")
        self.cached_tokens = counter("prefix_cache_hits", "Prompt tokens found in the prefix cache.")
        self.generation_tokens = counter("generation_tokens", "Generated tokens.")
        self.verifications = counter("spec_decode_num_drafts", "Runs that checked proposed tokens.")
        self.proposed_tokens = counter("spec_decode_num_draft_tokens", "Proposed tokens.")
        self.accepted_tokens = counter("spec_decode_num_accepted_tokens", "Proposed tokens that were accepted.")
        self.speculative_speedup = gauge(
            "spec_decode_speedup",
            "Speed with proposals over that of one token at a time, since the artifact was loaded.",
        )
        self.requests_waiting = gauge("num_requests_waiting", "Requests that wait for their first row.")
        self.rows_running = gauge("num_rows_running", "Rows in prefill or decoding.")
        self.preemptions = counter("num_preemptions", "Rows removed for lack of memory, to be computed again.")
        self.queue_time = seconds("request_queue_time", "From a request's arrival to its first row.")
        self.time_to_first_token = seconds("time_to_first_token", "From a request's arrival to its first token.")
        self.inter_token_latency = seconds("inter_token_latency", "From one token of a row to the next.")
        self.request_latency = seconds("e2e_request_latency", "From a request's arrival to its last token.")
        self.model_info = gauge("model_info", "1 for the artifact that new requests get.", "name", "version", "digest")
        self.models_loaded = gauge("models_loaded", "Artifacts in memory: 2 while an old one finishes its requests.")
        self.model_swaps = counter("model_swaps", "Artifacts that replaced another.")
        self.models_refused = counter(
            "model_refused", "New artifacts that could not be loaded; the old one is still served."
        )

    def text(self) -> bytes:
        """All metrics in Prometheus' text format."""
        return generate_latest(self.registry)
