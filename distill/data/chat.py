"""Prompts with completions and conversations as token ids, and which of the tokens are the answers."""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import pairwise, takewhile
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from limbeck.distill.data.document import Document
from limbeck.registry.core.errors import BadInput

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

GENERATION_MARK = re.compile(r"\{%-?\s*generation\s*-?%\}")  # a template that marks what the assistant writes
TEMPLATE_FIX = "take a tokenizer with another chat template, or lay the rows out yourself: data.prompt_column"


class EncodedDocument(NamedTuple):
    """A document's tokens up to the end of its last answer.

    Attributes:
        ids: (n,) int32.
        targets: (n,) bool: the tokens to learn: of each answer, with the token that ends it.
        text_bytes: UTF-8 bytes of text that the targets stand for.
    """

    ids: np.ndarray
    targets: np.ndarray
    text_bytes: int


class Span(NamedTuple):
    """Characters `start` to `end` of a text."""

    start: int
    end: int


def encode_document(document: Document, tokenizer: PreTrainedTokenizerBase, start: int, end: int) -> EncodedDocument:
    """Encode a document whose answers alone are learnt.

    The chat template lays out a conversation. A prompt follows the start token, as in lm-eval, unless it begins like a
    rendered chat: with BOS, or with a special token if there is no BOS. EOS ends an answer that does not end with a
    special token of its own.

    Args:
        start: id of the start token.
        end: id of EOS.

    Raises:
        BadInput: no answer, or no chat template that fits; with the document's path.
    """
    try:
        text, spans, text_bytes = _text_and_answers(document, tokenizer)
    except BadInput as error:
        error.message = f"{document.path}: {error.message}"
        raise
    ids, targets = _encode_text(text, spans, tokenizer)
    if not targets.any():
        raise BadInput(f"{document.path}: its answer has no token", fix="leave it out")
    last = int(np.flatnonzero(targets)[-1]) + 1
    ids, targets = ids[:last], targets[:last]
    special = set(tokenizer.all_special_ids)
    if ids[-1] not in special:
        ids, targets = np.append(ids, np.int32(end)), np.append(targets, True)
    has_start = ids[0] == start or (tokenizer.bos_token_id is None and ids[0] in special)
    if not document.messages and not has_start:
        ids, targets = np.insert(ids, 0, start), np.insert(targets, 0, False)
    return EncodedDocument(ids, targets, text_bytes)


def _text_and_answers(document: Document, tokenizer: PreTrainedTokenizerBase) -> tuple[str, list[Span], int]:
    """A document's text, its answers in it, and their bytes of UTF-8. Raises BadInput if there is no answer."""
    if document.messages:
        text, spans = _render_conversation(document.messages, tokenizer)
        contents = [message["content"] for message in document.messages if message["role"] == "assistant"]
        text_bytes = sum(len(content.encode()) for content in contents)
    else:
        text, spans = document.text, [Span(len(document.prompt), len(document.text))]
        text_bytes = len(document.completion.encode())
    if not text_bytes:
        raise BadInput(
            "there is no answer to learn",
            fix="give answers (data.completion_column, or an assistant's message), or let the teacher write them: "
            "[generate]",
        )
    return text, spans, text_bytes


def _encode_text(text: str, spans: Sequence[Span], tokenizer: PreTrainedTokenizerBase) -> tuple[np.ndarray, np.ndarray]:
    """The ids of a text (n,) int32, and which of them are in `spans` (n,) bool.

    If a token crosses the edge of an answer, or the tokenizer does not report offsets, encodes the parts between the
    edges separately: at inference the model gets the tokens of the prompt alone.
    """
    starts, stops = np.array(spans).T
    edges = sorted({edge for span in spans for edge in span} - {0, len(text)})
    if tokenizer.is_fast:
        encoded = tokenizer(text, add_special_tokens=False, return_attention_mask=False, return_offsets_mapping=True)
        begins, ends = np.array(encoded["offset_mapping"]).reshape(-1, 2).T
        if not _has_split_token(begins, ends, np.array(edges), len(text)):
            span = np.searchsorted(starts, begins, side="right") - 1
            return np.array(encoded["input_ids"], dtype=np.int32), (span >= 0) & (begins < stops[span])
    parts, targets = [], []
    for begin, stop in pairwise([0, *edges, len(text)]):
        ids = tokenizer(text[begin:stop], add_special_tokens=False, return_attention_mask=False)["input_ids"]
        parts.append(np.array(ids, dtype=np.int32))
        targets.append(np.full(len(ids), ((starts <= begin) & (begin < stops)).any()))
    return np.concatenate(parts), np.concatenate(targets)


def _has_split_token(begins: np.ndarray, ends: np.ndarray, edges: np.ndarray, length: int) -> bool:
    """Whether one of `edges` may be inside a token; `begins` and `ends` are the tokens' offsets.

    Some tokenizers leave the blanks around a token out of its offsets, so an edge in such a gap may split it too.
    """
    inside = np.searchsorted(edges, ends, side="left") > np.searchsorted(edges, begins, side="right")
    before = np.maximum.accumulate(np.insert(ends, 0, 0))
    after = np.append(begins, length)
    in_gap = np.searchsorted(edges, after, side="right") > np.searchsorted(edges, before, side="left")
    return bool(inside.any() or (in_gap & (after > before)).any())


# --- conversations through a chat template


class _ChatTemplate:
    """The chat template of a tokenizer. Raises BadInput if it has none."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        try:
            self.template: str = tokenizer.get_chat_template()
        except ValueError:
            raise BadInput(
                "a conversation needs a chat template and the tokenizer has none",
                fix="take a teacher or student with one, or lay the rows out yourself: data.prompt_column",
            ) from None
        self.variables: dict[str, Any] = dict(tokenizer.special_tokens_map)
        self.marks_answers = GENERATION_MARK.search(self.template) is not None

    def render(self, messages: Sequence[dict[str, str]], add_generation_prompt: bool = False) -> str:
        """Messages as text; "" for none. With `add_generation_prompt`, up to where the next answer begins."""
        if not messages:
            return ""
        return self._render(messages, add_generation_prompt=add_generation_prompt)[0]

    def render_marked(self, messages: Sequence[dict[str, str]]) -> tuple[str, list[Span]]:
        """Messages as text, and the spans that the template marks as written by the assistant."""
        text, marks = self._render(messages, return_assistant_tokens_mask=True)
        return text, [Span(*mark) for mark in marks]

    def _render(self, messages: Sequence[dict[str, str]], **options: Any) -> tuple[str, Any]:
        from transformers.utils.chat_template_utils import render_jinja_template

        try:
            rendered: Any = render_jinja_template(
                conversations=[list(messages)], chat_template=self.template, **self.variables, **options
            )
        except Exception as error:  # templates raise errors of any kind, and so does jinja
            raise BadInput(f"the chat template refuses the messages: {error}") from error
        texts, marks = rendered
        return texts[0], marks[0] if marks else []


def _render_conversation(
    messages: Sequence[dict[str, str]], tokenizer: PreTrainedTokenizerBase
) -> tuple[str, list[Span]]:
    """A conversation as text, and the spans of it that the assistant writes."""
    answers = [number for number, message in enumerate(messages) if message["role"] == "assistant"]
    if not answers:
        return "", []
    template = _ChatTemplate(tokenizer)
    if template.marks_answers:
        return _answers_by_marks(messages, answers, template, tokenizer)
    return _answers_by_comparison(messages, answers, template, tokenizer)


def _answers_by_marks(
    messages: Sequence[dict[str, str]],
    answers: Sequence[int],
    template: _ChatTemplate,
    tokenizer: PreTrainedTokenizerBase,
) -> tuple[str, list[Span]]:
    """A conversation as text, and the spans that the template marks."""
    text, marks = template.render_marked(messages)
    spans = _merge_marks(text, marks, tokenizer)
    for number in answers:
        if not any(_find_content(text, messages[number]["content"], span) for span in spans):
            raise _dropped_message_error(messages, number)
    return text, spans


def _answers_by_comparison(
    messages: Sequence[dict[str, str]],
    answers: Sequence[int],
    template: _ChatTemplate,
    tokenizer: PreTrainedTokenizerBase,
) -> tuple[str, list[Span]]:
    """A conversation as text, and the spans of its answers, found by rendering the messages before each of them."""
    text = template.render(messages)
    prompts = [template.render(messages[:number], add_generation_prompt=True) for number in answers]
    starts = []  # where the text of each answer begins at the earliest
    for number, prompt in zip(answers, prompts, strict=True):
        candidates = (template.render(messages[:number]), prompt)
        starts.append(len(_matching_prefix(text, candidates, number)))
    spans = []
    for number, prompt, start, stop in zip(answers, prompts, starts, [*starts[1:], len(text)], strict=True):
        content = _find_content(text, messages[number]["content"], Span(start, stop))
        if content is None:
            raise _dropped_message_error(messages, number)
        begin = len(prompt) if text.startswith(prompt) else min(_common_prefix_length(text, prompt), content.start)
        rendered = template.render(messages[: number + 1]).rstrip()
        spans.append(Span(begin, _answer_end(text, content.end, rendered, tokenizer)))
    return text, spans


def _matching_prefix(text: str, candidates: tuple[str, str], number: int) -> str:
    """The first of `candidates`, renderings of what precedes message `number`, that `text` begins with.

    Raises BadInput if neither is a prefix.
    """
    for candidate in candidates:
        if text.startswith(candidate):
            return candidate
    raise BadInput(
        f"the chat template renders what comes before message {number + 1} differently once it is answered, so the "
        f"start of the answer is unknown",
        fix=TEMPLATE_FIX,
    )


def _common_prefix_length(one: str, other: str) -> int:
    """How many characters two texts have in common at the start."""
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(one, other, strict=False)))


def _dropped_message_error(messages: Sequence[dict[str, str]], number: int) -> BadInput:
    return BadInput(
        f"the chat template drops part of message {number + 1}: {messages[number]['content'].strip()[:60]!r}",
        fix=f"such as the reasoning in an answer; {TEMPLATE_FIX}",
    )


def _find_content(text: str, content: str, within: Span) -> Span | None:
    """The span of a message's content in a rendered text; None if part of it is missing. Ignores changed blanks."""
    at = text.find(content.strip(), *within)
    if at >= 0:
        return Span(at, at + len(content.strip()))
    offsets = [offset for offset in range(*within) if not text[offset].isspace()]
    without_blanks = "".join(content.split())
    at = "".join(text[offset] for offset in offsets).find(without_blanks)
    return Span(offsets[at], offsets[at + len(without_blanks) - 1] + 1) if at >= 0 else None


def _answer_end(text: str, content_end: int, rendered: str, tokenizer: PreTrainedTokenizerBase) -> int:
    """Where an answer ends: with `rendered`, the messages up to it, if that is a prefix of the text.

    Otherwise after the special token that follows its content, or with the content if there is none.
    """
    if len(rendered) > content_end and text.startswith(rendered):
        return len(rendered)
    rest = text[content_end:]
    blanks = len(rest) - len(rest.lstrip())
    for token in _added_tokens(tokenizer):
        if rest.startswith(token, blanks):
            return content_end + blanks + len(token)
    return content_end


def _merge_marks(text: str, marks: Sequence[Span], tokenizer: PreTrainedTokenizerBase) -> list[Span]:
    """The spans that a template marks: adjacent ones merged, without blanks after a final special token."""
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
    """The text of all added tokens, longest first."""
    return sorted(filter(None, map(str, tokenizer.added_tokens_decoder.values())), key=len, reverse=True)
