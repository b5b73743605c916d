"""An lm-eval model over any engine, with the numbers of lm-eval's HFLM; equal requests run once."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import (
    handle_stop_sequences,
    has_bos_prefix,
    normalize_gen_kwargs,
    postprocess_generated_text,
)
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from limbeck.evals.engines.batches import BATCH_TOKENS, ContinuationScore, NanLogits, TokenPair, split_by_tokens
from limbeck.evals.engines.engine import Engine
from limbeck.evals.engines.score_cache import ScoreCache, request_key
from limbeck.registry.core.errors import BadInput
from limbeck.registry.core.terminal import print_status

MAX_GEN_TOKS = 256  # if a task does not set it, as in HFLM


@dataclass(frozen=True)
class RequestNames:
    """How messages name a request.

    Attributes:
        model: the model's label.
        document_numbers: task -> the indices of its documents that are scored; None if those are the first ones.
    """

    model: str = "the model"
    document_numbers: Callable[[str], list[int] | None] = lambda task: None

    def describe(self, request: Instance) -> str:
        """The model, task and document of a request."""
        numbers = self.document_numbers(request.task_name or "")
        document = request.doc_id if numbers is None or request.doc_id is None else numbers[request.doc_id]
        return f"{self.model}: task {request.task_name}, document {document}"


@dataclass(frozen=True, kw_only=True)
class ChatSettings:
    """How a model is talked to.

    Attributes:
        template: the name of the tokenizer's chat template; None is its only or default one.
        template_args: further variables of the template, such as `{"enable_thinking": True}`.
        think_end: the text after which a generated answer begins, such as "</think>"; None: a model does not think.
    """

    template: str | None = None
    template_args: Mapping[str, Any] = field(default_factory=dict)
    think_end: str | None = None


class LimbeckLM(TemplateLM):
    """An `Engine` as an lm-eval model.

    Tokens, BOS, truncation and windows are those of `lm_eval.models.huggingface.HFLM` with its defaults, so
    that scores pair with scores of the harness itself. Requests with the same input tokens run once.

    Args:
        names: how messages name a request.
        cache: stores answers; without it they are reused within a call only.
        harness: name and version of lm-eval, for the cache keys.
        chat: how the model is talked to; None for the defaults.
        batch_tokens: the most tokens of one forward pass, padding included; a longer text runs alone.
        on_requests: called with the number of requests that were just finished.
    """

    def __init__(
        self,
        engine: Engine,
        *,
        names: RequestNames | None = None,
        cache: ScoreCache | None = None,
        harness: str = "",
        chat: ChatSettings | None = None,
        batch_tokens: int = BATCH_TOKENS,
        on_requests: Callable[[int], None] = lambda done: None,
    ) -> None:
        super().__init__()
        self.engine = engine
        self.tokenizer = engine.tokenizer
        self.max_length = engine.max_length
        self.names = names or RequestNames()
        self.cache = cache
        self.chat = chat or ChatSettings()
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
        """The token before a text without context: BOS, else EOS. Raises BadInput if the tokenizer has neither."""
        bos, eos = self.tokenizer.bos_token_id, self.tokenizer.eos_token_id
        if bos is None and eos is None:
            raise BadInput(f"the tokenizer of {self.tokenizer.name_or_path} has neither a BOS nor an EOS token")
        return eos if bos is None else bos

    @property
    def tokenizer_name(self) -> str:
        """The tokenizer's folder or hub id, as lm-eval writes it in its cache keys."""
        return self.tokenizer.name_or_path.replace("/", "__")

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """A conversation as one prompt, by the tokenizer's template.

        As in HFLM, a template that refuses the conversation gets it without system messages. Raises BadInput if it
        refuses that too.
        """
        from jinja2.exceptions import TemplateError

        settings: dict[str, Any] = {
            "tokenize": False,
            "add_generation_prompt": add_generation_prompt,
            "continue_final_message": not add_generation_prompt,
            "chat_template": self.chat.template,
            **self.chat.template_args,
        }
        try:
            return str(self.tokenizer.apply_chat_template(chat_history, **settings))
        except TemplateError as error:
            if not self._warned_of_system_role:
                print_status(f"the chat template refuses the messages ({error}): retrying without the system message")
            self._warned_of_system_role = True
        rest = [message for message in chat_history if message["role"] != "system"]
        try:
            return str(self.tokenizer.apply_chat_template(rest, **settings))
        except TemplateError as error:
            raise BadInput(f"the chat template cannot be applied: {error}") from error

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """Token ids. By default the tokenizer adds its special tokens, unless the text already starts with BOS."""
        if add_special_tokens is None and has_bos_prefix(string, self.tokenizer.decode(self.prefix_token_id)):
            add_special_tokens = False
        options = {} if add_special_tokens is None else {"add_special_tokens": add_special_tokens}
        return self.tokenizer.encode(string, **options)

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = True) -> list[ContinuationScore]:
        """(log-probability in nats, whether greedy decoding gives it) of each (context, continuation)."""
        self._requests = requests
        return super().loglikelihood(requests, disable_tqdm=True)

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = True) -> list[float]:
        """Log-probability in nats of each whole text; a text longer than the context is split into windows."""
        owners: list[int] = []
        windows: list[TokenPair] = []
        for index, request in enumerate(requests):
            rolling = get_rolling_token_windows(
                token_list=self.tok_encode(request.args[0]),
                prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length,
                context_len=1,
            )
            disjoint = [make_disjoint_window(window) for window in rolling]
            windows += disjoint
            owners += [index] * len(disjoint)
        remaining = Counter(owners)
        totals = [0.0] * len(requests)
        for window, (logprob, _) in self._score_pairs([requests[owner] for owner in owners], windows):
            owner = owners[window]
            totals[owner] += logprob
            remaining[owner] -= 1
            self.on_requests(int(remaining[owner] == 0))
        return totals

    def _loglikelihood_tokens(
        self, requests: list[tuple[tuple[str, str], list[int], list[int]]], **kwargs: Any
    ) -> list[ContinuationScore]:
        scores: list[ContinuationScore] = [(0.0, False)] * len(requests)
        pairs = [(context, continuation) for _, context, continuation in requests]
        # The last continuation token is predicted, not read, so it needs no room in the context.
        _report_truncation(self._requests, [len(a) + len(b) - 1 for a, b in pairs], self.max_length, self.max_length)
        for index, score in self._score_pairs(self._requests, pairs):
            scores[index] = score
            self.on_requests(1)
        return scores

    def _score_pairs(
        self, requests: Sequence[Instance], pairs: Sequence[TokenPair]
    ) -> Iterator[tuple[int, ContinuationScore]]:
        """(index, score) of each pair: those in the cache first, then the others as they are finished.

        Args:
            requests: the request of each pair.
        """
        keys = [self._pair_key(request, pair) for request, pair in zip(requests, pairs, strict=True)]
        answers = _Answers(keys, self.cache)
        yield from answers.cached()
        missing = answers.missing
        if not missing:
            return
        firsts = [answers.first_index(key) for key in missing]
        try:
            for number, score in self.engine.scores([pairs[index] for index in firsts], self.batch_tokens):
                if math.isnan(score[0]):
                    raise NanLogits(number)
                yield from answers.add(missing[number], score)
        except NanLogits as error:
            raise self._nan_error(requests[firsts[error.index]], error) from None

    def _pair_key(self, request: Instance, pair: TokenPair) -> bytes:
        """The cache key of a pair. Raises BadInput for a continuation that is empty or longer than the context."""
        if not 0 < len(pair[1]) <= self.max_length:
            raise BadInput(
                f"{self.names.describe(request)}: a choice has {len(pair[1])} tokens; "
                f"the model's context allows 1 to {self.max_length}",
                fix="leave the task out, or give a model with a longer context",
            )
        return request_key(request.request_type, request.task_name, *pair, *self._key_parts)

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = True) -> list[str]:
        """The text generated after each (context, generation_kwargs), up to one of its `until` strings."""
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
        """(index, text) of requests with the same settings: those in the cache first, then the others."""
        settings = self._generation_settings(requests[0])
        prompts = [self._encode_prompt(request.args[0]) for request in requests]
        room = self.max_length - settings.new_tokens
        _report_truncation(requests, [len(prompt) for prompt in prompts], room, self.max_length)
        prompts = [prompt[-room:] for prompt in prompts]
        answers = _Answers(self._generation_keys(requests, prompts, settings), self.cache)
        yield from answers.cached()
        missing = sorted(answers.missing, key=lambda key: -len(prompts[answers.first_index(key)]))
        firsts = [answers.first_index(key) for key in missing]
        done = unfinished = 0
        for batch in split_by_tokens([prompts[index] for index in firsts], self.batch_tokens, settings.new_tokens):
            try:
                generated = self._generate(batch, settings)
            except NanLogits as error:
                raise self._nan_error(requests[firsts[done + error.index]], error) from None
            for new in generated:
                text, thinks = self._answer(new)
                unfinished += thinks
                yield from answers.add(missing[done], postprocess_generated_text(text, settings.until, None))
                done += 1
        if unfinished:
            print_status(
                f"{unfinished} of {done} texts of {requests[0].task_name} have no {self.chat.think_end!r} within "
                f"{settings.new_tokens} tokens, and count as answers, as in lm-eval: raise max_gen_toks by --gen-kwargs"
            )

    def _answer(self, generated: list[int] | str) -> tuple[str, bool]:
        """What comes after the thoughts, and whether these did not end; all, if the model does not think."""
        end = self.chat.think_end
        if end is None or isinstance(generated, str):
            text = generated if isinstance(generated, str) else self._decode(generated)
        else:
            tokens = list(generated)
            special = self.tokenizer.convert_tokens_to_ids(end) if end in self.tokenizer.all_special_tokens else None
            if special in tokens:  # the decoded text would not have it
                return self._decode(tokens[len(tokens) - tokens[::-1].index(special) :]).lstrip(), False
            text = self._decode(tokens)
        if end is None:
            return text, False
        return postprocess_generated_text(text, None, end) if end in text else text, end not in text

    def _decode(self, tokens: list[int]) -> str:
        return str(self.tokenizer.decode(tokens, skip_special_tokens=True))

    def _generation_settings(self, request: Instance) -> _GenerationSettings:
        """The settings of a generate_until request. Raises BadInput if they leave no room for a prompt."""
        sampling: dict[str, Any] = dict(normalize_gen_kwargs(request.args[1], MAX_GEN_TOKS))
        eos = str(self.tokenizer.decode(self.eot_token_id, skip_special_tokens=False))
        until = handle_stop_sequences(sampling.pop("until"), eos=eos)
        new_tokens, end = sampling.pop("max_gen_toks"), self.chat.think_end
        if new_tokens >= self.max_length:
            raise BadInput(
                f"the task generates up to {new_tokens} tokens, but the model's context has only {self.max_length}",
                fix="set a smaller max_gen_toks in the task's generation_kwargs, or with --gen-kwargs",
            )
        return _GenerationSettings(until, new_tokens, sampling, end, until if end is None else [eos])

    def _generation_keys(
        self, requests: Sequence[Instance], prompts: Sequence[list[int]], settings: _GenerationSettings
    ) -> Iterator[bytes]:
        """The cache key of each request. Repeats of a request that is sampled have keys of their own."""
        repeats: Counter[bytes] = Counter()
        for request, prompt in zip(requests, prompts, strict=True):
            parts = ("generate_until", request.task_name, prompt, *settings, *self._key_parts)
            key = request_key(*parts)
            if settings.sampling["do_sample"]:
                repeats[key] += 1
                key = request_key(*parts, repeats[key])
            yield key

    def _generate(self, prompts: Sequence[list[int]], settings: _GenerationSettings) -> Iterable[list[int] | str]:
        """See `Engine.generate`. Raises BadInput for settings that the library does not know."""
        try:
            return self.engine.generate(prompts, settings.new_tokens, settings.engine_until, **settings.sampling)
        except (TypeError, ValueError) as error:
            line = str(error).strip().splitlines()[0]
            raise BadInput(f"the model cannot generate with {settings.sampling}: {line}") from error

    def _nan_error(self, request: Instance, error: NanLogits) -> BadInput:
        return BadInput(f"{self.names.describe(request)}: {error.message}", fix=error.fix)

    def _encode_prompt(self, text: str) -> list[int]:
        """The tokens of a prompt; `prefix_token_id` alone if it is empty."""
        starts_with_bos = has_bos_prefix(text, self.tokenizer.bos_token)
        ids = self.tokenizer.encode(text, **({"add_special_tokens": False} if starts_with_bos else {}))
        return ids or [self.prefix_token_id]


class _GenerationSettings(NamedTuple):
    """The settings of a generate_until request."""

    until: list[str]
    new_tokens: int
    sampling: dict[str, Any]  # do_sample, temperature and others, as transformers takes them
    think_end: str | None
    engine_until: list[str]  # what ends generation: only EOS ends thoughts, in which the task's own strings may occur


class _Answers:
    """The answers to requests by their keys: requests with equal keys share one answer, which the cache may have."""

    def __init__(self, keys: Iterable[bytes], cache: ScoreCache | None) -> None:
        self._cache = cache
        self._indices: dict[bytes, list[int]] = {}
        for index, key in enumerate(keys):
            self._indices.setdefault(key, []).append(index)
        found = {key: cache.get(key) for key in self._indices} if cache else {}
        self._cached = {key: answer for key, answer in found.items() if answer is not None}

    @property
    def missing(self) -> list[bytes]:
        """The keys without a cached answer."""
        return [key for key in self._indices if key not in self._cached]

    def first_index(self, key: bytes) -> int:
        """The index of the first request with this key."""
        return self._indices[key][0]

    def cached(self) -> Iterator[tuple[int, Any]]:
        """(index, answer) of each request with a cached answer."""
        for key, answer in self._cached.items():
            yield from ((index, answer) for index in self._indices[key])

    def add(self, key: bytes, answer: Any) -> Iterator[tuple[int, Any]]:
        """Store an answer in the cache; yields (index, answer) of each request with this key."""
        if self._cache:
            self._cache.put(key, answer)
        yield from ((index, answer) for index in self._indices[key])


def _report_truncation(requests: Sequence[Instance], lengths: Sequence[int], room: int, context: int) -> None:
    """Print for each task how many requests lose their beginning, as they do in HFLM."""
    totals = Counter(request.task_name for request in requests)
    truncated = Counter(request.task_name for request, length in zip(requests, lengths, strict=True) if length > room)
    for task, count in truncated.items():
        print_status(
            f"{count} of {totals[task]} requests of {task} are longer than the context of {context} tokens "
            "and lost their beginning"
        )
