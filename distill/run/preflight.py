"""The preflight of a recipe: errors, warnings and forecasts, before any long work."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from limbeck.distill.context import Setting, count_parameters, errors_at
from limbeck.distill.losses.hidden_states import depth, layer_map
from limbeck.distill.recipe import grid, load
from limbeck.distill.recipe.grid import Plan
from limbeck.distill.recipe.load import Source
from limbeck.distill.run import resources
from limbeck.distill.run.findings import Finding, error_finding, ok, one_plan_per_student, plans_using_teacher
from limbeck.distill.run.prepare import prepare_setting
from limbeck.distill.students import initialise, licences
from limbeck.distill.students.keys import student_key
from limbeck.registry.core.errors import BadInput, LimbeckError
from limbeck.registry.core.terminal import print_status

if TYPE_CHECKING:
    from limbeck.registry.mlflow.store import Store


def check_recipe(path: Path, overrides: list[str], store: Store) -> list[Finding]:
    """All findings on the recipe at `path`. Trains no student, registers nothing, and uses no endpoint's model."""
    try:
        recipe = load.load_recipe(path, overrides)
        setting = prepare_setting(recipe, Source(path, tuple(overrides)), store)
    except LimbeckError as error:
        return [error_finding("recipe", error)]
    plans = grid.plan_students(recipe)
    findings = [_text(setting)]
    missing = plans
    if not recipe.generate:
        keys = {plan.label: student_key(setting, plan) for plan in plans}
        missing = [
            plan
            for plan in plans
            if not store.find_version(recipe.name, engine="torch", recipe_digest=keys[plan.label])
        ]
        made = len(plans) - len(missing)
        findings.append(ok("students", f"{len(plans)} in all{f', {made} of them already made' if made else ''}"))
    findings += preflight(setting, missing)
    if missing and not any(finding.level == "error" for finding in findings):
        findings += _run_check("time", lambda: resources.check_time(setting, missing))
    return findings


def preflight(setting: Setting, plans: list[Plan]) -> list[Finding]:
    """The findings on the students to make that take no time; every run begins with them."""
    checks: list[tuple[str, Callable[[], Iterator[Finding]]]] = [
        ("student", lambda: _students(setting, plans)),
        ("vocabulary", lambda: _vocabularies(setting, plans)),
        ("context", lambda: _context(setting, plans)),
        ("size", lambda: _sizes(setting, plans)),
        ("licence", lambda: _licence(setting, plans)),
        ("text licence", lambda: _text_licence(setting)),
        ("cache", lambda: resources.check_cache(setting, plans)),
        ("memory", lambda: resources.check_memory(setting, plans)),
        ("disk", lambda: resources.check_disk(setting, plans)),
    ]
    findings: list[Finding] = []
    for name, run in checks if plans else ():
        findings += _run_check(name, run)
        if any(finding.level == "error" for finding in findings):  # later checks may depend on this one
            break
    return findings


def confirm_findings(findings: Sequence[Finding], yes: bool) -> None:
    """Print a run's warnings, and ask for confirmation if needed, unless `yes`.

    Raises BadInput for an error, and for a finding that needs confirmation and does not get it.
    """
    for finding in findings:
        if finding.level == "error":
            raise BadInput(finding.message, fix=finding.fix)
        must_ask = finding.needs_confirmation and not yes
        if must_ask and not sys.stdin.isatty():
            raise BadInput(finding.message, fix=f"{finding.fix}; or add --yes to continue anyway")
        if finding.level == "warning":
            print_status(f"  warning: {finding.message}")
        if must_ask and not click.confirm("continue anyway?", err=True):
            raise BadInput(finding.message, fix=finding.fix)


def _run_check(name: str, run: Callable[[], Iterator[Finding]]) -> list[Finding]:
    findings: list[Finding] = []
    try:
        findings.extend(run())
    except LimbeckError as error:
        findings.append(error_finding(name, error))
    return findings


def _text(setting: Setting) -> Finding:
    if setting.recipe.generate:
        return ok("text", "the teacher writes it when the recipe runs")
    text = setting.corpus
    return ok(
        "text",
        f"{text.train_documents:,} training documents, {text.heldout_documents:,} held out; "
        f"{setting.train.ids.size:,} tokens in blocks of {setting.recipe.data.max_length}",
    )


def _students(setting: Setting, plans: list[Plan]) -> Iterator[Finding]:
    for plan in one_plan_per_student(plans).values():
        initialise.check(setting, plan)
    for plan in plans:
        if plan.objective.layers and setting.teacher:
            with errors_at(setting.source, "objectives", plan.objective_name, "layers"):
                student_config = initialise.meta_model(setting, plan.student).config
                layer_map(plan.objective.layers, depth(student_config), depth(setting.teacher_config()))
    yield from ()  # only errors, no findings


def _vocabularies(setting: Setting, plans: list[Plan]) -> Iterator[Finding]:
    for name in one_plan_per_student(plans_using_teacher(setting, plans)):
        compared = initialise.compare_with_teacher(setting, name)
        if compared is None:
            continue
        summary = f"{name}: {compared.summary()}"
        if not compared.same:  # recipes that need equal tokens were refused before
            yield ok("vocabulary", f"{summary}; the student learns from text chunks, text or retokenized outputs")
        elif compared.special:
            fix = (
                "documents begin and end with the recipe's BOS and EOS; make sure that the student is served with them"
            )
            yield Finding(check="vocabulary", level="warning", message=summary, fix=fix)
        else:
            yield ok("vocabulary", summary)


def _context(setting: Setting, plans: list[Plan]) -> Iterator[Finding]:
    configs = {}
    if setting.teacher is not None and not setting.teacher.endpoint:
        configs["teacher"] = setting.teacher_config().get_text_config()
    for name in one_plan_per_student(plans):
        configs[name] = initialise.meta_model(setting, name).config.get_text_config()
    length = setting.recipe.data.max_length
    contexts = []
    for name, config in configs.items():
        positions = getattr(config, "max_position_embeddings", None)
        contexts.append(f"{name} {positions:,}" if positions else f"{name} no limit")
        if positions and positions < length:
            raise BadInput(
                f"{setting.source.locate_key('data', 'max_length')} is {length} and {name} has {positions} positions",
                fix=f"set data.max_length = {positions} or less",
            )
    yield ok("context", f"blocks of {length} tokens; positions: {', '.join(contexts)}")


def _sizes(setting: Setting, plans: list[Plan]) -> Iterator[Finding]:
    learning = one_plan_per_student(plans_using_teacher(setting, plans))
    if setting.teacher is None or not learning:
        return
    if setting.teacher.endpoint:
        yield ok("size", "the endpoint does not report the teacher's size")
        return
    teacher_size = count_parameters(setting.teacher.path)
    for name in learning:
        size = initialise.count_student_parameters(setting, name)
        if size > teacher_size:
            place = setting.source.locate_key("students", name)
            yield Finding(
                check="size",
                level="warning",
                message=f"{place} has {size:,} parameters; its teacher is smaller, with {teacher_size:,}",
                fix="distil from a larger model, or make the student smaller",
                needs_confirmation=True,
            )
        else:
            share = size / teacher_size
            yield ok("size", f"{name}: {size:,} parameters, {share:.1%} of the teacher's {teacher_size:,}")


def _text_licence(setting: Setting) -> Iterator[Finding]:
    stated = licences.text_licence(setting.recipe.data, setting.source.path.resolve().parent)
    yield ok("text licence", f"text: {stated}" if stated else "text: not stated; set data.licence to record it")


def _licence(setting: Setting, plans: list[Plan]) -> Iterator[Finding]:
    if not plans_using_teacher(setting, plans):
        return
    stated = licences.teacher_licences(setting) or "not stated"
    allows = licences.licences_allow_distillation(setting)
    if allows:
        yield ok("licence", f"teacher: {stated}; it allows distillation")
        return
    verdict = "forbids distillation" if allows is False else "is not known to allow distillation"
    yield Finding(
        check="licence",
        level="warning",
        message=f"teacher's licence: {stated}; it {verdict}. The students record this, and a policy can block them",
        fix="ask its owner, and set teacher.licence_allows_distillation to the answer",
    )
