"""Text and recipes so small that a run takes a second."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.conftest import SIZES

# Model type -> the TOML config of a tiny student.
STUDENTS = {
    model_type: "\n".join(
        f"{key} = {str(value).lower() if isinstance(value, bool) else value}"
        for key, value in {"model_type": f'"{model_type}"', **sizes}.items()
        if key not in ("max_position_embeddings", "n_positions")
    )
    for model_type, sizes in SIZES.items()
}


def lines_of_text(lines: int, seed: int = 0) -> str:
    """Lines with a pattern that a small model can learn; every tenth is followed by a blank line."""
    generator = random.Random(seed)
    names = ["still", "vessel", "spirit", "drops", "copper", "caf\u00e9"]
    made = []
    for number in range(lines):
        made.append(f"{generator.choice(names)}.{generator.choice(names)} = {generator.choice(names)}({number % 7})\n")
        if number % 10 == 9:
            made.append("\n")
    return "".join(made)


@pytest.fixture
def text_file(tmp_path: Path) -> Path:
    """A text file of about 24 kB and a dozen documents."""
    path = tmp_path / "text.txt"
    path.write_text(lines_of_text(1000), encoding="utf-8")
    return path


@pytest.fixture
def write_recipe(tmp_path: Path, text_file: Path) -> Callable[..., Path]:
    """Writes a recipe for a tiny run.

    `teacher` is a model, or None; `student` a model type, a TOML config, or the folder of a pretrained model.
    """

    def write(teacher: object = None, student: str | Path = "llama", objectives: str = "", extra: str = "") -> Path:
        path = tmp_path / "recipe.toml"
        teacher_table = f'[teacher]\nmodel = "{teacher}"\n' if teacher else "[tokenizer]\nvocab_size = 300\n"
        if isinstance(student, Path):
            student_table = f'[students.small]\nmodel = "{student}"'
        else:
            student_table = f"[students.small.config]\n{STUDENTS.get(student, student)}"
        path.write_text(
            f"""
name = "tiny"
licence = "CC0-1.0"

[data]
path = "{text_file.name}"
heldout = 0.2
max_length = 32

{teacher_table}
{student_table}

{objectives or "[objectives.labels]" + chr(10) + "labels = 1.0"}

[training]
max_steps = 4
per_device_train_batch_size = 4
logging_steps = 2
bf16 = false
{extra}
""",
            encoding="utf-8",
        )
        return path

    return write


DISTILLED = '[objectives.distilled]\ndivergence = "forward_kl"\n'
TWINS = DISTILLED + "\n[objectives.labels]\nlabels = 1.0\n"
