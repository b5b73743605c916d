"""`limbeck quickstart`: runs the commands of the whole loop in order. Each command can also be run alone."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import click

from limbeck.registry.core.terminal import print_status

HERE = Path(__file__).resolve().parent  # not the link in limbeck/: commands print short paths
PROMPT = "def read_config(path):"
SAMPLING = ("--max-new-tokens", 64, "--temperature", 0.6, "--seed", 0)
TASKS = ("stdlib_bits_per_byte", "stdlib_next_line", "stdlib_minimal_pairs")

CommandLine = tuple[object, ...]  # the words after `limbeck`; prints paths below the current folder as relative


@click.command()
@click.option("--recipe", type=click.Path(path_type=Path), default=HERE / "recipe.toml", help="The recipe to run.")
@click.option(
    "--policy", type=click.Path(path_type=Path), default=HERE / "policy.toml", help="The policy of the promotion."
)
@click.option("--limit", type=int, help="Score at most N documents of each task.")
@click.option("--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Override a key of the recipe.")
def quickstart(recipe: Path, policy: Path, limit: int | None, overrides: tuple[str, ...]) -> None:
    """The whole loop: text, students, ONNX, scores, leaderboard, promotion, a completion.

    Prints each command before it runs it. Run it again, and it skips what is done; after Ctrl-C or a kill it
    resumes.
    """
    from limbeck.distill.recipe.load import load_recipe

    began = time.monotonic()
    name = load_recipe(recipe, list(overrides)).name
    for number, (title, commands) in enumerate(steps(name, recipe, policy, limit, overrides), 1):
        print_status(f"\n[{number}] {title}")
        for command_line in commands:
            run_command(command_line)
    print_status(
        f"\n[{time.monotonic() - began:.0f} s] {name}@production is ready to serve:\n$ limbeck serve {name}@production"
    )


def steps(
    name: str, recipe: Path, policy: Path, limit: int | None, overrides: Sequence[str]
) -> Iterator[tuple[str, list[CommandLine]]]:
    """The steps of the loop, as titles with command lines.

    Run each step before you take the next one: its command lines name the versions that earlier steps registered.
    """
    state = Path(os.environ.get("LIMBECK_HOME", ".limbeck"))
    heldout, tasks = state / "data" / name / "heldout.jsonl", state / "tasks" / "stdlib"
    sets = [word for override in overrides for word in ("--set", override)]
    limits = ["--limit", limit] if limit else []

    yield (
        "Students: the teacher runs once; each size is distilled, and again trained on labels alone (its control)",
        [("distill", recipe, *sets)],
    )
    teacher, students = teacher_and_students(name)
    yield (
        "ONNX: each student in fp32 and int8-weight, compared with PyTorch",
        [("export", *students, "--precision", "fp32,int8-weight", "--texts", heldout)],
    )
    yield (
        "Scores: quality on three lm-eval tasks made from the held-out files, and cost, relative to the teacher",
        [
            ("tasks", "make", heldout, "--name", "stdlib", "--output", tasks),
            ("eval", name, "--tasks", ",".join(TASKS), "--include-path", tasks, "--against", teacher, *limits),
        ],
    )
    yield (
        "Gain from distillation: each distilled student compared with its control",
        [("compare", *pair) for pair in distilled_and_labels_pairs(name)],
    )
    yield ("Leaderboard: cost and quality", [("leaderboard", name)])
    yield ("Verdict: is the giant a waste here?", [("verdict", name)])
    yield (
        "Promotion: the cheapest variant that passes the policy",
        [("promote", name, "--alias", "production", "--policy", policy), ("leaderboard", name, "--format", "html")],
    )
    yield (
        "Use: the torch-free runtime in a new process, compared with the teacher",
        [("generate", f"{name}@production", PROMPT, *SAMPLING, "--against", teacher)],
    )


def teacher_and_students(name: str) -> tuple[str, list[str]]:
    """NAME/VERSION of the newest teacher and of its students."""
    from limbeck.registry.mlflow.store import Store

    versions = Store().versions(name)
    teacher = [version for version in versions if version.kind == "teacher"][-1]
    students = [v for v in versions if v.kind == "student" and v.teacher == teacher.ref]
    return teacher.ref, [student.ref for student in students]


def distilled_and_labels_pairs(name: str) -> list[tuple[str, str]]:
    """NAME/VERSION of each distilled student and of its control, the same student trained on labels alone."""
    from limbeck.registry.mlflow.store import Store

    students = {v.recipe or "": v.ref for v in Store().versions(name) if v.kind == "student"}
    pairs = ((ref, students.get(f"{recipe.removesuffix('-distilled')}-labels")) for recipe, ref in students.items())
    return [(ref, control) for ref, control in pairs if control and control != ref]


def run_command(command_line: CommandLine) -> None:
    """Print a command and run it in this process; `generate` in a new process, as a user of the artifact would."""
    args = [_shorten_path(word) for word in command_line]
    print_status(f"$ limbeck {shlex.join(args)}")
    if args[0] == "generate":
        code = subprocess.run([sys.executable, "-P", "-m", "limbeck", *args]).returncode
    else:
        command = click.get_current_context().find_root().command
        code = command.main(args, standalone_mode=False)
    if code:
        sys.exit(code)


def _shorten_path(word: object) -> str:
    if isinstance(word, Path) and word.is_absolute() and word.is_relative_to(Path.cwd()):
        return str(word.relative_to(Path.cwd()))
    return str(word)
