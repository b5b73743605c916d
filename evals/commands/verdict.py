"""`limbeck verdict`."""

from __future__ import annotations

from pathlib import Path

import click

from limbeck.evals.cost.prices import Prices, price_options
from limbeck.registry.core.errors import BadInput
from limbeck.registry.core.terminal import print_json, write_report


@click.command()
@click.argument("name")
@click.option(
    "--against", metavar="TEACHER", help="NAME/VERSION. [default: the one that most versions were scored against]"
)
@click.option("--task", "tasks", multiple=True, help="Decide by this task or group only; repeatable.")
@click.option(
    "--margin",
    "margins",
    multiple=True,
    metavar="[NAME=]NUMBER",
    help="How much worse is still as good, in the metric's own units, on all tasks or on one task or metric; "
    "repeatable. [default: 0.01]",
)
@click.option(
    "--tokens-per-day",
    type=click.FloatRange(min=0, min_open=True),
    help="The load, prompt and new tokens together, to compute the days until a student pays for itself.",
)
@price_options
@click.option(
    "--format",
    "output_format",
    type=click.Choice(["table", "markdown", "html", "json"]),
    default="table",
    show_default=True,
    help="table: for the terminal; html: one file.",
)
@click.option("--output", "file", type=click.Path(path_type=Path, dir_okay=False), help="Write to this file.")
def verdict(  # noqa: PLR0913 (one parameter per option)
    name: str,
    against: str | None,
    tasks: tuple[str, ...],
    margins: tuple[str, ...],
    tokens_per_day: float | None,
    prices_file: Path | None,
    usd_per_hour: float | None,
    output_format: str,
    file: Path | None,
) -> None:
    """Is the giant a waste here? One page: is some version of NAME as good as its teacher, and cheaper?

    Yes, no or not settled, with retention, cost, when it pays back, and what was not measured. No model runs. The
    exit code is 0 whatever the answer: `limbeck promote` is the gate.
    """
    from limbeck.evals.stats.noninferiority import Margins
    from limbeck.evals.verdict.decide import decide_verdict
    from limbeck.registry.core.home import home
    from limbeck.registry.mlflow.store import Store

    if output_format == "table" and file:
        raise BadInput("--output does not take a table", fix="add --format html, markdown or json")
    report = decide_verdict(
        Store(),
        name,
        against=against,
        tasks=list(dict.fromkeys(tasks)),
        margins=Margins.parse(margins) if margins else None,
        tokens_per_day=tokens_per_day,
        prices=Prices.load(prices_file, usd_per_hour),
    )
    if output_format == "json" and file is None:
        print_json(report)
        return
    from limbeck.evals.verdict.page import print_report, render_html, render_markdown

    if output_format == "table":
        print_report(report)
        return
    if output_format == "html":
        file = file or home() / "reports" / f"{name}-verdict.html"
        text = render_html(report)
    else:
        text = report.model_dump_json(indent=2) + "\n" if output_format == "json" else render_markdown(report)
    write_report(text, file)
