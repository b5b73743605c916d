"""Measures whether bfloat16 is faster on this machine: some processors support it and are slower with it."""

from __future__ import annotations

import json
import time
from typing import TYPE_CHECKING

from limbeck.registry.core.home import atomic_write, home
from limbeck.registry.core.machine import describe_hardware

if TYPE_CHECKING:
    import torch
    from transformers import PretrainedConfig

GAIN = 1.1  # bfloat16 rounds, so it must be this many times faster to be worth it
ROWS, MAX_WIDTH, TRIES = 1024, 4096, 5


def uses_bf16(requested: bool | None, config: PretrainedConfig) -> bool:
    """Whether a model of `config` runs under bfloat16 autocast: as `requested`, else if it is measured to be faster.

    Stores the measurement below `home()` by machine and shapes, so that a resumed run and the key of a teacher cache
    do not depend on how busy the machine is.
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
        measured = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        measured = {}
    if key not in measured:
        measured[key] = measure_matmul(hidden, inner)
        with atomic_write(file) as temporary:
            temporary.write_text(json.dumps(measured, indent=1) + "\n", encoding="utf-8")
    return measured[key]["fp32_s"] > GAIN * measured[key]["bf16_s"]


def feed_forward_sizes(config: PretrainedConfig) -> tuple[int, int]:
    """Rows and columns of a model's feed-forward matrices, limited to sizes large enough to measure the difference."""
    config = config.get_text_config()
    hidden = int(config.hidden_size)
    inner = next((getattr(config, name, None) for name in ("intermediate_size", "n_inner", "ffn_dim")), None)
    return min(hidden, MAX_WIDTH // 4), min(int(inner or 4 * hidden), MAX_WIDTH)


def measure_matmul(hidden: int, inner: int) -> dict[str, float]:
    """Seconds of a product (ROWS, hidden) x (hidden, inner), forward and backward: the best of TRIES, in turn."""
    import torch

    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(ROWS, hidden, generator=generator).requires_grad_()
    weight = torch.randn(inner, hidden, generator=generator).requires_grad_()
    best = {"fp32_s": float("inf"), "bf16_s": float("inf")}
    for _ in range(TRIES + 1):  # the first warms up
        for name in best:
            began = time.perf_counter()
            with torch.autocast("cpu", torch.bfloat16, enabled=name == "bf16_s"):
                outputs: torch.Tensor = torch.nn.functional.linear(inputs, weight)
            outputs.backward(torch.ones_like(outputs))
            best[name] = min(best[name], time.perf_counter() - began)
    return best
