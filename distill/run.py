"""A whole recipe: text, teacher, cache, then each student trained, logged and registered."""

from __future__ import annotations

import math
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from distill import card, models
from distill import recipe as recipes
from distill import students as starting
from distill.cache import TeacherCache
from distill.recipe import Plan, Source
from distill.setting import Setting, code_version, prepare
from distill.teacher import teacher_for
from registry.digest import json_digest
from registry.errors import BadInput, Refused
from registry.home import home, written_whole
from registry.machine import hardware
from registry.records import Making, Version
from registry.run import Run
from registry.store import MAKING, Store
from registry.terminal import progress, say

if TYPE_CHECKING:
    from transformers import PreTrainedModel

PRECISION = {"float32": "fp32", "float16": "fp16", "bfloat16": "bf16"}


class Student(NamedTuple):
    """One student of a recipe: its registered version, and whether this run trained it."""

    plan: Plan
    version: Version
    trained: bool


def distill(path: Path, overrides: list[str], store: Store, to: Path | None = None) -> list[Student]:
    """Carry out the recipe at `path`; students already made from the same ingredients are skipped.

    Args:
        path: the recipe, TOML.
        overrides: `KEY=VALUE`, put in before the recipe is checked.
        to: also copy the student's files there (a recipe with one student); a model that is there is replaced.

    Raises:
        BadInput: anything wrong with the recipe, its text, its teacher or its students; before any training.
    """
    recipe = recipes.load(path, overrides)
    plans = recipes.plans(recipe)
    if to is not None and len(plans) != 1:
        raise BadInput(f"--to takes one student and {path} makes {len(plans)}", fix="leave --to out")
    if to is not None and to.exists() and not (to / "config.json").exists():
        raise BadInput(f"--to {to} is there and is no model", fix="give a folder that is not there yet")
    setting = prepare(recipe, Source(path, tuple(overrides)), store)
    keys = {plan.label: student_key(setting, plan) for plan in plans}
    students: dict[str, Student] = {}
    for plan in plans:
        if there := store.find(recipe.name, engine="torch", recipe_digest=keys[plan.label]):
            say(f"  {plan.label}: already made, {there.ref}")
            students[plan.label] = Student(plan, there, trained=False)
    missing = [plan for plan in plans if plan.label not in students]
    for plan in {plan.student: plan for plan in missing}.values():
        starting.check(setting, plan)
    teacher = teacher_for(setting, missing)
    for plan in missing:
        version = _make(setting, plan, keys[plan.label], teacher, store)
        students[plan.label] = Student(plan, version, trained=True)
    if to is not None:
        with written_whole(to) as temporary:
            shutil.copytree(store.folder(students[plans[0].label].version), temporary)
    return [students[plan.label] for plan in plans]


def student_key(setting: Setting, plan: Plan) -> str:
    """The digest of all that makes a student what it is: the part of the recipe that concerns it, data, teacher."""
    recipe = setting.recipe
    uses_teacher = plan.objective.uses_teacher
    student = recipe.students[plan.student].model_dump(exclude={"training"})
    if plan.student in setting.starts:
        student["model"] = setting.starts[plan.student].digest
    training = recipe.training_of(plan.student).model_dump(exclude={"logging_steps", "save_minutes"})
    return json_digest(
        {
            "student": student,
            "objective": plan.objective.model_dump(),
            "training": training,
            "seed": plan.seed,
            "blocks": setting.train.digest,
            "tokenizer": recipe.tokenizer.model_dump() if recipe.tokenizer else None,
            "teacher": setting.teacher.digest if setting.teacher and uses_teacher else None,
            "cache": recipe.cache.model_dump() if uses_teacher else None,
        }
    )


def _make(
    setting: Setting, plan: Plan, key: str, teacher: PreTrainedModel | TeacherCache | None, store: Store
) -> Version:
    """Train one student, log its run, register it."""
    recipe = setting.recipe
    work = home() / "runs" / key[:16]
    tags = {"limbeck.label": plan.label, "limbeck.recipe_digest": key, "limbeck.data_digest": setting.corpus.digest}
    params: dict[str, Any] = {
        "student": plan.student,
        "set": " ".join(setting.source.overrides),
        "seed": plan.seed,
        "code_version": code_version(),
        **{f"data.{k}": v for k, v in recipe.data.model_dump().items()},
        **{f"data.{part}": getattr(setting.corpus, part) for part in ("train_bytes", "heldout_bytes")},
        **{f"config.{k}": v for k, v in recipe.students[plan.student].config.items()},
        **{f"objective.{k}": v for k, v in plan.objective.model_dump().items()},
        **{f"training.{k}": v for k, v in recipe.training_of(plan.student).model_dump().items()},
    }
    compared = setting.teacher_version.ref if setting.teacher_version else None
    if setting.teacher_version is not None:
        params |= {"teacher": compared, "teacher_digest": setting.teacher_version.digest}
    with store.run(f"{recipe.name} {plan.label}", params=params, tags=tags) as run:
        run.artifact(setting.source.path, "recipe")
        facts = _train_and_save(setting, plan, teacher, work, run)
        making = _making(setting, plan, teacher, facts)
        run.metrics(facts | {"teacher_seconds": making.teacher_seconds})
        run.tags({MAKING: making.model_dump_json()})
        version = store.register(
            recipe.name,
            work / "final",
            kind="student" if setting.teacher else "teacher",
            licence=recipe.licence,
            # A twin trained on labels alone is compared with the teacher, and was not made from it.
            parent=compared if plan.objective.uses_teacher else None,
            teacher=compared,
            recipe=plan.label,
            recipe_digest=key,
            data_digest=setting.corpus.digest,
            code_version=code_version(),
            params=int(facts["params"]),
            precision=PRECISION[recipe.students[plan.student].dtype],
            run_id=run.id,
        )
    shutil.rmtree(work, ignore_errors=True)
    say(
        f"  {plan.label}: {version.ref}, {facts['heldout_bits_per_byte']:.3f} held-out bits per byte, "
        f"{facts['tokens']:,} tokens in {facts['seconds']:.0f} s"
    )
    return version


def _making(
    setting: Setting, plan: Plan, teacher: PreTrainedModel | TeacherCache | None, facts: dict[str, float]
) -> Making:
    """What the student took. A capture that several students share is counted in full for each of them."""
    import torch

    recipe = setting.recipe
    learns = [each.label for each in recipes.plans(recipe) if each.objective.uses_teacher]
    cache = teacher if isinstance(teacher, TeacherCache) and plan.label in learns else None
    device = models.device()
    return Making(
        training_seconds=facts["seconds"],
        teacher_seconds=cache.seconds() if cache else 0.0,
        teacher_students=len(learns) if cache else 1,
        tokens=int(facts["tokens"]),
        machine=hardware(torch.cuda.get_device_name(0) if device == "cuda" else None),
        device=device,
    )


def _train_and_save(
    setting: Setting, plan: Plan, teacher: PreTrainedModel | TeacherCache | None, work: Path, run: Run
) -> dict[str, float]:
    """Train below `work`, save the student in `work/final`; returns its figures."""
    import torch

    from distill.train import Job, train

    recipe = setting.recipe
    spec = recipe.students[plan.student]
    model = starting.make(setting, plan)
    with _bar(plan.label) as on_progress:
        job = Job(
            student=model,
            train=setting.train,
            heldout=setting.heldout,
            objective=plan.objective,
            training=recipe.training_of(plan.student),
            teacher=teacher,
            folder=work,
            seed=plan.seed,
            vocab_size=setting.vocab_size,
            budget=recipe.budget,
            on_policy=recipe.on_policy,
        )
        trained = train(job, on_progress, run.metrics)
    facts = {
        "params": sum(p.numel() for p in model.parameters()),
        "tokens": trained.tokens,
        "seconds": trained.seconds,
        "heldout_bits_per_byte": models.bits_per_byte(model, setting.heldout),
    }
    if not math.isfinite(facts["heldout_bits_per_byte"]):
        shutil.rmtree(work)
        raise Refused(
            f"{plan.label}: training diverged, its loss is no number; nothing was registered",
            fix="give a lower training.learning_rate or more training.warmup_ratio",
        )
    model.to(getattr(torch, spec.dtype))
    with written_whole(work / "final") as temporary:
        model.save_pretrained(temporary, safe_serialization=True)
        setting.tokenizer.save_pretrained(temporary)
        (temporary / "README.md").write_text(card.student_card(setting, plan, facts), encoding="utf-8")
    return facts


@contextmanager
def _bar(label: str) -> Iterator[Any]:
    with progress() as bar:
        task = bar.add_task(label, total=None, rate="")

        def on_progress(now: Any) -> None:
            loss = f"loss {now.loss:.3f}, " if now.loss is not None else ""
            rate = f"{loss}{now.tokens_per_s:,.0f} tok/s"
            bar.update(task, completed=now.step, total=now.steps, rate=rate)

        yield on_progress
