"""`limbeck eval`."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from limbeck.evals.commands.tasks import allow_task_code_option
from limbeck.evals.cost.prices import Prices, price_options
from limbeck.evals.leaderboard.columns import RATIO_HEADERS, figure_cell, figure_header, ratio_cells, task_headers
from limbeck.registry.core.errors import BadInput
from limbeck.registry.core.terminal import format_option, print_json, print_status, print_table, quiet_libraries

if TYPE_CHECKING:
    from limbeck.registry.records import Scorecard

OTHER_FIGURES = ("decode_tokens_per_s", "disk_bytes")  # cost figures in the table, beside dollars


@click.command("eval")
@click.argument("models", metavar="MODEL...", nargs=-1, required=True)
@click.option("--tasks", "names", required=True, metavar="TASK,...", help="lm-eval tasks or groups.")
@click.option("--include-path", type=click.Path(path_type=Path), multiple=True, help="A folder of lm-eval tasks.")
@click.option("--against", metavar="TEACHER", help="The model to compare with.")
@click.option("--num-fewshot", type=click.IntRange(min=0), help="Few-shot examples in each prompt.")
@click.option("--limit", type=click.IntRange(min=1), help="Score a random sample of N documents of each task.")
@click.option("--limit-seed", type=click.IntRange(min=0), default=0, show_default=True, help="Of that sample.")
@click.option("--samples", metavar="JSON|FILE", help='Score only these documents of a task: {"TASK": [0, 5], ...}.')
@click.option(
    "--metric",
    "metrics",
    metavar="TASK=NAME",
    multiple=True,
    help="The metric to record of a task or group, such as arc_easy=acc_norm; repeatable. [default: its first mean]",
)
@click.option(
    "--filter",
    "filters",
    metavar="TASK=NAME",
    multiple=True,
    help="The lm-eval filter to record it after, such as gsm8k=flexible-extract; repeatable. [default: its first]",
)
@click.option(
    "--apply-chat-template",
    metavar="[NAME]",
    is_flag=False,
    flag_value="",
    help="Use the tokenizer's chat template, or the one named NAME.",
)
@click.option(
    "--chat-template-args", metavar="JSON", help='Variables of the chat template, such as {"enable_thinking": true}.'
)
@click.option(
    "--think-end", metavar="TEXT", help="What ends a model's thoughts, such as </think>: its answer begins after it."
)
@click.option(
    "--fewshot-as-multiturn/--no-fewshot-as-multiturn",
    default=None,
    help="Put each few-shot example into a chat turn of its own. [default: yes with a chat template]",
)
@click.option("--system-instruction", metavar="TEXT", help="Text to put before each prompt.")
@click.option(
    "--gen-kwargs",
    metavar="KEY=VALUE,...",
    help="Settings of generation, such as do_sample=true,temperature=0.7, or JSON.",
)
@click.option("--confirm-run-unsafe-code", is_flag=True, help="Allow tasks that run code written by a model.")
@allow_task_code_option
@click.option("--cost/--no-cost", default=True, help="Also measure speed, memory and dollars. [default: --cost]")
@click.option("--draft", metavar="STUDENT", help="Also time ONNX artifacts with this artifact's proposals of tokens.")
@price_options
@click.option("--tokenizer", metavar="MODEL", help="The tokenizer of endpoints (http://HOST:PORT/v1#NAME).")
@click.option(
    "--num-concurrent",
    type=click.IntRange(1, 256),
    default=4,
    show_default=True,
    help="Concurrent requests to an endpoint.",
)
@click.option("--force", is_flag=True, help="Score and measure again, ignoring stored results.")
@click.option("--trust-remote-code", is_flag=True, help="Run Python code that comes with a model.")
@format_option
def evaluate(  # noqa: PLR0913 (one parameter per option)
    models: tuple[str, ...],
    names: str,
    include_path: tuple[Path, ...],
    against: str | None,
    num_fewshot: int | None,
    limit: int | None,
    limit_seed: int,
    samples: str | None,
    metrics: tuple[str, ...],
    filters: tuple[str, ...],
    apply_chat_template: str | None,
    chat_template_args: str | None,
    think_end: str | None,
    fewshot_as_multiturn: bool | None,
    system_instruction: str | None,
    gen_kwargs: str | None,
    confirm_run_unsafe_code: bool,
    allow_task_code: bool,
    cost: bool,
    draft: str | None,
    prices_file: Path | None,
    usd_per_hour: float | None,
    tokenizer: str | None,
    num_concurrent: int,
    force: bool,
    trust_remote_code: bool,
    output_format: str,
) -> None:
    """Score each MODEL with lm-eval and measure its cost, relative to a teacher.

    A NAME alone means all its versions. Stored scores, by digest of files and tasks, are not computed again, and
    neither are requests that a model answered before. The tasks are checked first, as by `limbeck tasks check`.
    Retention is the share of the teacher's quality above chance that a model keeps, with its 95% interval.
    """
    quiet_libraries()
    from limbeck.evals.scores.scorecard import EvalOptions
    from limbeck.evals.scores.scorecard import evaluate as run
    from limbeck.evals.scores.vocabulary import tokenizer_faults
    from limbeck.evals.tasks.metrics import MetricChoice
    from limbeck.evals.tasks.task_set import TaskSet
    from limbeck.registry.catalog.model_ref import resolve_model, resolve_models
    from limbeck.registry.mlflow.store import Store

    prices = Prices.load(prices_file, usd_per_hour)
    http: dict[str, Any] = {"tokenizer": tokenizer, "num_concurrent": num_concurrent}
    found = resolve_models(models, **http)
    teacher = resolve_model(against, **http) if against else None
    proposing = resolve_model(draft) if draft else None
    if proposing and (proposing.engine != "onnxruntime" or not cost):
        raise BadInput(
            f"--draft {draft}: a draft model is an ONNX artifact, and is timed with the cost",
            fix="export it first; leave --no-cost out",
        )
    store = Store() if any(model.version for model in (*found, *filter(None, [teacher]))) else None
    task_set = TaskSet.load(
        [name.strip() for name in names.split(",") if name.strip()],
        include_path,
        num_fewshot=num_fewshot,
        limit=limit,
        limit_seed=limit_seed,
        samples=_samples(samples) if samples else None,
        choice=MetricChoice(_by_task("--metric", metrics), _by_task("--filter", filters)),
        apply_chat_template=apply_chat_template is not None and (apply_chat_template or True),
        chat_template_args=_template_args(chat_template_args) if chat_template_args else {},
        think_end=think_end or None,
        fewshot_as_multiturn=fewshot_as_multiturn,
        system_instruction=system_instruction,
        gen_kwargs=_gen_kwargs(gen_kwargs) if gen_kwargs else None,
        confirm_run_unsafe_code=confirm_run_unsafe_code,
        allow_task_code=allow_task_code,
        other_faults=tokenizer_faults([*found, *filter(None, [teacher])], trust_remote_code),
    )
    options = EvalOptions(cost=cost, prices=prices, draft=proposing, force=force, trust_remote_code=trust_remote_code)
    cards = run(found, task_set, store, against=teacher, options=options)
    if output_format == "json":
        print_json(cards)
        return
    _print_cards(cards)
    for task, result in cards[0].tasks.items():
        if result.limit_seed is not None and result.group is None:
            of_all = f"{result.documents:,} of {result.of_documents:,} documents"
            print_status(f"{task}: a random sample of {of_all} (seed {result.limit_seed})")
    for price in dict.fromkeys(card.cost.price for card in cards if card.cost and card.cost.price):
        print_status(f"dollars: {price}")


def _samples(text: str) -> dict[str, list[int]]:
    """Task -> document numbers, from JSON text or a JSON file, as in lm-eval."""
    try:
        found = json.loads(text if text.lstrip().startswith("{") else Path(text).read_text())
    except (ValueError, OSError) as error:
        raise BadInput(f"--samples is neither JSON nor a JSON file: {error}") from None
    numbers = found.values() if isinstance(found, dict) else [None]
    if not all(isinstance(each, list) and all(type(index) is int for index in each) for each in numbers):
        raise BadInput("--samples has the wrong form", fix='give {"TASK": [0, 5], ...}')
    return found


def _by_task(option: str, texts: Sequence[str]) -> dict[str, str]:
    """Task or group -> name, from several TASK=NAME."""
    found: dict[str, str] = {}
    for text in texts:
        task, _, name = (part.strip() for part in text.partition("="))
        if not task or not name:
            raise BadInput(f"{option} {text!r} is not TASK=NAME", fix=f"such as {option} arc_easy=acc_norm")
        if found.get(task, name) != name:
            raise BadInput(f"{option} names {task} twice: {found[task]} and {name}", fix="leave one of them out")
        found[task] = name
    return found


def _template_args(text: str) -> dict[str, Any]:
    """Variables of a chat template, from a JSON object."""
    try:
        found = json.loads(text)
    except ValueError as error:
        raise BadInput(f"--chat-template-args is not JSON: {error}", fix='such as {"enable_thinking": true}') from None
    if not isinstance(found, dict):
        raise BadInput("--chat-template-args is not a JSON object", fix='such as {"enable_thinking": true}')
    return found


def _gen_kwargs(text: str) -> dict[str, Any]:
    """Settings of generation, as in lm-eval or as a JSON object."""
    from lm_eval.utils import simple_parse_args_string

    try:
        found = json.loads(text) if text.lstrip().startswith("{") else simple_parse_args_string(text)
    except ValueError as error:
        raise BadInput(f"--gen-kwargs is not JSON: {error}") from None
    if any(value == "" for value in found.values()):
        raise BadInput(f"--gen-kwargs {text!r} has a key without a value", fix="give KEY=VALUE,...")
    return found


def _print_cards(cards: Sequence[Scorecard]) -> None:
    from limbeck.registry.records import USD, top_level_tasks

    shown = list(dict.fromkeys(task for card in cards for task in top_level_tasks(card.tasks)))
    columns = [
        "model",
        *task_headers({task: cards[0].tasks[task].metric for task in shown}),
        "retention",
        figure_header(USD),
        *RATIO_HEADERS,
        *map(figure_header, OTHER_FIGURES),
    ]
    table = []
    for card in cards:
        results = [card.tasks[task] for task in shown]
        share = card.relative.retention if card.relative else None
        cost = card.cost.figures() if card.cost else None
        table.append(
            [
                card.model,
                *(f"{r.value:.3f}" + (f" ±{r.stderr:.3f}" if r.stderr is not None else "") for r in results),
                f"{share.value:.3f} [{share.low:.3f}, {share.high:.3f}]" if share else None,
                figure_cell(cost, USD),
                *(ratio_cells(card.relative.cost_ratio, card.relative.speedup) if card.relative else [None, None]),
                *(figure_cell(cost, figure) for figure in OTHER_FIGURES),
            ]
        )
    print_table("scores with standard errors", columns, table)
