"""Speculative decoding: the model checks proposed tokens in one run. In float32 the text is the one it makes alone.

Leviathan et al., 2023: Fast Inference from Transformers via Speculative Decoding (arXiv:2211.17192); Chen et al., 2023
(arXiv:2302.01318). Each token is chosen from the model's own logits in the ordinary way, and a proposal only saves the
run that computes them: it is accepted if it equals the chosen token. A proposal without randomness is thereby accepted
with its own probability, the optimal rate, and sampling, penalties, constraints and seeds are as without proposals.

In float32 greedy text is identical. Artifacts whose activations are rounded to int8 enlarge the difference of rounding
between a run of one token and a run of several: to a logit of about 0.1, as much as their rounding itself moves it. A
token that the artifact nearly chose may then take the place of the one that it chose.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from limbeck.export.runtime.speculative.draft_model import DraftModel, check_draft
from limbeck.export.runtime.speculative.prompt_lookup import PromptLookup
from limbeck.registry.core.errors import BadInput

if TYPE_CHECKING:
    from limbeck.export.runtime.batch import Batch
    from limbeck.export.runtime.generation import GenerationState
    from limbeck.export.runtime.session import Session
    from limbeck.export.runtime.slot import Slot

# A run of several tokens rounds otherwise than a run of one: on SmolLM2-135M float32 logits move by at most 5e-5. Where
# the two best are closer than this, a run of one token decides, so that greedy text is the same.
NEAR_TIE = 1e-3
DRAFT_TOKENS = 5  # proposed by a draft model at once, at most
FIRST_PLAIN_STEPS = 2  # one token each, to know how long a step takes
MIN_PAUSE, MAX_PAUSE = 8, 64  # tokens without proposals where they do not pay


@dataclass
class SpeculationCounts:
    """What speculative decoding did so far, in all texts.

    Attributes:
        verifications: runs that checked proposed tokens.
        proposed, accepted: tokens.
        tokens, seconds: of all tokens that a `Speculator` decoded, proposed or not.
        plain_steps, plain_s: the runs of one token among them.
    """

    verifications: int = 0
    proposed: int = 0
    accepted: int = 0
    tokens: int = 0
    seconds: float = 0.0
    plain_steps: int = 0
    plain_s: float = 0.0

    @property
    def acceptance_length(self) -> float | None:
        """Tokens that a verification yields on average, its own one included; None before the first."""
        return 1 + self.accepted / self.verifications if self.verifications else None

    @property
    def speedup(self) -> float | None:
        """How many times as fast as one token at a time, by the time that such steps took; None if none was run."""
        if not self.plain_steps or not self.seconds:
            return None
        return self.tokens * self.plain_s / self.plain_steps / self.seconds


class Speculation:
    """How a model's proposals are made; and what they brought.

    Args:
        session: the model that decides.
        prompt_lookup_num_tokens: propose at most so many tokens from the text itself; 0: none.
        draft: a smaller model, which proposes where the text has nothing; None: none.

    Raises:
        BadInput: a graph whose cache cannot drop its last tokens, or a draft model of another vocabulary.
    """

    def __init__(self, session: Session, *, prompt_lookup_num_tokens: int = 0, draft: Session | None = None) -> None:
        for each, name in ((session, "model"), (draft, "draft model")):
            if each is not None and (not each.is_fused or each.is_recurrent):
                raise BadInput(
                    f"the {name}'s graph cannot take proposed tokens back: it is not fused, or keeps a recurrent state",
                    fix="leave --draft and --prompt-lookup-num-tokens out",
                )
        if draft is not None:
            check_draft(draft, session)
        self.counts = SpeculationCounts()
        self.session, self.draft, self.prompt_lookup_num_tokens = session, draft, prompt_lookup_num_tokens

    def start(self) -> Speculator:
        """The speculative decoding of one text."""
        return Speculator(self)


class Speculator:
    """Decodes one text; see `Speculation`."""

    def __init__(self, speculation: Speculation) -> None:
        self._speculation = speculation
        self._lookup = PromptLookup() if speculation.prompt_lookup_num_tokens else None
        self._draft = DraftModel(speculation.draft) if speculation.draft else None
        self._count = 4  # tokens to propose
        self._plain_s = 0.0  # moving average of the seconds of a run of one token
        self._benefit = 1.0  # moving average: tokens of a verification times `_plain_s`, over its seconds
        self._pause, self._next_pause = FIRST_PLAIN_STEPS, MIN_PAUSE

    def run(self, batch: Batch, slot: Slot, state: GenerationState, text: Sequence[int]) -> Iterator[np.ndarray]:
        """Run the model once or twice, and yield (V,) logits for each token that this settles, at least one.

        The caller chooses a token from each, by `state.choose_token`, and appends it to `text` before the next.

        Args:
            batch, slot: of the text; all of it but `state.last_token` is in the cache.
            text: prompt and new tokens.
        """
        start, counts = time.perf_counter(), self._speculation.counts
        proposed = self._propose(text, state)
        if not proposed:
            [logits] = batch.step([slot], [state.last_token])
            self._note_plain(time.perf_counter() - start)
            yield logits
            return
        inputs = [state.last_token, *proposed]
        all_logits = batch.verify(slot, inputs)
        seconds = time.perf_counter() - start
        counts.verifications += 1
        counts.proposed += len(proposed)
        accepted = 0
        for token, following, logits in zip(inputs, [*proposed, None], all_logits, strict=True):
            if state.is_near_tie(logits, NEAR_TIE):
                again = time.perf_counter()
                [logits] = batch.step([slot], [token])
                seconds += time.perf_counter() - again
                yield logits
            else:
                batch.accept(slot, token)
                yield logits
                if following is not None and state.last_token == following and not state.finish_reason:
                    accepted += 1
                    continue
            break
        counts.accepted += accepted
        self._note_verification(len(proposed), accepted, seconds)

    def _propose(self, text: Sequence[int], state: GenerationState) -> list[int]:
        if self._pause:
            self._pause -= 1
            return []
        speculation = self._speculation
        room = min(state.max_new_tokens - state.token_count - 1, speculation.session.max_length - len(text))
        proposed: list[int] = []
        if self._lookup:
            proposed = self._lookup.propose(text, min(self._count, speculation.prompt_lookup_num_tokens, room))
        if self._draft and not proposed:
            proposed = self._draft.propose(text, min(self._count, DRAFT_TOKENS, room))
        return [token for token in proposed if token < speculation.session.vocab_size]

    def _note_plain(self, seconds: float) -> None:
        counts = self._speculation.counts
        counts.plain_steps += 1
        counts.plain_s += seconds
        counts.tokens += 1
        counts.seconds += seconds
        self._plain_s = seconds if not self._plain_s else self._plain_s + (seconds - self._plain_s) / 4

    def _note_verification(self, proposed: int, accepted: int, seconds: float) -> None:
        """Propose more after success, as transformers does, and pause where it does not pay."""
        counts = self._speculation.counts
        counts.tokens += accepted + 1
        counts.seconds += seconds
        self._count = self._count + 2 if accepted == proposed else max(2, self._count - 1)
        self._benefit += ((accepted + 1) * self._plain_s / seconds - self._benefit) / 4
        if self._benefit < 1 and accepted < proposed:
            self._pause, self._next_pause = self._next_pause, min(2 * self._next_pause, MAX_PAUSE)
        elif self._benefit >= 1:
            self._next_pause = MIN_PAUSE
