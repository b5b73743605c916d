"""Choose the block format of a graph's weights by measurement; sensitive parts of the model get more bits."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from limbeck.export.quantize.evaluate import CandidateEvaluator, CandidateScore
from limbeck.export.quantize.weight_only import BlockFormat, GraphWeights

CANDIDATE_BLOCK_SIZES = (32, 64, 128)
# Relative to the fastest candidate:
EQUAL_TIME_RATIO = 1.05  # up to here a candidate counts as equally fast; measurements are no finer
MAX_TIME_RATIO = 1.5  # above this a candidate is too slow for the little quality it gains


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
    """Choose the fastest block format of `bits` bits whose loss is at most `max_loss`, else the one with least loss.

    If bits is 4 and no format reaches `max_loss`, parts of the model get 8 bits until the loss is at most `max_loss`,
    starting with the part that gains most per byte.

    Args:
        max_loss: limit of `CandidateScore.loss`.
        on_cpu: False if the artifact will run on CUDA. Then products compute in float, and the smallest format counts
            as the fastest, since it cannot be timed here.
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
    """One measured format. `time` is ms per token, or bytes if the device cannot be timed here."""

    blocks: BlockFormat
    score: CandidateScore
    time: float


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
            self._try_format(BlockFormat(bits, block_size, symmetric, 4 if self.on_cpu else 0))
            for symmetric in (False, True)
            for block_size in CANDIDATE_BLOCK_SIZES
        ]
        # 8 bits with float32 activations are not tried: onnxruntime unpacks such weights at each token, many times
        # slower than float32 weights.
        if bits == 4 and self.on_cpu:
            trials.append(self._try_format(replace(self._best(trials), accuracy_level=0)))
        return self._best(trials), [self._trial_to_manifest(trial) for trial in trials]

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
        model = self.weights.quantize(dict.fromkeys(self.weights.groups, blocks))
        self.weights.clear_packed()
        if self.on_cpu:
            score, time = self.evaluator.score_and_time(model)
            speed = f", {time:.2f} ms per token"
        else:
            score = self.evaluator.score(model)
            time, speed = score.bytes, ""
        change = f"KL {score.kl:.4f}, bits per byte {score.bits_per_byte_change:+.2%}"
        self.report(f"  {_describe_format(blocks)}: {change}{speed}")
        return _Trial(blocks, score, time)

    def _best(self, trials: list[_Trial]) -> BlockFormat:
        shortest = min(trial.time for trial in trials)
        fast = [trial for trial in trials if trial.time <= MAX_TIME_RATIO * shortest]
        within_limit = [trial for trial in fast if trial.score.loss <= self.max_loss]
        if not within_limit:
            return min(fast, key=lambda trial: trial.score.kl).blocks
        shortest = min(trial.time for trial in within_limit)
        equally_fast = [trial for trial in within_limit if trial.time <= EQUAL_TIME_RATIO * shortest]
        return min(equally_fast, key=lambda trial: trial.score.kl).blocks

    def _trial_to_manifest(self, trial: _Trial) -> dict[str, Any]:
        fields = {**trial.blocks.to_manifest(), **trial.score.to_manifest()}
        return {**fields, "decode_ms": trial.time} if self.on_cpu else fields

    def _in_8_bits(self, blocks: BlockFormat) -> BlockFormat:
        return replace(blocks, bits=8, accuracy_level=4 if self.on_cpu else 0)


def _describe_format(blocks: BlockFormat) -> str:
    text = f"{blocks.bits} bits, blocks of {blocks.block_size}"
    if blocks.symmetric:
        text += ", symmetric"
    if blocks.accuracy_level == 0:
        text += ", in float32"
    return text
