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
@click.option(
    "--output", "output_folder", type=click.Path(path_type=Path), help="Also copy the only student's files to a folder."
)
@click.option("--resume", is_flag=True, help="Resume an earlier run, which must exist; without it, one is resumed too.")
@click.option("--restart", is_flag=True, help="Remove checkpoints and make every student again.")
@click.option(
    "--ray",
    is_flag=False,
    flag_value="local",
    metavar="[ADDRESS]",
    help="Make the students on a Ray cluster: at ADDRESS, on one that runs here (auto), or on a new one (no ADDRESS).",
)
@click.option("--check", "check_only", is_flag=True, help="Report errors, warnings and forecasts; make nothing.")
@click.option("--yes", is_flag=True, help="Confirm all warnings that need confirmation.")
@format_option
def distill(  # noqa: PLR0913 (one parameter per option)
    recipe: Path,
    overrides: tuple[str, ...],
    output_folder: Path | None,
    resume: bool,
    restart: bool,
    ray: str | None,
    check_only: bool,
    yes: bool,
    output_format: str,
) -> None:
    """Distil the teacher of RECIPE into its students: every size, objective, temperature and seed, and controls.

    The teacher runs once for all students. Each student is logged to MLflow and registered. A student that was
    already made from the same recipe, data and teacher is skipped. A stopped run resumes from its last checkpoint.
    If one student fails, the others are still made, and the exit code is 1.
    """
    if resume and restart:
        raise click.UsageError("--resume and --restart exclude each other")
    from limbeck.registry.core.terminal import quiet_libraries

    quiet_libraries()
    from limbeck.distill.run.distill import SomeStudentsFailed
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
    begin: Begin = "continue"
    if resume or restart:
        begin = "resume" if resume else "restart"
    try:
        with distributed.lead_workers():
            students = run(recipe, list(overrides), Store(), output_folder, begin=begin, ray=ray, yes=yes)
    except SomeStudentsFailed as error:
        _print_students(error.made, output_format)
        raise
    _print_students(students, output_format)


def _check(recipe: Path, overrides: list[str], output_format: str) -> None:
    """Print the findings of the preflight; exit code 2 if one is an error."""
    from limbeck.distill.run.preflight import check_recipe
    from limbeck.registry.mlflow.store import Store

    findings = check_recipe(recipe, overrides, Store())
    if output_format == "json":
        print_json(findings)
    else:
        rows = [(f.check, f.level, f.message + (f"\n{f.fix}" if f.fix and f.level != "ok" else "")) for f in findings]
        print_table(f"preflight of {recipe}", ["check", "", "finding"], rows)
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
    """Write the training and held-out documents of RECIPE as JSON lines in .limbeck/data/NAME.

    If RECIPE has [generate], the teacher writes them.
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
