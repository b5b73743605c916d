"""What running an artifact costs. `FIGURES`, made of the fields of `Cost`, is the one table of cost figures.

A new figure is a field of `Cost` with its `Figure`, and its measurement in `limbeck.evals.cost.measure`. Columns,
policy limits, sort keys, model cards, pages and the tables of the docs follow from it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from limbeck.registry.records.base import Estimate, Record


@dataclass(frozen=True)
class Figure:
    """How one cost figure is named, shown and compared.

    Attributes:
        title: of its column, with the unit that `factor` gives.
        description: as a model card and a policy say it, with the unit of the record.
        format: the format specification of the value times `factor`.
        higher_is_better: decides the order, the frontier, and whether a policy limits it from below.
        varies_with: what else decides its value. Figures that vary with time compare only within one run.
        is_headline: shown where there is room for a few figures.
    """

    title: str
    description: str
    format: str
    factor: float = 1.0
    higher_is_better: bool = False
    varies_with: Literal["nothing", "machine", "time"] = "nothing"
    is_headline: bool = False

    def format_value(self, value: float | None) -> str | None:
        """The value as its column shows it; None if it was not measured."""
        return None if value is None else f"{value * self.factor:{self.format}}"


class BatchCost(Record):
    """The cost of equal requests in one batch size."""

    batch: int
    request_ms: tuple[float, ...]  # of one batch from start to end, one value a round; rounds of one run are paired
    prefill_tokens_per_s: float  # of the whole batch
    decode_tokens_per_s: float
    p50_ms: float
    p95_ms: float
    usd_per_million_tokens: float
    peak_rss_bytes: int  # includes the smaller batches, which came before
    peak_device_bytes: int | None = None  # at most allocated by torch on the GPU


class Cost(Record):
    """What running an artifact costs, by the protocol of `limbeck.evals.cost.measure`, in a process of its own.

    A request is prompt_tokens in and new_tokens out, at batch 1.
    """

    usd_per_million_tokens: Annotated[
        float,
        Figure(
            "$ per 1M tokens",
            "dollars per million tokens, prompt and new ones together",
            ".3g",
            varies_with="time",
            is_headline=True,
        ),
    ]
    p50_ms: Annotated[
        float,
        Figure("p50 ms", "milliseconds of a request, the median", ",.1f", varies_with="time", is_headline=True),
    ]
    p95_ms: Annotated[
        float,
        Figure("p95 ms", "milliseconds of a request, the 95th percentile", ",.1f", varies_with="time"),
    ]
    prefill_tokens_per_s: Annotated[
        float,
        Figure("prefill tokens/s", "prompt tokens per second", ",.0f", higher_is_better=True, varies_with="time"),
    ]
    decode_tokens_per_s: Annotated[
        float,
        Figure(
            "decode tokens/s",
            "new tokens per second",
            ",.0f",
            higher_is_better=True,
            varies_with="time",
            is_headline=True,
        ),
    ]
    params: Annotated[int, Figure("parameters M", "parameters", ",.2f", 1e-6)]
    disk_bytes: Annotated[int, Figure("size MB", "bytes on disk", ",.1f", 1e-6, is_headline=True)]
    peak_rss_bytes: Annotated[
        int,
        Figure("memory MB", "bytes of memory at its peak", ",.0f", 1e-6, varies_with="machine", is_headline=True),
    ]
    flops_per_token: Annotated[
        float | None,
        Figure("MFLOPs a token", "floating-point operations a token, mean over a request", ",.1f", 1e-6),
    ] = None
    peak_device_bytes: Annotated[
        int | None,
        Figure("GPU memory MB", "bytes of a GPU's memory at their peak", ",.0f", 1e-6, varies_with="machine"),
    ] = None
    acceptance_length: Annotated[
        float | None,
        Figure(
            "tokens a run",
            "new tokens that one run settles, of those that check the tokens of a draft model",
            ".2f",
            higher_is_better=True,
        ),
    ] = None
    speculative_speedup: Annotated[
        float | None,
        Figure(
            "speed-up by draft",
            "times as fast with a draft model as one token at a time",
            ".2f",
            higher_is_better=True,
            varies_with="time",
        ),
    ] = None
    intervals: dict[str, Estimate] = {}  # figure -> its interval over the rounds of a run
    usd_per_hour: float
    prompt_tokens: int
    new_tokens: int
    requests: int
    threads: int
    machine: str
    protocol: int  # limbeck.evals.cost.measure.PROTOCOL
    run: str | None = None  # id of the run; the costs of one run were measured in turn, round by round
    device: str = "cpu"  # cpu or cuda
    price: str | None = None  # where usd_per_hour comes from: name, date and source
    loads: tuple[BatchCost, ...] = ()  # by batch size, batch 1 first
    draft: str | None = None  # digest of the draft model of acceptance_length and speculative_speedup

    @property
    def setting(self) -> tuple[str, int, int, int, float, int]:
        """What two costs must share to be compared in one table: machine, threads, request, price, protocol."""
        hardware = self.machine.partition(";")[0]
        return hardware, self.threads, self.prompt_tokens, self.new_tokens, self.usd_per_hour, self.protocol

    def figures(self) -> dict[str, float | None]:
        """Every figure by its name; None if it was not measured."""
        return {name: getattr(self, name) for name in FIGURES}


FIGURES: dict[str, Figure] = {
    name: figure for name, field in Cost.model_fields.items() for figure in field.metadata if isinstance(figure, Figure)
}
USD = "usd_per_million_tokens"
HEADLINES = tuple(name for name, figure in FIGURES.items() if figure.is_headline)


def limit_name(figure: str) -> str:
    """The key of a policy that limits a figure: max_..., or min_... if more is better."""
    return f"{'min' if FIGURES[figure].higher_is_better else 'max'}_{figure}"
