"""The model card in a student's folder (Hugging Face model card format)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from limbeck.distill.students import licences as terms

if TYPE_CHECKING:
    from limbeck.distill.context import Setting
    from limbeck.distill.recipe.grid import Plan


def student_card(setting: Setting, plan: Plan, facts: dict[str, Any]) -> str:
    """README.md of a student: what it learns from and how, its text, its training, its quality, its licences.

    Args:
        facts: `params`, `tokens`, `heldout_bits_per_byte`, and `stopped` if training ended before its last step.
    """
    recipe = setting.recipe
    training = recipe.training_of(plan.student)
    licences = terms.licence_fields(setting, plan)
    licence = f"license: {recipe.licence.lower()}\n" if recipe.licence else ""
    teacher_licence = "-"
    if terms.learns_from_teacher(setting, plan):
        teacher_licence = licences["teacher_licence"] or "not stated"
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
| initial model | {_describe_initial_model(setting, plan)} |
| learns from | {_describe_signal(setting, plan)} |
| text | {_describe_text(setting)}: {setting.corpus.train_documents} documents, \
{setting.corpus.train_bytes:,} bytes; {setting.corpus.heldout_documents} documents held out by a hash of their path |
| data digest | `{setting.corpus.digest}` |
| training tokens | {facts["tokens"]:,}{_describe_early_stop(facts)} |
| optimizer | {training.optim}, learning rate {training.learning_rate}, {training.lr_scheduler_type} |
| context | {recipe.data.max_length} tokens |
| held-out bits per byte | {facts["heldout_bits_per_byte"]:.3f} |
| licence | {recipe.licence or "not stated"} |
| licence of the teacher | {teacher_licence} |
| licence of the text | {licences["data_licence"] or "not stated"} |

Limits: a model of this size completes text like its training text. Do not rely on it for facts; check what it
writes.
"""


def _describe_initial_model(setting: Setting, plan: Plan) -> str:
    student, teacher = setting.recipe.students[plan.student], setting.teacher_version
    if student.prune:
        start = f"pruned from {teacher.ref if teacher else 'the teacher'}"
    elif student.model:
        start = f"`{student.model}`"
    else:
        start = f"random {student.config.get('model_type')}"
    return f"{start}, with a merged LoRA adapter of rank {student.lora.r}" if student.lora else start


def _describe_signal(setting: Setting, plan: Plan) -> str:
    """What the student learns from; for a control, also which kind of control it is."""
    recipe, objective, teacher = setting.recipe, plan.objective, setting.teacher_version
    if plan.control == "untrained":
        return "nothing, no training: a control of distillation"
    if not objective.uses_teacher or teacher is None:
        return _describe_labels(setting, plan)
    heated = f" at temperature {objective.temperature:g}" if objective.temperature != 1 else ""
    signals = [f"{objective.divergence}{heated}"] if objective.divergence else []
    if objective.layers:
        signals.append(f"hidden states ({objective.layers.loss})")
    signal = f"{' and '.join(signals)} from {teacher.ref} (digest {teacher.digest[:12]})"
    if recipe.on_policy:
        signal += f", on its own text in {recipe.on_policy.lmbda:.0%} of the batches"
    return f"{signal}, with {objective.labels:.0%} of the loss from labels" if objective.labels else signal


def _describe_labels(setting: Setting, plan: Plan) -> str:
    teacher = setting.teacher_version
    labels = "next-token labels alone"
    if setting.recipe.generate and teacher is not None:
        return f"{labels}, written by {teacher.ref} (digest {teacher.digest[:12]})"
    kinds = {"labels": "at equal tokens", "labels_equal_cost": "at equal cost, including the teacher's pass"}
    return f"{labels}: a control of distillation {kinds[plan.control]}" if plan.control else labels


def _describe_text(setting: Setting) -> str:
    data, generate = setting.recipe.data, setting.recipe.generate
    name = data.path or data.kind
    if generate:
        return f"the teacher's filtered answers to {name} (temperature {generate.temperature:g}); labels: answers only"
    if data.messages_column or data.prompt_column:
        return f"{name}; labels: answers only"
    return name


def _describe_early_stop(facts: dict[str, Any]) -> str:
    return f"; stopped before its last step: {facts['stopped']}" if facts.get("stopped") else ""
