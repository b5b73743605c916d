"""Limbeck's model for lm-eval: the same numbers as its HFLM gives, from PyTorch or ONNX, in large batches."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
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

from evals.engines import Engine, Scored
from evals.rows import BATCH_TOKENS, batches
from registry.errors import BadInput

MAX_GEN_TOKS = 256  # where a task does not say, as HFLM


class LimbeckLM(TemplateLM):
    """An `Engine` as an lm-eval model.

    Tokens, BOS, truncation and windows are those of `lm_eval.models.huggingface.HFLM` with its defaults, so
    that scores pair with scores of the harness itself. Requests with the same input tokens run once.

    Args:
        batch_tokens: the most tokens of one forward pass, padding included; a longer text runs alone.
        on_requests: told of each batch the number of requests that it finished.
    """

    def __init__(
        self,
        engine: Engine,
        *,
        batch_tokens: int = BATCH_TOKENS,
        on_requests: Callable[[int], None] = lambda done: None,
    ) -> None:
        super().__init__()
        self.engine = engine
        self.tokenizer = engine.tokenizer
        self.max_length = engine.max_length
        self.batch_tokens = batch_tokens
        self.on_requests = on_requests

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
        """A conversation as one prompt, by the tokenizer's own template."""
        text = self.tokenizer.apply_chat_template(
            chat_history,
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=not add_generation_prompt,
        )
        return str(text)

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """Token ids. Special tokens as the tokenizer adds them, unless the text starts with BOS or it is said."""
        if add_special_tokens is None and has_bos_prefix(string, self.tokenizer.decode(self.prefix_token_id)):
            add_special_tokens = False
        given = {} if add_special_tokens is None else {"add_special_tokens": add_special_tokens}
        return self.tokenizer.encode(string, **given)

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = True) -> list[Scored]:
        """(log-probability in nats, greedy) of each (context, continuation)."""
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
        for window, (logprob, _) in self._scores(windows):
            owner = owners[window]
            totals[owner] += logprob
            missing[owner] -= 1
            self.on_requests(int(missing[owner] == 0))
        return totals

    def _loglikelihood_tokens(
        self, requests: list[tuple[tuple[str, str], list[int], list[int]]], **kwargs: Any
    ) -> list[Scored]:
        scores: list[Scored] = [(0.0, False)] * len(requests)
        for index, score in self._scores([(context, continuation) for _, context, continuation in requests]):
            scores[index] = score
            self.on_requests(1)
        return scores

    def _scores(self, pairs: list[tuple[list[int], list[int]]]) -> Iterator[tuple[int, Scored]]:
        """(index, score) of each (context, continuation) of token ids, in the order they are finished."""
        for _, continuation in pairs:
            if not 0 < len(continuation) <= self.max_length:
                raise BadInput(
                    f"a choice has {len(continuation)} tokens; the model's context allows 1 to {self.max_length}",
                    fix="leave the task out, or give a model with a longer context",
                )
        return self.engine.scores(pairs, self.batch_tokens)

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = True) -> list[str]:
        """The text that follows each (context, generation_kwargs), up to one of its `until` strings."""
        texts = [""] * len(requests)
        groups: dict[str, list[int]] = {}
        for index, request in enumerate(requests):
            groups.setdefault(repr(request.args[1]), []).append(index)
        for members in groups.values():
            settings: dict[str, Any] = dict(normalize_gen_kwargs(requests[members[0]].args[1], MAX_GEN_TOKS))
            eos = self.tokenizer.decode(self.eot_token_id, skip_special_tokens=False)
            until = handle_stop_sequences(settings.pop("until"), eos=eos)
            new_tokens = settings.pop("max_gen_toks")
            room = self.max_length - new_tokens
            if room <= 0:
                raise BadInput(
                    f"the task generates up to {new_tokens} tokens, the model's context has {self.max_length}",
                    fix="set a smaller max_gen_toks in the task's generation_kwargs",
                )
            prompts = {index: self._prompt(requests[index].args[0], room) for index in members}
            order = sorted(members, key=lambda index: -len(prompts[index]))
            done = 0
            for batch in batches([prompts[index] for index in order], self.batch_tokens, new_tokens):
                for tokens in self.engine.generate(batch, new_tokens, until, **settings):
                    text = self.tokenizer.decode(tokens, skip_special_tokens=True)
                    texts[order[done]] = postprocess_generated_text(text, until, None)
                    done += 1
                self.on_requests(len(batch))
        return texts

    def _prompt(self, text: str, room: int) -> list[int]:
        """The last `room` tokens of a prompt; the token that begins a text where it is empty."""
        bos = has_bos_prefix(text, self.tokenizer.bos_token)
        ids = self.tokenizer.encode(text, **({"add_special_tokens": False} if bos else {}))
        return ids[-room:] or [self.prefix_token_id]
