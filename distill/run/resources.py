"""Preflight checks of what a recipe takes: teacher caches, memory, disk space and time."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from typing import TYPE_CHECKING, NamedTuple

from limbeck.distill.context import Setting, count_parameters
from limbeck.distill.models import loading
from limbeck.distill.recipe.grid import Plan
from limbeck.distill.run import forecast
from limbeck.distill.run.findings import Finding, ok, one_plan_per_student, plans_using_teacher
from limbeck.distill.run.forecast import Memory
from limbeck.distill.students import matching
from limbeck.distill.teacher import usage
from limbeck.distill.teacher.signal import caches_for, chunks_cache, form_of
from limbeck.registry.core.errors import BadInput
from limbeck.registry.core.home import home
from limbeck.registry.core.machine import available_memory
from limbeck.registry.core.terminal import format_bytes

if TYPE_CHECKING:
    from limbeck.distill.cache.teacher_cache import TeacherCache

MEMORY_WARNING_SHARE = 0.8  # of the free memory


class _CacheNeed(NamedTuple):
    """A teacher cache that students learn from, and how much of it is missing."""

    label: str
    cache: TeacherCache

    def missing_tokens(self) -> int:
        return self.cache.missing_blocks() * self.cache.length

    def missing_bytes(self) -> int:
        return self.missing_tokens() * forecast.stored_bytes(self.cache.form)


def _caches_needed(setting: Setting, plans: list[Plan]) -> list[_CacheNeed]:
    """The caches that plans learn from; none if the teacher has not written the text yet."""
    if setting.recipe.generate and setting.generated is None:
        return []
    learning = [plan for plan in plans if plan.objective.uses_teacher]
    chunks = [plan for plan in learning if plan.objective.divergence == "chunks"]
    needs = [_CacheNeed("text chunks", chunks_cache(setting))] if chunks else []
    forms = [form_of(setting, plan) for plan in learning if plan not in chunks]
    for form, cache in caches_for(setting, forms).items():
        heated = f" at temperature {form.temperature:g}" if form.temperature != 1 else ""
        needs.append(_CacheNeed(f"{form.kind}{heated}", cache))
    return needs


def _runs_teacher_online(setting: Setting, plan: Plan) -> bool:
    """Whether the teacher runs during a student's training."""
    objective = plan.objective
    return objective.uses_teacher and objective.divergence != "chunks" and form_of(setting, plan) is None


def check_cache(setting: Setting, plans: list[Plan]) -> Iterator[Finding]:
    online = sum(_runs_teacher_online(setting, plan) for plan in plans)
    if online:
        yield ok("cache", f"the teacher runs online for {online} students")
    for need in _caches_needed(setting, plans):
        if tokens := need.missing_tokens():
            size = format_bytes(need.missing_bytes())
            yield ok("cache", f"{need.label}: miss, {tokens:,} tokens to capture, about {size}")
        else:
            name, size = need.cache.folder.name, format_bytes(need.cache.disk_bytes())
            yield ok("cache", f"{need.label}: hit, {name}, {size}")


def check_memory(setting: Setting, plans: list[Plan]) -> Iterator[Finding]:
    available, memory_name = available_memory(), "main memory"
    if loading.device() == "cuda":
        import torch

        available, memory_name = torch.cuda.mem_get_info()[0], "GPU memory"
    teacher = 0
    if setting.teacher is not None and not setting.teacher.endpoint and plans_using_teacher(setting, plans):
        teacher = count_parameters(setting.teacher.path)
        yield _memory_finding("the teacher", Memory(forecast.FLOAT * teacher, 2**30), available, memory_name)
    for name, plan in one_plan_per_student(plans).items():
        online = _runs_teacher_online(setting, plan)
        needed = forecast.memory(setting, plan, teacher if online else 0)
        subject = f"{name} with the teacher online" if online else name
        yield _memory_finding(subject, needed, available, memory_name)


def _memory_finding(subject: str, needed: Memory, available: int, memory_name: str) -> Finding:
    message = f"{subject}: about {format_bytes(needed.total)} of {format_bytes(available)} of free {memory_name}"
    if needed.certain > available:
        raise BadInput(
            f"{message}; weights, gradients and optimizer alone take {format_bytes(needed.certain)}",
            fix="use a machine with more memory",
        )
    if needed.total <= MEMORY_WARNING_SHARE * available:
        return ok("memory", message)
    fix = "lower training.per_device_train_batch_size or data.max_length, or set activation_checkpointing = true"
    return Finding(check="memory", level="warning", message=message, fix=fix)


def check_disk(setting: Setting, plans: list[Plan]) -> Iterator[Finding]:
    needed = forecast.disk(setting, plans) + sum(need.missing_bytes() for need in _caches_needed(setting, plans))
    free = shutil.disk_usage(home()).free
    message = f"about {format_bytes(needed)} of {format_bytes(free)} free in {home()}"
    if needed > free:
        raise BadInput(f"not enough disk space: {message}", fix="free some, or move the state with LIMBECK_HOME")
    yield ok("disk", message)


class _TimeForecast(NamedTuple):
    """Seconds of a run.

    Attributes:
        teacher: of the teacher's pass that fills caches.
        students: of each student, by label.
        measured: whether all speeds were measured, none estimated.
    """

    teacher: float
    students: dict[str, float]
    measured: bool

    @property
    def total(self) -> float:
        return self.teacher + sum(self.students.values())


def _forecast_time(setting: Setting, plans: list[Plan]) -> _TimeForecast:
    budget = setting.recipe.budget
    speeds = {name: forecast.training_speed(setting, plan) for name, plan in one_plan_per_student(plans).items()}
    teacher_speed, teacher_pass = None, 0.0
    needs, online = _caches_needed(setting, plans), any(_runs_teacher_online(setting, plan) for plan in plans)
    missing_tokens = max((need.missing_tokens() for need in needs), default=0)
    if setting.teacher is not None and not setting.teacher.endpoint and (missing_tokens or online):
        caches = [need.cache for need in needs if need.cache.form]
        teacher_speed = forecast.teacher_speed(setting, caches, count_parameters(setting.teacher.path))
        teacher_pass = teacher_speed.seconds_per_token * missing_tokens
    students: dict[str, float] = {}
    for plan in plans:
        per_token = speeds[plan.student].seconds_per_token
        if teacher_speed and _runs_teacher_online(setting, plan):
            per_token += teacher_speed.seconds_per_token
        seconds = per_token * forecast.tokens(setting, plan) if plan.control != "untrained" else 0.0
        if budget.max_minutes:
            seconds = min(seconds, 60 * budget.max_minutes)
        if plan.control == "labels_equal_cost":
            matched = matching.plans_to_match(setting.recipe, plan)
            distilled = [students.get(other.label, 0.0) for other in matched if other.control is None]
            seconds = max(distilled, default=0.0) + teacher_pass
        students[plan.label] = seconds
    measured = all(speed.measured for speed in (*speeds.values(), teacher_speed) if speed is not None)
    return _TimeForecast(teacher_pass, students, measured)


def check_time(setting: Setting, plans: list[Plan]) -> Iterator[Finding]:
    recipe = setting.recipe
    expected = _forecast_time(setting, plans)
    parts = [f"about {_duration(expected.total)}"]
    if expected.teacher:
        parts.append(f"{_duration(expected.teacher)} of it for the teacher's pass")
    method = "measured on a few steps" if expected.measured else "estimated from operations, within a factor of two"
    parts.append(method)
    if recipe.generate:
        parts.append("without the time in which the teacher writes")
    endpoint = usage.expected_usage(setting, plans)
    usd = endpoint.usd or 0.0
    if recipe.budget.usd_per_hour:
        usd += expected.total / 3600 * recipe.budget.usd_per_hour
    if endpoint.input_tokens:
        tokens = f"{endpoint.input_tokens:,} tokens to the endpoint and at most {endpoint.output_tokens:,} from it"
        parts.append(tokens)
    parts.append(f"about {usd:.3g} dollars" if usd else "no price: budget.usd_per_hour is not set")
    if recipe.budget.max_usd and usd > recipe.budget.max_usd:
        parts[-1] += f", more than budget.max_usd = {recipe.budget.max_usd:g}"
        fix = "training stops when the budget is used, and the student is kept"
        yield Finding(check="time", level="warning", message=", ".join(parts), fix=fix)
        return
    yield ok("time", ", ".join(parts))


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
