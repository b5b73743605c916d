"""`limbeck leaderboard`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from limbeck.registry.core.errors import BadInput
from limbeck.registry.core.terminal import print_json, print_table, write_report

if TYPE_CHECKING:
    from limbeck.registry.records import LeaderboardRow

# Mark of a version -> what it means for the licences of what it learnt from.
LICENCE_MARKS = {
    "!": "a licence of what it learnt from forbids learning from it",
    "?": "it is unknown whether the licences of what it learnt from allow it: set teacher.licence in the recipe, "
    "or register it with --parent",
}

WHERE_MEASURED = ("acceptance_length", "speculative_speedup")  # cost figures in the table where some version has them


@click.command()
@click.argument("name")
@click.option("--task", help="Rank by this task only.")
@click.option(
    "--sort",
    default="retention",
    show_default=True,
    help="Or a task, a cost figure, cost_ratio, speedup, version, kind, recipe, precision. Best or first on top.",
)
@click.option(
    "--cost",
    default="usd_per_million_tokens",
    show_default=True,
    help="The cost figure of the frontier and the plot; names as in the JSON.",
)
@click.option("--kind", multiple=True, help="Show only teacher, student or onnx; repeatable.")
@click.option("--recipe", multiple=True, help="Show only students of this recipe; repeatable.")
@click.option("--precision", multiple=True, help="Show only this precision; repeatable.")
@click.option("--pareto", is_flag=True, help="Show only the Pareto frontier.")
@click.option(
    "--format",
    "output_format",
    type=click.Choice(["table", "json", "csv", "html"]),
    default="table",
    show_default=True,
    help="html is one file with a plot.",
)
@click.option("--output", "file", type=click.Path(path_type=Path, dir_okay=False), help="Write to this file.")
def leaderboard(  # noqa: PLR0913 (one parameter per option)
    name: str,
    task: str | None,
    sort: str,
    cost: str,
    kind: tuple[str, ...],
    recipe: tuple[str, ...],
    precision: tuple[str, ...],
    pareto: bool,
    output_format: str,
    file: Path | None,
) -> None:
    """Rank the versions of NAME by retention of the teacher's quality and by cost.

    A star marks the Pareto frontier of the shown versions: no other version is both cheaper and at least as good.
    Versions that were measured differently (tasks, documents, prompts, harness, teacher, machine, threads, request,
    price) are ranked apart, the largest group first.
    """
    from limbeck.evals.leaderboard.rows import leaderboard_rows, to_csv
    from limbeck.registry.core.home import home
    from limbeck.registry.mlflow.store import Store

    if output_format == "table" and file:
        raise BadInput("--output does not take a table", fix="add --format html, csv or json")
    filters = {"kind": kind, "recipe": recipe, "precision": precision}
    found = leaderboard_rows(Store(), name, task, sort=sort, cost=cost, filters=filters)
    found = [row for row in found if row.pareto or not pareto]
    if output_format == "html":
        from limbeck.evals.leaderboard.page import render_page

        file = file or home() / "reports" / f"{name}.html"
        text = render_page(name, found, task, cost)
    elif output_format == "csv":
        text = to_csv(found)
    elif output_format == "json" and file:
        import json

        text = json.dumps([row.model_dump(mode="json") for row in found], indent=2) + "\n"
    elif output_format == "json":
        print_json(found)
        return
    else:
        _print_rows(name, found, cost)
        return
    write_report(text, file)


def _print_rows(name: str, rows: Sequence[LeaderboardRow], cost: str) -> None:
    """Print a table for each setting."""
    from limbeck.evals.leaderboard.rows import group_by_setting
    from limbeck.evals.scores.controls import describe_control_result

    for group in group_by_setting(rows) or [[]]:
        apart = f", {group[0].differs}" if group and group[0].differs else ""
        print_table(f"{name}{apart}: * is on the Pareto frontier", *_table(group, cost))
    marks = {_licence_mark(row) for row in rows}
    for mark, meaning in LICENCE_MARKS.items():
        if mark in marks:
            print(f"{mark} {meaning}")
    lines = [line for row in rows for each in row.against_controls for line in describe_control_result(each)]
    if lines:
        print("what distillation brought, paired by document, with 95% intervals")
        print("\n".join(f"  {line}" for line in lines))


def _licence_mark(row: LeaderboardRow) -> str:
    """The key of LICENCE_MARKS for a version; "" if learning was allowed, and for a teacher."""
    if row.kind == "teacher" or row.licence_allows_distillation:
        return ""
    return "!" if row.licence_allows_distillation is False else "?"


def _table(rows: Sequence[LeaderboardRow], cost: str) -> tuple[list[str], list[list[str | None]]]:
    """Columns and cells of rows of one setting."""
    from limbeck.evals.leaderboard.columns import (
        RATIO_HEADERS,
        describe_version,
        figure_cell,
        figure_header,
        ratio_cells,
        task_headers,
    )
    from limbeck.evals.leaderboard.ranking import sort_value

    metrics = {task: str(quality["metric"]) for row in rows for task, quality in row.quality.items()}
    figures = [cost, *(each for each in WHERE_MEASURED if any(row.cost and row.cost[each] for row in rows))]
    columns = ["version", "what", *task_headers(metrics), "retention", *map(figure_header, dict.fromkeys(figures))]
    columns += [*RATIO_HEADERS, "verdict"]
    lines = []
    for row in rows:
        values = [sort_value(row, task) for task in metrics]
        share = row.retention
        lines.append(
            [
                f"{row.version.rpartition('/')[2]}{_licence_mark(row)}{' *' if row.pareto else ''}",
                describe_version(row),
                *(f"{each:.3f}" if isinstance(each, float) else None for each in values),
                f"{share['value']:.3f} [{share['low']:.3f}, {share['high']:.3f}]" if share else None,
                *(figure_cell(row.cost, each) for each in dict.fromkeys(figures)),
                *ratio_cells(row.cost_ratio, row.speedup),
                " ".join(filter(None, [row.verdict, *row.aliases])) or None,
            ]
        )
    return columns, lines
