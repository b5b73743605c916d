"""What an endpoint says of a text that it is given: the likeliest tokens at each place, and the text's own likelihood.

It is asked to complete the text and to echo it with log-probabilities, as vLLM and `limbeck serve` do; chat APIs and
most commercial servers do not, which is found out by one short request before any other.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from limbeck.distill.cache import encoding
from limbeck.distill.cache.teacher_cache import TeacherCache, TeacherPass
from limbeck.distill.data.blocks import Blocks, document_slices
from limbeck.distill.teacher.answer_cache import AnswerCache
from limbeck.distill.teacher.endpoint import EndpointTeacher, Request
from limbeck.registry.core.errors import BadInput

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from limbeck.distill.context import Setting

MAX_PROMPTS_PER_REQUEST = 8  # of one request, at most: what is lost where it fails
PROBE = "The quick brown fox jumps over the lazy dog."
BY_ID = "token_id:"  # how vLLM names a token with return_tokens_as_token_ids
NO_LOGPROB = -20.0  # log-probability where nothing is to be predicted


class PromptLogprobs(NamedTuple):
    """One prompt as it came back.

    Attributes:
        tokens: their texts or, by id, `token_id:17`. logprobs: of each given those before, the first one's is NaN.
        tops: the likeliest at each place, token -> log-probability; the first is empty.
        offsets: where each token begins in `text`, the prompt and what was made of it.
    """

    tokens: list[str]
    logprobs: np.ndarray
    top_logprobs: list[Mapping[str, float]]
    offsets: list[int]
    text: str


class PromptLogprobsClient:
    """Has texts echoed by an endpoint.

    Args:
        tokenizer: of the model that is served; None where the server's own is to read the texts.
    """

    def __init__(self, teacher: EndpointTeacher, tokenizer: PreTrainedTokenizerBase | None = None) -> None:
        self.teacher, self.tokenizer = teacher, tokenizer
        self._by_id = False  # whether tokens are told by id
        self._checked = 0  # so many likeliest tokens are told
        self._ids: dict[str, int] | None = None

    def request(self, prompts: Sequence[Any], top: int) -> Request:
        """For prompts, all of them texts or all token ids: with the `top` likeliest tokens at each place."""
        payload = {
            "prompt": list(prompts),
            "max_tokens": 1,  # not every server takes 0
            "temperature": 0,
            "echo": True,
            "logprobs": top,
        }
        if self._by_id:
            payload["return_tokens_as_token_ids"] = True
        return self.teacher.request("/completions", payload)

    def check(self, top: int) -> None:
        """Find out by a short request what the server tells.

        Raises BadInput where it gives no log-probabilities of a prompt, fewer than `top`, or reads ids otherwise.
        """
        if top <= self._checked:
            return
        ids = self.tokenizer.encode(PROBE, add_special_tokens=False) if self.tokenizer else None
        prompt: Any = PROBE if ids is None else ids
        self._by_id = ids is not None
        try:
            ((_, (echoed,)),) = self.teacher.ask_all([self.request([prompt], top)], self._read)
            self._by_id = self._by_id and all(token.startswith(BY_ID) for token in echoed.tokens)
        except BadInput:
            if not self._by_id:
                raise
            self._by_id = False  # a server that does not know how to tell tokens by id may refuse to be asked
            try:
                ((_, (echoed,)),) = self.teacher.ask_all([self.request([prompt], top)], self._read)
            except BadInput as error:
                if "logprobs" in error.message:
                    error.fix = f"it may tell fewer than {top} tokens a place: lower cache.top_k, or raise its limit"
                raise
        if ids is not None:
            self._compare(ids, echoed, top)
        self._checked = top

    def _compare(self, ids: Sequence[int], echoed: PromptLogprobs, top: int) -> None:
        assert self.tokenizer is not None
        read = [self._id(token) for token in echoed.tokens[: len(ids)]]
        if read != list(ids) and not (
            not self._by_id and _without_spaces(echoed.text).startswith(_without_spaces(PROBE))
        ):
            raise BadInput(
                f"{self.teacher.label} has another tokenizer: it reads {PROBE!r} as {echoed.text[:80]!r}",
                fix="give the model that it serves as teacher.tokenizer",
            )
        self.top_tokens(echoed, 1, top)

    def _read(self, answer: Any) -> list[PromptLogprobs]:
        """The echoes in an answer. Raises BadInput where they lack log-probabilities."""
        try:
            choices = sorted(answer["choices"], key=lambda choice: int(choice["index"]))
            return [_parse_choice(choice) for choice in choices]
        except (TypeError, KeyError, ValueError):
            raise BadInput(
                f"{self.teacher.label} gives no log-probabilities of a text that it is given",
                fix="serve the teacher with vLLM or `limbeck serve`, or have it write the text: [generate]",
            ) from None

    def top_tokens(self, echoed: PromptLogprobs, place: int, top: int) -> tuple[list[int], list[float]]:
        """The `top` likeliest tokens at a place and their log-probabilities. Raises BadInput where they are untold."""
        told = sorted(echoed.top_logprobs[place].items(), key=lambda item: -item[1])[:top]
        ids = [self._id(token) for token, _ in told]
        if len(told) < top or None in ids or len(set(ids)) < len(ids):
            why = f"{len(told)} of them" if len(told) < top else "some by a text that several tokens share"
            raise BadInput(
                f"{self.teacher.label} was asked for the {top} likeliest tokens at each place and told {why}",
                fix="lower cache.top_k, raise the server's limit, or serve the teacher with vLLM or `limbeck serve`",
            )
        return [token for token in ids if token is not None], [logprob for _, logprob in told]

    def _id(self, token: str) -> int | None:
        """The id of a token as the server names it; None where that is not certain."""
        if self._by_id:
            return int(token.removeprefix(BY_ID)) if token.startswith(BY_ID) else None
        assert self.tokenizer is not None
        if self._ids is None:
            self._ids = {}
            for name, number in self.tokenizer.get_vocab().items():
                text = self.tokenizer.decode([number])
                text = name if "\ufffd" in text else text
                self._ids[text] = -1 if text in self._ids else number
        found = self._ids.get(token, -1)
        return None if found < 0 else found

    def token_logprobs(self, texts: Sequence[str]) -> Iterator[tuple[int, tuple[list[str], list[float]]]]:
        """(number, (tokens, log-probabilities)) of each text, as they come, by the server's own tokenizer.

        The tokens together are the text; one that is no whole character alone is empty, and what follows it has the
        character. The first log-probability is NaN where nothing comes before it.
        """
        plain = PromptLogprobsClient(self.teacher)
        plain.check(1)
        for number, (echoed,) in self.teacher.ask_all([plain.request([text], 1) for text in texts], self._read):
            yield number, _text_tokens(echoed, texts[number])

    def pass_over_blocks(self, blocks: Blocks) -> TeacherPass:
        """What each cache stores of blocks. Raises BadInput where the context is too short, or as `check`."""
        length, context = blocks.ids.shape[1], self.teacher.endpoint.context
        if context is not None and context < length + 1:
            raise BadInput(
                f"{self.teacher.label} has a context of {context} tokens and a block takes {length + 1}",
                fix=f"set data.max_length = {context - 1} or less",
            )

        def run(indices: np.ndarray, caches: list[TeacherCache]) -> list[dict[str, np.ndarray]]:
            forms = [cache.form for cache in caches if cache.form is not None]
            size = max(form.size for form in forms)
            self.check(size)
            arrays = self._blocks(blocks, indices, size)
            return [
                encoding.shard_arrays(
                    [
                        encoding.topk_arrays(form, ids[:, : form.size], logprobs[:, : form.size])
                        for ids, logprobs in arrays
                    ]
                )
                for form in forms
            ]

        return run

    def _blocks(self, blocks: Blocks, indices: np.ndarray, size: int) -> list[tuple[np.ndarray, np.ndarray]]:
        """Of each block the `size` likeliest tokens at each position (T, size), and their log-probabilities."""
        length = blocks.ids.shape[1]
        arrays = [(np.tile(np.arange(size), (length, 1)), np.full((length, size), NO_LOGPROB)) for _ in indices]
        pieces = [
            (place, places.start, blocks.ids[index][places].tolist())
            for place, index in enumerate(indices)
            for places in _slices_to_send(blocks.segments[index], blocks.targets[index])
        ]
        groups = [
            pieces[start : start + MAX_PROMPTS_PER_REQUEST] for start in range(0, len(pieces), MAX_PROMPTS_PER_REQUEST)
        ]
        requests = [self.request([ids for _, _, ids in group], size) for group in groups]
        for number, echoes in self.teacher.ask_all(requests, self._read):
            for (place, start, ids), echoed in zip(groups[number], echoes, strict=True):
                if len(echoed.top_logprobs) < len(ids):
                    raise BadInput(
                        f"{self.teacher.label} echoes {len(echoed.top_logprobs)} tokens where {len(ids)} were sent"
                    )
                for position in range(1, len(ids)):  # what is told of a token stands with the one before it
                    row = start + position - 1
                    arrays[place][0][row], arrays[place][1][row] = self.top_tokens(echoed, position, size)
        return arrays


def endpoint_pass(setting: Setting) -> TeacherPass:
    """A function of block numbers and caches that has a recipe's endpoint say what is to be stored of the blocks."""
    return prompt_logprobs_client(setting, setting.tokenizer).pass_over_blocks(setting.train)


def prompt_logprobs_client(setting: Setting, tokenizer: PreTrainedTokenizerBase | None = None) -> PromptLogprobsClient:
    """A recipe's endpoint; its own tokenizer reads the texts where none is given."""
    recipe = setting.recipe
    assert setting.teacher is not None
    assert recipe.teacher is not None
    return PromptLogprobsClient(EndpointTeacher(setting.teacher, recipe.teacher, AnswerCache()), tokenizer)


def _slices_to_send(segments: np.ndarray, targets: np.ndarray) -> list[slice]:
    """The documents of a block of which something is to be predicted, from its segments and targets (T,)."""
    return [places for places in document_slices(segments) if targets[places][1:].any()]


def tokens_sent(blocks: Blocks) -> tuple[int, int]:
    """Tokens that an endpoint is sent and gives when every block is echoed."""
    rows = [
        places.stop - places.start
        for segments, targets in zip(blocks.segments, blocks.targets, strict=True)
        for places in _slices_to_send(segments, targets)
    ]
    return sum(rows), len(rows)


def _parse_choice(choice: Mapping[str, Any]) -> PromptLogprobs:
    said = choice["logprobs"]
    values = [math.nan if value is None else float(value) for value in said["token_logprobs"]]
    # Of the first token nothing is told, since nothing comes before it.
    if not values or not math.isnan(values[0]) or any(map(math.isnan, values[1:])):
        raise ValueError("no log-probabilities of the prompt")
    tops = [top or {} for top in said.get("top_logprobs") or [{}] * len(values)]
    return PromptLogprobs(list(said["tokens"]), np.array(values), tops, list(said["text_offset"]), str(choice["text"]))


def _text_tokens(echoed: PromptLogprobs, text: str) -> tuple[list[str], list[float]]:
    """The tokens of a text as parts of it, without what was made after it."""
    if not echoed.text.startswith(text):
        raise BadInput(f"the endpoint echoes {echoed.text[:80]!r} where {text[:80]!r} was sent")
    starts = [offset for offset in echoed.offsets if offset < len(text)]
    ends = [*starts[1:], len(text)]
    tokens = [text[start:end] for start, end in zip(starts, ends, strict=True)]
    return tokens, echoed.logprobs[: len(tokens)].tolist()


def _without_spaces(text: str) -> str:
    return "".join(text.split())
