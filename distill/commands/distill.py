"""`limbeck distill` and `limbeck data`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from limbeck.registry.core.terminal import format_option, print_json, print_table

if TYPE_CHECKING:
    from limbeck.distill.run.distill import Begin, Student

set_option = click.option(
    "--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Override a key, as in training.max_steps=100."
)


@click.command()
@click.argument("recipe", type=click.Path(path_type=Path))
@set_option
@click.option("--to", type=click.Path(path_type=Path), help="Also copy the (one) student's files to this folder.")
@click.option("--resume", is_flag=True, help="Go on, as is done anyway; an error where nothing was begun.")
@click.option("--restart", is_flag=True, help="Drop checkpoints and make every student anew.")
@click.option(
    "--ray",
    is_flag=False,
    flag_value="local",
    metavar="[ADDRESS]",
    help="Make the students on a Ray cluster: at this address, auto for one that runs here; alone, begin one here.",
)
@click.option("--check", "check_only", is_flag=True, help="Say what does not fit and what it will take; make nothing.")
@click.option("--yes", is_flag=True, help="Go on where a warning has to be confirmed.")
@format_option
def distill(
    recipe: Path,
    overrides: tuple[str, ...],
    to: Path | None,
    resume: bool,
    restart: bool,
    ray: str | None,
    check_only: bool,
    yes: bool,
    output_format: str,
) -> None:
    """Distil the teacher of RECIPE into its students: every size, objective, temperature and seed, and controls.

    The teacher runs once for all of them. Each student is logged to MLflow and registered. A student already
    made from the same ingredients is skipped; a run that was stopped goes on from its last checkpoint. Where one
    student fails the others are made all the same, and the exit code is 1.
    """
    if resume and restart:
        raise click.UsageError("--resume goes on and --restart begins anew: give one of them")
    from limbeck.registry.core.terminal import quiet_libraries

    quiet_libraries()
    from limbeck.distill.run.distill import SomeFailed
    from limbeck.distill.run.distill import distill as run
    from limbeck.distill.run.worker import run_worker
    from limbeck.distill.training import distributed
    from limbeck.registry.mlflow.store import Store

    distributed.set_up()
    if not distributed.is_main():
        if not check_only:
            run_worker(recipe, list(overrides))
        return
    if check_only:
        _check(recipe, list(overrides), output_format)
        return
    begin: Begin = "resume" if resume else "restart" if restart else "go on"
    try:
        with distributed.lead_workers():
            students = run(recipe, list(overrides), Store(), to, begin=begin, ray=ray, yes=yes)
    except SomeFailed as error:
        _print_students(error.made, output_format)
        raise
    _print_students(students, output_format)


def _check(recipe: Path, overrides: list[str], output_format: str) -> None:
    """Print the findings; exit code 2 where one is an error."""
    from limbeck.distill.run.preflight import check_recipe
    from limbeck.registry.mlflow.store import Store

    findings = check_recipe(recipe, overrides, Store())
    if output_format == "json":
        print_json(findings)
    else:
        rows = [(f.check, f.level, f.message + (f"\n{f.fix}" if f.fix and f.level != "ok" else "")) for f in findings]
        print_table(f"{recipe}, before it is run", ["check", "", "what was found"], rows)
    if any(finding.level == "error" for finding in findings):
        raise click.exceptions.Exit(2)


def _print_students(students: list[Student], output_format: str) -> None:
    if output_format == "json":
        print_json([{**s.version.model_dump(mode="json"), "trained": s.trained} for s in students])
        return
    rows = [
        (s.version.ref, s.plan.label, f"{s.version.params:,}", s.version.teacher, s.version.digest[:12])
        for s in students
    ]
    print_table("students", ["version", "recipe", "parameters", "teacher", "digest"], rows)


@click.command()
@click.argument("recipe", type=click.Path(path_type=Path))
@set_option
@format_option
def data(recipe: Path, overrides: tuple[str, ...], output_format: str) -> None:
    """Write the train and held-out documents of RECIPE as JSON lines below .limbeck/data/NAME.

    Where RECIPE has [generate], the teacher writes them.
    """
    from limbeck.registry.core.terminal import quiet_libraries

    quiet_libraries()
    from limbeck.distill.data import corpus
    from limbeck.distill.recipe.load import Source, load_recipe

    loaded = load_recipe(recipe, list(overrides))
    if loaded.generate:
        from limbeck.distill.run.prepare import prepare_setting, with_generated_text
        from limbeck.registry.mlflow.store import Store

        text = with_generated_text(prepare_setting(loaded, Source(recipe, overrides), Store())).corpus
    else:
        text = corpus.prepare_corpus(loaded.data, recipe.resolve().parent, loaded.name)
    if output_format == "json":
        print_json(text._asdict())
        return
    rows = [
        ("train", text.train_documents, f"{text.train_bytes:,}", text.train),
        ("held-out", text.heldout_documents, f"{text.heldout_bytes:,}", text.heldout),
    ]
    print_table(f"{loaded.name}, digest {text.digest[:12]}", ["part", "documents", "bytes", "file"], rows)
