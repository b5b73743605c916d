"""Costs with the requests of each round, as measuring them gives, without running a model."""

from __future__ import annotations

from typing import Any

from limbeck.evals.cost.measure import PROTOCOL
from limbeck.registry.records import BatchCost, Cost

TEACHER_MS = (100.0, 101.0, 99.0, 100.0, 102.0, 98.0)  # of a request, round by round


def timed_cost(factor: float, **changes: Any) -> Cost:
    """The cost of requests in batches of 1 and 8 that take `factor` times as long as the teacher's, at 1 USD/h."""
    loads = tuple(
        BatchCost(
            batch=batch,
            request_ms=tuple(factor * ms for ms in TEACHER_MS),
            prefill_tokens_per_s=1e3,
            decode_tokens_per_s=500.0,
            p50_ms=100 * factor,
            p95_ms=110 * factor,
            usd_per_million_tokens=100 * factor / 3.6e6 / (128 * batch) * 1e6,
            peak_rss_bytes=10**8,
        )
        for batch in (1, 8)
    )
    fields: dict[str, Any] = {
        "params": 10**6,
        "disk_bytes": 4 * 10**6,
        "requests": len(TEACHER_MS),
        "usd_per_hour": 1.0,
        "prompt_tokens": 64,
        "new_tokens": 64,
        "threads": 2,
        "machine": "a test machine, 2 cores; torch 2",
        "protocol": PROTOCOL,
        "run": "r",
        "loads": loads,
        **loads[0].model_dump(exclude={"batch", "request_ms"}),
    }
    return Cost(**fields | changes)
