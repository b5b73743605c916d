"""Which blocks a graph's weights are stored in, chosen by measurement; sensitive parts stay in more bits."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from limbeck.export.quantize.evaluate import CandidateEvaluator, CandidateScore
from limbeck.export.quantize.weight_only import BlockFormat, GraphWeights

CANDIDATE_BLOCK_SIZES = (32, 64, 128)
EQUAL_TIME_RATIO = 1.05  # of the least time: as fast, as far as it can be measured
MAX_TIME_RATIO = 1.5  # of the least time: too slow for what little it gains


@dataclass(frozen=True)
class ChosenPlan:
    """What was chosen, and all that was tried on the way, as the manifest says it."""

    plan: dict[str, BlockFormat]  # by part of the model
    record: dict[str, Any]


def choose_plan(
    weights: GraphWeights,
    trial: CandidateEvaluator,
    bits: int,
    *,
    max_loss: float,
    on_cpu: bool = True,
    report: Callable[[str], None] = lambda text: None,
) -> ChosenPlan:
    """The fastest blocks of `bits` bits whose loss is at most `max_loss`, or the ones that lose least.

    Where not even those lose little enough, parts of the model are given 8 bits, those first that gain most for their
    size, until the loss is at most `max_loss`.

    Args:
        max_loss: of `Score.loss`.
        on_cpu: False where it will run elsewhere: products are then computed in float, and the smallest are taken for
            the fastest.
    """
    blocks, tries = _blocks(weights, trial, bits, max_loss, on_cpu, report)
    plan = dict.fromkeys(weights.groups, blocks)
    record: dict[str, Any] = {"chosen": blocks.to_manifest(), "tried": tries}
    if bits < 8:
        plan, kept = _raise_parts_to_8_bits(weights, trial, plan, max_loss, on_cpu, report)
        record |= kept
    return ChosenPlan(plan, record)


def _blocks(
    weights: GraphWeights,
    trial: CandidateEvaluator,
    bits: int,
    max_loss: float,
    on_cpu: bool,
    report: Callable[[str], None],
) -> tuple[BlockFormat, list[dict[str, Any]]]:
    tried: list[
        tuple[BlockFormat, CandidateScore, float]
    ] = []  # with the time of a token in ms, or the bytes where it is not known

    def attempt(blocks: BlockFormat) -> None:
        model = weights.quantize(dict.fromkeys(weights.groups, blocks))
        weights.clear_packed()
        score = trial.score(model)
        tried.append((blocks, score, trial.decode_ms(model) if on_cpu else score.bytes))
        report(
            f"  {_describe_block_format(blocks)}: KL {score.kl:.4f}, bits per byte {score.bits_per_byte_change:+.2%}"
            + f", {tried[-1][2]:.2f} ms a token" * on_cpu
        )

    for symmetric in (False, True):
        for block in CANDIDATE_BLOCK_SIZES:
            attempt(BlockFormat(bits, block, symmetric, 4 if on_cpu else 0))
    if bits == 4 and on_cpu:  # 8 bits in float32 are unpacked at each token: many times slower than float32 weights
        attempt(
            BlockFormat(bits, _best(tried, max_loss).block_size, _best(tried, max_loss).symmetric, accuracy_level=0)
        )
    fields = [
        {**b.to_manifest(), **score.to_manifest(), **({"decode_ms": ms} if on_cpu else {})} for b, score, ms in tried
    ]
    return _best(tried, max_loss), fields


def _best(tried: list[tuple[BlockFormat, CandidateScore, float]], max_loss: float) -> BlockFormat:
    fast = [one for one in tried if one[2] <= MAX_TIME_RATIO * min(ms for _, _, ms in tried)]
    fit = [one for one in fast if one[1].loss <= max_loss]
    if not fit:
        return min(fast, key=lambda one: one[1].kl)[0]
    least = min(ms for _, _, ms in fit)
    return min((one for one in fit if one[2] <= EQUAL_TIME_RATIO * least), key=lambda one: one[1].kl)[0]


def _raise_parts_to_8_bits(
    weights: GraphWeights,
    trial: CandidateEvaluator,
    plan: Mapping[str, BlockFormat],
    max_loss: float,
    on_cpu: bool,
    report: Callable[[str], None],
) -> tuple[dict[str, BlockFormat], dict[str, Any]]:
    """Give parts 8 bits, greedily, until the loss is at most `max_loss`. Returns the plan, and for the manifest: what
    each part would bring alone, and what they brought one after the other."""
    now = trial.score(weights.quantize(plan))
    if now.loss <= max_loss:
        return dict(plan), {}
    alone, gains = {}, {}
    for part, blocks in plan.items():
        score = trial.score(weights.quantize({**plan, part: _as_8_bit(blocks, on_cpu)}))
        alone[part] = score.to_manifest()
        gains[part] = (now.kl - score.kl) / max(1, score.bytes - now.bytes)
        report(f"  {part} in 8 bits: KL {now.kl:.4f} -> {score.kl:.4f}")
    curve = [{"part": None, **now.to_manifest()}]
    chosen = dict(plan)
    for part in sorted(gains, key=gains.__getitem__, reverse=True):
        chosen[part] = _as_8_bit(chosen[part], on_cpu)
        score = trial.score(weights.quantize(chosen))
        curve.append({"part": part, **score.to_manifest()})
        if score.loss <= max_loss:
            break
    return chosen, {"alone_in_8_bits": alone, "kept_in_8_bits": curve}


def _as_8_bit(blocks: BlockFormat, on_cpu: bool) -> BlockFormat:
    return replace(blocks, bits=8, accuracy_level=4 if on_cpu else 0)


def _describe_block_format(blocks: BlockFormat) -> str:
    how = ", symmetric" * blocks.symmetric + ", in float32" * (blocks.accuracy_level == 0)
    return f"{blocks.bits} bits, blocks of {blocks.block_size}{how}"
