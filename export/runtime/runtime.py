"""Run an ONNX artifact: numpy, onnxruntime and tokenizers, nothing else. A serving host needs no torch.

>>> from limbeck.runtime import Runtime
>>> runtime = Runtime.load(folder)
>>> print(runtime.generate(["def main("], max_new_tokens=32)[0].text)
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from limbeck.export.runtime.batch import Batch
from limbeck.export.runtime.generation import Completion, GenerationState, TokenEvent
from limbeck.export.runtime.sampling import Sampling
from limbeck.export.runtime.session import Session
from limbeck.export.runtime.slot import Slot
from limbeck.registry.core.errors import BadInput


class Runtime(Session):
    """A session that completes prompts, several together as one batch."""

    def generate(self, prompts: Sequence[str] | Sequence[Sequence[int]], **sampling: Any) -> list[Completion]:
        """Complete each prompt; all of them together as one batch.

        Args:
            prompts: texts, or token ids.
            **sampling: the fields of `Sampling`; max_new_tokens is required.

        Raises:
            BadInput: a prompt that leaves no room in the context, or a setting out of range.
        """
        ids = [self.prompt_ids(prompt) for prompt in prompts]
        request = Sampling(**sampling)
        start = time.perf_counter()
        events, times = [], []
        for event in self.generate_events(ids, request):
            events.append(event)
            times.append(time.perf_counter())
        completions = []
        for index, prompt in enumerate(ids):
            own = [event for event in events if event.index == index]
            logprobs = [event.logprob for event in own if event.logprob is not None]
            top = [event.top_logprobs for event in own if event.top_logprobs is not None]
            completions.append(
                Completion(
                    text="".join(event.text for event in own),
                    token_ids=[event.token_id for event in own],
                    finish_reason=own[-1].finish_reason or "length",
                    prompt_tokens=len(prompt),
                    prefill_s=times[0] - start,
                    decode_s=times[-1] - times[0],
                    logprobs=logprobs if request.logprobs is not None else None,
                    top_logprobs=top if request.logprobs else None,
                )
            )
        return completions

    def stream(self, prompt: str | Sequence[int], **sampling: Any) -> Iterator[str]:
        """The text of one completion, piece by piece as it is generated; whole characters only."""
        for event in self.generate_events([self.prompt_ids(prompt)], Sampling(**sampling)):
            if event.text:
                yield event.text

    def generate_events(self, prompts: Sequence[Sequence[int]], sampling: Sampling) -> Iterator[TokenEvent]:
        """The tokens of a request as they come. Every prompt ends with an event that has a finish_reason.

        Args:
            prompts: token ids, none empty.
        """
        batch = Batch(self, prefix_cache_tokens=0)
        going = [(self.start_generation(index, prompt, sampling), prompt) for index, prompt in enumerate(prompts)]
        rows = [(row, batch.add_prompt(prompt, row.max_new_tokens)) for row, prompt in going]
        logits = self._prefill(batch, [slot for _, slot in rows])
        while rows:
            for (row, _), values in zip(rows, logits, strict=True):
                yield row.choose_token(values)
            for row, slot in rows:
                if row.finish_reason:
                    batch.remove_slot(slot)
            rows = [(row, slot) for row, slot in rows if not row.finish_reason]
            if rows:
                logits = list(batch.step([slot for _, slot in rows], [row.last_token for row, _ in rows]))

    def _prefill(self, batch: Batch, slots: list[Slot]) -> list[np.ndarray]:
        """(V,) logits after each prompt, read in pieces whose logits fit in memory."""
        found: dict[Slot, np.ndarray] = {}
        while unread := [slot for slot in slots if slot not in found]:
            values = batch.prefill(unread, self.max_prefill_tokens)
            found |= {slot: logits for slot, logits in zip(unread, values, strict=True) if logits is not None}
        return [found[slot] for slot in slots]

    def start_generation(self, index: int, prompt: Sequence[int], sampling: Sampling) -> GenerationState:
        """The state of one prompt of a request while it is completed. Raises BadInput."""
        if (highest := max(sampling.logit_bias, default=0)) >= self.vocab_size:
            raise BadInput(f"logit_bias names token {highest}; the model's are 0 to {self.vocab_size - 1}")
        room = self.max_length - len(prompt)
        return GenerationState(
            index, prompt, sampling, context_left=room, eos_token_ids=self.eos_token_ids, decode=self.decode
        )
