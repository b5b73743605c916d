"""`limbeck models diff`."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

import click

from limbeck.registry.core.terminal import format_option, print_json, print_table, quiet_libraries

if TYPE_CHECKING:
    from limbeck.evals.leaderboard.diff import ChangedField, ComparedCost, Diff
    from limbeck.registry.records import ComparedTask

DIGEST = re.compile("[0-9a-f]{64}")


@click.command()
@click.argument("a")
@click.argument("b")
@format_option
def diff(a: str, b: str, output_format: str) -> None:
    """Two versions side by side: recipe, scores, cost.

    A and B are NAME/VERSION or NAME@ALIAS. Differences are A - B, paired by document, with their 95% intervals;
    ratios are A over B, and only of figures that were measured alike. `limbeck compare A B` has more on quality.
    """
    quiet_libraries()
    from limbeck.evals.leaderboard.diff import diff_versions as run
    from limbeck.registry.mlflow.store import Store

    found = run(Store(), a, b)
    if output_format == "json":
        print_json(found)
    else:
        _print(found)


def _print(comparison: Diff) -> None:
    a, b = comparison.a.ref, comparison.b.ref
    if comparison.fields:
        _print_changed("versions", comparison.fields, a, b)
    else:
        print(f"versions: {a} and {b} do not differ in a field")
    if comparison.no_recipe:
        print(f"recipe: {comparison.no_recipe}")
    elif comparison.recipe:
        _print_changed("recipe", comparison.recipe, a, b)
    else:
        print("recipe: the same in every parameter")
    if quality := comparison.quality:
        columns = ["task", "metric", a, b, "difference, paired", "better", "documents"]
        print_table(f"scores, {quality.harness}", columns, [_score(row) for row in quality.tasks])
        if kept := quality.retention:
            print(f"retention: {a} keeps {kept.value:.3f} [{kept.low:.3f}, {kept.high:.3f}] of {b}")
        for task, why in quality.unknown_tasks.items():
            print(f"{task}: {why}")
    else:
        print(f"scores: {comparison.no_quality}")
    if comparison.cost:
        print_table("cost", ["figure", a, b, f"{a} / {b}"], [_cost(row) for row in comparison.cost])
    if comparison.no_cost:
        print(f"cost: {comparison.no_cost}")


def _print_changed(title: str, rows: tuple[ChangedField, ...], a: str, b: str) -> None:
    print_table(title, ["differs in", a, b], [(row.name, _short(row.a), _short(row.b)) for row in rows])


def _short(value: str | None) -> str | None:
    """A value, of a digest its beginning."""
    return value[:12] if value and DIGEST.fullmatch(value) else value


def _score(row: ComparedTask) -> list[str]:
    sure = row.difference
    between = f"{sure.value:+.4f} [{sure.low:+.4f}, {sure.high:+.4f}]"
    values = f"{row.candidate:.4f}", f"{row.reference:.4f}"
    return [row.task, row.metric, *values, between, row.better or "not settled", f"{row.documents:,}"]


def _cost(row: ComparedCost) -> list[str | None]:
    from limbeck.registry.records import FIGURES

    column, sure = FIGURES[row.figure], row.ratio_interval
    said = (
        f"{row.ratio:.3f}" + (f" [{sure.low:.3f}, {sure.high:.3f}]" if sure else "") if row.ratio is not None else None
    )
    return [column.title, column.format_value(row.a), column.format_value(row.b), said]
