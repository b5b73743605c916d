"""What running an artifact costs. `FIGURES` is the one table of its figures."""

from __future__ import annotations

from limbeck.registry.records.base import Estimate, Record


class BatchCost(Record):
    """Requests of one batch size, all of them the same."""

    batch: int
    request_ms: tuple[float, ...]  # one batch from start to end, round by round; rounds of one run are paired
    prefill_tokens_per_s: float  # of the whole batch
    decode_tokens_per_s: float
    p50_ms: float
    p95_ms: float
    usd_per_million_tokens: float
    peak_rss_bytes: int  # so far: smaller batches came before
    peak_device_bytes: int | None = None  # the most that torch held on the GPU


class Cost(Record):
    """What running an artifact costs, by the protocol of `limbeck.evals.cost.measure`, in a process of its own.

    Records of the first protocol lack what `later` marks.
    """

    params: int
    disk_bytes: int
    peak_rss_bytes: int
    prefill_tokens_per_s: float
    decode_tokens_per_s: float
    p50_ms: float  # one whole request: prompt_tokens in, new_tokens out, batch 1
    p95_ms: float
    usd_per_million_tokens: float  # prompt and new tokens together, at usd_per_hour
    usd_per_hour: float
    prompt_tokens: int
    new_tokens: int
    requests: int
    threads: int
    machine: str
    protocol: int = 1
    run: str | None = None  # costs of one run were measured in turn, round by round
    device: str = "cpu"  # cpu or cuda
    price: str | None = None  # where usd_per_hour comes from: name, date and source
    usd_interval: Estimate | None = None  # of usd_per_million_tokens: the median over rounds
    p50_interval: Estimate | None = None  # of p50_ms
    flops_per_token: float | None = None  # mean over a request's tokens, see limbeck.evals.cost.flops
    peak_device_bytes: int | None = None
    loads: tuple[BatchCost, ...] = ()  # by batch size, batch 1 first

    @property
    def setting(self) -> tuple[str, int, int, int, float, int]:
        """What two costs share that may stand in one table: machine, threads, request, price, protocol."""
        hardware = self.machine.partition(";")[0]
        return hardware, self.threads, self.prompt_tokens, self.new_tokens, self.usd_per_hour, self.protocol
