"""Text from the teacher (`[generate]`): it answers the prompts of `[data]`; filtered answers become the text.

Sequence-level distillation (Kim and Rush, arXiv 1606.07947), as for the DeepSeek-R1-Distill models (arXiv
2501.12948). Every answer is stored by its request, with a seed of its own (`limbeck.distill.teacher.answer_cache`). So
a stopped run resumes, other filters cost no new answers, and more prompts cost only their own answers.
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

MAX_TEXT_SHARE = 0.8  # of budget.max_usd; the rest pays for training on the text


class GenerationForecast(NamedTuple):
    """The most that generating can take.

    Attributes:
        answers: of all prompts.
        missing: answers that are not stored yet.
        input_tokens, output_tokens, usd: of the missing answers; at most.
    """

    prompts: int
    answers: int
    missing: int
    input_tokens: int
    output_tokens: int
    usd: float


class _Requests(NamedTuple):
    """The prompts of a recipe and the requests for their answers.

    Attributes:
        prompts: all of them.
        digests_by_prompt: the prompts that are short enough, with the digests of their requests.
        missing: the requests without a stored answer, by digest.
        cached_tokens: an endpoint's tokens in and out of the stored answers.
        by_chat: prompts go through a chat template.
    """

    prompts: list[Prompt]
    digests_by_prompt: list[tuple[Prompt, list[str]]]
    missing: dict[str, Request]
    cached_tokens: tuple[int, int]
    teacher: TeacherWriter
    answer_cache: AnswerCache
    by_chat: bool


def forecast_generation(setting: Setting) -> GenerationForecast:
    """Forecast what generating takes, without running the teacher.

    Raises BadInput, as `generate_text` does, for prompts or filters that cannot be used.
    """
    requests = _collect_requests(setting, _answer_filter(setting))
    generate, teacher = setting.recipe.generate, setting.recipe.teacher
    assert generate is not None
    assert teacher is not None
    # About four characters per token if the tokenizer is unknown.
    sizes = [len(r["ids"]) if "ids" in r else len(str(r["payload"])) // 4 for r in requests.missing.values()]
    output_tokens = len(requests.missing) * generate.max_new_tokens
    usd = teacher.usd(sum(sizes), output_tokens)
    answers = sum(len(digests) for _, digests in requests.digests_by_prompt)
    return GenerationForecast(len(requests.prompts), answers, len(requests.missing), sum(sizes), output_tokens, usd)


def generate_text(setting: Setting) -> tuple[corpus.Corpus, GenerationStats]:
    """Let the teacher answer the recipe's prompts, and write the answers that pass the filters as its text.

    Raises:
        BadInput: prompts or filters that cannot be used, before the teacher runs; or no answer passes the filters.
        Unreachable: an endpoint does not answer; its earlier answers stay stored.
    """
    recipe = setting.recipe
    assert recipe.generate is not None
    assert recipe.teacher is not None
    answer_filter = _answer_filter(setting)
    requests = _collect_requests(setting, answer_filter)
    pairs, new_answers = _answer_requests(requests)
    lay_out = document_layout(setting.tokenizer, requests.by_chat, recipe.generate.system_prompt)
    documents = [
        lay_out(prompt, answer.text)
        for prompt, answer in pairs
        if answer_filter.keeps(prompt.messages or prompt.text, answer, prompt.row)
    ]
    tokens = [sum(getattr(answer, part) for _, answer in pairs) for part in ("input_tokens", "output_tokens")]
    facts = GenerationStats(
        prompts=len(requests.prompts),
        too_long=len(requests.prompts) - len(requests.digests_by_prompt),
        answers=len(pairs),
        kept_answers=answer_filter.kept_count,
        dropped=dict(answer_filter.dropped),
        tokens=sum(answer.tokens for _, answer in pairs),
        seconds=sum(answer.seconds for _, answer in pairs),
        input_tokens=tokens[0],
        output_tokens=tokens[1],
        usd=recipe.teacher.usd(*tokens),
        new_answers=new_answers,
    )
    _report_generation(facts, requests, answer_filter)
    if not documents:
        raise BadInput(
            f"no answer of the teacher passes the filters: {answer_filter.summary()}",
            fix="loosen generate.filter or raise generate.max_new_tokens; the answers stay stored",
        )
    return corpus.write_corpus(documents, recipe.name, recipe.data.heldout, "what the teacher wrote"), facts


def _report_generation(facts: GenerationStats, requests: _Requests, answer_filter: AnswerFilter) -> None:
    """Print a line about the prompts, the answers and their price."""
    too_long = f", {facts.too_long} of them too long and left out" if facts.too_long else ""
    parts = [f"{facts.prompts} prompts{too_long}", answer_filter.summary()]
    paid = f", ${facts.usd:.2f} in all" if facts.usd else ""
    parts.append(f"{facts.new_answers} written now{paid}")
    refusals = requests.teacher.refusals
    if unsent := len(requests.missing) - facts.new_answers - len(refusals):
        parts.append(f"{MAX_TEXT_SHARE:.0%} of budget.max_usd is spent, {unsent} answers were not requested")
    if refusals:
        parts.append(f"{len(refusals)} requests were refused, such as: {refusals[0]}")
    print_status(f"  teacher's text: {'; '.join(parts)}")


def _answer_filter(setting: Setting) -> AnswerFilter:
    assert setting.recipe.generate is not None
    return AnswerFilter(setting.recipe.generate.filter, setting.source.path.resolve().parent)


def _collect_requests(setting: Setting, answer_filter: AnswerFilter) -> _Requests:
    """Make the requests for all prompts, look up their stored answers, and check the prompts' rows for the filters."""
    recipe, generate = setting.recipe, setting.recipe.generate
    assert generate is not None
    prompts = load_prompts(recipe.data, generate, setting.source.path.resolve().parent)
    for prompt in prompts:
        answer_filter.check(prompt.row, prompt.path)
    answer_cache = AnswerCache()
    teacher, by_chat = _writer(setting, prompts, answer_cache)
    missing: dict[str, Request] = {}
    stored: list[Answer] = []
    digests_by_prompt = []
    for prompt in prompts:
        digests = []
        for sample in range(generate.samples):
            seed = int(json_digest([recipe.seed, prompt.text, sample])[:8], 16) >> 1
            request = teacher.request(prompt, seed)
            if request is None:  # too long
                continue
            digest = json_digest(request)
            digests.append(digest)
            stored_answer = answer_cache.get(digest)
            if stored_answer is None:
                missing[digest] = request
            else:
                stored.append(teacher.answer(stored_answer))
        if digests:
            digests_by_prompt.append((prompt, digests))
    if not digests_by_prompt:
        raise BadInput(
            f"none of {len(prompts)} prompts leaves room for {generate.max_new_tokens} new tokens in the context",
            fix="use shorter prompts or a smaller generate.max_new_tokens",
        )
    cached_tokens = sum(each.input_tokens for each in stored), sum(each.output_tokens for each in stored)
    return _Requests(prompts, digests_by_prompt, missing, cached_tokens, teacher, answer_cache, by_chat)


def _answer_requests(requests: _Requests) -> tuple[list[tuple[Prompt, Answer]], int]:
    """Get the missing answers; every prompt with each of its answers, and the number of new answers."""
    total = len({digest for _, digests in requests.digests_by_prompt for digest in digests})
    new_answers = 0
    with progress_bar() as bar:
        task = bar.add_task("teacher writes", total=total, completed=total - len(requests.missing), rate="")
        for count in requests.teacher.ask(requests.missing, requests.cached_tokens):
            new_answers += count
            speed = bar.tasks[task].speed
            bar.update(task, advance=count, rate=f"{speed:,.1f} answers/s" if speed else "")
    pairs = [
        (prompt, requests.teacher.answer(stored))
        for prompt, digests in requests.digests_by_prompt
        for digest in digests
        if (stored := requests.answer_cache.get(digest)) is not None
    ]
    return pairs, new_answers


def _writer(setting: Setting, all_prompts: Sequence[Prompt], answer_cache: AnswerCache) -> tuple[TeacherWriter, bool]:
    """The teacher, and whether prompts go through a chat template."""
    recipe, model = setting.recipe, setting.teacher
    assert model is not None
    assert recipe.teacher is not None
    assert recipe.generate is not None
    tokenizer = setting.teacher_tokenizer() if model.has_tokenizer else None
    by_chat = _uses_chat(setting, all_prompts, has_template=tokenizer is None or bool(tokenizer.chat_template))
    if model.endpoint:
        limit = recipe.budget.max_usd
        teacher = EndpointTeacher(model, recipe.teacher, answer_cache, MAX_TEXT_SHARE * limit if limit else None)
        return EndpointWriter(teacher, tokenizer, recipe.generate, by_chat), by_chat
    assert tokenizer is not None
    trust = recipe.teacher.trust_remote_code
    return LocalWriter(model, tokenizer, recipe.generate, by_chat, answer_cache, trust), by_chat


def _uses_chat(setting: Setting, all_prompts: Sequence[Prompt], has_template: bool) -> bool:
    """Whether prompts go through a chat template. Raises BadInput if they must and cannot.

    Args:
        has_template: whether the teacher's tokenizer has one; true for an endpoint whose tokenizer is unknown.
    """
    generate = setting.recipe.generate
    assert generate is not None
    has_conversations = any(prompt.messages for prompt in all_prompts)
    is_plain_text = setting.recipe.data.prompt_column is None and not has_conversations
    needs_template = None  # what cannot be given without a template
    if has_conversations:
        needs_template = "conversations"
    elif generate.system_prompt:
        needs_template = "a system prompt"
    by_chat = generate.chat
    if by_chat is None:
        by_chat = has_template and (needs_template is not None or not is_plain_text)
    if by_chat and not has_template:
        raise BadInput("generate.chat is set, but the teacher's tokenizer has no chat template", fix="leave it out")
    if needs_template and not by_chat:
        reason = "generate.chat is false" if generate.chat is False else "the teacher's tokenizer has none"
        raise BadInput(f"{needs_template} cannot be given to the teacher without a chat template: {reason}")
    return by_chat
