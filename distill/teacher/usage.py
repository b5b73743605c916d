"""What a teacher's texts and an endpoint's tokens cost; the forward passes of a local teacher are not part of it."""

from __future__ import annotations

from typing import NamedTuple

from limbeck.distill.context import Setting
from limbeck.distill.recipe.grid import Plan
from limbeck.distill.teacher import generate, logprobs
from limbeck.distill.teacher.signal import caches_for, form_of


class TeacherUsage(NamedTuple):
    """The cost of everything that a student learns from, in full: in any run, however many students share it.

    Attributes:
        seconds: in which a local teacher wrote text.
        input_tokens, output_tokens: of an endpoint.
        usd: at the recipe's prices; None if it has none.
        model: the endpoint's model; None for a local teacher.
    """

    seconds: float = 0.0
    input_tokens: int = 0
    output_tokens: int = 0
    usd: float | None = None
    model: str | None = None


def usage_of_plan(setting: Setting, plan: Plan) -> TeacherUsage:
    """The usage of the teacher that a student learns from."""
    teacher = setting.recipe.teacher
    if teacher is None or setting.teacher is None or plan.control == "untrained":
        return TeacherUsage()
    seconds, tokens = 0.0, [0, 0]
    if setting.generated:
        seconds = setting.generated.seconds
        tokens = [setting.generated.input_tokens, setting.generated.output_tokens]
    if setting.teacher.endpoint is None:
        return TeacherUsage(seconds)
    if plan.objective.uses_teacher:
        tokens = [sum(pair) for pair in zip(tokens, logprobs.tokens_sent(setting.train), strict=True)]
    priced = teacher.usd_per_million_input_tokens or teacher.usd_per_million_output_tokens
    return TeacherUsage(
        seconds, tokens[0], tokens[1], teacher.usd(*tokens) if priced else None, setting.teacher.endpoint.name
    )


def expected_usage(setting: Setting, plans: list[Plan]) -> TeacherUsage:
    """The most that an endpoint will be used for; stored answers and cached outputs are not requested again."""
    teacher, model = setting.recipe.teacher, setting.teacher
    if teacher is None or model is None or model.endpoint is None:
        return TeacherUsage()
    tokens = [0, 0]
    if setting.recipe.generate and setting.generated is None:
        expected = generate.forecast_generation(setting)
        tokens = [expected.input_tokens, expected.output_tokens]
        if any(plan.objective.uses_teacher for plan in plans):  # prompt logprobs of every answer
            tokens = [2 * tokens[0] + tokens[1], tokens[1] + expected.answers]
    else:
        forms = [form_of(setting, plan) for plan in plans if plan.objective.uses_teacher]
        caches = caches_for(setting, forms)
        missing = max(
            (cache.missing_blocks() / cache.num_blocks for cache in caches.values() if cache.num_blocks), default=0.0
        )
        tokens = [round(missing * count) for count in logprobs.tokens_sent(setting.train)]
    return TeacherUsage(0.0, tokens[0], tokens[1], teacher.usd(*tokens), model.endpoint.name)
