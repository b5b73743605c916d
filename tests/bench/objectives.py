"""What each objective gains over labels alone, at equal tokens, on the quickstart's text with its teacher.

Every student has the same seed and reads the same tokens in the same order; they are compared by held-out bits per
byte. Students with their own tokenizer are compared with each other only, since their labels are other tokens.
"""

from __future__ import annotations

import os
from pathlib import Path
from tempfile import TemporaryDirectory

from limbeck.registry.core.terminal import print_table, quiet_libraries
from tests import ROOT

QUICKSTART = ROOT / "quickstart"
STUDENT = "small"
# How the teacher's outputs are used -> objectives by name, as in a recipe.
OBJECTIVES = {
    "topk": {
        "labels": "labels = 1.0",
        "forward KL": 'divergence = "forward_kl"',
        "forward KL and labels": 'divergence = "forward_kl"\nlabels = 0.5',
        "reverse KL": 'divergence = "reverse_kl"',
        "Jensen-Shannon, beta 0.5": 'divergence = "jsd"',
        "skewed KL, alpha 0.1": 'divergence = "skew_kl"',
        "skewed reverse KL, alpha 0.1": 'divergence = "skew_reverse_kl"',
        "total variation": 'divergence = "total_variation"',
        "total variation and labels": 'divergence = "total_variation"\nlabels = 0.5',
    },
    "sampled": {"forward KL": 'divergence = "forward_kl"'},
    "online": {
        "forward KL": 'divergence = "forward_kl"',
        "forward KL, temperature 2": 'divergence = "forward_kl"\ntemperature = 2.0',
        "forward KL and hidden states": 'divergence = "forward_kl"\nlayers = {loss = "cosine"}',
    },
    "own tokenizer": {
        "labels": "labels = 1.0",
        "forward KL, retokenized": 'divergence = "forward_kl"',
        "chunks and labels": 'divergence = "chunks"\nlabels = 0.5',
    },
}


def main() -> None:
    """Train a student under each objective and print a table."""
    quiet_libraries()
    from limbeck.distill.run.distill import distill
    from limbeck.registry.mlflow.store import Store

    rows = []
    with TemporaryDirectory() as temporary:
        os.environ["LIMBECK_HOME"] = temporary
        store = Store()
        for form, objectives in OBJECTIVES.items():
            path = Path(temporary) / f"{form}.toml"
            path.write_text(recipe(form, objectives), encoding="utf-8")
            for student in distill(path, [], store):
                name = student.plan.objective_name
                metrics = store.client.get_run(student.version.run_id).data.metrics
                rows.append((form, name, metrics["heldout_bits_per_byte"], metrics["seconds"]))
    labels = {form == "own tokenizer": bits for form, name, bits, _ in rows if name == "labels"}
    print_table(
        f"held-out bits per byte of the quickstart's student {STUDENT!r}, equal tokens",
        ["teacher", "objective", "bits per byte", "against labels alone", "seconds"],
        [
            (form, name, f"{bits:.4f}", f"{bits - labels[form == 'other tokens']:+.4f}", f"{s:.0f}")
            for form, name, bits, s in rows
        ],
    )


def recipe(form: str, objectives: dict[str, str]) -> str:
    """The quickstart's recipe with one student, these objectives and this form of the teacher's outputs."""
    text = (QUICKSTART / "recipe.toml").read_text(encoding="utf-8")
    sections = {part.partition("]")[0]: "[" + part for part in text.split("\n[")[1:]}
    shared = [sections["data"], sections[f"students.{STUDENT}.config"], sections["training"]]
    tables = [f'[objectives."{name}"]\n{body}' for name, body in objectives.items()]
    crosses = form == "own tokenizer"
    teacher = f'teacher = {{model = "{QUICKSTART / "teacher"}", retokenize = {str(crosses).lower()}}}'
    kind = "tokenizer = {vocab_size = 1024}" if crosses else f'cache = {{form = "{form}"}}'
    head = ['name = "objectives"', teacher, kind]
    return "\n".join([*head, *shared, *tables])
