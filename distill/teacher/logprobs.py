"""Prompt logprobs of an endpoint: the most likely tokens at each position of a text, and the text's log-probabilities.

A completion request with `echo` and `logprobs` returns them, on vLLM and on `limbeck serve`. Chat APIs and most
commercial servers do not support it; one short request finds that out before any other.
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

MAX_PROMPTS_PER_REQUEST = 8  # all of them are lost if the request fails
PROBE = "The quick brown fox jumps over the lazy dog."
TOKEN_ID_PREFIX = "token_id:"  # vLLM's names of tokens with return_tokens_as_token_ids
NO_LOGPROB = -20.0  # log-probability stored at positions without a target


class PromptLogprobs(NamedTuple):
    """One prompt and its completion, as the endpoint returns it.

    Attributes:
        tokens: texts of the tokens or, by id, `token_id:17`.
        logprobs: of each token after those before it; the first is NaN.
        top_logprobs: the most likely tokens at each position, token -> log-probability; the first is empty.
        offsets: where each token begins in `text`.
        text: the prompt and its completion.
    """

    tokens: list[str]
    logprobs: np.ndarray
    top_logprobs: list[Mapping[str, float]]
    offsets: list[int]
    text: str


class PromptLogprobsClient:
    """Gets prompt logprobs from an endpoint.

    Args:
        tokenizer: of the served model; None if the server tokenizes the texts.
    """

    def __init__(self, teacher: EndpointTeacher, tokenizer: PreTrainedTokenizerBase | None = None) -> None:
        self.teacher, self.tokenizer = teacher, tokenizer
        self._by_id = False  # the server names tokens by id
        self._checked_top = 0  # the server was seen to return this many most likely tokens
        self._ids: dict[str, int] | None = None  # by text; -1 if several tokens share it

    def request(self, prompts: Sequence[Any], top: int) -> Request:
        """The request for prompts, all texts or all lists of ids, and the `top` most likely tokens at each position."""
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
        """Find out by a short request what the server supports.

        Raises BadInput if it returns no prompt logprobs or fewer than `top` tokens, or if it has another tokenizer.
        """
        if top <= self._checked_top:
            return
        ids = self.tokenizer.encode(PROBE, add_special_tokens=False) if self.tokenizer else None
        prompt: Any = PROBE if ids is None else ids
        self._by_id = ids is not None
        try:
            ((_, (result,)),) = self.teacher.ask_all([self.request([prompt], top)], self._parse)
            self._by_id = self._by_id and all(token.startswith(TOKEN_ID_PREFIX) for token in result.tokens)
        except BadInput:
            if not self._by_id:
                raise
            self._by_id = False  # a server that cannot name tokens by id may refuse the request
            try:
                ((_, (result,)),) = self.teacher.ask_all([self.request([prompt], top)], self._parse)
            except BadInput as error:
                if "logprobs" in error.message:
                    error.fix = (
                        f"it may return fewer than {top} tokens at each position: lower cache.top_k, or raise its limit"
                    )
                raise
        if ids is not None:
            self._check_tokenizer(ids, result)
            self.top_tokens(result, 1, top)
        self._checked_top = top

    def _check_tokenizer(self, ids: Sequence[int], result: PromptLogprobs) -> None:
        """Raise BadInput if the server reads the ids of PROBE as another text."""
        server_ids = [self._id(token) for token in result.tokens[: len(ids)]]
        if server_ids == list(ids):
            return
        # Without ids, texts may differ in spaces or be shared by several tokens: compare the whole text.
        if self._by_id or not _without_spaces(result.text).startswith(_without_spaces(PROBE)):
            raise BadInput(
                f"{self.teacher.label} has another tokenizer: it reads {PROBE!r} as {result.text[:80]!r}",
                fix="set teacher.tokenizer to the model that it serves",
            )

    def _parse(self, answer: Any) -> list[PromptLogprobs]:
        """The prompts in an answer. Raises BadInput if log-probabilities are missing."""
        try:
            choices = sorted(answer["choices"], key=lambda choice: int(choice["index"]))
            return [_parse_choice(choice) for choice in choices]
        except (TypeError, KeyError, ValueError):
            raise BadInput(
                f"{self.teacher.label} returns no prompt logprobs: log-probabilities of a text that it is given",
                fix="serve the teacher with vLLM or `limbeck serve`, or let it write the text: [generate]",
            ) from None

    def top_tokens(self, result: PromptLogprobs, position: int, top: int) -> tuple[list[int], list[float]]:
        """The ids of the `top` most likely tokens at a position, and their log-probabilities.

        Raises BadInput if the server returned fewer, or if their ids are not certain.
        """
        items = sorted(result.top_logprobs[position].items(), key=lambda item: -item[1])[:top]
        ids = [self._id(token) for token, _ in items]
        if len(items) < top or None in ids or len(set(ids)) < len(ids):
            reason = f"only {len(items)}" if len(items) < top else "some by a text that several tokens share"
            raise BadInput(
                f"{self.teacher.label} was asked for the {top} most likely tokens at each position and returned "
                f"{reason}",
                fix="lower cache.top_k, raise the server's limit, or serve the teacher with vLLM or `limbeck serve`",
            )
        return [token for token in ids if token is not None], [logprob for _, logprob in items]

    def _id(self, token: str) -> int | None:
        """The id of a token by the server's name for it; None if it is not certain."""
        if self._by_id:
            return int(token.removeprefix(TOKEN_ID_PREFIX)) if token.startswith(TOKEN_ID_PREFIX) else None
        assert self.tokenizer is not None
        if self._ids is None:
            self._ids = {}
            for name, number in self.tokenizer.get_vocab().items():
                text = str(self.tokenizer.decode([number]))
                text = name if "\ufffd" in text else text
                self._ids[text] = -1 if text in self._ids else number
        token_id = self._ids.get(token, -1)
        return None if token_id < 0 else token_id

    def token_logprobs(self, texts: Sequence[str]) -> Iterator[tuple[int, tuple[list[str], list[float]]]]:
        """Yield (number of the text, (tokens, log-probabilities)) in the order of the answers.

        The server's tokenizer makes the tokens; joined, they are the text. A token that ends inside a character is
        empty, and the token that completes the character has all of it. The first log-probability is NaN if the
        server puts no token before the text.
        """
        client = PromptLogprobsClient(self.teacher)
        client.check(1)
        for number, (result,) in self.teacher.ask_all([client.request([text], 1) for text in texts], self._parse):
            yield number, _text_tokens(result, texts[number])

    def pass_over_blocks(self, blocks: Blocks) -> TeacherPass:
        """A function of block numbers and caches that returns the arrays to store.

        Raises BadInput if the server's context is too short for a block; the function raises what `check` does.
        """
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
        """The `size` most likely tokens at each position of each block, (T, size), and their log-probabilities."""
        length = blocks.ids.shape[1]
        arrays = [(np.tile(np.arange(size), (length, 1)), np.full((length, size), NO_LOGPROB)) for _ in indices]
        documents = [
            (place, positions.start, blocks.ids[index][positions].tolist())
            for place, index in enumerate(indices)
            for positions in _slices_to_send(blocks.segments[index], blocks.targets[index])
        ]
        groups = [
            documents[start : start + MAX_PROMPTS_PER_REQUEST]
            for start in range(0, len(documents), MAX_PROMPTS_PER_REQUEST)
        ]
        requests = [self.request([ids for _, _, ids in group], size) for group in groups]
        for number, results in self.teacher.ask_all(requests, self._parse):
            for (place, start, ids), result in zip(groups[number], results, strict=True):
                if len(result.top_logprobs) < len(ids):
                    raise BadInput(
                        f"{self.teacher.label} returns {len(result.top_logprobs)} tokens of a prompt of {len(ids)}"
                    )
                for position in range(1, len(ids)):  # the prediction of a token is stored at the position before it
                    row = start + position - 1
                    arrays[place][0][row], arrays[place][1][row] = self.top_tokens(result, position, size)
        return arrays


def endpoint_pass(setting: Setting) -> TeacherPass:
    """A function of block numbers and caches: the arrays to store of a recipe's endpoint."""
    return prompt_logprobs_client(setting, setting.tokenizer).pass_over_blocks(setting.train)


def prompt_logprobs_client(setting: Setting, tokenizer: PreTrainedTokenizerBase | None = None) -> PromptLogprobsClient:
    """The client of a recipe's endpoint; without `tokenizer`, the server tokenizes the texts."""
    recipe = setting.recipe
    assert setting.teacher is not None
    assert recipe.teacher is not None
    return PromptLogprobsClient(EndpointTeacher(setting.teacher, recipe.teacher, AnswerCache()), tokenizer)


def _slices_to_send(segments: np.ndarray, targets: np.ndarray) -> list[slice]:
    """The documents of a block that have a target, from its segments and targets (T,)."""
    return [positions for positions in document_slices(segments) if targets[positions][1:].any()]


def tokens_sent(blocks: Blocks) -> tuple[int, int]:
    """The tokens that an endpoint reads and writes for the prompt logprobs of all blocks: one new token each."""
    sizes = [
        positions.stop - positions.start
        for segments, targets in zip(blocks.segments, blocks.targets, strict=True)
        for positions in _slices_to_send(segments, targets)
    ]
    return sum(sizes), len(sizes)


def _parse_choice(choice: Mapping[str, Any]) -> PromptLogprobs:
    logprobs = choice["logprobs"]
    values = [math.nan if value is None else float(value) for value in logprobs["token_logprobs"]]
    # The first token has no log-probability, since no token comes before it.
    if not values or not math.isnan(values[0]) or any(map(math.isnan, values[1:])):
        raise ValueError("no prompt logprobs")
    tops = [top or {} for top in logprobs.get("top_logprobs") or [{}] * len(values)]
    return PromptLogprobs(
        list(logprobs["tokens"]), np.array(values), tops, list(logprobs["text_offset"]), str(choice["text"])
    )


def _text_tokens(result: PromptLogprobs, text: str) -> tuple[list[str], list[float]]:
    """The tokens of a text as parts of it, without the completion, and their log-probabilities."""
    if not result.text.startswith(text):
        raise BadInput(f"the endpoint returns the prompt {text[:80]!r} as {result.text[:80]!r}")
    starts = [offset for offset in result.offsets if offset < len(text)]
    ends = [*starts[1:], len(text)]
    tokens = [text[start:end] for start, end in zip(starts, ends, strict=True)]
    return tokens, result.logprobs[: len(tokens)].tolist()


def _without_spaces(text: str) -> str:
    return "".join(text.split())
