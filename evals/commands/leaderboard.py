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

# Mark of a version -> what it says of the licences of what it learnt from.
LICENCE_MARKS = {
    "!": "a licence of what it learnt from forbids that",
    "?": "whether the licences of what it learnt from allow that is not known: teacher.licence in the recipe says it",
}


@click.command()
@click.argument("name")
@click.option("--task", help="Rank by this task alone.")
@click.option(
    "--sort",
    default="retention",
    show_default=True,
    help="Or a task, a cost, cost_ratio, speedup, version, kind, recipe, precision. The best, or first, on top.",
)
@click.option(
    "--cost",
    default="usd_per_million_tokens",
    show_default=True,
    help="The cost that the frontier and the plot are about; its names are those of the JSON.",
)
@click.option("--kind", multiple=True, help="Show only teacher, student or onnx; may be given again.")
@click.option("--recipe", multiple=True, help="Show only students of this recipe; may be given again.")
@click.option("--precision", multiple=True, help="Show only this precision; may be given again.")
@click.option("--pareto", is_flag=True, help="Show only the frontier.")
@click.option(
    "--format",
    "output_format",
    type=click.Choice(["table", "json", "csv", "html"]),
    default="table",
    show_default=True,
    help="html is one file with a plot.",
)
@click.option("--output", "file", type=click.Path(path_type=Path, dir_okay=False), help="Write to this file.")
def leaderboard(
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
    """Rank the versions of NAME: quality kept of the teacher's, against cost.

    A star marks the Pareto frontier of what is shown: no other version is both cheaper and at least as good.
    Versions that were not measured alike (other tasks, documents, prompts, harness, teacher, machine, threads,
    request, price) are ranked apart, the largest group first.
    """
    from limbeck.evals.leaderboard.rows import leaderboard_rows, to_csv
    from limbeck.registry.core.home import home
    from limbeck.registry.mlflow.store import Store

    if output_format == "table" and file:
        raise BadInput("--output takes no table", fix="add --format html, csv or json")
    only = {"kind": kind, "recipe": recipe, "precision": precision}
    found = leaderboard_rows(Store(), name, task, sort=sort, cost=cost, filters=only)
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
    """A table for each setting."""
    from limbeck.evals.leaderboard.rows import group_by_setting
    from limbeck.evals.scores.controls import describe_control_result

    for alike in group_by_setting(rows) or [[]]:
        apart = f", {alike[0].differs}" if alike and alike[0].differs else ""
        print_table(f"{name}{apart}: * is on the Pareto frontier", *_table(alike, cost))
    marks = {_licence_mark(row) for row in rows}
    for mark, words in LICENCE_MARKS.items():
        if mark in marks:
            print(f"{mark} {words}")
    lines = [line for row in rows for held in row.against_controls for line in describe_control_result(held)]
    if lines:
        print("what distillation brought, paired by document, with 95% intervals")
        print("\n".join(f"  {line}" for line in lines))


def _licence_mark(row: LeaderboardRow) -> str:
    """The mark of `TERMS` for what a version learnt from; none where that is allowed, or where it is a teacher."""
    if row.kind == "teacher" or row.licence_allows_distillation:
        return ""
    return "!" if row.licence_allows_distillation is False else "?"


def _table(rows: Sequence[LeaderboardRow], cost: str) -> tuple[list[str], list[list[str | None]]]:
    """Columns and cells of rows that were measured alike."""
    from limbeck.evals.leaderboard.columns import COST_COLUMNS, cost_cells, describe_version, task_headers
    from limbeck.evals.leaderboard.ranking import sort_value
    from limbeck.registry.records import FIGURES, USD

    metrics = {task: str(quality["metric"]) for row in rows for task, quality in row.quality.items()}
    chosen = COST_COLUMNS[:1] if cost == USD else [FIGURES[cost].title.replace(" ", "\n", 1)]
    columns = ["version", "what", *task_headers(metrics), "retention", *chosen, *COST_COLUMNS[1:3], "verdict"]
    lines = []
    for row in rows:
        values = [sort_value(row, task) for task in metrics]
        kept = row.retention
        lines.append(
            [
                f"{row.version.rpartition('/')[2]}{_licence_mark(row)}{' *' if row.pareto else ''}",
                describe_version(row),
                *(f"{each:.3f}" if isinstance(each, float) else None for each in values),
                f"{kept['value']:.3f} [{kept['low']:.3f}, {kept['high']:.3f}]" if kept else None,
                FIGURES[cost].format_value(sort_value(row, cost)),
                *cost_cells(row.cost, row.cost_ratio, row.speedup)[1:3],
                " ".join(filter(None, [row.verdict, *row.aliases])) or None,
            ]
        )
    return columns, lines
