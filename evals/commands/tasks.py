"""`limbeck tasks make` and `limbeck tasks check`."""

from __future__ import annotations

from pathlib import Path

import click

from limbeck.registry.core.errors import BadInput
from limbeck.registry.core.terminal import format_option, print_json, print_status, print_table, quiet_libraries

allow_task_code_option = click.option(
    "--allow-task-code", is_flag=True, help="Run Python code that the task files of a folder name (!function)."
)


@click.command()
@click.argument("corpus", type=click.Path(path_type=Path))
@click.option("--name", required=True, help="The prefix of the task names.")
@click.option(
    "--output",
    "folder",
    type=click.Path(path_type=Path),
    required=True,
    help="The folder to write; give it to `limbeck eval --include-path`.",
)
@click.option("--kind", "kinds", multiple=True, help="bits_per_byte, next_line or minimal_pairs. [default: all]")
@click.option("--documents", type=click.IntRange(min=1), help="At most this many documents of each task.")
@format_option
def make(
    corpus: Path, name: str, folder: Path, kinds: tuple[str, ...], documents: int | None, output_format: str
) -> None:
    """Make lm-eval tasks from the held-out text in CORPUS: JSON lines with "path" and "text".

    Three kinds: bits per byte of the text; choosing the true next line among lines of the same file; and, for Python,
    pairs of a snippet and a copy with one error. lm-eval itself can run these tasks too.
    """
    quiet_libraries()
    from limbeck.evals.tasks.make_tasks import TASK_KINDS, make_tasks

    made = make_tasks(corpus, folder, name, kinds or TASK_KINDS, documents=documents)
    if output_format == "json":
        print_json(made)
        return
    for task in made:
        print(task)
    print_status(f"score them: limbeck eval MODEL --tasks {','.join(made)} --include-path {folder}")


@click.command()
@click.argument("targets", metavar="TASK|FOLDER...", nargs=-1, required=True)
@click.option("--include-path", type=click.Path(path_type=Path), multiple=True, help="A folder of lm-eval tasks.")
@click.option(
    "--model", "models", metavar="MODEL", multiple=True, help="Also check this model's tokenizer; repeatable."
)
@click.option("--num-fewshot", type=click.IntRange(min=0), help="Few-shot examples in each prompt.")
@allow_task_code_option
@click.option("--trust-remote-code", is_flag=True, help="Run Python code that comes with a model.")
@format_option
def check(
    targets: tuple[str, ...],
    include_path: tuple[Path, ...],
    models: tuple[str, ...],
    num_fewshot: int | None,
    allow_task_code: bool,
    trust_remote_code: bool,
    output_format: str,
) -> None:
    """Find what is wrong with lm-eval tasks, before a model runs: each TASK, and all tasks in each FOLDER.

    Empty or undecodable files, two files with one task name, empty documents and choices, labels that are no choice,
    documents among their own few-shot examples, and tokenizers larger than the model's embedding. All are named at
    once, with file and row; the exit code is then 2. `limbeck eval` and `limbeck compare` do the same first.
    """
    quiet_libraries()
    from limbeck.evals.scores.vocabulary import tokenizer_faults
    from limbeck.evals.tasks.faults import FaultyTasks
    from limbeck.evals.tasks.loading import names_in
    from limbeck.evals.tasks.task_set import TaskSet
    from limbeck.registry.catalog.model_ref import resolve_models

    folders = [Path(target) for target in targets if Path(target).is_dir()]
    names = [target for target in targets if not Path(target).is_dir()]
    faults = list(tokenizer_faults(resolve_models(models), trust_remote_code))
    for folder in folders:
        inside, unreadable = names_in(folder)
        if not inside and not unreadable:
            raise BadInput(f"{folder} has no tasks", fix="give a folder with the YAML files of tasks")
        names += inside
        faults += unreadable
    rows = []
    if names:
        tasks, found = TaskSet.check(
            names,
            [*include_path, *folders],
            num_fewshot=num_fewshot,
            allow_task_code=allow_task_code,
            confirm_run_unsafe_code=True,  # nothing is generated, so nothing runs
        )
        faults += found
        rows = [
            {
                "task": name,
                "documents": len({request.doc_id for request in task.instances}),
                "requests": len(task.instances),
            }
            for name, task in tasks.tasks.items()
        ]
    if output_format == "json":
        print_json({"tasks": rows, "faults": faults})
    elif rows:
        print_table("tasks", ["task", "documents", "requests"], [list(row.values()) for row in rows])
    if faults:
        raise FaultyTasks(faults)
