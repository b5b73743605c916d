"""One student: trained, logged, registered; and the digest of all that makes it what it is."""

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
from limbeck.distill.students import controls, licences, model_card
from limbeck.distill.students import initialise as starting
from limbeck.distill.students.keys import family_key, folder_of
from limbeck.distill.teacher import usage
from limbeck.distill.teacher.signal import likeliest
from limbeck.distill.training import distributed
from limbeck.distill.training.trainer import Job, TrainingResult, train
from limbeck.registry.core.errors import LimbeckError, Refused
from limbeck.registry.core.home import atomic_write, home
from limbeck.registry.core.machine import describe_hardware
from limbeck.registry.core.terminal import print_status, progress_bar
from limbeck.registry.mlflow.run import Run
from limbeck.registry.mlflow.store import TRAINING_COST_TAG, Store
from limbeck.registry.provenance.cyclonedx import MADE_WITH
from limbeck.registry.records import NewVersion, TrainingCost, Version

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from limbeck.distill.training.callbacks import Progress
    from limbeck.distill.training.trainer import TeacherSignal, TrainingResult

PACKAGES = ("accelerate", "datasets", "peft", "safetensors", "tokenizers", "torch", "transformers")  # that made it
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
    """Train one student, log its run (below `parent_run` where given, with `more_tags`), register it."""
    recipe = setting.recipe
    work = folder_of(key)
    training, budget = controls.schedule(setting, plan, controls.records_to_match(setting, plan, store))
    tags = {"limbeck.label": plan.label, "limbeck.recipe_digest": key, "limbeck.data_digest": setting.corpus.digest}
    tags |= {"limbeck.control": plan.control} if plan.control else {}
    tags |= more_tags or {}
    compared = setting.teacher_version.ref if setting.teacher_version else None
    with store.run(
        f"{recipe.name} {plan.label}", params=_params(setting, plan, training), tags=tags, parent=parent_run
    ) as run:
        run.log_artifact(setting.source.path, "recipe")
        facts = _train_and_save(setting, plan, (training, budget), teacher, work, run)
        making = _making(setting, plan, teacher, facts)
        numbers = {name: value for name, value in facts.items() if not isinstance(value, str)}
        run.log_metrics(numbers | {"teacher_seconds": making.teacher_seconds, "teacher_usd": making.api_usd or 0.0})
        if setting.generated:
            run.log_metrics(setting.generated.metrics())
        packages = {name: installed(name) for name in PACKAGES}
        run.set_tags({TRAINING_COST_TAG: making.model_dump_json(), MADE_WITH: json.dumps(packages)})
        version = store.register(
            NewVersion(
                name=recipe.name,
                kind="student" if setting.teacher_version else "teacher",
                licence=recipe.licence,
                **licences.licence_fields(setting, plan),
                # A twin trained on labels alone is compared with the teacher, and was not made from it.
                parent=compared if licences.learns_from_teacher(setting, plan) else None,
                teacher=compared,
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
            work / "final",
        )
    shutil.rmtree(work, ignore_errors=True)
    stopped = f"; stopped: {facts['stopped']}" if facts.get("stopped") else ""
    print_status(
        f"  {plan.label}: {version.ref}, {facts['heldout_bits_per_byte']:.3f} held-out bits per byte, "
        f"{facts['tokens']:,} tokens in {facts['seconds']:.0f} s{stopped}"
    )
    return version


def format_error(plan: Plan, error: Exception) -> str:
    """What went wrong with a student, in a line; what no one foresaw leaves its traceback in a file."""
    if isinstance(error, LimbeckError):
        return error.message.removeprefix(f"{plan.label}: ")
    with atomic_write(home() / "runs" / f"{plan.label}.error.txt") as temporary:
        temporary.write_text(traceback.format_exc(), encoding="utf-8")
    return (
        f"{type(error).__name__}: {error}".split("\n")[0] + f" (traceback in {home() / 'runs' / plan.label}.error.txt)"
    )


def _params(setting: Setting, plan: Plan, training: Training) -> dict[str, Any]:
    """What MLflow shows of a student's run."""
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


def _making(setting: Setting, plan: Plan, teacher: TeacherSignal, facts: dict[str, Any]) -> TrainingCost:
    """What the student took. A capture that several students share is counted in full for each of them."""
    import torch

    recipe = setting.recipe
    learns = [each.label for each in grid.plan_students(recipe) if each.objective.uses_teacher]
    cache = teacher if isinstance(teacher, TeacherCache) and plan.label in learns else None
    device = loading.device()
    words = usage.usage_of_plan(setting, plan)
    shared = grid.plan_students(recipe) if setting.generated else learns if cache else []
    return TrainingCost(
        training_seconds=facts["seconds"],
        teacher_seconds=(cache.capture_seconds() if cache else 0.0) + words.seconds,
        students_sharing_teacher=max(1, len(shared)),
        api_input_tokens=words.input_tokens,
        api_output_tokens=words.output_tokens,
        api_model=words.model if words.input_tokens else None,
        api_usd=words.usd,
        tokens=int(facts["tokens"]),
        machine=describe_hardware(torch.cuda.get_device_name(0) if device == "cuda" else None),
        device=device,
    )


def _train_and_save(
    setting: Setting, plan: Plan, schedule: tuple[Training, Budget], teacher: TeacherSignal, work: Path, run: Run
) -> dict[str, Any]:
    """Train below `work`, save the student in `work/final`; returns its figures."""
    if plan.control == "untrained":
        model, trained = starting.initialise_student(setting, plan), TrainingResult(tokens=0, seconds=0.0)
    else:
        training, budget = (part.model_dump() for part in schedule)
        distributed.broadcast_to_workers(
            {"label": plan.label, "training": training, "budget": budget, "folder": str(work)}
        )
        model, trained = train_one(setting, plan, schedule, teacher, work, run.log_metrics)
    model = starting.merge_adapter(model)
    facts: dict[str, Any] = {
        "params": sum(p.numel() for p in model.parameters()),
        "tokens": trained.tokens,
        "seconds": trained.seconds,
        "eval_seconds": trained.eval_seconds,
        "heldout_bits_per_byte": heldout.bits_per_byte(model, setting.heldout),
    }
    if trained.stop_reason:
        facts["stopped"] = trained.stop_reason
        run.set_tags({"limbeck.stopped": trained.stop_reason})
    if not math.isfinite(facts["heldout_bits_per_byte"]):
        shutil.rmtree(work)
        raise Refused(
            f"{plan.label}: training diverged, its loss is no number; nothing was registered",
            fix="give a lower training.learning_rate or more training.warmup_ratio",
        )
    _save(setting, plan, model, facts, work / "final")
    return facts


def train_one(
    setting: Setting,
    plan: Plan,
    schedule: tuple[Training, Budget],
    teacher: TeacherSignal,
    work: Path,
    on_log: Callable[[dict[str, float], int], None] = lambda logs, step: None,
) -> tuple[PreTrainedModel, TrainingResult]:
    """A student, trained below `work`, by every process of the run at once."""
    model = starting.initialise_student(setting, plan)
    job = Job(
        student=model,
        train=setting.train,
        heldout=setting.heldout,
        objective=plan.objective,
        training=schedule[0],
        teacher=teacher,
        folder=work,
        seed=plan.seed,
        vocab_size=setting.vocab_size,
        budget=schedule[1],
        on_policy=setting.recipe.on_policy,
        paid_usd=usage.usage_of_plan(setting, plan).usd or 0.0,
        likeliest=likeliest(setting),
    )
    with distributed.collective_work(), _bar(plan.label) as on_progress:
        return model, train(job, on_progress, on_log)


def _save(setting: Setting, plan: Plan, model: PreTrainedModel, facts: dict[str, Any], folder: Path) -> None:
    """The student's files, whole or not at all."""
    import torch

    model.to(getattr(torch, setting.recipe.students[plan.student].dtype))
    with atomic_write(folder) as temporary:
        model.save_pretrained(temporary, safe_serialization=True)
        setting.tokenizer.save_pretrained(temporary)
        (temporary / "README.md").write_text(model_card.student_card(setting, plan, facts), encoding="utf-8")


@contextmanager
def _bar(label: str) -> Iterator[Callable[[Progress], None]]:
    with progress_bar() as bar:
        task = bar.add_task(label, total=None, rate="")

        def on_progress(now: Progress) -> None:
            known = {
                "loss {:.3f}": now.loss,
                "{:.0%} as the teacher": now.agreement,
                "held-out {:.3f} bits/byte": now.heldout_bits_per_byte,
                "{:,.0f} tok/s": now.tokens_per_s,
            }
            rate = ", ".join(form.format(value) for form, value in known.items() if value is not None)
            bar.update(task, completed=now.step, total=now.steps, rate=rate)

        yield on_progress
