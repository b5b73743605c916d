"""Text by the teacher (`[generate]`): it answers the prompts of `[data]`, what passes the filters is learnt from.

Sequence-level distillation (Kim and Rush, arXiv 1606.07947), as the DeepSeek-R1-Distill models were made
(arXiv 2501.12948). Every answer is kept by what was asked and by a seed of its own (`distill.completions`): a run
that was stopped goes on where it was, other filters cost no new answers, nor do more prompts but for their own.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from distill import corpus, models
from distill.completions import Completions
from distill.corpus import Document
from distill.filters import THOUGHT, Answer, Sieve
from distill.recipe import Data, Generate
from registry.digest import json_digest, text_digest
from registry.errors import BadInput
from registry.resolve import Model
from registry.terminal import progress, say

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from distill.setting import Setting

THINKING = "<think>"
CHARACTERS = 2  # of plain text, for each token of a block: its beginning is a prompt of about half a block

Messages = Sequence[dict[str, str]]


class Prompt(NamedTuple):
    """What the teacher is to answer.

    Attributes:
        path: identifies it; the split and the statistics group by it.
        text: in plain. messages: the turns before the answer; () where it is no conversation.
        row: of the table it is from, for a verifier.
    """

    path: str
    text: str
    messages: Messages
    row: Mapping[str, Any]


class Generated(NamedTuple):
    """What came of it. Seconds and tokens are those of all answers, whichever run had them made."""

    prompts: int
    too_long: int  # prompts left out: with max_new_tokens they pass the teacher's context
    answers: int
    kept: int
    dropped: dict[str, int]  # by filter
    tokens: int  # of all answers
    seconds: float  # a local teacher took
    input_tokens: int  # of a teacher behind an API
    output_tokens: int
    usd: float
    asked: int  # answers that this run had made

    def metrics(self) -> dict[str, float]:
        """As they are logged."""
        facts = {f"generate.{name}": float(value) for name, value in self._asdict().items() if name != "dropped"}
        return facts | {f"generate.dropped.{name}": float(count) for name, count in self.dropped.items()}


class Writes(Protocol):
    """A teacher that answers prompts."""

    def request(self, prompt: Prompt, seed: int) -> dict[str, Any] | None:
        """All that an answer depends on; None where the prompt is too long to be answered."""

    def ask(self, requests: Mapping[str, dict[str, Any]], kept: Completions) -> Iterator[int]:
        """Have requests answered, by their digest, and keep the answers; yields how many more are done."""

    def answer(self, kept: Any) -> Answer:
        """An answer as it was kept."""


def prompts(data: Data, generate: Generate, beside: Path) -> list[Prompt]:
    """The prompts of a recipe's data, ordered by the hash of their path, so that any number is a fair sample.

    Raises BadInput, naming the row, for one that cannot be used.
    """
    if data.kind == "dataset":
        found = _of_rows(data, beside)
    else:
        found = (
            Prompt(document.path, _beginning(document.text, data.max_length), (), {})
            for document in corpus.documents(data, beside)
        )
    kept = sorted((p for p in found if p.text.strip()), key=lambda prompt: text_digest(prompt.path))
    if not kept:
        raise BadInput(f"{data.path or data.kind} has no prompt", fix="give text, a prompt_column or a messages_column")
    return kept[: generate.max_prompts]


def _of_rows(data: Data, beside: Path) -> Iterator[Prompt]:
    path = corpus.located(data, beside)
    asked = data.model_copy(update={"completion_column": None})  # the teacher's stands in its place
    for document, row in corpus.table(asked, path):
        messages = list(document.messages)
        while messages and messages[-1]["role"] == "assistant":
            messages.pop()
        if document.messages and not (messages and messages[-1]["role"] == "user"):
            raise BadInput(f"{document.path}: no user's turn to answer", fix="leave the row out")
        if messages:
            text = "\n".join(message["content"] for message in messages)
        else:
            text = document.prompt or _beginning(document.text, data.max_length)
        yield Prompt(document.path, text, messages, row)


def _beginning(text: str, max_length: int) -> str:
    """The first half of a text, at most about half a block, up to the end of a word."""
    size = min(len(text) // 2, CHARACTERS * max_length)
    while size > 1 and size < len(text) and not text[size].isspace():
        size -= 1
    return text[:size]


def written(setting: Setting) -> tuple[corpus.Corpus, Generated]:
    """Have the prompts of a recipe answered, and write what passes its filters as the recipe's text.

    Raises:
        BadInput: prompts or filters that cannot be used, before any answer; no answer that is kept.
        Unreachable: an endpoint that does not answer; what it answered before is kept.
    """
    recipe, beside = setting.recipe, setting.source.path.resolve().parent
    generate = recipe.generate
    assert generate is not None
    asked = prompts(recipe.data, generate, beside)
    sieve = Sieve(generate.filter, beside)
    for prompt in asked:
        sieve.check(prompt.row, prompt.path)
    teacher = _writer(setting, asked)
    kept = Completions()
    requests: dict[str, dict[str, Any]] = {}
    of_prompt: list[tuple[Prompt, list[str]]] = []  # and the digests of its requests
    for prompt in asked:
        digests = []
        for sample in range(generate.samples):
            seed = int(json_digest([recipe.seed, prompt.text, sample])[:8], 16) >> 1
            if (request := teacher.request(prompt, seed)) is not None:
                digests.append(json_digest(request))
                requests[digests[-1]] = request
        if digests:
            of_prompt.append((prompt, digests))
    if not of_prompt:
        raise BadInput(
            f"none of {len(asked)} prompts leaves room for {generate.max_new_tokens} new tokens in the teacher's "
            "context",
            "context",
            fix="give shorter prompts or a smaller generate.max_new_tokens",
        )
    missing = {digest: request for digest, request in requests.items() if kept.get(digest) is None}
    with progress() as bar:
        task = bar.add_task("teacher writes", total=len(requests), completed=len(requests) - len(missing), rate="")
        for count in teacher.ask(missing, kept):
            bar.update(task, advance=count, rate=_rate(bar.tasks[task].speed))
    pairs = [(prompt, teacher.answer(kept.get(digest))) for prompt, digests in of_prompt for digest in digests]
    lay_out = _layout(setting.tokenizer, _by_chat(setting, asked), generate.system_prompt)
    documents = [
        lay_out(prompt, a.text) for prompt, a in pairs if sieve.keeps(prompt.messages or prompt.text, a, prompt.row)
    ]
    facts = Generated(
        prompts=len(asked),
        too_long=len(asked) - len(of_prompt),
        answers=len(pairs),
        kept=sieve.kept,
        dropped=dict(sieve.dropped),
        tokens=sum(answer.tokens for _, answer in pairs),
        seconds=sum(answer.seconds for _, answer in pairs),
        input_tokens=sum(answer.input_tokens for _, answer in pairs),
        output_tokens=sum(answer.output_tokens for _, answer in pairs),
        usd=0.0,
        asked=len(missing),
    )
    left_out = f", {facts.too_long} too long and left out" if facts.too_long else ""
    say(f"  teacher's text: {len(asked)} prompts{left_out}; {sieve.told()}; {len(missing)} of them written now")
    if not documents:
        raise BadInput(
            f"no answer of the teacher is left to learn from: {sieve.told()}",
            fix="loosen generate.filter or give a larger generate.max_new_tokens; the answers are kept",
        )
    return corpus.write(documents, recipe.name, recipe.data.heldout, "what the teacher wrote"), facts


def _rate(speed: float | None) -> str:
    return f"{speed:,.1f} answers/s" if speed else ""


def _by_chat(setting: Setting, asked: Sequence[Prompt]) -> bool:
    """Whether prompts go through the teacher's chat template. Raises BadInput where they have to and cannot."""
    generate, teacher = setting.recipe.generate, setting.recipe.teacher
    assert generate is not None
    assert teacher is not None
    if teacher.is_endpoint and teacher.tokenizer is None:
        can = True
    else:
        assert setting.teacher is not None
        can = bool(_teacher_tokenizer(setting.teacher, teacher.trust_remote_code).chat_template)
    conversations = any(prompt.messages for prompt in asked)
    plain = setting.recipe.data.prompt_column is None and not conversations
    by_chat = (can and not plain) if generate.chat is None else generate.chat
    needs = "conversations" if conversations else "a system prompt" if generate.system_prompt else None
    if by_chat and not can:
        raise BadInput("generate.chat is set and the teacher's tokenizer has no chat template", fix="leave it out")
    if needs and not by_chat:
        why = "generate.chat is false" if generate.chat is False else "the teacher's tokenizer has none"
        raise BadInput(f"{needs} cannot be given to the teacher without a chat template: {why}")
    return by_chat


@functools.lru_cache(maxsize=2)
def _teacher_tokenizer(teacher: Model, trust_remote_code: bool) -> PreTrainedTokenizerBase:
    return models.load_tokenizer(teacher.path, trust_remote_code)


def turns(prompt: Prompt, system_prompt: str | None) -> list[dict[str, str]]:
    """A prompt as the turns before the answer."""
    messages = list(prompt.messages) or [{"role": "user", "content": prompt.text}]
    if system_prompt and messages[0]["role"] != "system":
        messages.insert(0, {"role": "system", "content": system_prompt})
    return messages


def _writer(setting: Setting, asked: Sequence[Prompt]) -> Writes:
    by_chat = _by_chat(setting, asked)
    return LocalWriter(setting, by_chat)


class LocalWriter:
    """A teacher that runs here; see `Writes`. It is loaded when there is something to be written."""

    def __init__(self, setting: Setting, by_chat: bool) -> None:
        from transformers import AutoConfig

        assert setting.recipe.generate is not None
        assert setting.recipe.teacher is not None
        assert setting.teacher is not None
        self.generate, self.by_chat = setting.recipe.generate, by_chat
        self.model, self.trust_remote_code = setting.teacher, setting.recipe.teacher.trust_remote_code
        self.tokenizer = _teacher_tokenizer(self.model, self.trust_remote_code)
        config = AutoConfig.from_pretrained(self.model.path, trust_remote_code=self.trust_remote_code)
        self.context = getattr(config.get_text_config(), "max_position_embeddings", None)
        self.settings = {
            "teacher": self.model.digest,
            **self.generate.model_dump(include={"max_new_tokens", "temperature", "top_p", "stop"}),
        }

    def request(self, prompt: Prompt, seed: int) -> dict[str, Any] | None:
        """See `Writes.request`."""
        opening = ""
        if self.by_chat:
            text = rendered(self.tokenizer, turns(prompt, self.generate.system_prompt), prompt.path)
            ids = self.tokenizer(text, add_special_tokens=False)["input_ids"]
            if text.rstrip().endswith(THINKING):  # the template opens the reasoning, which is part of the answer
                opening = THINKING + text.rpartition(THINKING)[2]
        else:
            start = self.tokenizer.bos_token_id
            start = self.tokenizer.eos_token_id if start is None else start
            ids = [start, *self.tokenizer(prompt.text, add_special_tokens=False)["input_ids"]]
        if self.context and len(ids) + self.generate.max_new_tokens > self.context:
            return None
        return {**self.settings, "ids": ids, "opening": opening, "seed": seed if self.generate.temperature else 0}

    def ask(self, requests: Mapping[str, dict[str, Any]], kept: Completions) -> Iterator[int]:
        """See `Writes.ask`. Batches are of prompts that are alike in length."""
        from distill.sampling import Writer

        if not requests:
            return
        model = models.load_model(self.model.path, self.trust_remote_code).to(models.device())  # type: ignore[arg-type]
        vocab_size = models.vocabulary(self.tokenizer)
        settings = self.generate.model_dump(include={"max_new_tokens", "temperature", "top_p", "stop"})
        writer = Writer(model, self.tokenizer, vocab_size=vocab_size, **settings)
        # A batch is kept whole: what is missing after a kill falls into the batches that an unbroken run makes.
        order = sorted(requests, key=lambda digest: (len(requests[digest]["ids"]), digest))
        for start in range(0, len(order), self.generate.batch_size):
            batch = order[start : start + self.generate.batch_size]
            asked = [requests[digest] for digest in batch]
            answers = writer.answers([each["ids"] for each in asked], [each["seed"] for each in asked])
            made = {
                digest: answer._replace(text=request["opening"] + answer.text)._asdict()
                for digest, request, answer in zip(batch, asked, answers, strict=True)
            }
            kept.add(made)
            yield len(batch)

    def answer(self, kept: Any) -> Answer:
        """See `Writes.answer`."""
        return Answer(**kept)


def rendered(tokenizer: PreTrainedTokenizerBase, messages: Messages, where: str) -> str:
    """Turns through a chat template, up to where the answer begins. Raises BadInput where it refuses them."""
    from jinja2 import TemplateError

    try:
        return str(tokenizer.apply_chat_template(list(messages), add_generation_prompt=True, tokenize=False))
    except (TemplateError, TypeError, ValueError) as error:
        raise BadInput(f"{where}: the teacher's chat template refuses it: {error}") from error


def _layout(tokenizer: PreTrainedTokenizerBase, by_chat: bool, system_prompt: str | None) -> Any:
    """A function of prompt and answer that gives the document to learn from, by the student's tokenizer."""

    def plain(prompt: Prompt, answer: str) -> Document:
        return Document(prompt.path, prompt.text + answer, prompt=prompt.text)

    def chat(prompt: Prompt, answer: str) -> Document:
        messages = turns(prompt, system_prompt)
        if THOUGHT in answer and not keeps_thoughts:
            # The template would drop the reasoning: what it gives before the answer is the prompt, in plain.
            text = rendered(tokenizer, messages, prompt.path).removeprefix(tokenizer.bos_token or "")
            if text.rstrip().endswith(THINKING):
                text = text.rpartition(THINKING)[0]
            return Document(prompt.path, text + answer, prompt=text)
        return corpus.conversation(prompt.path, [*messages, {"role": "assistant", "content": answer}])

    if not (by_chat and tokenizer.chat_template):
        return plain
    thinks = {"role": "assistant", "content": f"{THINKING}\na thought of it\n{THOUGHT}\n\nwhat it says"}
    probe = tokenizer.apply_chat_template([{"role": "user", "content": "what is asked"}, thinks], tokenize=False)
    keeps_thoughts = "a thought of it" in str(probe)
    return chat
