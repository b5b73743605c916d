"""`limbeck compare`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from limbeck.evals.commands.tasks import allow_task_code_option
from limbeck.registry.core.errors import Refused
from limbeck.registry.core.terminal import format_option, print_json, print_table, quiet_libraries

if TYPE_CHECKING:
    from limbeck.evals.tasks.task_set import TaskSet
    from limbeck.registry.catalog.model_ref import ResolvedModel
    from limbeck.registry.records import ComparedModels, ComparedTask, Flip, Noninferiority

MAX_TEXT_CHARACTERS = 90
DEFAULT_FLIPS = 10  # documents of each task, if --show-flips has no number


@click.command()
@click.argument("a")
@click.argument("b")
@click.option(
    "--tasks", metavar="TASK,...", default="", help="Only these tasks or groups; score what is not scored yet."
)
@click.option("--include-path", type=click.Path(path_type=Path), multiple=True, help="A folder of lm-eval tasks.")
@allow_task_code_option
@click.option(
    "--margin",
    "margins",
    metavar="[NAME=]NUMBER",
    multiple=True,
    help="How much worse A may be, in the metric's own units, on all tasks or on task or metric NAME. [default: 0.01]",
)
@click.option(
    "--show-flips",
    type=click.IntRange(min=1),
    metavar="[N]",
    is_flag=False,
    flag_value=DEFAULT_FLIPS,
    help=f"Show documents on which they differ, at most N of each task. [N: {DEFAULT_FLIPS}]",
)
@click.option("--check", is_flag=True, help="Exit with 1 unless every task passes.")
@click.option("--trust-remote-code", is_flag=True, help="Run Python code that comes with a model.")
@format_option
def compare(  # noqa: PLR0913 (one parameter per option)
    a: str,
    b: str,
    tasks: str,
    include_path: tuple[Path, ...],
    allow_task_code: bool,
    margins: tuple[str, ...],
    show_flips: int | None,
    check: bool,
    trust_remote_code: bool,
    output_format: str,
) -> None:
    """Compare A with B, document by document: what is the difference, and is A as good as B?

    The difference is A - B with its 95% interval, paired by document and clustered by file. A passes if the one-sided
    95% lower bound of its advantage lies above minus the margin. It fails if the upper bound lies below minus the
    margin. Set the margin before you look.

    For an inconclusive task the table says about how many documents would settle it if the difference stays the same.
    "Detectable" is the margin that these documents would show in four of five cases for an equally good model.

    Uses the newest scores that both have. No model runs, except for --tasks that are not scored yet.
    """
    quiet_libraries()
    from limbeck.evals.scores.compare import compare_models, score_missing_tasks
    from limbeck.evals.stats.noninferiority import Margins
    from limbeck.registry.mlflow.store import Store

    names = [name.strip() for name in tasks.split(",") if name.strip()]
    allowed = Margins.parse(margins)
    store = Store()

    def load(models: Sequence[ResolvedModel]) -> TaskSet:
        from limbeck.evals.scores.vocabulary import tokenizer_faults
        from limbeck.evals.tasks.task_set import TaskSet

        return TaskSet.load(
            names,
            include_path,
            allow_task_code=allow_task_code,
            other_faults=tokenizer_faults(models, trust_remote_code),
        )

    compared: Sequence[str] = names
    if names:
        compared = score_missing_tasks(a, b, names, load, store=store, trust_remote_code=trust_remote_code)
    found = compare_models(a, b, compared, margins=allowed, max_flips=show_flips or 0, store=store)
    if output_format == "json":
        print_json(found)
    else:
        _print(found)
    open_tasks = [row.task for row in found.tasks if row.noninferiority.verdict != "pass"] + list(found.unknown_tasks)
    if check and open_tasks:
        raise Refused(f"{found.candidate} is not shown to be as good as {found.reference} on {', '.join(open_tasks)}")


def _print(comparison: ComparedModels) -> None:
    a, b = comparison.candidate, comparison.reference
    rows = [*comparison.tasks, *comparison.over_all]
    columns = ["task", "metric", a, b, "difference, paired", "better"]
    print_table("", columns, [_difference_cells(row) for row in rows])
    columns = ["task", "margin", "lower bound", "p", "verdict", "detectable", "what would settle it"]
    print_table(f"is {a} as good as {b}?", columns, [_verdict_cells(row) for row in rows])
    columns = ["task", "documents", "clusters", "retention", "right to\nwrong", "wrong to\nright", "McNemar\np", "KL"]
    print_table(f"how the answers of {a} differ", columns, [_answer_cells(row) for row in rows])
    for row in rows:
        if row.no_retention:
            print(f"{_name(row)}: {row.no_retention}")
    for task, why in comparison.unknown_tasks.items():
        print(f"{task}: {why}")
    for flip in comparison.flips:
        print("\n".join(_flip_lines(flip, a, b)))


def _name(row: ComparedTask) -> str:
    return row.task if row.tasks == (row.task,) else f"{row.task} of {len(row.tasks)}"


def _difference_cells(row: ComparedTask) -> list[str]:
    difference = row.difference
    interval = f"{difference.value:+.4f} [{difference.low:+.4f}, {difference.high:+.4f}]"
    values = f"{row.candidate:.4f}", f"{row.reference:.4f}"
    return [_name(row), row.metric, *values, interval, row.better or "not settled"]


def _verdict_cells(row: ComparedTask) -> list[str | None]:
    test = row.noninferiority
    numbers = f"{test.margin:g}", f"{test.lower:+.4f}", f"{test.p_value:.2g}"
    return [_name(row), *numbers, test.verdict, f"{test.detectable:.2g}", _missing_evidence(test)]


def _missing_evidence(test: Noninferiority) -> str | None:
    """What would settle an inconclusive test; None if it is not inconclusive."""
    from limbeck.evals.stats.skew import FEW

    if test.verdict != "inconclusive":
        return None
    if test.carried_by_few:
        return f"{FEW} documents carry {test.carried_by_few:.0%}"
    if test.documents_needed is None:
        return "nothing: it equals the margin"
    return f"about {_round_up(test.documents_needed)} documents"


def _round_up(count: int) -> str:
    """Round up to two digits."""
    unit = 10 ** max(0, len(str(count)) - 2)
    return f"{-(-count // unit) * unit:,}"


def _answer_cells(row: ComparedTask) -> list[str | int | None]:
    retention, answers = row.retention, row.answers
    return [
        _name(row),
        f"{row.documents:,}",
        f"{row.clusters:,}",
        f"{retention.value:.3f} [{retention.low:.3f}, {retention.high:.3f}]" if retention else "undefined",
        answers.right_to_wrong,
        answers.wrong_to_right,
        f"{answers.mcnemar_p:.2g}" if answers.mcnemar_p is not None else None,
        f"{answers.kl:.3g}" if answers.kl is not None else None,
    ]


def _flip_lines(flip: Flip, a: str, b: str) -> Iterator[str]:
    width = max(len(a), len(b), len("prompt"))
    yield f"\n{flip.task} {flip.doc_id}"
    yield f"  {'prompt':{width}}  {_escape_text(flip.prompt_end)[-MAX_TEXT_CHARACTERS:]}"
    yield f"  {'target':{width}}  {_escape_text(flip.target)[:MAX_TEXT_CHARACTERS]}"
    for name, value, response in (
        (a, flip.candidate_value, flip.candidate_response),
        (b, flip.reference_value, flip.reference_response),
    ):
        yield f"  {name:{width}}  {value:.4g}  {_escape_text(response)[:MAX_TEXT_CHARACTERS]}"


def _escape_text(text: str | None) -> str:
    """A text on one line, without control characters that could rewrite the terminal."""
    return "-" if text is None else repr(text)[1:-1]
