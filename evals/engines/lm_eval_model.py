"""Limbeck's model for lm-eval: the same numbers as its HFLM gives, from any engine, and none of them twice."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import (
    handle_stop_sequences,
    has_bos_prefix,
    normalize_gen_kwargs,
    postprocess_generated_text,
)
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from limbeck.evals.engines.batches import BATCH_TOKENS, ContinuationScore, NanLogits, split_by_tokens
from limbeck.evals.engines.engine import Engine
from limbeck.evals.engines.score_cache import ScoreCache, request_key
from limbeck.registry.core.errors import BadInput
from limbeck.registry.core.terminal import print_status

MAX_GEN_TOKS = 256  # where a task does not say, as HFLM


class LimbeckLM(TemplateLM):
    """An `Engine` as an lm-eval model.

    Tokens, BOS, truncation and windows are those of `lm_eval.models.huggingface.HFLM` with its defaults, so
    that scores pair with scores of the harness itself. Requests with the same input tokens run once.

    Args:
        label: what the model is called in messages.
        cache: where answers are kept and looked for; without one they are kept for a call only.
        harness: name and version of lm-eval, for the cache.
        documents: the numbers of a task's documents where not all are asked, for messages.
        chat_template: the name of the tokenizer's chat template; None is its only or default one.
        batch_tokens: the most tokens of one forward pass, padding included; a longer text runs alone.
        on_requests: told of each batch the number of requests that it finished.
    """

    def __init__(
        self,
        engine: Engine,
        *,
        label: str = "the model",
        cache: ScoreCache | None = None,
        harness: str = "",
        document_numbers: Callable[[str], list[int] | None] = lambda task: None,
        chat_template: str | None = None,
        batch_tokens: int = BATCH_TOKENS,
        on_requests: Callable[[int], None] = lambda done: None,
    ) -> None:
        super().__init__()
        self.engine = engine
        self.tokenizer = engine.tokenizer
        self.max_length = engine.max_length
        self.label = label
        self.cache = cache
        self.document_numbers = document_numbers
        self.template = chat_template
        self.batch_tokens = batch_tokens
        self.on_requests = on_requests
        self._key_parts = [harness, engine.identity, engine.max_length]
        self._requests: Sequence[Instance] = []
        self._warned_of_system_role = False

    @property
    def eot_token_id(self) -> int:
        """The token that ends a text."""
        return self.tokenizer.eos_token_id

    @property
    def prefix_token_id(self) -> int:
        """What stands before a text without context: BOS, else EOS. Raises BadInput where there is neither."""
        begin = self.tokenizer.bos_token_id
        begin = self.tokenizer.eos_token_id if begin is None else begin
        if begin is None:
            raise BadInput(f"the tokenizer of {self.tokenizer.name_or_path} has neither a BOS nor an EOS token")
        return begin

    @property
    def tokenizer_name(self) -> str:
        """The tokenizer's folder or hub id, as lm-eval writes it in its cache keys."""
        return self.tokenizer.name_or_path.replace("/", "__")

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """A conversation as one prompt, by the tokenizer's template.

        As in HFLM, a template that knows no system role is given the rest. Raises BadInput where it takes that
        no more.
        """
        from jinja2.exceptions import TemplateError

        settings: dict[str, Any] = {
            "tokenize": False,
            "add_generation_prompt": add_generation_prompt,
            "continue_final_message": not add_generation_prompt,
            "chat_template": self.template,
        }
        try:
            return str(self.tokenizer.apply_chat_template(chat_history, **settings))
        except TemplateError as error:
            if not self._warned_of_system_role:
                print_status(f"the chat template refuses these messages ({error}): the system message is left out")
            self._warned_of_system_role = True
        rest = [message for message in chat_history if message["role"] != "system"]
        try:
            return str(self.tokenizer.apply_chat_template(rest, **settings))
        except TemplateError as error:
            raise BadInput(f"the chat template cannot be applied: {error}") from error

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """Token ids. Special tokens as the tokenizer adds them, unless the text starts with BOS or it is said."""
        if add_special_tokens is None and has_bos_prefix(string, self.tokenizer.decode(self.prefix_token_id)):
            add_special_tokens = False
        given = {} if add_special_tokens is None else {"add_special_tokens": add_special_tokens}
        return self.tokenizer.encode(string, **given)

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = True) -> list[ContinuationScore]:
        """(log-probability in nats, greedy) of each (context, continuation)."""
        self._requests = requests
        return super().loglikelihood(requests, disable_tqdm=True)

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = True) -> list[float]:
        """Log-probability in nats of each whole text; one longer than the context goes in windows."""
        owners: list[int] = []
        windows: list[tuple[list[int], list[int]]] = []
        for index, request in enumerate(requests):
            rolling = get_rolling_token_windows(
                token_list=self.tok_encode(request.args[0]),
                prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length,
                context_len=1,
            )
            windows += (pair := [make_disjoint_window(window) for window in rolling])
            owners += [index] * len(pair)
        missing = Counter(owners)
        totals = [0.0] * len(requests)
        for window, (logprob, _) in self._score_pairs([requests[owner] for owner in owners], windows):
            owner = owners[window]
            totals[owner] += logprob
            missing[owner] -= 1
            self.on_requests(int(missing[owner] == 0))
        return totals

    def _loglikelihood_tokens(
        self, requests: list[tuple[tuple[str, str], list[int], list[int]]], **kwargs: Any
    ) -> list[ContinuationScore]:
        scores: list[ContinuationScore] = [(0.0, False)] * len(requests)
        pairs = [(context, continuation) for _, context, continuation in requests]
        # Of the last continuation token nothing is asked, so that it needs no room.
        _report_truncation(self._requests, [len(a) + len(b) - 1 for a, b in pairs], self.max_length, self.max_length)
        for index, score in self._score_pairs(self._requests, pairs):
            scores[index] = score
            self.on_requests(1)
        return scores

    def _score_pairs(
        self, requests: Sequence[Instance], pairs: Sequence[tuple[list[int], list[int]]]
    ) -> Iterator[tuple[int, ContinuationScore]]:
        """(index, score) of each (context, continuation) of token ids: what is kept first, then as it is run.

        Args:
            requests: the request that each pair is of.
        """
        places: dict[bytes, list[int]] = {}
        for index, (request, (context, continuation)) in enumerate(zip(requests, pairs, strict=True)):
            if not 0 < len(continuation) <= self.max_length:
                raise BadInput(
                    f"{self._describe_request(request)}: a choice has {len(continuation)} tokens; "
                    f"the model's context allows 1 to {self.max_length}",
                    fix="leave the task out, or give a model with a longer context",
                )
            key = request_key(request.request_type, request.task_name, context, continuation, *self._key_parts)
            places.setdefault(key, []).append(index)
        kept = self._cached_answers(places)
        for key, (logprob, greedy) in kept.items():
            for index in places[key]:
                yield index, (logprob, greedy)
        missing = [key for key in places if key not in kept]
        if not missing:
            return
        todo = [pairs[places[key][0]] for key in missing]
        try:
            for number, score in self.engine.scores(todo, self.batch_tokens):
                if math.isnan(score[0]):
                    raise NanLogits(number)
                if self.cache:
                    self.cache.put(missing[number], score)
                for index in places[missing[number]]:
                    yield index, score
        except NanLogits as error:
            raise self._nan_error(requests[places[missing[error.index]][0]], error) from None

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = True) -> list[str]:
        """The text that follows each (context, generation_kwargs), up to one of its `until` strings."""
        texts = [""] * len(requests)
        groups: dict[str, list[int]] = {}
        for index, request in enumerate(requests):
            groups.setdefault(repr(request.args[1]), []).append(index)
        for members in groups.values():
            for index, text in self._generate_texts([requests[index] for index in members]):
                texts[members[index]] = text
                self.on_requests(1)
        return texts

    def _generate_texts(self, requests: Sequence[Instance]) -> Iterator[tuple[int, str]]:
        """(index, text) of requests with the same settings: what is kept first, then as it is generated."""
        settings: dict[str, Any] = dict(normalize_gen_kwargs(requests[0].args[1], MAX_GEN_TOKS))
        eos = self.tokenizer.decode(self.eot_token_id, skip_special_tokens=False)
        until = handle_stop_sequences(settings.pop("until"), eos=eos)
        new_tokens = settings.pop("max_gen_toks")
        room = self.max_length - new_tokens
        if room <= 0:
            raise BadInput(
                f"the task generates up to {new_tokens} tokens, the model's context has {self.max_length}",
                fix="set a smaller max_gen_toks in the task's generation_kwargs, or with --gen-kwargs",
            )
        prompts = [self._encode_prompt(request.args[0]) for request in requests]
        _report_truncation(requests, [len(prompt) for prompt in prompts], room, self.max_length)
        places: dict[bytes, list[int]] = {}
        times: Counter[bytes] = Counter()
        for index, (request, prompt) in enumerate(zip(requests, prompts, strict=True)):
            said = ("generate_until", request.task_name, prompt[-room:], until, new_tokens, settings, *self._key_parts)
            key = request_key(*said)
            if settings["do_sample"]:  # asked again it says something else, and that is kept too
                times[key] += 1
                key = request_key(*said, times[key])
            places.setdefault(key, []).append(index)
        kept = self._cached_answers(places)
        for key, text in kept.items():
            for index in places[key]:
                yield index, text
        missing = [key for key in places if key not in kept]
        ids = {key: prompts[places[key][0]][-room:] for key in missing}
        missing.sort(key=lambda key: -len(ids[key]))
        done = 0
        for batch in split_by_tokens([ids[key] for key in missing], self.batch_tokens, new_tokens):
            try:
                answers = self._generate(batch, new_tokens, until, settings)
            except NanLogits as error:
                raise self._nan_error(requests[places[missing[done + error.index]][0]], error) from None
            for made in answers:
                key = missing[done]
                text = made if isinstance(made, str) else self.tokenizer.decode(made, skip_special_tokens=True)
                text = postprocess_generated_text(text, until, None)
                if self.cache:
                    self.cache.put(key, text)
                for index in places[key]:
                    yield index, text
                done += 1

    def _cached_answers(self, keys: Iterable[bytes]) -> dict[bytes, Any]:
        """The answers that the cache has."""
        found = ((key, self.cache.get(key)) for key in keys) if self.cache else ()
        return {key: answer for key, answer in found if answer is not None}

    def _generate(
        self, prompts: Sequence[list[int]], new_tokens: int, until: list[str], settings: dict[str, Any]
    ) -> Iterable[list[int] | str]:
        """As `Engine.generate`. Raises BadInput for settings that the library does not know."""
        try:
            return self.engine.generate(prompts, new_tokens, until, **settings)
        except (TypeError, ValueError) as error:
            line = str(error).strip().splitlines()[0]
            raise BadInput(f"the model cannot generate with {settings}: {line}") from error

    def _nan_error(self, request: Instance, error: NanLogits) -> BadInput:
        return BadInput(f"{self._describe_request(request)}: {error.message}", fix=error.fix)

    def _describe_request(self, request: Instance) -> str:
        chosen = self.document_numbers(request.task_name or "")
        number = request.doc_id if chosen is None or request.doc_id is None else chosen[request.doc_id]
        return f"{self.label}: task {request.task_name}, document {number}"

    def _encode_prompt(self, text: str) -> list[int]:
        """The tokens of a prompt; the token that begins a text where it is empty."""
        bos = has_bos_prefix(text, self.tokenizer.bos_token)
        ids = self.tokenizer.encode(text, **({"add_special_tokens": False} if bos else {}))
        return ids or [self.prefix_token_id]


def _report_truncation(requests: Sequence[Instance], lengths: Sequence[int], room: int, context: int) -> None:
    """Tell of each task how many requests lose their beginning, as they do in HFLM."""
    asked = Counter(request.task_name for request in requests)
    cut = Counter(request.task_name for request, length in zip(requests, lengths, strict=True) if length > room)
    for task, count in cut.items():
        print_status(
            f"{count} of {asked[task]} requests of {task} are longer than the context of {context} tokens "
            "and lost their beginning"
        )
