"""`limbeck leaderboard`."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from evals.cells import COST_COLUMNS, cost_cells, headers
from registry.errors import BadInput
from registry.terminal import print_json, print_table

if TYPE_CHECKING:
    from registry.records import LeaderboardRow


@click.command()
@click.argument("name")
@click.option("--task", help="Rank by this task alone.")
@click.option(
    "--format",
    "output",
    type=click.Choice(["table", "json", "csv", "html"]),
    default="table",
    show_default=True,
    help="html is one file with a plot.",
)
@click.option("--output", "file", type=click.Path(path_type=Path, dir_okay=False), help="Write to this file.")
def leaderboard(name: str, task: str | None, output: str, file: Path | None) -> None:
    """Rank the versions of NAME: quality kept of the teacher's, against cost.

    A star marks the Pareto frontier: no other version is both cheaper and at least as good.
    """
    from evals.leaderboard import rows, to_csv
    from registry.home import home, written_whole
    from registry.store import Store

    if output == "table" and file:
        raise BadInput("--output takes no table", fix="add --format html, csv or json")
    found = rows(Store(), name, task)
    if output == "html":
        from evals.page import render

        file = file or home() / "reports" / f"{name}.html"
        text = render(name, found, task)
    elif output == "csv":
        text = to_csv(found)
    elif output == "json" and file:
        import json

        text = json.dumps([row.model_dump(mode="json") for row in found], indent=2) + "\n"
    elif output == "json":
        print_json(found)
        return
    else:
        _print_rows(name, found)
        return
    if file is None:
        print(text, end="")
        return
    try:
        with written_whole(file) as part:
            part.write_text(text, encoding="utf-8")
    except (FileNotFoundError, FileExistsError, NotADirectoryError) as error:
        raise BadInput(f"{file} cannot be written: {error.strerror}", fix="choose another --output") from error
    print(os.path.relpath(file))


def _print_rows(name: str, found: Sequence[LeaderboardRow]) -> None:
    from evals.plot import title

    metrics = {task: str(quality["metric"]) for row in found for task, quality in row.quality.items()}
    columns = ["version", "what", *headers(metrics), "retention", *COST_COLUMNS[:3], "verdict"]
    table = []
    for row in found:
        values = [row.quality[task]["value"] if task in row.quality else None for task in metrics]
        kept = row.retention
        table.append(
            [
                f"{row.version.rpartition('/')[2]}{' *' if row.pareto else ''}",
                title(row),
                *(f"{value:.3f}" if isinstance(value, float) else None for value in values),
                f"{kept['value']:.3f} [{kept['low']:.3f}, {kept['high']:.3f}]" if kept else None,
                *cost_cells(row.cost, row.cost_ratio, row.speedup)[:3],
                " ".join(filter(None, [row.verdict, *row.aliases])) or None,
            ]
        )
    print_table(f"{name}: * is on the Pareto frontier", columns, table)
