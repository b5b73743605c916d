"""Text from a local model, in batches; each answer is drawn by random numbers of its own."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList, StoppingCriteria, StoppingCriteriaList

from limbeck.distill.data.filters import Answer

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

TAIL = 8  # tokens looked back at for the rest of a stop string, beyond one for each of its characters


class SeededSampling(LogitsProcessor):
    """Chooses each row's next token by one random number of the row's own, and keeps what it was worth.

    The number picks its place in the cumulative distribution. So an answer depends on its seed and its prompt alone;
    rounding apart, which differs with the padding, no other row of the batch has a say.

    Args:
        seeds: of each row. width: tokens before the first new one.
        vocab_size: logits from there on are padding and are never chosen.
    """

    def __init__(
        self, seeds: Sequence[int], width: int, length: int, vocab_size: int, temperature: float, top_p: float
    ) -> None:
        self.numbers = np.stack([np.random.default_rng(seed).random(length) for seed in seeds])  # (B, length)
        self.width = width
        self.vocab_size = vocab_size
        self.temperature = temperature
        self.top_p = top_p
        self.logprobs: list[torch.Tensor] = []  # (B,) for each step, of the chosen token at temperature 1

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        """Logits (B, V) in which only the chosen token is left."""
        logprobs = scores[:, : self.vocab_size].float().log_softmax(-1)
        if self.temperature == 0:
            chosen = logprobs.argmax(-1, keepdim=True)
        else:
            number = torch.from_numpy(self.numbers[:, input_ids.shape[1] - self.width, None]).to(scores.device)
            chosen = self._draw_tokens((logprobs / self.temperature).double().softmax(-1), number)
        self.logprobs.append(logprobs.gather(-1, chosen)[:, 0])
        left = torch.full_like(scores, -torch.inf)
        return left.scatter_(-1, chosen, 0.0)  # type: ignore[return-value]

    def _draw_tokens(self, probabilities: torch.Tensor, number: torch.Tensor) -> torch.Tensor:
        """The tokens (B, 1) at the places `number` (B, 1) in [0, 1) of distributions (B, V)."""
        order = None
        if self.top_p < 1:
            probabilities, order = probabilities.sort(-1, descending=True)
            before = probabilities.cumsum(-1) - probabilities
            probabilities = probabilities.where(before < self.top_p, 0.0)
        mass = probabilities.cumsum(-1)
        place = torch.searchsorted(mass, number * mass[:, -1:], right=True)
        # Rounding may bring a number to the end of all mass: the last token that has some is meant.
        place = place.minimum((mass < mass[:, -1:]).sum(-1, keepdim=True))
        return place if order is None else order.gather(-1, place)


class Stops(StoppingCriteria):
    """A row ends with its text holding one of the stop strings."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, stop: Sequence[str], width: int) -> None:
        self.tokenizer, self.stop, self.width = tokenizer, stop, width
        self.tail = max(len(text.encode()) for text in stop) + TAIL

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor, **kwargs: Any) -> torch.Tensor:
        """(B,) bool."""
        tails = input_ids[:, max(self.width, input_ids.shape[1] - self.tail) :]
        texts = self.tokenizer.batch_decode(tails, skip_special_tokens=True)
        return torch.tensor([any(stop in text for stop in self.stop) for text in texts], device=input_ids.device)


class TextSampler:
    """A local model that answers prompts.

    Args:
        end_ids: tokens that end an answer.
        vocab_size: of the tokenizer.
        max_new_tokens, temperature, top_p, stop: as in `recipe.Generate`.
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
        """The answers to prompts of token ids, all of them one batch, each drawn by its seed."""
        began = time.monotonic()
        width = max(map(len, prompts))
        pad = self.tokenizer.pad_token_id if self.tokenizer.pad_token_id is not None else min(self.end_ids)
        ids = torch.tensor([[pad] * (width - len(prompt)) + list(prompt) for prompt in prompts])
        mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts])
        draws = SeededSampling(seeds, width, self.max_new_tokens, self.vocab_size, self.temperature, self.top_p)
        # Of the checkpoint's own settings none is left, such as a repetition penalty: the recipe says all.
        config = GenerationConfig(
            max_new_tokens=self.max_new_tokens, do_sample=False, eos_token_id=sorted(self.end_ids), pad_token_id=pad
        )
        stops = [Stops(self.tokenizer, self.stop, width)] if self.stop else []
        output = self.model.generate(
            input_ids=ids.to(self.model.device),
            attention_mask=mask.to(self.model.device),
            generation_config=config,
            use_model_defaults=False,
            logits_processor=LogitsProcessorList([draws]),
            stopping_criteria=StoppingCriteriaList(stops),
        )
        logprobs = torch.stack(draws.logprobs, 1).double().cpu().numpy()  # (B, steps)
        seconds = (time.monotonic() - began) / len(prompts)
        new = output[:, width:].cpu().numpy()
        return [self._answer(*row, seconds) for row in zip(new, logprobs, strict=True)]

    def _answer(self, ids: np.ndarray, logprobs: np.ndarray, seconds: float) -> Answer:
        """One row's new tokens (steps,), cut where it ended."""
        ends = np.flatnonzero(np.isin(ids, sorted(self.end_ids)))
        finished = len(ends) > 0
        size = int(ends[0]) if finished else len(ids)
        steps = size + finished  # the token that ends it was chosen too
        text = self.tokenizer.decode(ids[:size], skip_special_tokens=True)
        if cuts := [place for stop in self.stop if (place := text.find(stop)) >= 0]:
            text, finished = text[: min(cuts)], True
            size = steps = self._until_stop(ids[:size])
        return Answer(text, size, finished, float(logprobs[:steps].mean()), seconds=seconds)

    def _until_stop(self, ids: np.ndarray) -> int:
        """How many of a row's tokens (n,) were made until a stop string was whole: what follows is padding."""
        low, high = 1, len(ids)
        while low < high:
            middle = (low + high) // 2
            text = self.tokenizer.decode(ids[:middle], skip_special_tokens=True)
            low, high = (low, middle) if any(stop in text for stop in self.stop) else (middle + 1, high)
        return low


def end_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """The tokens that end a text: the tokenizer's EOS, and those of the checkpoint, such as the end of a turn."""
    own = model.generation_config.eos_token_id if model.generation_config else None
    ids = own if isinstance(own, list) else [own]
    return {int(token) for token in [*ids, tokenizer.eos_token_id] if token is not None}
