"""Text generation with an ONNX artifact. Needs numpy, onnxruntime and tokenizers, no torch.

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
from limbeck.export.runtime.speculative.speculation import Speculation
from limbeck.registry.core.errors import BadInput


class Runtime(Session):
    """A `Session` (load, encode, decode, logits) that also generates: completions, text streams, token events.

    The parts of generation: `Sampling` are the settings, `GenerationState` is one prompt, `Batch` runs the model over
    all prompts with a static or dynamic cache. Not thread-safe.

    Attributes:
        speculation: how tokens are proposed; None: one token at a time. A text that is decoded alone uses it.
    """

    speculation: Speculation | None = None

    def speculate(self, prompt_lookup_num_tokens: int = 0, draft: Session | None = None) -> None:
        """Propose tokens from now on, as `Speculation` says; without both, no longer.

        Raises BadInput if the graph cannot take proposed tokens back, or if `draft` has another vocabulary.
        """
        speculates = prompt_lookup_num_tokens > 0 or draft is not None
        self.speculation = (
            Speculation(self, prompt_lookup_num_tokens=prompt_lookup_num_tokens, draft=draft) if speculates else None
        )

    def generate(
        self, prompts: Sequence[str] | Sequence[Sequence[int]], *, parse_special: bool = False, **sampling: Any
    ) -> list[Completion]:
        """Complete all prompts together, as one batch.

        Args:
            prompts: texts, or lists of token ids.
            parse_special: special tokens in a prompt's text are tokens, not text.
            **sampling: the fields of `Sampling`; `max_new_tokens` is required.

        Raises:
            BadInput: a prompt that leaves no room in the context, or a setting out of range.
        """
        ids = [self.prompt_ids(prompt, parse_special=parse_special) for prompt in prompts]
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

    def stream(self, prompt: str | Sequence[int], *, parse_special: bool = False, **sampling: Any) -> Iterator[str]:
        """Yield the text of one completion as it is generated, whole characters only. Arguments as `generate`."""
        ids = self.prompt_ids(prompt, parse_special=parse_special)
        for event in self.generate_events([ids], Sampling(**sampling)):
            if event.text:
                yield event.text

    def generate_events(self, prompts: Sequence[Sequence[int]], sampling: Sampling) -> Iterator[TokenEvent]:
        """Yield the tokens of all prompts as they are generated; the last event of a prompt has a finish_reason.

        Args:
            prompts: lists of token ids, none empty.
            sampling: the settings of all prompts.

        Raises:
            BadInput: `logit_bias` names a token outside the vocabulary.
        """
        batch = Batch(self, prefix_cache_tokens=0)
        states = [self.start_generation(index, prompt, sampling) for index, prompt in enumerate(prompts)]
        rows = [(state, batch.add_prompt(prompt)) for state, prompt in zip(states, prompts, strict=True)]
        logits = self._prefill(batch, [slot for _, slot in rows])
        while rows:
            for (state, _), values in zip(rows, logits, strict=True):
                yield state.choose_token(values)
            for state, slot in rows:
                if state.finish_reason:
                    batch.remove_slot(slot)
            rows = [(state, slot) for state, slot in rows if not state.finish_reason]
            if len(rows) == 1 and self.speculation:
                yield from self._speculate(batch, *rows[0])
                return
            if rows:
                logits = list(batch.step([slot for _, slot in rows], [state.last_token for state, _ in rows]))

    def _speculate(self, batch: Batch, state: GenerationState, slot: Slot) -> Iterator[TokenEvent]:
        """Yield the tokens of the last row to its end."""
        assert self.speculation
        speculator, text = self.speculation.start(), [*slot.cached_tokens, state.last_token]
        while not state.finish_reason:
            for logits in speculator.run(batch, slot, state, text):
                event = state.choose_token(logits)
                text.append(event.token_id)
                yield event
        batch.remove_slot(slot)

    def _prefill(self, batch: Batch, slots: list[Slot]) -> list[np.ndarray]:
        """(V,) logits after each prompt; computes the prompts in chunks whose logits fit in memory."""
        logits_of_slot: dict[Slot, np.ndarray] = {}
        while unread := [slot for slot in slots if slot not in logits_of_slot]:
            values = batch.prefill(unread, self.max_prefill_tokens)
            logits_of_slot |= {slot: logits for slot, logits in zip(unread, values, strict=True) if logits is not None}
        return [logits_of_slot[slot] for slot in slots]

    def start_generation(self, index: int, prompt: Sequence[int], sampling: Sampling) -> GenerationState:
        """Make the state of one prompt of a request; the server calls this too.

        Raises:
            BadInput: `logit_bias` or `stop_token_ids` name a token outside the vocabulary.
        """
        for name, tokens in (("logit_bias", sampling.logit_bias), ("stop_token_ids", sampling.stop_token_ids)):
            highest = max(tokens, default=0)
            if highest >= self.vocab_size:
                raise BadInput(f"{name} names token {highest}; the vocabulary is 0 to {self.vocab_size - 1}")
        return GenerationState(
            index,
            prompt,
            sampling,
            context_left=self.max_length - len(prompt),
            eos_token_ids=self.eos_token_ids,
            token_bytes=self.token_bytes,
        )
