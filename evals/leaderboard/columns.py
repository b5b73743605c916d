"""Columns and cells that the tables of this room share."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Protocol

from limbeck.registry.records import FIGURES, LeaderboardRow


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


RATIO_HEADERS = ["cost\nratio", "speed-up"]  # to the teacher


def describe_version(row: Described) -> str:
    """A version in a word or two, such as "small-distilled int8-weight"."""
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


def figure_header(figure: str) -> str:
    """The column title of a cost figure, on short lines."""
    return "\n".join(_lines(FIGURES[figure].title))


def figure_cell(cost: Mapping[str, Any] | None, figure: str) -> str | None:
    """A cost figure as its column shows it; None if it was not measured."""
    return FIGURES[figure].format_value(cost[figure]) if cost else None


def ratio_cells(ratio: float | None, speedup: float | None) -> list[str | None]:
    """The cells under RATIO_HEADERS; None for what was not measured."""
    return [
        f"{ratio:.3f}" if ratio is not None else None,
        f"{speedup:.1f}x" if speedup is not None else None,
    ]
