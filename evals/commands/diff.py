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
    """Compare two versions: recipe, scores, cost.

    A and B are NAME/VERSION or NAME@ALIAS. Differences are A - B, paired by document, with 95% intervals. Ratios are A
    over B, only for figures that were measured the same way. `limbeck compare A B` has more on quality.
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
        print(f"versions: {a} and {b} have the same fields")
    if comparison.no_recipe:
        print(f"recipe: {comparison.no_recipe}")
    elif comparison.recipe:
        _print_changed("recipe", comparison.recipe, a, b)
    else:
        print("recipe: the same in every parameter")
    if quality := comparison.quality:
        columns = ["task", "metric", a, b, "difference, paired", "better", "documents"]
        print_table(f"scores, {quality.harness}", columns, [_score(row) for row in quality.tasks])
        if share := quality.retention:
            print(f"retention: {a} retains {share.value:.3f} [{share.low:.3f}, {share.high:.3f}] of {b}")
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
    """A value; of a digest only the beginning."""
    return value[:12] if value and DIGEST.fullmatch(value) else value


def _score(row: ComparedTask) -> list[str]:
    difference = row.difference
    interval = f"{difference.value:+.4f} [{difference.low:+.4f}, {difference.high:+.4f}]"
    values = f"{row.candidate:.4f}", f"{row.reference:.4f}"
    return [row.task, row.metric, *values, interval, row.better or "not settled", f"{row.documents:,}"]


def _cost(row: ComparedCost) -> list[str | None]:
    from limbeck.registry.records import FIGURES

    figure, interval = FIGURES[row.figure], row.ratio_interval
    ratio = None
    if row.ratio is not None:
        ratio = f"{row.ratio:.3f}" + (f" [{interval.low:.3f}, {interval.high:.3f}]" if interval else "")
    return [figure.title, figure.format_value(row.a), figure.format_value(row.b), ratio]
