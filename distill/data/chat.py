"""From a prompt with its completion, or a conversation, to tokens, and which of them are the answers."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from itertools import pairwise, takewhile
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from limbeck.distill.data.document import Document
from limbeck.registry.core.errors import BadInput

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

GENERATION_MARK = re.compile(r"\{%-?\s*generation\s*-?%\}")  # a template that says itself what the assistant writes


class EncodedDocument(NamedTuple):
    """A document's tokens up to the end of its last answer.

    Attributes:
        ids: (n,) int32.
        learnt: (n,) bool: the tokens of answers, with the one that ends each.
        size: bytes of UTF-8 that the learnt tokens stand for.
    """

    ids: np.ndarray
    targets: np.ndarray
    text_bytes: int


class Span(NamedTuple):
    """Characters `start` to `end` of a text."""

    start: int
    end: int


def encode_document(document: Document, tokenizer: PreTrainedTokenizerBase, start: int, end: int) -> EncodedDocument:
    """The tokens of a document of which only the answers are learnt.

    A conversation is as the chat template lays it out. A prompt comes after the start token, as lm-eval gives it
    to a model, unless it begins as a rendered chat does: with BOS, or with a special token where there is no BOS.
    Where an answer ends in no special token of its own, EOS ends it.

    Args:
        start, end: the ids of the start token and of EOS.

    Raises:
        BadInput: no answer, no chat template or one that does not fit; it names the document.
    """
    try:
        if document.messages:
            text, spans = _render_conversation(document.messages, tokenizer)
            size = sum(len(turn["content"].encode()) for turn in document.messages if turn["role"] == "assistant")
        else:
            text, spans = document.text, [Span(len(document.prompt), len(document.text))]
            size = len(document.completion.encode())
        if not size:
            raise BadInput(
                "there is no answer to learn",
                fix="give answers (data.completion_column, or an assistant's message), or let the teacher write them: "
                "[generate]",
            )
    except BadInput as error:
        error.message = f"{document.path}: {error.message}"
        raise
    ids, learnt = _tokens(text, spans, tokenizer)
    if not learnt.any():
        raise BadInput(f"{document.path}: its answer is no token", fix="leave it out")
    last = int(np.flatnonzero(learnt)[-1]) + 1
    ids, learnt = ids[:last], learnt[:last]
    special = set(tokenizer.all_special_ids)
    if ids[-1] not in special:
        ids, learnt = np.append(ids, np.int32(end)), np.append(learnt, True)
    begun = ids[0] == start or (tokenizer.bos_token_id is None and ids[0] in special)
    if not document.messages and not begun:
        ids, learnt = np.insert(ids, 0, start), np.insert(learnt, 0, False)
    return EncodedDocument(ids, learnt, size)


def _tokens(text: str, spans: Sequence[Span], tokenizer: PreTrainedTokenizerBase) -> tuple[np.ndarray, np.ndarray]:
    """The ids of a text (n,) int32, and which of them lie in `spans` (n,) bool.

    Where a token would reach across the edge of an answer, or a tokenizer does not tell where its tokens lie, the
    text is cut there before: a model that answers has been given the tokens of the prompt alone.
    """
    starts, stops = np.array(spans).T
    edges = sorted({edge for span in spans for edge in span} - {0, len(text)})
    if tokenizer.is_fast:
        found = tokenizer(text, add_special_tokens=False, return_attention_mask=False, return_offsets_mapping=True)
        begins, ends = np.array(found["offset_mapping"]).reshape(-1, 2).T
        if not _has_split_token(begins, ends, np.array(edges), len(text)):
            span = np.searchsorted(starts, begins, side="right") - 1
            return np.array(found["input_ids"], dtype=np.int32), (span >= 0) & (begins < stops[span])
    pieces, learnt = [], []
    for begin, stop in pairwise([0, *edges, len(text)]):
        ids = tokenizer(text[begin:stop], add_special_tokens=False, return_attention_mask=False)["input_ids"]
        pieces.append(np.array(ids, dtype=np.int32))
        learnt.append(np.full(len(ids), ((starts <= begin) & (begin < stops)).any()))
    return np.concatenate(pieces), np.concatenate(learnt)


def _has_split_token(begins: np.ndarray, ends: np.ndarray, edges: np.ndarray, length: int) -> bool:
    """Whether one of `edges` may lie within a token, whose places these are.

    Some tokenizers leave the blanks around a token out of its place: an edge among those belongs to either side.
    """
    inside = np.searchsorted(edges, ends, side="left") > np.searchsorted(edges, begins, side="right")
    before = np.maximum.accumulate(np.insert(ends, 0, 0))
    after = np.append(begins, length)
    blank = np.searchsorted(edges, after, side="right") > np.searchsorted(edges, before, side="left")
    return bool(inside.any() or (blank & (after > before)).any())


def _render_conversation(
    messages: Sequence[dict[str, str]], tokenizer: PreTrainedTokenizerBase
) -> tuple[str, list[Span]]:
    """A conversation as the chat template lays it out, and what of it the assistant writes."""
    from transformers.utils.chat_template_utils import render_jinja_template

    answers = [number for number, turn in enumerate(messages) if turn["role"] == "assistant"]
    if not answers:
        return "", []
    try:
        template = tokenizer.get_chat_template()
    except ValueError:
        raise BadInput(
            "a conversation needs a chat template and the tokenizer has none",
            fix="take a teacher or student with one, or lay the rows out yourself: data.prompt_column",
        ) from None

    known: dict[str, Any] = dict(tokenizer.special_tokens_map)

    def render(turns: Sequence[dict[str, str]], marked: bool = False, **options: Any) -> tuple[str, list[Span]]:
        try:
            rendered: Any = render_jinja_template(
                conversations=[list(turns)],
                chat_template=template,
                return_assistant_tokens_mask=marked,
                **known,
                **options,
            )
        except Exception as error:  # templates raise what they like, jinja adds its own
            raise BadInput(f"the chat template refuses the messages: {error}") from error
        texts, marks = rendered
        return texts[0], [Span(*mark) for mark in marks[0]] if marked else []

    if GENERATION_MARK.search(template):
        text, marks = render(messages, marked=True)
        spans = _merge_marks(text, marks, tokenizer)
        for number in answers:
            if not any(_place(text, messages[number]["content"], span) for span in spans):
                raise _dropped_message_error(messages, number)
        return text, spans
    text, _ = render(messages)
    befores, askeds = ([_before(messages[:n], render, asked=asked) for n in answers] for asked in (False, True))
    befores = [
        _matching_prefix(text, each, number)
        for number, each in zip(answers, zip(befores, askeds, strict=True), strict=True)
    ]
    spans = []
    for number, before, asked, after in zip(answers, befores, askeds, [*befores[1:], text], strict=True):
        found = _place(text, messages[number]["content"], Span(len(before), len(after)))
        if found is None:
            raise _dropped_message_error(messages, number)
        begin = len(asked) if text.startswith(asked) else min(_common_prefix_length(text, asked), found.start)
        upto = render(messages[: number + 1])[0].rstrip()
        spans.append(Span(begin, _end(text, found.end, upto, tokenizer)))
    return text, spans


TEMPLATE_FIX = "take a tokenizer with another chat template, or lay the rows out yourself: data.prompt_column"


def _before(turns: Sequence[dict[str, str]], render: Callable[..., tuple[str, list[Span]]], asked: bool) -> str:
    """What comes before an answer: the turns, and where it is `asked` for, what the template opens it with."""
    return render(turns, add_generation_prompt=asked)[0] if turns else ""


def _matching_prefix(text: str, befores: tuple[str, str], number: int) -> str:
    """Of what may come before message `number`, that with which the whole begins. Raises BadInput for none."""
    for before in befores:
        if text.startswith(before):
            return before
    raise BadInput(
        f"the chat template lays out what comes before message {number + 1} otherwise once it is answered: where the "
        f"answer begins cannot be told",
        fix=TEMPLATE_FIX,
    )


def _common_prefix_length(one: str, other: str) -> int:
    """How many characters two texts have in common at their beginning."""
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(one, other, strict=False)))


def _dropped_message_error(messages: Sequence[dict[str, str]], number: int) -> BadInput:
    return BadInput(
        f"the chat template leaves out some of message {number + 1}: {messages[number]['content'].strip()[:60]!r}",
        fix=f"such as the reasoning in an answer; {TEMPLATE_FIX}",
    )


def _place(text: str, content: str, within: Span) -> Span | None:
    """Where a message's content lies; templates set blanks as they like. None where it is not all there."""
    at = text.find(content.strip(), *within)
    if at >= 0:
        return Span(at, at + len(content.strip()))
    places = [place for place in range(*within) if not text[place].isspace()]
    wanted = "".join(content.split())
    at = "".join(text[place] for place in places).find(wanted)
    return Span(places[at], places[at + len(wanted) - 1] + 1) if at >= 0 else None


def _end(text: str, after: int, upto: str, tokenizer: PreTrainedTokenizerBase) -> int:
    """Where an answer ends: where the text ended with it, else behind the special token that follows its content."""
    if len(upto) > after and text.startswith(upto):
        return len(upto)
    rest = text[after:]
    blank = len(rest) - len(rest.lstrip())
    return after + next((blank + len(token) for token in _added_tokens(tokenizer) if rest.startswith(token, blank)), 0)


def _merge_marks(text: str, marks: Sequence[Span], tokenizer: PreTrainedTokenizerBase) -> list[Span]:
    """What a template marks, without the blanks behind a special token; marks that touch are one."""
    spans: list[Span] = []
    for start, end in marks:
        if spans and spans[-1].end == start:
            spans[-1] = Span(spans[-1].start, end)
        elif start < end:
            spans.append(Span(start, end))
    ends = [len(text[: span.end].rstrip()) for span in spans]
    tokens = tuple(_added_tokens(tokenizer))
    return [
        Span(span.start, end) if text.endswith(tokens, span.start, end) else span
        for span, end in zip(spans, ends, strict=True)
    ]


def _added_tokens(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """The tokens that are written out whole, the longest first."""
    return sorted(filter(None, map(str, tokenizer.added_tokens_decoder.values())), key=len, reverse=True)
