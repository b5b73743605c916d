"""Choose the parts of a model that need more than 4 bits, by measurement."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from limbeck.export.quantize.blocks.formats import BlockFormat
from limbeck.export.quantize.evaluate import CandidateEvaluator, CandidateScore
from limbeck.export.quantize.switches import SwitchedGraph, switch_graphs
from limbeck.export.quantize.weight_only import GraphWeights
from limbeck.registry.core.digest import json_digest, write_json
from limbeck.registry.core.home import atomic_write, home

RANKING_STEP = 4  # parts are ranked on every fourth text


@dataclass(frozen=True)
class ChosenPlan:
    """The chosen format of each part of the model, and a record of the search for the manifest."""

    plan: dict[str, BlockFormat]
    record: dict[str, Any]


def choose_plan(
    weights: GraphWeights,
    evaluator: CandidateEvaluator,
    formats: Mapping[int, BlockFormat],
    *,
    max_loss: float,
    report: Callable[[str], None] = lambda text: None,
) -> ChosenPlan:
    """Give all parts of the model 4 bits, and as many as needed 8 bits until the loss is at most `max_loss`.

    The part that gains most per byte comes first. The same model and text give the same choice.

    Args:
        formats: of 4 and of 8 bits.
        max_loss: limit of `CandidateScore.loss`.
    """
    search = _Search(weights, evaluator, formats[8], max_loss, report)
    plan, record = search.raise_parts_to_8_bits(dict.fromkeys(weights.groups, formats[4]))
    return ChosenPlan(plan, record)


@dataclass(frozen=True)
class _Search:
    weights: GraphWeights
    evaluator: CandidateEvaluator
    in_8_bits: BlockFormat
    max_loss: float
    report: Callable[[str], None]

    def raise_parts_to_8_bits(self, plan: Mapping[str, BlockFormat]) -> tuple[dict[str, BlockFormat], dict[str, Any]]:
        """Give parts 8 bits, best gain per byte first, until the loss is at most the limit.

        Each part is tried alone, on some of the texts. Gains add up nearly, so the number of parts is then found by
        bisection, on all texts.

        Returns the new plan, and for the manifest the score of the plan, of each part alone in 8 bits, and with the
        first parts raised, by their number; only the first if it is within the limit.
        """
        start = self.evaluator.score(self.weights.quantize(plan))
        self.report(f"  4 bits: KL {start.kl:.4f}, bits per byte {start.bits_per_byte_change:+.2%}")
        in_4_bits = {"in_4_bits": start.to_manifest()}
        if start.loss <= self.max_loss:
            return dict(plan), in_4_bits
        in_8_bits = dict.fromkeys(plan, self.in_8_bits)
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
        return {**plan, **dict.fromkeys(ranked[:high], self.in_8_bits)}, {
            **in_4_bits,
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
