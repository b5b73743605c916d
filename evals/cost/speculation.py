"""Measures speculative decoding on the prompts of tasks: how many tokens a run settles, and how much faster that is.

What a draft model proposes depends on the text, so the arbitrary tokens of `limbeck.evals.cost.measure` cannot show it.
Each prompt is the end of a document's prompt. It is completed alone, greedily, first one token at a time and then with
proposals; the ratio of the two times is one round.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from limbeck.evals.cost.measure import median_estimate
from limbeck.export.runtime.runtime import Runtime
from limbeck.registry.catalog.model_ref import ResolvedModel
from limbeck.registry.core.machine import physical_cores
from limbeck.registry.records import Cost

if TYPE_CHECKING:
    import pyarrow as pa

PROMPTS = 16
NEW_TOKENS = 64
SPEEDUP = "speculative_speedup"


def task_prompts(documents: pa.Table) -> list[str]:
    """PROMPTS prompts of different documents, spread evenly over all; fewer if there are fewer."""
    found = list(dict.fromkeys(text for text in documents["prompt_end"].to_pylist() if text))
    count = min(PROMPTS, len(found))
    return [found[index * len(found) // count] for index in range(count)]


def measure_speculation(
    model: ResolvedModel,
    draft: ResolvedModel,
    prompts: Sequence[str],
    cost: Cost,
    on_prompt: Callable[[int, int], None] = lambda done, total: None,
) -> Cost:
    """Return `cost` with the figures of speculative decoding.

    Args:
        model, draft: ONNX artifacts with a fused graph and one vocabulary.
        prompts: of the tasks; one that leaves no room in a context is cut at its beginning.
        on_prompt: called after each prompt with the number of prompts done and of all.

    Raises:
        BadInput: a graph that cannot take tokens back, or two vocabularies.
    """
    runtime, proposing = (Runtime.load(each.path, threads=physical_cores(), verify=False) for each in (model, draft))
    new_tokens = min(NEW_TOKENS, runtime.max_length // 2)
    ratios, verifications, accepted = [], 0, 0
    for done, prompt in enumerate(prompts):
        ids = runtime.prompt_ids(prompt)[-(runtime.max_length - new_tokens) :]
        seconds = []
        for each in (None, proposing):
            runtime.speculate(draft=each)
            runtime.generate([ids[:1]], max_new_tokens=2, ignore_eos=True)  # the weights are in the caches again
            began = time.perf_counter()
            runtime.generate([ids], max_new_tokens=new_tokens, ignore_eos=True)
            seconds.append(time.perf_counter() - began)
        ratios.append(seconds[0] / seconds[1])
        assert runtime.speculation is not None
        verifications += runtime.speculation.counts.verifications
        accepted += runtime.speculation.counts.accepted
        on_prompt(done + 1, len(prompts))
    speedup = median_estimate(ratios)
    return cost.model_copy(
        update={
            "draft": draft.digest,
            "acceptance_length": 1 + accepted / verifications if verifications else None,
            SPEEDUP: speedup.value,
            "intervals": cost.intervals | {SPEEDUP: speedup},
        }
    )
