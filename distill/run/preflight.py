"""The preflight of a recipe: what does not fit, what is to be known, what it will take; before any long work."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NamedTuple

import click

from limbeck.distill.context import Setting, count_parameters, errors_at
from limbeck.distill.losses.hidden_states import depth, layer_map
from limbeck.distill.models import loading
from limbeck.distill.recipe import grid, load
from limbeck.distill.recipe.grid import Plan
from limbeck.distill.recipe.load import Source
from limbeck.distill.run import forecast
from limbeck.distill.run.prepare import prepare_setting
from limbeck.distill.students import initialise, licences, matching
from limbeck.distill.students.keys import student_key
from limbeck.distill.teacher import usage
from limbeck.distill.teacher.signal import caches_for, chunks_cache, form_of
from limbeck.registry.core.errors import BadInput, LimbeckError
from limbeck.registry.core.home import home
from limbeck.registry.core.machine import available_memory
from limbeck.registry.core.terminal import format_bytes, print_status
from limbeck.registry.records import Record

if TYPE_CHECKING:
    from limbeck.distill.cache.teacher_cache import TeacherCache
    from limbeck.registry.mlflow.store import Store

Level = Literal["ok", "warning", "error"]
MEMORY_WARNING_SHARE = 0.8  # of the memory that is there: from here on it is told


class Finding(Record):
    """One line of `limbeck distill RECIPE --check --format json`."""

    check: str
    level: Level
    message: str
    fix: str | None = None
    needs_confirmation: bool = False  # a run has to be told to go on all the same


def check_recipe(path: Path, overrides: list[str], store: Store) -> list[Finding]:
    """All findings on the recipe at `path`. Nothing is trained, asked of an endpoint's model, or registered."""
    try:
        recipe = load.load_recipe(path, overrides)
        setting = prepare_setting(recipe, Source(path, tuple(overrides)), store)
    except LimbeckError as error:  # what is wrong is told with its place; without it there is no more to be said
        return [_error("recipe", error)]
    plans = grid.plan_students(recipe)
    found = [_text(setting)]
    missing = plans
    if not recipe.generate:
        keys = {plan.label: student_key(setting, plan) for plan in plans}
        missing = [
            plan
            for plan in plans
            if not store.find_version(recipe.name, engine="torch", recipe_digest=keys[plan.label])
        ]
        made = len(plans) - len(missing)
        found.append(_ok("students", f"{len(plans)} in all{f', {made} of them made already' if made else ''}"))
    found += preflight(setting, missing)
    if missing and not any(finding.level == "error" for finding in found):
        found += _run_check("time", lambda: _time(setting, missing))
    return found


def preflight(setting: Setting, plans: list[Plan]) -> list[Finding]:
    """What can be told at once, of the students that are to be made; every run begins with it."""
    checks: list[tuple[str, Callable[[], Iterator[Finding]]]] = [
        ("student", lambda: _students(setting, plans)),
        ("vocabulary", lambda: _vocabularies(setting, plans)),
        ("context", lambda: _context(setting, plans)),
        ("size", lambda: _sizes(setting, plans)),
        ("licence", lambda: _licence(setting, plans)),
        ("text licence", lambda: _text_licence(setting)),
        ("cache", lambda: _cache(setting, plans)),
        ("memory", lambda: _memory(setting, plans)),
        ("disk", lambda: _disk(setting, plans)),
    ]
    found: list[Finding] = []
    for name, run in checks if plans else ():
        found += _run_check(name, run)
        if any(finding.level == "error" for finding in found):  # what follows may stumble over it
            break
    return found


def confirm_findings(findings: Sequence[Finding], yes: bool) -> None:
    """Tell a run's warnings; ask about those that have to be confirmed, unless `yes`.

    Raises BadInput at an error, and where what has to be confirmed is not.
    """
    for finding in findings:
        if finding.level == "error":
            raise BadInput(finding.message, fix=finding.fix)
        asks = finding.needs_confirmation and not yes
        if asks and not sys.stdin.isatty():
            raise BadInput(finding.message, fix=f"{finding.fix}; or add --yes to go on all the same")
        if finding.level == "warning":
            print_status(f"  warning: {finding.message}")
        if asks and not click.confirm("go on all the same?", err=True):
            raise BadInput(finding.message, fix=finding.fix)


def _run_check(name: str, run: Callable[[], Iterator[Finding]]) -> list[Finding]:
    found: list[Finding] = []
    try:
        found.extend(run())
    except LimbeckError as error:
        found.append(_error(name, error))
    return found


def _ok(name: str, message: str) -> Finding:
    return Finding(check=name, level="ok", message=message)


def _error(name: str, error: LimbeckError) -> Finding:
    return Finding(check=name, level="error", message=error.message, fix=error.fix)


def _text(setting: Setting) -> Finding:
    if setting.recipe.generate:
        return _ok("text", "written by the teacher, when the recipe is run")
    text = setting.corpus
    return _ok(
        "text",
        f"{text.train_documents:,} documents to train on, {text.heldout_documents:,} held out; "
        f"{setting.train.ids.size:,} tokens in blocks of {setting.recipe.data.max_length}",
    )


def _one_plan_per_size(plans: list[Plan]) -> dict[str, Plan]:
    """A plan of each size."""
    sized: dict[str, Plan] = {}
    for plan in plans:
        sized.setdefault(plan.student, plan)
    return sized


def _students(setting: Setting, plans: list[Plan]) -> Iterator[Finding]:
    for plan in _one_plan_per_size(plans).values():
        initialise.check(setting, plan)
    for plan in plans:
        if plan.objective.layers and setting.teacher:
            with errors_at(setting.source, "objectives", plan.objective_name, "layers"):
                _layers(setting, plan)
    return
    yield


def _layers(setting: Setting, plan: Plan) -> None:
    assert plan.objective.layers is not None
    own = initialise.meta_model(setting, plan.student).config
    layer_map(plan.objective.layers, depth(own), depth(setting.teacher_config()))


def _plans_using_teacher(setting: Setting, plans: list[Plan]) -> list[Plan]:
    """Those that learn from the teacher, be it from its text alone."""
    return [plan for plan in plans if plan.objective.uses_teacher or (setting.recipe.generate and not plan.control)]


def _vocabularies(setting: Setting, plans: list[Plan]) -> Iterator[Finding]:
    for name in _one_plan_per_size(_plans_using_teacher(setting, plans)):
        compared = initialise.compare_with_teacher(setting, name)
        if compared is None:
            continue
        said = f"{name}: {compared.summary()}"
        if not compared.same:  # what cannot work with that was refused before
            yield _ok("vocabulary", f"{said}; text is compared, its chunks, or what is retold")
        elif compared.special:
            fix = "documents begin and end with the recipe's own BOS and EOS; make sure that the student is served so"
            yield Finding(check="vocabulary", level="warning", message=said, fix=fix)
        else:
            yield _ok("vocabulary", said)


def _context(setting: Setting, plans: list[Plan]) -> Iterator[Finding]:
    """Sequences longer than a model's context were refused before: here the room is told."""
    room = {}
    if setting.teacher is not None and not setting.teacher.endpoint:
        room["teacher"] = setting.teacher_config().get_text_config()
    for name in _one_plan_per_size(plans):
        room[name] = initialise.meta_model(setting, name).config.get_text_config()
    length = setting.recipe.data.max_length
    told = []
    for name, config in room.items():
        positions = getattr(config, "max_position_embeddings", None)
        told.append(f"{name} {positions:,}" if positions else f"{name} no limit")
        if positions and positions < length:
            raise BadInput(
                f"{setting.source.locate_key('data', 'max_length')} is {length} and {name} has {positions} positions",
                fix=f"set data.max_length = {positions} or less",
            )
    yield _ok("context", f"blocks of {length} tokens; positions: {', '.join(told)}")


def _sizes(setting: Setting, plans: list[Plan]) -> Iterator[Finding]:
    learning = _one_plan_per_size(_plans_using_teacher(setting, plans))
    if setting.teacher is None or not learning:
        return
    if setting.teacher.endpoint:
        yield _ok("size", "how large the teacher is its endpoint does not tell")
        return
    large = count_parameters(setting.teacher.path)
    for name in learning:
        own = initialise.count_student_parameters(setting, name)
        if own > large:
            place = setting.source.locate_key("students", name)
            yield Finding(
                check="size",
                level="warning",
                message=f"{place} has {own:,} parameters and its teacher {large:,}, the smaller of the two",
                fix="distil from a larger model, or make the student smaller",
                needs_confirmation=True,
            )
        else:
            yield _ok("size", f"{name}: {own:,} parameters, {own / large:.1%} of the teacher's {large:,}")


def _text_licence(setting: Setting) -> Iterator[Finding]:
    stated = licences.text_licence(setting.recipe.data, setting.source.path.resolve().parent)
    yield _ok("text licence", f"text: {stated}" if stated else "text: not stated; data.licence records it")


def _licence(setting: Setting, plans: list[Plan]) -> Iterator[Finding]:
    if not _plans_using_teacher(setting, plans):
        return
    stated = licences.teacher_licences(setting) or "not stated"
    allows = licences.licences_allow_distillation(setting)
    if allows:
        yield _ok("licence", f"teacher: {stated}; a student may learn from its outputs")
        return
    said = "forbids that a student learns from its outputs" if allows is False else "is not known to allow that"
    yield Finding(
        check="licence",
        level="warning",
        message=f"teacher's licence: {stated}; it {said}. The students record that, and a policy can block it",
        fix="ask its owner; what they say goes into teacher.licence_allows_distillation",
    )


class _CacheNeed(NamedTuple):
    """What is stored of the teacher's words for some students, and what there is yet to capture."""

    label: str
    cache: TeacherCache

    def missing_tokens(self) -> int:
        return self.cache.missing_blocks() * self.cache.length

    def missing_bytes(self) -> int:
        return self.missing_tokens() * forecast.stored_bytes(self.cache.form)


def _caches_needed(setting: Setting, plans: list[Plan]) -> list[_CacheNeed]:
    """The caches that plans learn from; of a text that is not written yet there are none."""
    if setting.recipe.generate and setting.generated is None:
        return []
    learning = [plan for plan in plans if plan.objective.uses_teacher]
    chunks = [plan for plan in learning if plan.objective.divergence == "chunks"]
    found = [_CacheNeed("chunks of text", chunks_cache(setting))] if chunks else []
    forms = [form_of(setting, plan) for plan in learning if plan not in chunks]
    for form, cache in caches_for(setting, forms).items():
        heated = f" at temperature {form.temperature:g}" if form.temperature != 1 else ""
        found.append(_CacheNeed(f"{form.kind}{heated}", cache))
    return found


def _runs_teacher_online(setting: Setting, plan: Plan) -> bool:
    """Whether the teacher runs beside a student."""
    objective = plan.objective
    return objective.uses_teacher and objective.divergence != "chunks" and form_of(setting, plan) is None


def _cache(setting: Setting, plans: list[Plan]) -> Iterator[Finding]:
    online = sum(_runs_teacher_online(setting, plan) for plan in plans)
    if online:
        yield _ok("cache", f"the teacher runs online for {online} students")
    for words in _caches_needed(setting, plans):
        if tokens := words.missing_tokens():
            size = format_bytes(words.missing_bytes())
            yield _ok("cache", f"{words.label}: miss, {tokens:,} tokens to capture, about {size}")
        else:
            name, size = words.cache.folder.name, format_bytes(words.cache.disk_bytes())
            yield _ok("cache", f"{words.label}: hit, {name}, {size}")


def _memory(setting: Setting, plans: list[Plan]) -> Iterator[Finding]:
    there, where = available_memory(), "main memory"
    if loading.device() == "cuda":
        import torch

        there, where = torch.cuda.mem_get_info()[0], "memory of the GPU"
    teacher = 0
    if setting.teacher is not None and not setting.teacher.endpoint and _plans_using_teacher(setting, plans):
        teacher = count_parameters(setting.teacher.path)
        yield from _memory_finding("the teacher", forecast.FLOAT * teacher, 2**30, there, where)
    for name, plan in _one_plan_per_size(plans).items():
        online = _runs_teacher_online(setting, plan)
        needed = forecast.memory(setting, plan, teacher if online else 0)
        yield from _memory_finding(f"{name}{' with the teacher beside it' * online}", *needed, there, where)


def _memory_finding(subject: str, certain: int, about: int, available: int, memory_name: str) -> Iterator[Finding]:
    said = f"{subject}: about {format_bytes(certain + about)} of {format_bytes(available)} of free {memory_name}"
    fix = "set training.per_device_train_batch_size or data.max_length lower, or gradient_checkpointing = true"
    if certain > available:
        raise BadInput(
            f"{said}, and {format_bytes(certain)} of it for weights and optimizer", fix="take a larger machine"
        )
    level: Level = "warning" if certain + about > MEMORY_WARNING_SHARE * available else "ok"
    yield Finding(check="memory", level=level, message=said, fix=fix if level == "warning" else None)


def _disk(setting: Setting, plans: list[Plan]) -> Iterator[Finding]:
    needed = forecast.disk(setting, plans) + sum(words.missing_bytes() for words in _caches_needed(setting, plans))
    free = shutil.disk_usage(home()).free
    said = f"about {format_bytes(needed)} of the {format_bytes(free)} that are free in {home()}"
    if needed > free:
        raise BadInput(f"no room on the disk: {said}", fix="make room, or move the state with LIMBECK_HOME")
    yield _ok("disk", said)


def _time(setting: Setting, plans: list[Plan]) -> Iterator[Finding]:
    recipe = setting.recipe
    speed = {name: forecast.training_seconds(setting, plan) for name, plan in _one_plan_per_size(plans).items()}
    pace, teacher = None, 0.0
    words, online = _caches_needed(setting, plans), any(_runs_teacher_online(setting, plan) for plan in plans)
    lacking = max((each.missing_tokens() for each in words), default=0)
    if setting.teacher is not None and not setting.teacher.endpoint and (lacking or online):
        caches = [each.cache for each in words if each.cache.form]
        pace = forecast.teacher_seconds(setting, caches, count_parameters(setting.teacher.path))
        teacher = pace.per_token * lacking
    took: dict[str, float] = {}
    for plan in plans:
        each = speed[plan.student].per_token
        if pace and _runs_teacher_online(setting, plan):
            each += pace.per_token
        took[plan.label] = each * forecast.tokens(setting, plan) if plan.control != "untrained" else 0.0
        if recipe.budget.max_minutes:
            took[plan.label] = min(took[plan.label], 60 * recipe.budget.max_minutes)
        if plan.control == "labels_equal_cost":
            others = [took.get(p.label, 0.0) for p in matching.plans_to_match(recipe, plan) if p.control is None]
            took[plan.label] = max(others, default=0.0) + teacher
    hours = (teacher + sum(took.values())) / 3600
    measured = all(each.measured for each in [*speed.values(), *([pace] if pace else [])])
    asked = usage.expected_usage(setting, plans)
    dollars = asked.usd or 0.0
    parts = [f"about {_duration(3600 * hours)}"]
    if teacher:
        parts.append(f"{_duration(teacher)} of it the teacher's pass")
    parts.append(
        "measured on a few steps" if measured else "reckoned from operations, it may be off by a factor of two"
    )
    if recipe.generate:
        parts.append("the teacher's writing not counted")
    if recipe.budget.usd_per_hour:
        dollars += hours * recipe.budget.usd_per_hour
    if asked.input_tokens:
        parts.append(f"{asked.input_tokens:,} tokens to the endpoint and at most {asked.output_tokens:,} from it")
    parts.append(f"about {dollars:.3g} dollars" if dollars else "no price given: budget.usd_per_hour")
    over = recipe.budget.max_usd and dollars > recipe.budget.max_usd
    yield Finding(
        check="time",
        level="warning" if over else "ok",
        message=", ".join(parts) + (f", of {recipe.budget.max_usd:g} in budget.max_usd" if over else ""),
        fix="a student whose budget ends is stopped and kept" if over else None,
    )


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
