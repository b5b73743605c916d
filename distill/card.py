"""The model card that travels with a student (Hugging Face model card format)."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from distill.recipe import Plan
    from distill.setting import Setting


def student_card(setting: Setting, plan: Plan, facts: dict[str, Any]) -> str:
    """README.md of a student: what it learnt from, how, how much, and what came of it."""
    recipe = setting.recipe
    objective = plan.objective
    training = recipe.training_of(plan.student)
    teacher = setting.teacher_version
    learnt = "next-token labels alone"
    if objective.divergence and teacher is not None:
        learnt = f"{objective.divergence} from {teacher.ref} (digest {teacher.digest[:12]})"
        if objective.labels:
            learnt += f", with a share of {objective.labels} of the labels"
    licence = f"license: {recipe.licence.lower()}\n" if recipe.licence else ""
    return f"""---
{licence}library_name: transformers
pipeline_tag: text-generation
tags:
- limbeck
---

# {recipe.name}: {plan.label}

| | |
|---|---|
| parameters | {facts["params"]:,} |
| recipe | `{setting.source.path.name}`, student `{plan.student}`, objective `{plan.objective_name}` |
| learnt from | {learnt} |
| text | {recipe.data.path or recipe.data.kind}: {setting.corpus.train_documents} documents, \
{setting.corpus.train_bytes:,} bytes; {setting.corpus.heldout_documents} documents held out by a hash of their path |
| data digest | `{setting.corpus.digest}` |
| tokens seen | {facts["tokens"]:,} |
| optimizer | {training.optim}, learning rate {training.learning_rate}, {training.lr_scheduler_type} |
| context | {recipe.data.max_length} tokens |
| held-out bits per byte | {facts["heldout_bits_per_byte"]:.3f} |
| licence | {recipe.licence or "not stated"} |

Limits: a model of this size completes text like its training text. It knows no facts to rely on, and what it
writes has to be checked.
"""


def licence_of(folder: Path) -> str | None:
    """The licence that a model's own card states, or None."""
    from huggingface_hub import ModelCard

    try:
        licence = ModelCard.load(folder / "README.md", ignore_metadata_errors=True).data.license
    except (OSError, ValueError):
        return None
    return str(licence) if licence else None
