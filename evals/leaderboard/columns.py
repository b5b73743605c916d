"""Columns and cells that the tables of this room share."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Protocol

from limbeck.registry.records import LeaderboardRow


class Described(Protocol):
    """What `describe_version` takes: a row of a leaderboard, or a candidate of a verdict."""

    @property
    def version(self) -> str: ...
    @property
    def kind(self) -> str: ...
    @property
    def recipe(self) -> str | None: ...
    @property
    def precision(self) -> str | None: ...


COST_COLUMNS = ["$ per 1M\ntokens", "cost\nratio", "speed-up", "tokens/s", "MB"]


def describe_version(row: Described) -> str:
    """A version in a word or two, such as "small-distilled int8"."""
    if row.kind == "teacher":
        return "teacher"
    control = ", control" if isinstance(row, LeaderboardRow) and row.control else ""
    return f"{row.recipe or row.version} {row.precision if row.kind == 'onnx' else 'torch'}{control}"


def task_headers(metrics: Mapping[str, str]) -> Iterator[str]:
    """Column titles of tasks, on short lines, without the word that all task names begin with."""
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
    """The cells under COST_COLUMNS; None for what was not measured."""
    return [
        f"{cost['usd_per_million_tokens']:.3g}" if cost else None,
        f"{ratio:.3f}" if ratio is not None else None,
        f"{speedup:.1f}x" if speedup is not None else None,
        f"{cost['decode_tokens_per_s']:,.0f}" if cost else None,
        f"{cost['disk_bytes'] / 1e6:.1f}" if cost else None,
    ]
