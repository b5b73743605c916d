"""What this machine's processor can do, as Linux tells it; no torch is needed to ask."""

from __future__ import annotations

import re
from pathlib import Path


def proc(path: str) -> str:
    """The text of a file of /proc, or nothing where there is no such file."""
    try:
        return Path(path).read_text()
    except OSError:
        return ""


def cpu_bf16() -> list[str]:
    """The processor's flags for bfloat16 matrix products: AVX512-BF16, AMX; empty where it has none."""
    flags = set(re.findall(r"\w+", proc("/proc/cpuinfo").partition("flags")[2].partition("\n")[0]))
    return sorted(flags & {"avx512_bf16", "amx_bf16"})
