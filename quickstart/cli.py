"""`limbeck quickstart`: the commands of the whole loop, one after the other. Each can be run alone."""

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

HERE = Path(__file__).parent
PROMPT = "def read_config(path):"
SAMPLING = ("--max-new-tokens", 64, "--temperature", 0.6, "--seed", 0)
TASKS = ("stdlib_bits_per_byte", "stdlib_next_line", "stdlib_minimal_pairs")

CommandLine = tuple[object, ...]  # a command line after `limbeck`; a path is said as short as it can be from here


@click.command()
@click.option("--recipe", type=click.Path(path_type=Path), default=HERE / "recipe.toml", help="Another recipe.")
@click.option("--policy", type=click.Path(path_type=Path), default=HERE / "policy.toml", help="Another policy.")
@click.option("--limit", type=int, help="Score only so many documents of each task.")
@click.option("--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Override a key of the recipe.")
def quickstart(recipe: Path, policy: Path, limit: int | None, overrides: tuple[str, ...]) -> None:
    """The whole loop: text, students, ONNX, scores, leaderboard, promotion, a completion.

    Every step is a command of its own and is printed before it runs. Running the quickstart again skips what
    is done; after Ctrl-C or a kill it goes on where it was.
    """
    from limbeck.distill.recipe.load import load_recipe

    began = time.monotonic()
    name = load_recipe(recipe, list(overrides)).name
    for number, (title, commands) in enumerate(steps(name, recipe, policy, limit, overrides), 1):
        print_status(f"\n[{number}] {title}")
        for words in commands:
            run_command(words)
    print_status(
        f"\n[{time.monotonic() - began:.0f} s] {name}@production is yours to serve:\n$ limbeck serve {name}@production"
    )


def steps(
    name: str, recipe: Path, policy: Path, limit: int | None, overrides: Sequence[str]
) -> Iterator[tuple[str, list[CommandLine]]]:
    """The loop, as titles and command lines. A later step names what an earlier one registered."""
    state = Path(os.environ.get("LIMBECK_HOME", ".limbeck"))
    heldout, tasks = state / "data" / name / "heldout.jsonl", state / "tasks" / "stdlib"
    sets = [word for override in overrides for word in ("--set", override)]
    limits = ["--limit", limit] if limit else []

    yield (
        "Students: the teacher runs once, each size is distilled and has a twin trained on labels alone",
        [("distill", recipe, *sets)],
    )
    teacher, students = teacher_and_students(name)
    yield (
        "ONNX: fp32 and int8 of each student, held against PyTorch",
        [("export", *students, "--precision", "fp32,int8", "--texts", heldout)],
    )
    yield (
        "Scores: three lm-eval tasks from the held-out files, quality and cost against the teacher",
        [
            ("tasks", heldout, "--name", "stdlib", "--to", tasks),
            ("eval", name, "--tasks", ",".join(TASKS), "--include-path", tasks, "--against", teacher, *limits),
        ],
    )
    yield (
        "What distillation brought: each student against its twin",
        [("compare", *pair) for pair in distilled_and_labels_pairs(name)],
    )
    yield ("Leaderboard: cost against quality", [("leaderboard", name)])
    yield ("Verdict: is the giant a waste here?", [("verdict", name)])
    yield (
        "Promotion: the cheapest variant that passes the policy",
        [("promote", name, "--alias", "production", "--policy", policy), ("leaderboard", name, "--format", "html")],
    )
    yield (
        "Use: a fresh process, the torch-free runtime, beside the teacher",
        [("generate", f"{name}@production", PROMPT, *SAMPLING, "--beside", teacher)],
    )


def teacher_and_students(name: str) -> tuple[str, list[str]]:
    """NAME/VERSION of the newest teacher, and of the students that are compared with it."""
    from limbeck.registry.mlflow.store import Store

    versions = Store().versions(name)
    teacher = [version for version in versions if version.kind == "teacher"][-1]
    students = [v for v in versions if v.kind == "student" and v.teacher == teacher.ref]
    return teacher.ref, [student.ref for student in students]


def distilled_and_labels_pairs(name: str) -> list[tuple[str, str]]:
    """NAME/VERSION of each distilled student and of its twin: the same student, trained on labels alone."""
    from limbeck.registry.mlflow.store import Store

    students = {v.recipe or "": v.ref for v in Store().versions(name) if v.kind == "student"}
    pairs = ((ref, students.get(f"{recipe.removesuffix('-distilled')}-labels")) for recipe, ref in students.items())
    return [(ref, twin) for ref, twin in pairs if twin and twin != ref]


def run_command(command_line: CommandLine) -> None:
    """Print a command and run it here; `generate` in a process of its own, as a user of the artifact would."""
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
