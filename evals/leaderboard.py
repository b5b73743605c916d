"""Cost against quality: the versions of a model side by side."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime
from difflib import get_close_matches
from typing import TYPE_CHECKING, Any

from evals.statistics import top_level
from registry.errors import BadInput
from registry.lineage import ancestor
from registry.records import Estimate, LeaderboardRow, Scorecard, Version
from registry.terminal import say

if TYPE_CHECKING:
    from registry.store import Store

COST = (
    "params",
    "disk_bytes",
    "peak_rss_bytes",
    "prefill_tokens_per_s",
    "decode_tokens_per_s",
    "p50_ms",
    "p95_ms",
    "usd_per_million_tokens",
)


def rows(store: Store, name: str, task: str | None = None) -> list[LeaderboardRow]:
    """The versions of `name`, best retention first; those that are not scored come last.

    Of each version the newest scorecard counts that is of the same tasks, and against the same teacher, as
    those of most versions. Figures of other tasks are not put beside them; a line on stderr says so.

    Args:
        task: rank by the retention of this task alone.

    Raises:
        BadInput: no such model, or a task that none of its scorecards has.
    """
    versions = store.versions(name)
    if not versions:
        raise store.unknown(name)
    cards = {version.version: store.scorecards(version) for version in versions}
    chosen = _alike(cards, task)
    if task and not any(chosen.values()):
        known = sorted({known for several in cards.values() for card in several for known in card.tasks})
        near = get_close_matches(task, known, n=1)
        raise BadInput(
            f"no version of {name} is scored on {task!r}",
            fix=f"did you mean {near[0]}?" if near else f"they are scored on: {', '.join(known) or 'nothing yet'}",
        )
    others = [f"{name}/{number}" for number, several in cards.items() if several and not chosen[number]]
    if others:
        say(f"not shown with a score, since theirs are of other tasks: {', '.join(others)}")
    found = [_row(store, version, chosen[version.version], task) for version in versions]
    frontier = pareto([(_usd(row), _retention(row)) for row in found])
    ranked = [row.model_copy(update={"pareto": best}) for row, best in zip(found, frontier, strict=True)]
    return sorted(ranked, key=_rank)


def pareto(points: Sequence[tuple[float | None, float | None]]) -> list[bool]:
    """Which of the points (cost, quality) no other one beats: none is cheaper and as good, or better and as cheap.

    Points with None are on no frontier.
    """
    whole = [(cost, quality) for cost, quality in points if cost is not None and quality is not None]

    def beaten(cost: float, quality: float) -> bool:
        return any(c <= cost and q >= quality and (c < cost or q > quality) for c, q in whole)

    return [c is not None and q is not None and not beaten(c, q) for c, q in points]


def to_csv(found: Sequence[LeaderboardRow]) -> str:
    """The rows as CSV, one line each; nested fields become columns such as `cost.p50_ms`."""
    flat = [_flat(row.model_dump(mode="json")) for row in found]
    out = io.StringIO()
    writer = csv.DictWriter(out, list(dict.fromkeys(key for line in flat for key in line)), lineterminator="\n")
    writer.writeheader()
    writer.writerows(flat)
    return out.getvalue()


def _flat(fields: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    line: dict[str, Any] = {}
    for key, value in fields.items():
        if isinstance(value, dict):
            line |= _flat(value, f"{prefix}{key}.")
        else:
            line[prefix + key] = " ".join(value) if isinstance(value, list) else value
    return line


def _alike(cards: Mapping[int, Sequence[Scorecard]], task: str | None) -> dict[int, Scorecard | None]:
    """Of each version the newest scorecard on the tasks, and against the teacher, that most versions have.

    One that is against no teacher, or another, counts without its relative part.
    """

    def asked(card: Scorecard) -> str:
        return f"{card.tasks[task].task_hash if task else card.tasks_digest} {card.harness}"

    able = {n: [card for card in several if task is None or task in card.tasks] for n, several in cards.items()}
    tasks = _usual((n, asked(card), card) for n, several in able.items() for card in several)
    alike = {n: [card for card in several if asked(card) == tasks] for n, several in able.items()}
    against = {n: [(card.relative.teacher_digest, card) for card in s if card.relative] for n, s in alike.items()}
    teacher = _usual((n, digest, card) for n, several in against.items() for digest, card in several)
    chosen: dict[int, Scorecard | None] = {}
    for number, several in alike.items():
        held = [card for digest, card in against[number] if digest == teacher]
        bare = [card.model_copy(update={"relative": None}) for card in several]
        chosen[number] = next(reversed(held or bare), None)
    return chosen


def _usual(seen: Iterable[tuple[int, str, Scorecard]]) -> str | None:
    """Of (version, kind, scorecard): the kind that most versions have; the newest of those."""
    versions: dict[str, set[int]] = {}
    newest: dict[str, datetime] = {}
    for number, kind, card in seen:
        versions.setdefault(kind, set()).add(number)
        newest[kind] = max(card.created, newest.get(kind, card.created))
    return max(versions, key=lambda kind: (len(versions[kind]), newest[kind]), default=None)


def _row(store: Store, version: Version, card: Scorecard | None, task: str | None) -> LeaderboardRow:
    verdicts = store.verdicts(version)
    relative = card.relative if card else None
    kept: Estimate | None = None
    if relative:
        kept = relative.task_retention.get(task) if task else relative.retention
    shown = [task] if task else top_level(card.tasks) if card else []
    return LeaderboardRow(
        version=version.ref,
        kind=version.kind,
        parent=ancestor(version),
        recipe=version.recipe,
        precision=version.precision,
        quality={name: card.tasks[name].model_dump(include={"metric", "value", "stderr"}) for name in shown if card},
        retention=kept.model_dump(include={"value", "low", "high"}) if kept else None,
        cost=card.cost.model_dump(include=set(COST)) if card and card.cost else None,
        cost_ratio=relative.cost_ratio if relative else None,
        speedup=relative.speedup if relative else None,
        pareto=False,
        verdict=verdicts[-1].outcome if verdicts else None,
        aliases=version.aliases,
    )


def _rank(row: LeaderboardRow) -> tuple[float, float]:
    """Best first, the cheaper of two that are as good; without figures last."""
    kept, usd = _retention(row), _usd(row)
    return float("inf") if kept is None else -kept, float("inf") if usd is None else usd


def _usd(row: LeaderboardRow) -> float | None:
    return row.cost["usd_per_million_tokens"] if row.cost else None


def _retention(row: LeaderboardRow) -> float | None:
    return row.retention["value"] if row.retention else None
