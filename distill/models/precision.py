"""Whether bfloat16 is the faster way here, by measurement: a processor's flags promise it where it is the slower."""

from __future__ import annotations

import json
import time
from typing import TYPE_CHECKING

from limbeck.registry.core.home import atomic_write, home
from limbeck.registry.core.machine import describe_hardware

if TYPE_CHECKING:
    import torch
    from transformers import PretrainedConfig

GAIN = 1.1  # bfloat16 rounds: it has to be this much faster to be worth it
ROWS, WIDEST, TRIES = 1024, 4096, 5


def uses_bf16(requested: bool | None, config: PretrainedConfig) -> bool:
    """Whether a model of `config` runs under bfloat16 autocast: as `requested`, or where it is measured to be faster.

    What was measured is kept below `home()` by machine and shapes, so that a run that goes on, and the key of what a
    teacher said, do not depend on how busy the machine is.
    """
    import torch

    if requested is not None:
        return requested
    if torch.cuda.is_available():
        return torch.cuda.is_bf16_supported(including_emulation=False)
    hidden, inner = feed_forward_sizes(config)
    key = f"{describe_hardware()}, torch {torch.__version__}, {torch.get_num_threads()} threads, {hidden} x {inner}"
    file = home() / "precision.json"
    try:
        known = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        known = {}
    if key not in known:
        known[key] = measure_matmul(hidden, inner)
        with atomic_write(file) as temporary:
            temporary.write_text(json.dumps(known, indent=1) + "\n", encoding="utf-8")
    return known[key]["fp32_s"] > GAIN * known[key]["bf16_s"]


def feed_forward_sizes(config: PretrainedConfig) -> tuple[int, int]:
    """The sides of a model's feed-forward matrices, or of others like them; no wider than tells the two apart."""
    config = config.get_text_config()
    hidden = int(config.hidden_size)
    inner = next((getattr(config, name, None) for name in ("intermediate_size", "n_inner", "ffn_dim")), None)
    return min(hidden, WIDEST // 4), min(int(inner or 4 * hidden), WIDEST)


def measure_matmul(hidden: int, inner: int) -> dict[str, float]:
    """Seconds of a product (ROWS, hidden) x (hidden, inner), forward and backward, in turns: the best of TRIES each."""
    import torch

    made = torch.Generator().manual_seed(0)
    inputs = torch.randn(ROWS, hidden, generator=made).requires_grad_()
    weight = torch.randn(inner, hidden, generator=made).requires_grad_()
    best = {"fp32_s": float("inf"), "bf16_s": float("inf")}
    for _ in range(TRIES + 1):  # the first warms up
        for name in best:
            began = time.perf_counter()
            with torch.autocast("cpu", torch.bfloat16, enabled=name == "bf16_s"):
                outputs: torch.Tensor = torch.nn.functional.linear(inputs, weight)
            outputs.backward(torch.ones_like(outputs))
            best[name] = min(best[name], time.perf_counter() - began)
    return best
