"""Peak memory and time of the loss and its backward pass: in chunks of tokens, and with whole logits.

Every case runs in a process of its own. The figure is its peak resident memory, less the memory with hidden states,
weights and the teacher's outputs in place. Both methods compute the gradient of the head's weight.
"""

from __future__ import annotations

import json
import resource
import subprocess
import sys
import time
from pathlib import Path

from limbeck.registry.core.terminal import print_table

VOCABULARY, TOKENS, WIDTH, TEACHER_WIDTH, STORED = 128 * 1024, 2048, 256, 512, 32
CASES = {
    "cross-entropy": "no teacher",
    "forward KL, stored": f"top-{STORED} of the teacher",
    "forward KL, online": f"the teacher's hidden states, width {TEACHER_WIDTH}, and its head",
}


def main() -> None:
    """Measure and print a table."""
    rows = []
    for precision in ("fp32", "bf16"):
        for case in CASES:
            whole, chunked = (_in_a_process(case, method, precision) for method in ("whole", "chunked"))
            assert abs(whole["loss"] - chunked["loss"]) < 1e-2 * whole["loss"], (whole, chunked)
            less = whole["megabytes"] / chunked["megabytes"]
            faster = whole["seconds"] / chunked["seconds"]
            figures = (f"{whole['megabytes']:,.0f}", f"{chunked['megabytes']:,.0f}", f"{less:.1f}", f"{faster:.2f}")
            rows.append((case, precision, *figures))
    print_table(
        f"loss and backward pass, vocabulary {VOCABULARY:,}, {TOKENS:,} tokens, width {WIDTH}",
        ["loss", "precision", "whole logits, MB", "in chunks, MB", "times less memory", "times as fast"],
        rows,
    )


def _in_a_process(case: str, method: str, precision: str) -> dict[str, float]:
    command = [sys.executable, "-m", "tests.bench.loss_memory", case, method, precision]
    done = subprocess.run(command, stdout=subprocess.PIPE, check=True, text=True)
    return json.loads(done.stdout)


def measure(case: str, method: str, precision: str) -> dict[str, float]:
    """The loss per token, the peak memory in megabytes, and the seconds of the second pass."""
    import torch
    import torch.nn.functional as F

    from limbeck.distill.losses import chunked_head
    from limbeck.distill.losses.chunked_head import LazyLogits
    from limbeck.distill.losses.divergences import TopK
    from limbeck.distill.recipe.schema import Objective

    torch.manual_seed(0)
    student, teacher = _random(WIDTH), _random(TEACHER_WIDTH)
    labels = torch.randint(VOCABULARY, (TOKENS,))
    for part in student:
        part.requires_grad_()
    stored = TopK(torch.randint(VOCABULARY, (TOKENS, STORED)), torch.randn(TOKENS, STORED + 1).log_softmax(-1)[:, 1:])
    objective = Objective(labels=1.0) if case == "cross-entropy" else Objective(divergence="forward_kl")
    outputs = {"cross-entropy": None, "forward KL, stored": stored, "forward KL, online": LazyLogits(*teacher)}[case]

    def whole() -> torch.Tensor:
        logits = F.linear(*student).float()
        if case == "cross-entropy":
            return F.cross_entropy(logits, labels, reduction="sum")
        log_q = F.log_softmax(logits, dim=-1)
        if case == "forward KL, online":
            log_p = F.log_softmax(F.linear(*teacher).float(), dim=-1)
            return F.kl_div(log_q, log_p, reduction="sum", log_target=True)
        log_q, p = log_q.gather(-1, stored.ids), stored.logprobs.exp()
        tail_q, tail_p = 1 - log_q.exp().sum(-1), 1 - p.sum(-1)
        return (p * (stored.logprobs - log_q)).sum() + (tail_p * (tail_p.log() - tail_q.log())).sum()

    def chunked() -> torch.Tensor:
        return chunked_head.loss(LazyLogits(*student), labels, objective, outputs)[0]

    before = _resident()
    seconds = 0.0
    for _ in range(2):  # the first pass also loads libraries
        for part in student:
            part.grad = None
        began = time.perf_counter()
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
            loss = {"whole": whole, "chunked": chunked}[method]() / TOKENS
        loss.backward()
        seconds = time.perf_counter() - began
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {"loss": float(loss.detach()), "megabytes": (peak - before) / 1e6, "seconds": seconds}


def _random(width: int):  # type: ignore[no-untyped-def]
    """Hidden states and the weight of a head."""
    import torch

    return torch.randn(TOKENS, width), torch.randn(VOCABULARY, width) * width**-0.5


def _resident() -> int:
    """Bytes of resident memory now."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


if __name__ == "__main__":
    print(json.dumps(measure(*sys.argv[1:])))
