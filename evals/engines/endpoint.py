"""An OpenAI-compatible /v1/completions server, such as vLLM or `limbeck serve`, as an engine.

Requests are those of lm-eval's `local-completions`: token ids, for which the server returns prompt logprobs and one new
token that is ignored. lm-eval's class itself is not used, because it
- retries permanent errors, ignores Retry-After, and loses the answers of all other requests when one fails;
- takes the last token of the answer for the new one, which is wrong if the server adds none (the text has ended);
- sends one seed with every request, so that a prompt that is sampled several times gets the same answer each time.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

from limbeck.evals.engines.batches import ContinuationScore, split_by_tokens
from limbeck.evals.engines.engine import LoadedTokenizer
from limbeck.registry.catalog.endpoint import Endpoint, EndpointClient
from limbeck.registry.core.errors import BadInput, Unreachable

PROMPTS_PER_REQUEST = 8  # a request that fails loses this many answers
TOKENIZER_PROBE = "The quick brown fox jumps over the lazy dog."

Prompt = list[int]
Choice = dict[str, Any]


class EndpointEngine:
    """See `limbeck.evals.engines.engine.Engine`.

    A server must generate at least one new token, which takes room in the context. So `max_length` is the context less
    two tokens, and a text of more than `max_length` + 1 tokens loses more of its beginning than in a local engine.
    """

    identity = "OpenAI completions"

    def __init__(self, endpoint: Endpoint, loaded: LoadedTokenizer) -> None:
        self.tokenizer = loaded.tokenizer
        self.context = min(loaded.max_length, endpoint.context or loaded.max_length)
        self.max_length = self.context - 2
        self.endpoint = endpoint
        self._client = EndpointClient(endpoint.url, endpoint.num_concurrent)
        self._tokenizer_checked = False

    def scores(
        self, pairs: Sequence[tuple[list[int], list[int]]], batch_tokens: int
    ) -> Iterator[tuple[int, ContinuationScore]]:
        """See `Engine.scores`. Raises Unreachable if requests fail, after all answers that arrived."""
        self._check_tokenizer()
        prompts = [(context + continuation)[-(self.max_length + 1) :] for context, continuation in pairs]
        order = sorted(range(len(pairs)), key=lambda index: -len(prompts[index]))
        groups = [
            part
            for batch in split_by_tokens([prompts[i] for i in order], batch_tokens)
            for part in _split_prompts(batch)
        ]

        def score(group: Sequence[Prompt]) -> list[Choice]:
            return self._request_choices(group, max_tokens=1, temperature=0, logprobs=1, echo=True)

        starts = [0]
        for group in groups:
            starts.append(starts[-1] + len(group))
        for number, choices in self._client.map_concurrently(score, groups):
            for index, choice in zip(order[starts[number] :], choices, strict=False):
                yield index, self._score_choice(choice, len(prompts[index]), len(pairs[index][1]))

    def generate(
        self, prompts: Sequence[Sequence[int]], max_new_tokens: int, until: Sequence[str], **sampling: Any
    ) -> Iterator[str]:
        """See `Engine.generate`. No seed is sent: two samples of one prompt may differ."""
        if sampling.pop("do_sample", False):
            sampling["temperature"] = sampling.get("temperature") or 1.0
        else:
            sampling["temperature"] = 0.0
        stop = [text for text in until if text]
        groups = list(_split_prompts([list(prompt) for prompt in prompts]))

        def complete(group: Sequence[Prompt]) -> list[Choice]:
            return self._request_choices(group, max_tokens=max_new_tokens, stop=stop or None, **sampling)

        answers: dict[int, list[Choice]] = {}
        next_group = 0
        for number, choices in self._client.map_concurrently(complete, groups):
            answers[number] = choices
            while next_group in answers:
                yield from (str(choice.get("text") or "") for choice in answers.pop(next_group))
                next_group += 1

    def _request_choices(self, prompts: Sequence[Prompt], **settings: Any) -> list[Choice]:
        """The server's choices, one for each prompt. Raises Unreachable if their number is wrong."""
        payload = {"model": self.endpoint.name, "prompt": list(prompts), **settings}
        answer = self._client.request_json("/completions", payload)
        try:
            choices = sorted(answer["choices"], key=lambda choice: int(choice["index"]))
        except (TypeError, KeyError, ValueError):
            choices = []
        if len(choices) != len(prompts):
            raise Unreachable(f"{self.endpoint.url} answered {len(prompts)} prompts with {len(choices)} choices")
        return choices

    def _score_choice(self, choice: Choice, tokens: int, size: int) -> ContinuationScore:
        """The score of the last `size` tokens of a prompt of `tokens` tokens.

        Raises BadInput if the server returns no prompt logprobs.
        """
        logprobs = choice.get("logprobs") or {}
        values = (logprobs.get("token_logprobs") or [])[tokens - size : tokens]
        tops = (logprobs.get("top_logprobs") or [])[tokens - size : tokens]
        if not len(values) == len(tops) == size or None in values or not all(tops):
            raise BadInput(
                f"{self.endpoint.label} gives no log-probabilities of the prompt, so it can only generate",
                fix="serve the model with `limbeck serve` or vLLM, or leave out tasks that do not generate",
            )
        # top_logprobs may lack the token itself; if it is the likeliest, it has the largest value.
        greedy = all(value >= max(top.values()) for value, top in zip(values, tops, strict=True))
        return math.fsum(values), greedy

    def _check_tokenizer(self) -> None:
        """Raise BadInput if the server decodes token ids to another text: its scores would be of that text."""
        if self._tokenizer_checked:
            return
        ids = self.tokenizer.encode(TOKENIZER_PROBE, add_special_tokens=False)
        (choice,) = self._request_choices([ids], max_tokens=1, temperature=0, logprobs=1, echo=True)
        self._score_choice(choice, len(ids), len(ids) - 1)
        decoded, echoed_text = str(self.tokenizer.decode(ids)), str(choice.get("text"))
        expected, echoed = _without_whitespace(decoded), _without_whitespace(echoed_text)
        if not echoed.startswith(expected):
            raise BadInput(
                f"{self.endpoint.label} has another tokenizer: it reads {TOKENIZER_PROBE!r} as {choice.get('text')!r}",
                fix="give --tokenizer the model that the server runs",
            )
        self._tokenizer_checked = True


def _split_prompts(prompts: Sequence[Prompt]) -> Iterator[Sequence[Prompt]]:
    for start in range(0, len(prompts), PROMPTS_PER_REQUEST):
        yield prompts[start : start + PROMPTS_PER_REQUEST]


def _without_whitespace(text: str) -> str:
    return "".join(text.split())
