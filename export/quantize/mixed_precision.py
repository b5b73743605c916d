"""Choose the block format of a graph's weights by measurement; sensitive parts of the model get more bits."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from limbeck.export.quantize.blocks.formats import BlockFormat
from limbeck.export.quantize.evaluate import CandidateEvaluator, CandidateScore
from limbeck.export.quantize.switches import SwitchedGraph, switch_graphs
from limbeck.export.quantize.weight_only import GraphWeights
from limbeck.registry.core.digest import json_digest, write_json
from limbeck.registry.core.home import atomic_write, home

# Formats to try, by bits. Larger blocks save little: in 8 bits, blocks of 64 are 6% smaller than blocks of 32, and have
# 1.5 times their KL (SmolLM2-135M).
CANDIDATES = {
    8: (BlockFormat(8, 32, symmetric=True),),
    4: (BlockFormat(4, 32),),
}

RANKING_STEP = 4  # parts are ranked on every fourth text


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

        Each part is tried alone, on some of the texts. Gains add up nearly, so the number of parts is then found by
        bisection, on all texts.

        Returns the new plan, and for the manifest the score of each part alone in 8 bits, and the scores with the first
        parts raised, by their number. The record is empty if the plan is within the limit from the start.
        """
        start = self.evaluator.score(self.weights.quantize(plan))
        if start.loss <= self.max_loss:
            return dict(plan), {}
        in_8_bits = {part: self._in_8_bits(blocks) for part, blocks in plan.items()}
        nodes: list[Any] = [*self.weights.weight_nodes, *self.weights.expert_nodes]
        graph = switch_graphs(
            self.weights.quantize(plan),
            self.weights.quantize(in_8_bits),
            {node.output_name: node.group for node in nodes},
        )
        score = self.evaluator.open_switches(graph, start.bytes)
        on_some_texts = score([], step=RANKING_STEP)
        alone = self._score_alone(graph, on_some_texts, score)
        ranked = sorted(alone, key=lambda part: (alone[part].kl - on_some_texts.kl) / max(1, graph.added_bytes[part]))
        steps = {0: start}
        low, high = 0, len(ranked)  # with `low` parts the loss is above the limit
        while high - low > 1 or high not in steps:
            count = (low + high) // 2 if high in steps else high
            steps[count] = score(ranked[:count])
            if steps[count].loss <= self.max_loss:
                high = count
            elif count == high:
                break
            else:
                low = count
        record = [{"parts": count, **steps[count].to_manifest()} for count in sorted(steps)]
        return {**plan, **{part: in_8_bits[part] for part in ranked[:high]}}, {
            "alone_in_8_bits": {part: alone[part].to_manifest() for part in ranked},
            "raised_to_8_bits": record,
        }

    def _score_alone(
        self, graph: SwitchedGraph, start: CandidateScore, score: Callable[..., CandidateScore]
    ) -> dict[str, CandidateScore]:
        """Score each part alone in 8 bits. A search that was interrupted goes on where it stopped.

        The scores so far are in a file of the state folder, under a digest of the first score: another model, text or
        format has another.
        """
        key = json_digest({"start": start.to_manifest(), "parts": graph.added_bytes})
        file = home() / "searches" / f"{key[:16]}.json"
        file.parent.mkdir(exist_ok=True)
        known = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
        alone = {part: CandidateScore(**fields) for part, fields in known.items()}
        for part in graph.parts:
            if part not in alone:
                alone[part] = score([part], step=RANKING_STEP)
                with atomic_write(file) as temporary:
                    write_json(temporary, {name: found.to_manifest() for name, found in alone.items()})
            self.report(f"  {part} in 8 bits: KL {start.kl:.4f} -> {alone[part].kl:.4f}")
        file.unlink(missing_ok=True)
        return alone

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
