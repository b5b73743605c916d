"""Samples answers from a local model in batches; each answer has random numbers of its own."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList, StoppingCriteria, StoppingCriteriaList

from limbeck.distill.data.filters import Answer

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

TAIL = 8  # tokens searched for a stop string, besides one for each of its bytes


class SeededSampling(LogitsProcessor):
    """Chooses each row's next token with the row's own random numbers, and records its log-probability.

    A random number is a point in the cumulative distribution. So an answer depends only on its seed and its prompt, not
    on the other rows of the batch (except for rounding, which changes with the padding).

    Args:
        seeds: one for each row.
        width: tokens before the first new one.
        length: most new tokens.
        vocab_size: later logits are padding and are never chosen.
    """

    def __init__(
        self, seeds: Sequence[int], width: int, length: int, vocab_size: int, temperature: float, top_p: float
    ) -> None:
        self.numbers = np.stack([np.random.default_rng(seed).random(length) for seed in seeds])  # (B, length)
        self.width = width
        self.vocab_size = vocab_size
        self.temperature = temperature
        self.top_p = top_p
        self.logprobs: list[torch.Tensor] = []  # (B,) for each step: of the chosen token, at temperature 1

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        """Logits (B, V) that allow only the chosen token."""
        logprobs = scores[:, : self.vocab_size].float().log_softmax(-1)
        if self.temperature == 0:
            chosen = logprobs.argmax(-1, keepdim=True)
        else:
            number = torch.from_numpy(self.numbers[:, input_ids.shape[1] - self.width, None]).to(scores.device)
            chosen = self._draw_tokens((logprobs / self.temperature).double().softmax(-1), number)
        self.logprobs.append(logprobs.gather(-1, chosen)[:, 0])
        only_chosen = torch.full_like(scores, -torch.inf)
        return only_chosen.scatter_(-1, chosen, 0.0)  # type: ignore[return-value]

    def _draw_tokens(self, probabilities: torch.Tensor, number: torch.Tensor) -> torch.Tensor:
        """The tokens (B, 1) at the points `number` (B, 1), in [0, 1), of the cumulative distributions (B, V)."""
        order = None
        if self.top_p < 1:
            probabilities, order = probabilities.sort(-1, descending=True)
            before = probabilities.cumsum(-1) - probabilities
            probabilities = probabilities.where(before < self.top_p, 0.0)
        mass = probabilities.cumsum(-1)
        token = torch.searchsorted(mass, number * mass[:, -1:], right=True)
        # Rounding may move a point to the end of the mass: take the last token with a probability above 0.
        token = token.minimum((mass < mass[:, -1:]).sum(-1, keepdim=True))
        return token if order is None else order.gather(-1, token)


class StopStrings(StoppingCriteria):
    """Ends a row if its text contains one of the stop strings."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, stop: Sequence[str], width: int) -> None:
        self.tokenizer, self.stop, self.width = tokenizer, stop, width
        self.tail = max(len(text.encode()) for text in stop) + TAIL

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor, **kwargs: Any) -> torch.Tensor:
        """Whether each row has ended: (B,) bool."""
        tails = input_ids[:, max(self.width, input_ids.shape[1] - self.tail) :]
        texts = self.tokenizer.batch_decode(tails, skip_special_tokens=True)
        return torch.tensor([any(stop in text for stop in self.stop) for text in texts], device=input_ids.device)


class TextSampler:
    """A local model that answers prompts.

    Args:
        vocab_size: of the tokenizer.
        max_new_tokens, temperature, top_p, stop: as in `[generate]` of a recipe.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        vocab_size: int,
        max_new_tokens: int,
        temperature: float = 1.0,
        top_p: float = 1.0,
        stop: Sequence[str] = (),
    ) -> None:
        self.model, self.tokenizer, self.vocab_size = model.eval(), tokenizer, vocab_size
        self.max_new_tokens, self.temperature, self.top_p, self.stop = max_new_tokens, temperature, top_p, stop
        self.end_ids = end_ids(model, tokenizer)

    @torch.inference_mode()
    def answers(self, prompts: Sequence[Sequence[int]], seeds: Sequence[int]) -> list[Answer]:
        """The answers to prompts of token ids, sampled as one batch, with one seed for each."""
        began = time.monotonic()
        width = max(map(len, prompts))
        pad = self.tokenizer.pad_token_id if self.tokenizer.pad_token_id is not None else min(self.end_ids)
        ids = torch.tensor([[pad] * (width - len(prompt)) + list(prompt) for prompt in prompts])
        mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts])
        sampling = SeededSampling(seeds, width, self.max_new_tokens, self.vocab_size, self.temperature, self.top_p)
        # Ignore the checkpoint's own settings, such as a repetition penalty: the recipe has all settings.
        config = GenerationConfig(
            max_new_tokens=self.max_new_tokens, do_sample=False, eos_token_id=sorted(self.end_ids), pad_token_id=pad
        )
        stops = [StopStrings(self.tokenizer, self.stop, width)] if self.stop else []
        with generation_settings(self.model, config):
            output = self.model.generate(
                input_ids=ids.to(self.model.device),
                attention_mask=mask.to(self.model.device),
                logits_processor=LogitsProcessorList([sampling]),
                stopping_criteria=StoppingCriteriaList(stops),
            )
        logprobs = torch.stack(sampling.logprobs, 1).double().cpu().numpy()  # (B, steps)
        seconds = (time.monotonic() - began) / len(prompts)
        new = output[:, width:].cpu().numpy()
        return [self._answer(*row, seconds) for row in zip(new, logprobs, strict=True)]

    def _answer(self, ids: np.ndarray, logprobs: np.ndarray, seconds: float) -> Answer:
        """The answer in one row's new tokens (steps,)."""
        ends = np.flatnonzero(np.isin(ids, sorted(self.end_ids)))
        finished = len(ends) > 0
        size = int(ends[0]) if finished else len(ids)
        steps = size + finished  # with the token that ends it
        text = str(self.tokenizer.decode(ids[:size], skip_special_tokens=True))
        cuts = [text.find(stop) for stop in self.stop if stop in text]
        if cuts:
            text, finished = text[: min(cuts)], True
            size = steps = self._tokens_until_stop(ids[:size])
        return Answer(text, size, finished, float(logprobs[:steps].mean()), seconds=seconds)

    def _tokens_until_stop(self, ids: np.ndarray) -> int:
        """How many of a row's tokens (n,) it takes to complete a stop string; the rest is padding."""
        low, high = 1, len(ids)
        while low < high:
            middle = (low + high) // 2
            text = self.tokenizer.decode(ids[:middle], skip_special_tokens=True)
            if any(stop in text for stop in self.stop):
                high = middle
            else:
                low = middle + 1
        return low


@contextmanager
def generation_settings(model: PreTrainedModel, config: GenerationConfig) -> Iterator[None]:
    """Let `generate` of `model` follow `config` alone; transformers fills what it leaves out from the checkpoint's."""
    own, model.generation_config = model.generation_config, config
    try:
        yield
    finally:
        model.generation_config = own


def end_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """The ids that end a text: the tokenizer's EOS and those of the checkpoint, such as the end of a chat message."""
    own = model.generation_config.eos_token_id if model.generation_config else None
    ids = own if isinstance(own, list) else [own]
    return {int(token) for token in [*ids, tokenizer.eos_token_id] if token is not None}
