"""Choose the block format of a graph's weights by measurement; sensitive parts of the model get more bits."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from limbeck.export.quantize.blocks.formats import BlockFormat
from limbeck.export.quantize.evaluate import CandidateEvaluator, CandidateScore
from limbeck.export.quantize.weight_only import GraphWeights

# Formats to try, by bits. Larger blocks save little: in 8 bits, blocks of 64 are 6% smaller than blocks of 32, and have
# 1.5 times their KL (SmolLM2-135M).
CANDIDATES = {
    8: (BlockFormat(8, 32, symmetric=True),),
    4: (BlockFormat(4, 32),),
}


@dataclass(frozen=True)
class ChosenPlan:
    """The chosen format of each part of the model, and a record of the search for the manifest."""

    plan: dict[str, BlockFormat]
    record: dict[str, Any]


def choose_plan(
    weights: GraphWeights,
    evaluator: CandidateEvaluator,
    bits: int,
    *,
    max_loss: float,
    on_cpu: bool = True,
    report: Callable[[str], None] = lambda text: None,
) -> ChosenPlan:
    """Choose the block format of `bits` bits with the least KL. The same model and text give the same choice.

    If bits is 4 and no format reaches `max_loss`, parts of the model get 8 bits until the loss is at most `max_loss`,
    starting with the part that gains most per byte.

    Args:
        max_loss: limit of `CandidateScore.loss`.
        on_cpu: False if the artifact will run on CUDA, where products compute in float.
    """
    search = _Search(weights, evaluator, max_loss, on_cpu, report)
    blocks, trials = search.choose_format(bits)
    plan = dict.fromkeys(weights.groups, blocks)
    record: dict[str, Any] = {"chosen": blocks.to_manifest(), "tried": trials}
    if bits < 8:
        plan, raised = search.raise_parts_to_8_bits(plan)
        record |= raised
    return ChosenPlan(plan, record)


class _Trial(NamedTuple):
    """One measured format."""

    blocks: BlockFormat
    score: CandidateScore


@dataclass(frozen=True)
class _Search:
    weights: GraphWeights
    evaluator: CandidateEvaluator
    max_loss: float
    on_cpu: bool
    report: Callable[[str], None]

    def choose_format(self, bits: int) -> tuple[BlockFormat, list[dict[str, Any]]]:
        """Try formats of `bits` bits for all weights. Returns the best, and all trials for the manifest."""
        trials = [
            self._try_format(replace(blocks, accuracy_level=4 if self.on_cpu else 0)) for blocks in CANDIDATES[bits]
        ]
        best = min(trials, key=lambda trial: trial.score.kl)
        return best.blocks, [trial.blocks.to_manifest() | trial.score.to_manifest() for trial in trials]

    def raise_parts_to_8_bits(self, plan: Mapping[str, BlockFormat]) -> tuple[dict[str, BlockFormat], dict[str, Any]]:
        """Give parts 8 bits, best gain per byte first, until the loss is at most the limit.

        Returns the new plan, and for the manifest the score of each part alone in 8 bits, and the scores as parts were
        added one after the other. The record is empty if the plan is within the limit from the start.
        """
        start = self.evaluator.score(self.weights.quantize(plan))
        if start.loss <= self.max_loss:
            return dict(plan), {}
        alone, gains = {}, {}
        for part, blocks in plan.items():
            score = self.evaluator.score(self.weights.quantize({**plan, part: self._in_8_bits(blocks)}))
            alone[part] = score.to_manifest()
            gains[part] = (start.kl - score.kl) / max(1, score.bytes - start.bytes)
            self.report(f"  {part} in 8 bits: KL {start.kl:.4f} -> {score.kl:.4f}")
        steps = [{"part": None, **start.to_manifest()}]
        raised = dict(plan)
        for part in sorted(gains, key=gains.__getitem__, reverse=True):
            raised[part] = self._in_8_bits(raised[part])
            score = self.evaluator.score(self.weights.quantize(raised))
            steps.append({"part": part, **score.to_manifest()})
            if score.loss <= self.max_loss:
                break
        return raised, {"alone_in_8_bits": alone, "raised_to_8_bits": steps}

    def _try_format(self, blocks: BlockFormat) -> _Trial:
        score = self.evaluator.score(self._quantize_all(blocks))
        change = f"KL {score.kl:.4f}, bits per byte {score.bits_per_byte_change:+.2%}"
        self.report(f"  {_describe_format(blocks)}: {change}")
        return _Trial(blocks, score)

    def _quantize_all(self, blocks: BlockFormat) -> Any:
        """Build the graph with all weights in one format. The packed weights are freed."""
        model = self.weights.quantize(dict.fromkeys(self.weights.groups, blocks))
        self.weights.clear_packed()
        return model

    def _in_8_bits(self, blocks: BlockFormat) -> BlockFormat:
        return replace(blocks, bits=8, accuracy_level=4 if self.on_cpu else 0)


def _describe_format(blocks: BlockFormat) -> str:
    text = f"{blocks.bits} bits, blocks of {blocks.block_size}"
    if blocks.symmetric:
        text += ", symmetric"
    return text
