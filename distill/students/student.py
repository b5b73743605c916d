"""Trains one student, logs its run and registers it."""

from __future__ import annotations

import json
import math
import shutil
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from importlib.metadata import version as installed
from pathlib import Path
from typing import TYPE_CHECKING, Any

from limbeck.distill.cache.teacher_cache import TeacherCache
from limbeck.distill.context import Setting, code_version
from limbeck.distill.models import heldout, loading
from limbeck.distill.recipe import grid
from limbeck.distill.recipe.grid import Plan
from limbeck.distill.recipe.schema import Budget, Training
from limbeck.distill.students import controls, initialise, licences, model_card
from limbeck.distill.students.keys import checkpoint_folder, family_key
from limbeck.distill.teacher import usage
from limbeck.distill.teacher.signal import heldout_likeliest_tokens
from limbeck.distill.training import distributed
from limbeck.distill.training.trainer import Job, TrainingResult, train
from limbeck.registry.core.errors import LimbeckError, Refused
from limbeck.registry.core.home import atomic_write, home
from limbeck.registry.core.machine import describe_hardware
from limbeck.registry.core.terminal import print_status, progress_bar
from limbeck.registry.mlflow.runs import TRAINING_COST_TAG, Run
from limbeck.registry.mlflow.store import Store
from limbeck.registry.provenance.cyclonedx import MADE_WITH
from limbeck.registry.records import NewVersion, TrainingCost, Version

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from limbeck.distill.training.callbacks import Progress
    from limbeck.distill.training.trainer import TeacherSignal

# The packages whose versions are recorded with a student.
PACKAGES = ("accelerate", "datasets", "peft", "safetensors", "tokenizers", "torch", "transformers")
PRECISION = {"float32": "fp32", "float16": "fp16", "bfloat16": "bf16"}


def make_student(
    setting: Setting,
    plan: Plan,
    key: str,
    teacher: TeacherSignal,
    store: Store,
    parent_run: str | None = None,
    more_tags: Mapping[str, str] | None = None,
) -> Version:
    """Train one student, log its run and register it.

    Args:
        key: of `student_key`.
        teacher: what the plan learns from, as `teachers_for` returns it; None: labels alone.
        parent_run: the MLflow run of the sweep.
        more_tags: of the run.
    """
    recipe = setting.recipe
    folder = checkpoint_folder(key)
    matched_costs = controls.matched_training_costs(setting, plan, store)
    training, budget = controls.training_and_budget(setting, plan, matched_costs)
    tags = {"limbeck.label": plan.label, "limbeck.recipe_digest": key, "limbeck.data_digest": setting.corpus.digest}
    tags |= {"limbeck.control": plan.control} if plan.control else {}
    tags |= more_tags or {}
    teacher_ref = setting.teacher_version.ref if setting.teacher_version else None
    with store.runs.start(
        f"{recipe.name} {plan.label}", params=_params(setting, plan, training), tags=tags, parent=parent_run
    ) as run:
        run.log_artifact(setting.source.path, "recipe")
        facts = _train_and_save(setting, plan, (training, budget), teacher, folder, run)
        cost = _training_cost(setting, plan, teacher, facts)
        numbers = {name: value for name, value in facts.items() if not isinstance(value, str)}
        run.log_metrics(numbers | {"teacher_seconds": cost.teacher_seconds, "teacher_usd": cost.api_usd or 0.0})
        if setting.generated:
            run.log_metrics(setting.generated.metrics())
        packages = {name: installed(name) for name in PACKAGES}
        run.set_tags({TRAINING_COST_TAG: cost.model_dump_json(), MADE_WITH: json.dumps(packages)})
        version = store.register(
            NewVersion(
                name=recipe.name,
                kind="student" if setting.teacher_version else "teacher",
                licence=recipe.licence,
                **licences.licence_fields(setting, plan),
                # A student of labels alone is compared with the teacher, but was not made from it.
                parent=teacher_ref if licences.learns_from_teacher(setting, plan) else None,
                teacher=teacher_ref,
                recipe=plan.label,
                recipe_digest=key,
                family=family_key(setting, plan),
                control=plan.control,
                data_digest=setting.corpus.digest,
                code_version=code_version(),
                params=int(facts["params"]),
                precision=PRECISION[recipe.students[plan.student].dtype],
                run_id=run.id,
            ),
            folder / "final",
        )
    shutil.rmtree(folder, ignore_errors=True)
    stopped = f"; stopped: {facts['stopped']}" if facts.get("stopped") else ""
    print_status(
        f"  {plan.label}: {version.ref}, {facts['heldout_bits_per_byte']:.3f} held-out bits per byte, "
        f"{facts['tokens']:,} tokens in {facts['seconds']:.0f} s{stopped}"
    )
    return version


def format_error(plan: Plan, error: Exception) -> str:
    """Describe a student's error in one line; the traceback of an unexpected error is written to a file."""
    if isinstance(error, LimbeckError):
        return error.message.removeprefix(f"{plan.label}: ")
    path = home() / "runs" / f"{plan.label}.error.txt"
    with atomic_write(path) as temporary:
        temporary.write_text(traceback.format_exc(), encoding="utf-8")
    return f"{type(error).__name__}: {error}".split("\n")[0] + f" (traceback in {path})"


def _params(setting: Setting, plan: Plan, training: Training) -> dict[str, Any]:
    """The parameters that MLflow shows for a student's run."""
    recipe = setting.recipe
    params: dict[str, Any] = {
        "student": plan.student,
        "control": plan.control or "",
        "set": " ".join(setting.source.overrides),
        "seed": plan.seed,
        "code_version": code_version(),
        **{f"data.{k}": v for k, v in recipe.data.model_dump().items()},
        **{f"data.{part}": getattr(setting.corpus, part) for part in ("train_bytes", "heldout_bytes")},
        **{f"config.{k}": v for k, v in recipe.students[plan.student].config.items()},
        **{f"objective.{k}": v for k, v in plan.objective.model_dump().items()},
        **{f"generate.{k}": v for k, v in (recipe.generate.model_dump() if recipe.generate else {}).items()},
        **{f"training.{k}": v for k, v in training.model_dump().items()},
    }
    if setting.teacher_version is not None:
        params |= {"teacher": setting.teacher_version.ref, "teacher_digest": setting.teacher_version.digest}
    return params


def _training_cost(setting: Setting, plan: Plan, teacher: TeacherSignal, facts: dict[str, Any]) -> TrainingCost:
    """What the student took. A teacher cache that several students share counts in full for each of them."""
    import torch

    recipe = setting.recipe
    plans = grid.plan_students(recipe)
    using_teacher = [each.label for each in plans if each.objective.uses_teacher]
    cache = teacher if isinstance(teacher, TeacherCache) and plan.label in using_teacher else None
    device = loading.device()
    teacher_usage = usage.usage_of_plan(setting, plan)
    sharing = 1
    if setting.generated:
        sharing = len(plans)
    elif cache:
        sharing = len(using_teacher)
    return TrainingCost(
        training_seconds=facts["seconds"],
        teacher_seconds=(cache.capture_seconds() if cache else 0.0) + teacher_usage.seconds,
        students_sharing_teacher=sharing,
        api_input_tokens=teacher_usage.input_tokens,
        api_output_tokens=teacher_usage.output_tokens,
        api_model=teacher_usage.model if teacher_usage.input_tokens else None,
        api_usd=teacher_usage.usd,
        tokens=int(facts["tokens"]),
        machine=describe_hardware(torch.cuda.get_device_name(0) if device == "cuda" else None),
        device=device,
    )


def _train_and_save(
    setting: Setting, plan: Plan, schedule: tuple[Training, Budget], teacher: TeacherSignal, folder: Path, run: Run
) -> dict[str, Any]:
    """Train with checkpoints in `folder` and save the student in `folder/final`; returns its numbers by name."""
    if plan.control == "untrained":
        model, result = initialise.initialise_student(setting, plan), TrainingResult(tokens=0, seconds=0.0)
    else:
        training, budget = (part.model_dump() for part in schedule)
        distributed.broadcast_to_workers(
            {"label": plan.label, "training": training, "budget": budget, "folder": str(folder)}
        )
        model, result = train_student(setting, plan, schedule, teacher, folder, run.log_metrics)
    model = initialise.merge_adapter(model)
    facts: dict[str, Any] = {
        "params": sum(p.numel() for p in model.parameters()),
        "tokens": result.tokens,
        "seconds": result.seconds,
        "eval_seconds": result.eval_seconds,
        "heldout_bits_per_byte": heldout.bits_per_byte(model, setting.heldout),
    }
    if result.stop_reason:
        facts["stopped"] = result.stop_reason
        run.set_tags({"limbeck.stopped": result.stop_reason})
    if not math.isfinite(facts["heldout_bits_per_byte"]):
        shutil.rmtree(folder)
        raise Refused(
            f"{plan.label}: training diverged, its held-out loss is not finite; nothing was registered",
            fix="set a lower training.learning_rate or a higher training.warmup_steps",
        )
    _save(setting, plan, model, facts, folder / "final")
    return facts


def train_student(
    setting: Setting,
    plan: Plan,
    schedule: tuple[Training, Budget],
    teacher: TeacherSignal,
    folder: Path,
    on_log: Callable[[dict[str, float], int], None] = lambda logs, step: None,
) -> tuple[PreTrainedModel, TrainingResult]:
    """Initialise and train a student, with checkpoints in `folder`; all processes of the run call it together."""
    model = initialise.initialise_student(setting, plan)
    job = Job(
        student=model,
        train=setting.train,
        heldout=setting.heldout,
        objective=plan.objective,
        training=schedule[0],
        teacher=teacher,
        folder=folder,
        seed=plan.seed,
        vocab_size=setting.vocab_size,
        budget=schedule[1],
        on_policy=setting.recipe.on_policy,
        paid_usd=usage.usage_of_plan(setting, plan).usd or 0.0,
        likeliest=heldout_likeliest_tokens(setting),
    )
    with distributed.collective_work(), _progress_bar(plan.label) as on_progress:
        return model, train(job, on_progress, on_log)


def _save(setting: Setting, plan: Plan, model: PreTrainedModel, facts: dict[str, Any], folder: Path) -> None:
    """Write the student's files, all of them or none."""
    import torch

    model.to(getattr(torch, setting.recipe.students[plan.student].dtype))
    with atomic_write(folder) as temporary:
        model.save_pretrained(temporary, safe_serialization=True)
        setting.tokenizer.save_pretrained(temporary)
        (temporary / "README.md").write_text(model_card.student_card(setting, plan, facts), encoding="utf-8")


@contextmanager
def _progress_bar(label: str) -> Iterator[Callable[[Progress], None]]:
    """A progress bar in the terminal, and the function that updates it."""
    with progress_bar() as bar:
        task = bar.add_task(label, total=None, rate="")

        def on_progress(progress: Progress) -> None:
            values = {
                "loss {:.3f}": progress.loss,
                "agreement {:.0%}": progress.agreement,
                "held-out {:.3f} bits/byte": progress.heldout_bits_per_byte,
                "{:,.0f} tok/s": progress.tokens_per_s,
            }
            rate = ", ".join(form.format(value) for form, value in values.items() if value is not None)
            bar.update(task, completed=progress.step, total=progress.steps, rate=rate)

        yield on_progress
