"""`limbeck tasks`, `eval`, `compare` and `leaderboard`."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from registry.errors import BadInput
from registry.terminal import format_option, print_json, print_table, quiet_libraries, say

if TYPE_CHECKING:
    from registry.records import LeaderboardRow, Scorecard

USD_PER_HOUR = 0.10


@click.command()
@click.argument("corpus", type=click.Path(path_type=Path))
@click.option("--name", required=True, help="The tasks' names begin with it.")
@click.option("--to", type=click.Path(path_type=Path), required=True, help="The folder, for --include-path later.")
@click.option("--kind", "kinds", multiple=True, help="bits_per_byte, next_line or minimal_pairs. [default: all]")
@click.option("--documents", type=click.IntRange(min=1), help="At most so many of each task.")
@format_option
def tasks(corpus: Path, name: str, to: Path, kinds: tuple[str, ...], documents: int | None, output: str) -> None:
    """Make lm-eval tasks from the held-out text in CORPUS, a JSON object with "path" and "text" a line.

    Three kinds: bits per byte of the text; the true next line among lines of the same file; and, for Python,
    pairs of a snippet and one that is broken by a rule. lm-eval itself can run them too.
    """
    quiet_libraries()
    from evals.make_tasks import KINDS, make

    made = make(corpus, to, name, kinds or KINDS, documents=documents)
    if output == "json":
        print_json(made)
        return
    for task in made:
        print(task)
    say(f"score them: limbeck eval MODEL --tasks {','.join(made)} --include-path {to}")


@click.command("eval")
@click.argument("models", metavar="MODEL...", nargs=-1, required=True)
@click.option("--tasks", "names", required=True, metavar="TASK,...", help="lm-eval tasks or groups.")
@click.option("--include-path", type=click.Path(path_type=Path), multiple=True, help="A folder of lm-eval tasks.")
@click.option("--against", metavar="TEACHER", help="The model that the others are held against.")
@click.option("--num-fewshot", type=click.IntRange(min=0), help="Examples in each prompt.")
@click.option("--limit", type=click.IntRange(min=1), help="Only so many documents of each task.")
@click.option("--cost/--no-cost", default=True, help="Measure speed, memory and dollars too. [default: --cost]")
@click.option(
    "--usd-per-hour",
    type=float,
    default=USD_PER_HOUR,
    envvar="LIMBECK_USD_PER_HOUR",
    show_default=True,
    show_envvar=True,
    help="The price of this machine; the default is a placeholder for your own.",
)
@click.option("--force", is_flag=True, help="Score and measure anew what is known already.")
@click.option("--trust-remote-code", is_flag=True, help="Run Python code that comes with a model.")
@format_option
def evaluate(
    models: tuple[str, ...],
    names: str,
    include_path: tuple[Path, ...],
    against: str | None,
    num_fewshot: int | None,
    limit: int | None,
    cost: bool,
    usd_per_hour: float,
    force: bool,
    trust_remote_code: bool,
    output: str,
) -> None:
    """Score each MODEL with lm-eval, and tell what it costs to run, relative to a teacher.

    A NAME alone is all its versions. What is scored already, by digest of files and tasks, is not run again.
    Retention is the share of what the teacher has above guessing that a model keeps, with its 95% interval.
    """
    quiet_libraries()
    from evals.cost import check_price
    from evals.harness import TaskSet
    from evals.scorecard import evaluate as run
    from registry.resolve import resolve, resolve_all
    from registry.store import Store

    check_price(usd_per_hour)
    found = resolve_all(models)
    teacher = resolve(against) if against else None
    store = Store() if any(model.version for model in (*found, *filter(None, [teacher]))) else None
    task_set = TaskSet.load(
        [name.strip() for name in names.split(",") if name.strip()],
        include_path,
        num_fewshot=num_fewshot,
        limit=limit,
    )
    cards = run(
        found,
        task_set,
        store,
        against=teacher,
        cost=cost,
        usd_per_hour=usd_per_hour,
        force=force,
        trust_remote_code=trust_remote_code,
    )
    if output == "json":
        print_json(cards)
        return
    _print_cards(cards)
    if cost and usd_per_hour == USD_PER_HOUR:
        say(f"at {usd_per_hour:.2f} dollars an hour, a placeholder: give your own price with --usd-per-hour")


def _print_cards(cards: Sequence[Scorecard]) -> None:
    from evals.statistics import top_level

    shown = list(dict.fromkeys(task for card in cards for task in top_level(card.tasks)))
    columns = ["model", *_headers({task: cards[0].tasks[task].metric for task in shown}), "retention", *COST_COLUMNS]
    table = []
    for card in cards:
        results = [card.tasks[task] for task in shown]
        kept = card.relative.retention if card.relative else None
        table.append(
            [
                card.model,
                *(f"{r.value:.3f}" + (f" ±{r.stderr:.3f}" if r.stderr is not None else "") for r in results),
                f"{kept.value:.3f} [{kept.low:.3f}, {kept.high:.3f}]" if kept else None,
                *_cost_cells(
                    card.cost.model_dump() if card.cost else None,
                    card.relative.cost_ratio if card.relative else None,
                    card.relative.speedup if card.relative else None,
                ),
            ]
        )
    print_table("scores, each with its standard error", columns, table)


@click.command()
@click.argument("a")
@click.argument("b")
@format_option
def compare(a: str, b: str, output: str) -> None:
    """Hold the scored version A against B, document by document. No model runs.

    The difference is A - B, with its 95% interval: paired by document, clustered by file.
    """
    from evals.compare import compare as run
    from registry.store import Store

    found = run(Store(), a, b)
    if output == "json":
        print_json([{**row._asdict(), "difference": row.difference.model_dump()} for row in found])
        return
    rows = []
    for row in found:
        sure = row.difference
        between = f"{sure.value:+.4f} [{sure.low:+.4f}, {sure.high:+.4f}]"
        rows.append((row.task, row.metric, f"{row.a:.4f}", f"{row.b:.4f}", between, row.better or "not settled"))
    print_table("", ["task", "metric", a, b, "difference, paired", "better"], rows)


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


COST_COLUMNS = ["$ per 1M\ntokens", "cost\nratio", "speed-up", "tokens/s", "MB"]


def _print_rows(name: str, found: Sequence[LeaderboardRow]) -> None:
    from evals.plot import title

    metrics = {task: str(quality["metric"]) for row in found for task, quality in row.quality.items()}
    columns = ["version", "what", *_headers(metrics), "retention", *COST_COLUMNS[:3], "verdict"]
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
                *_cost_cells(row.cost, row.cost_ratio, row.speedup)[:3],
                " ".join(filter(None, [row.verdict, *row.aliases])) or None,
            ]
        )
    print_table(f"{name}: * is on the Pareto frontier", columns, table)


def _headers(metrics: Mapping[str, str]) -> Iterator[str]:
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


def _cost_cells(cost: Mapping[str, Any] | None, ratio: float | None, speedup: float | None) -> list[str | None]:
    return [
        f"{cost['usd_per_million_tokens']:.3g}" if cost else None,
        f"{ratio:.3f}" if ratio is not None else None,
        f"{speedup:.1f}x" if speedup is not None else None,
        f"{cost['decode_tokens_per_s']:,.0f}" if cost else None,
        f"{cost['disk_bytes'] / 1e6:.1f}" if cost else None,
    ]
