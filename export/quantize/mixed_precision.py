"""Which blocks a graph's weights are stored in, chosen by measurement; sensitive parts stay in more bits."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from limbeck.export.quantize.evaluate import Score, Trial
from limbeck.export.quantize.weight_only import Blocks, Weights

TRIED = (32, 64, 128)
NEAR = 1.05  # of the least time: as fast, as far as it can be measured
SLOW = 1.5  # of the least time: too slow for what little it gains


@dataclass(frozen=True)
class Choice:
    """What was chosen, and all that was tried on the way, as the manifest says it."""

    plan: dict[str, Blocks]  # by part of the model
    record: dict[str, Any]


def choose(
    weights: Weights,
    trial: Trial,
    bits: int,
    *,
    most: float,
    on_cpu: bool = True,
    tell: Callable[[str], None] = lambda text: None,
) -> Choice:
    """The fastest blocks of `bits` bits whose loss is at most `most`, or the ones that lose least.

    Where not even those lose little enough, parts of the model are given 8 bits, those first that gain most for their
    size, until the loss is at most `most`.

    Args:
        most: of `Score.loss`.
        on_cpu: False where it will run elsewhere: products are then computed in float, and the smallest are taken for
            the fastest.
    """
    blocks, tries = _blocks(weights, trial, bits, most, on_cpu, tell)
    plan = dict.fromkeys(weights.groups, blocks)
    record: dict[str, Any] = {"chosen": blocks.fields(), "tried": tries}
    if bits < 8:
        plan, kept = _keep(weights, trial, plan, most, on_cpu, tell)
        record |= kept
    return Choice(plan, record)


def _blocks(
    weights: Weights, trial: Trial, bits: int, most: float, on_cpu: bool, tell: Callable[[str], None]
) -> tuple[Blocks, list[dict[str, Any]]]:
    tried: list[tuple[Blocks, Score, float]] = []  # with the time of a token in ms, or the bytes where it is not known

    def attempt(blocks: Blocks) -> None:
        model = weights.quantized(dict.fromkeys(weights.groups, blocks))
        weights.forget()
        score = trial.score(model)
        tried.append((blocks, score, trial.decode_ms(model) if on_cpu else score.bytes))
        tell(
            f"  {_said(blocks)}: KL {score.kl:.4f}, bits per byte {score.change:+.2%}"
            + f", {tried[-1][2]:.2f} ms a token" * on_cpu
        )

    for symmetric in (False, True):
        for block in TRIED:
            attempt(Blocks(bits, block, symmetric, 4 if on_cpu else 0))
    if bits == 4 and on_cpu:  # 8 bits in float32 are unpacked at each token: many times slower than float32 weights
        attempt(Blocks(bits, _best(tried, most).block, _best(tried, most).symmetric, accuracy_level=0))
    fields = [{**b.fields(), **score.fields(), **({"decode_ms": ms} if on_cpu else {})} for b, score, ms in tried]
    return _best(tried, most), fields


def _best(tried: list[tuple[Blocks, Score, float]], most: float) -> Blocks:
    fast = [one for one in tried if one[2] <= SLOW * min(ms for _, _, ms in tried)]
    fit = [one for one in fast if one[1].loss <= most]
    if not fit:
        return min(fast, key=lambda one: one[1].kl)[0]
    least = min(ms for _, _, ms in fit)
    return min((one for one in fit if one[2] <= NEAR * least), key=lambda one: one[1].kl)[0]


def _keep(
    weights: Weights,
    trial: Trial,
    plan: Mapping[str, Blocks],
    most: float,
    on_cpu: bool,
    tell: Callable[[str], None],
) -> tuple[dict[str, Blocks], dict[str, Any]]:
    """Give parts 8 bits, greedily, until the loss is at most `most`. Returns the plan, and what the manifest says: what
    each part would bring alone, and what they brought one after the other."""
    now = trial.score(weights.quantized(plan))
    if now.loss <= most:
        return dict(plan), {}
    alone, gains = {}, {}
    for part, blocks in plan.items():
        score = trial.score(weights.quantized({**plan, part: _more(blocks, on_cpu)}))
        alone[part] = score.fields()
        gains[part] = (now.kl - score.kl) / max(1, score.bytes - now.bytes)
        tell(f"  {part} in 8 bits: KL {now.kl:.4f} -> {score.kl:.4f}")
    curve = [{"part": None, **now.fields()}]
    chosen = dict(plan)
    for part in sorted(gains, key=gains.__getitem__, reverse=True):
        chosen[part] = _more(chosen[part], on_cpu)
        score = trial.score(weights.quantized(chosen))
        curve.append({"part": part, **score.fields()})
        if score.loss <= most:
            break
    return chosen, {"alone_in_8_bits": alone, "kept_in_8_bits": curve}


def _more(blocks: Blocks, on_cpu: bool) -> Blocks:
    return replace(blocks, bits=8, accuracy_level=4 if on_cpu else 0)


def _said(blocks: Blocks) -> str:
    how = ", symmetric" * blocks.symmetric + ", in float32" * (blocks.accuracy_level == 0)
    return f"{blocks.bits} bits, blocks of {blocks.block}{how}"
