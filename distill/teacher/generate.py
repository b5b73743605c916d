"""Text by the teacher (`[generate]`): it answers the prompts of `[data]`, what passes the filters is learnt from.

Sequence-level distillation (Kim and Rush, arXiv 1606.07947), as the DeepSeek-R1-Distill models were made
(arXiv 2501.12948). Every answer is kept by what was asked and by a seed of its own (`teacher.answer_cache`): a run
that was stopped goes on where it was, other filters cost no new answers, nor do more prompts but for their own.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

from limbeck.distill.context import GenerationStats
from limbeck.distill.data import corpus
from limbeck.distill.data.filters import Answer, AnswerFilter
from limbeck.distill.data.prompts import Prompt, document_layout, load_prompts
from limbeck.distill.teacher.answer_cache import AnswerCache
from limbeck.distill.teacher.endpoint import EndpointTeacher
from limbeck.distill.teacher.writers import EndpointWriter, LocalWriter, Request, TeacherWriter
from limbeck.registry.core.digest import json_digest
from limbeck.registry.core.errors import BadInput
from limbeck.registry.core.terminal import print_status, progress_bar

if TYPE_CHECKING:
    from limbeck.distill.context import Setting

TEXT_SHARE = 0.8  # of budget.max_usd, at most: the rest is left to train on the text


class GenerationForecast(NamedTuple):
    """What generating will take at most, before any of it."""

    prompts: int
    answers: int
    missing: int  # answers that are not there from before
    input_tokens: int  # of those
    output_tokens: int  # at most
    usd: float  # at most


class _Requests(NamedTuple):
    """The prompts of a recipe and the requests for their answers, by digest."""

    prompts: list[Prompt]
    digests_by_prompt: list[tuple[Prompt, list[str]]]  # those short enough, and the digests of their requests
    missing: dict[str, Request]  # those that were not answered before
    cached_tokens: tuple[int, int]  # an endpoint's tokens in and out, of those that were
    teacher: TeacherWriter
    answer_cache: AnswerCache
    by_chat: bool


def forecast_generation(setting: Setting) -> GenerationForecast:
    """What generating will take at most; asks nobody. Raises BadInput as `written` does before any answer."""
    asked = _collect_requests(setting, _answer_filter(setting))
    generate, teacher = setting.recipe.generate, setting.recipe.teacher
    assert generate is not None
    assert teacher is not None
    sizes = [len(r["ids"]) if "ids" in r else len(str(r["payload"])) // 4 for r in asked.missing.values()]
    new = len(asked.missing) * generate.max_new_tokens
    usd = teacher.usd(sum(sizes), new)
    answers = sum(len(digests) for _, digests in asked.digests_by_prompt)
    return GenerationForecast(len(asked.prompts), answers, len(asked.missing), sum(sizes), new, usd)


def generate_text(setting: Setting) -> tuple[corpus.Corpus, GenerationStats]:
    """Have the prompts of a recipe answered, and write what passes its filters as the recipe's text.

    Raises:
        BadInput: prompts or filters that cannot be used, before any answer; no answer that is kept.
        Unreachable: an endpoint that does not answer; what it answered before is kept.
    """
    recipe = setting.recipe
    assert recipe.generate is not None
    assert recipe.teacher is not None
    sieve = _answer_filter(setting)
    asked = _collect_requests(setting, sieve)
    pairs, made = _answers(asked)
    lay_out = document_layout(setting.tokenizer, asked.by_chat, recipe.generate.system_prompt)
    documents = [
        lay_out(prompt, answer.text)
        for prompt, answer in pairs
        if sieve.keeps(prompt.messages or prompt.text, answer, prompt.row)
    ]
    tokens = [sum(getattr(answer, part) for _, answer in pairs) for part in ("input_tokens", "output_tokens")]
    facts = GenerationStats(
        prompts=len(asked.prompts),
        too_long=len(asked.prompts) - len(asked.digests_by_prompt),
        answers=len(pairs),
        kept_answers=sieve.kept_count,
        dropped=dict(sieve.dropped),
        tokens=sum(answer.tokens for _, answer in pairs),
        seconds=sum(answer.seconds for _, answer in pairs),
        input_tokens=tokens[0],
        output_tokens=tokens[1],
        usd=recipe.teacher.usd(*tokens),
        new_answers=made,
    )
    left_out = f", {facts.too_long} of them too long and left out" if facts.too_long else ""
    refused = asked.teacher.refusals
    unasked = len(asked.missing) - made - len(refused)
    ended = f"; {TEXT_SHARE:.0%} of budget.max_usd is spent, {unasked} answers were not asked for" if unasked else ""
    ended += f"; {len(refused)} requests were refused, such as: {refused[0]}" if refused else ""
    paid = f", ${facts.usd:.2f} in all" if facts.usd else ""
    print_status(
        f"  teacher's text: {facts.prompts} prompts{left_out}; {sieve.summary()}; {made} written now{paid}{ended}"
    )
    if not documents:
        raise BadInput(
            f"no answer of the teacher is left to learn from: {sieve.summary()}",
            fix="loosen generate.filter or give a larger generate.max_new_tokens; the answers are kept",
        )
    return corpus.write_corpus(documents, recipe.name, recipe.data.heldout, "what the teacher wrote"), facts


def _answer_filter(setting: Setting) -> AnswerFilter:
    assert setting.recipe.generate is not None
    return AnswerFilter(setting.recipe.generate.filter, setting.source.path.resolve().parent)


def _collect_requests(setting: Setting, answer_filter: AnswerFilter) -> _Requests:
    """What is to be asked, and what of it was answered before; all that can be checked is checked."""
    recipe, generate = setting.recipe, setting.recipe.generate
    assert generate is not None
    asked = load_prompts(recipe.data, generate, setting.source.path.resolve().parent)
    for prompt in asked:
        answer_filter.check(prompt.row, prompt.path)
    kept = AnswerCache()
    teacher, by_chat = _writer(setting, asked, kept)
    missing: dict[str, Request] = {}
    before = (0, 0)
    of_prompt = []
    for prompt in asked:
        digests = []
        for sample in range(generate.samples):
            seed = int(json_digest([recipe.seed, prompt.text, sample])[:8], 16) >> 1
            if (request := teacher.request(prompt, seed)) is not None:
                digests.append(json_digest(request))
                if (there := kept.get(digests[-1])) is None:
                    missing[digests[-1]] = request
                else:
                    answer = teacher.answer(there)
                    before = before[0] + answer.input_tokens, before[1] + answer.output_tokens
        if digests:
            of_prompt.append((prompt, digests))
    if not of_prompt:
        raise BadInput(
            f"none of {len(asked)} prompts leaves room for {generate.max_new_tokens} new tokens in the context",
            fix="give shorter prompts or a smaller generate.max_new_tokens",
        )
    return _Requests(asked, of_prompt, missing, before, teacher, kept, by_chat)


def _answers(requests: _Requests) -> tuple[list[tuple[Prompt, Answer]], int]:
    """Every prompt with each of its answers, and how many were made now."""
    total = len({digest for _, digests in requests.digests_by_prompt for digest in digests})
    made = 0
    with progress_bar() as bar:
        task = bar.add_task("teacher writes", total=total, completed=total - len(requests.missing), rate="")
        for count in requests.teacher.ask(requests.missing, requests.cached_tokens):
            made += count
            speed = bar.tasks[task].speed
            bar.update(task, advance=count, rate=f"{speed:,.1f} answers/s" if speed else "")
    pairs = [
        (prompt, requests.teacher.answer(kept))
        for prompt, digests in requests.digests_by_prompt
        for digest in digests
        if (kept := requests.answer_cache.get(digest)) is not None
    ]
    return pairs, made


def _writer(setting: Setting, all_prompts: Sequence[Prompt], answer_cache: AnswerCache) -> tuple[TeacherWriter, bool]:
    """The teacher, and whether it is asked by chat."""
    recipe, model = setting.recipe, setting.teacher
    assert model is not None
    assert recipe.teacher is not None
    assert recipe.generate is not None
    tokenizer = None
    if model.has_tokenizer:
        tokenizer = setting.teacher_tokenizer()
    by_chat = _by_chat(setting, all_prompts, has_template=tokenizer is None or bool(tokenizer.chat_template))
    if model.endpoint:
        limit = recipe.budget.max_usd
        teacher = EndpointTeacher(model, recipe.teacher, answer_cache, TEXT_SHARE * limit if limit else None)
        return EndpointWriter(teacher, tokenizer, recipe.generate, by_chat), by_chat
    assert tokenizer is not None
    trust = recipe.teacher.trust_remote_code
    return LocalWriter(model, tokenizer, recipe.generate, by_chat, answer_cache, trust), by_chat


def _by_chat(setting: Setting, all_prompts: Sequence[Prompt], has_template: bool) -> bool:
    """Whether prompts go through a chat template. Raises BadInput where they have to and cannot.

    Args:
        has_template: the teacher's tokenizer has a template; an endpoint without a tokenizer is trusted to have one.
    """
    generate = setting.recipe.generate
    assert generate is not None
    conversations = any(prompt.messages for prompt in all_prompts)
    plain = setting.recipe.data.prompt_column is None and not conversations
    needs = "conversations" if conversations else "a system prompt" if generate.system_prompt else None
    by_chat = (has_template and (bool(needs) or not plain)) if generate.chat is None else generate.chat
    if by_chat and not has_template:
        raise BadInput("generate.chat is set and the teacher's tokenizer has no chat template", fix="leave it out")
    if needs and not by_chat:
        why = "generate.chat is false" if generate.chat is False else "the teacher's tokenizer has none"
        raise BadInput(f"{needs} cannot be given to the teacher without a chat template: {why}")
    return by_chat
