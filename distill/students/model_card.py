"""The model card that travels with a student (Hugging Face model card format)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from limbeck.distill.students import licences as terms

if TYPE_CHECKING:
    from limbeck.distill.context import Setting
    from limbeck.distill.recipe.grid import Plan


def student_card(setting: Setting, plan: Plan, facts: dict[str, Any]) -> str:
    """README.md of a student: what it learnt from, how, how much, and what came of it."""
    recipe = setting.recipe
    training = recipe.training_of(plan.student)
    told = terms.licence_fields(setting, plan)
    licence = f"license: {recipe.licence.lower()}\n" if recipe.licence else ""
    teacher_licence = (told["teacher_licence"] or "not stated") if terms.learns_from_teacher(setting, plan) else "-"
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
| begins as | {_start(setting, plan)} |
| learnt from | {_describe_signal(setting, plan)} |
| text | {_text(setting)}: {setting.corpus.train_documents} documents, \
{setting.corpus.train_bytes:,} bytes; {setting.corpus.heldout_documents} documents held out by a hash of their path |
| data digest | `{setting.corpus.digest}` |
| tokens seen | {facts["tokens"]:,}{_describe_early_stop(facts)} |
| optimizer | {training.optim}, learning rate {training.learning_rate}, {training.lr_scheduler_type} |
| context | {recipe.data.max_length} tokens |
| held-out bits per byte | {facts["heldout_bits_per_byte"]:.3f} |
| licence | {recipe.licence or "not stated"} |
| licence of the teacher | {teacher_licence} |
| licence of the text | {told["data_licence"] or "not stated"} |

Limits: a model of this size completes text like its training text. It knows no facts to rely on, and what it
writes has to be checked.
"""


def _start(setting: Setting, plan: Plan) -> str:
    student, teacher = setting.recipe.students[plan.student], setting.teacher_version
    start = f"`{student.model}`" if student.model else f"a fresh {student.config.get('model_type')}"
    if student.prune:
        start = f"cut from {teacher.ref if teacher else 'the teacher'}"
    return f"{start}, with a LoRA adapter of rank {student.lora.r}, merged" if student.lora else start


def _describe_signal(setting: Setting, plan: Plan) -> str:
    """The signal, and of a control what it is one of."""
    recipe, objective, teacher = setting.recipe, plan.objective, setting.teacher_version
    if plan.control == "untrained":
        return "nothing, no training: a control of distillation"
    if not objective.uses_teacher or teacher is None:
        labels = "next-token labels alone"
        if recipe.generate and teacher is not None:
            return f"{labels}, written by {teacher.ref} (digest {teacher.digest[:12]})"
        kinds = {"labels": "at equal tokens", "labels_equal_cost": "at equal cost, the teacher's pass counted"}
        return f"{labels}: a control of distillation {kinds[plan.control]}" if plan.control else labels
    heated = f" at temperature {objective.temperature:g}" if objective.temperature != 1 else ""
    signals = [f"{objective.divergence}{heated}"] if objective.divergence else []
    if objective.layers:
        signals.append(f"hidden states ({objective.layers.loss})")
    learnt = f"{' and '.join(signals)} from {teacher.ref} (digest {teacher.digest[:12]})"
    if recipe.on_policy:
        learnt += f", on text of its own in a share of {recipe.on_policy.lmbda} of the batches"
    return f"{learnt}, with a share of {objective.labels} of the labels" if objective.labels else learnt


def _text(setting: Setting) -> str:
    data, generate = setting.recipe.data, setting.recipe.generate
    name = data.path or data.kind
    if generate:
        return f"the teacher's answers to {name} (temperature {generate.temperature:g}), filtered; learnt are answers"
    if data.messages_column or data.prompt_column:
        return f"{name}; learnt are the answers alone"
    return name


def _describe_early_stop(facts: dict[str, Any]) -> str:
    return f"; stopped before its last step: {facts['stopped']}" if facts.get("stopped") else ""
