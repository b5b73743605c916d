"""Cells that the tables of this room share."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple, Protocol

from limbeck.registry.records import LeaderboardRow


class Described(Protocol):
    """What `title` names: a row of a leaderboard, or a candidate of a verdict."""

    @property
    def version(self) -> str: ...
    @property
    def kind(self) -> str: ...
    @property
    def recipe(self) -> str | None: ...
    @property
    def precision(self) -> str | None: ...


class Column(NamedTuple):
    """How a figure of a cost is shown."""

    title: str
    form: str  # format specification
    factor: float = 1.0
    higher_is_better: bool = False

    def cell(self, value: float | None) -> str | None:
        return None if value is None else f"{value * self.factor:{self.form}}"


COSTS = {  # the figures of limbeck.registry.records.Cost that versions are compared by
    "usd_per_million_tokens": Column("$ per 1M tokens", ".3g"),
    "p50_ms": Column("p50 ms", ",.1f"),
    "p95_ms": Column("p95 ms", ",.1f"),
    "prefill_tokens_per_s": Column("prefill tokens/s", ",.0f", higher_is_better=True),
    "decode_tokens_per_s": Column("decode tokens/s", ",.0f", higher_is_better=True),
    "params": Column("parameters M", ",.2f", 1e-6),
    "disk_bytes": Column("size MB", ",.1f", 1e-6),
    "peak_rss_bytes": Column("memory MB", ",.0f", 1e-6),
    "flops_per_token": Column("MFLOPs a token", ",.1f", 1e-6),
}
COST_COLUMNS = ["$ per 1M\ntokens", "cost\nratio", "speed-up", "tokens/s", "MB"]


def title(row: Described) -> str:
    """What a version is, in a word or two."""
    if row.kind == "teacher":
        return "teacher"
    control = ", control" if isinstance(row, LeaderboardRow) and row.control else ""
    return f"{row.recipe or row.version} {row.precision if row.kind == 'onnx' else 'torch'}{control}"


def headers(metrics: Mapping[str, str]) -> Iterator[str]:
    """Column titles of tasks: without the word that all names begin with, on short lines."""
    first = {task.partition("_")[0] for task in metrics}
    for task, metric in metrics.items():
        title = task.partition("_")[2] if len(first) == 1 < len(metrics) else task
        yield "\n".join(_lines(f"{title} {metric}" if metric != title else title))


def _lines(title: str, width: int = 9) -> Iterable[str]:
    line = ""
    for word in title.replace("_", " ").split():
        if line and len(line) + 1 + len(word) > width:
            yield line
            line = ""
        line = f"{line} {word}".strip()
    yield line


def cost_cells(cost: Mapping[str, Any] | None, ratio: float | None, speedup: float | None) -> list[str | None]:
    return [
        f"{cost['usd_per_million_tokens']:.3g}" if cost else None,
        f"{ratio:.3f}" if ratio is not None else None,
        f"{speedup:.1f}x" if speedup is not None else None,
        f"{cost['decode_tokens_per_s']:,.0f}" if cost else None,
        f"{cost['disk_bytes'] / 1e6:.1f}" if cost else None,
    ]
