"""The processor, cores and memory of this machine, read from Linux without torch."""

from __future__ import annotations

import ctypes
import gc
import os
import platform
import re
from pathlib import Path


def read_proc_file(path: str) -> str:
    """The text of a file of /proc; empty if there is no such file."""
    try:
        return Path(path).read_text()
    except OSError:
        return ""


def cpu_bf16_flags() -> list[str]:
    """The processor's flags for bfloat16 matrix products: AVX512-BF16, AMX; empty if it has none."""
    flags = set(re.findall(r"\w+", read_proc_file("/proc/cpuinfo").partition("flags")[2].partition("\n")[0]))
    return sorted(flags & {"avx512_bf16", "amx_bf16"})


def describe_hardware(gpu: str | None = None) -> str:
    """This machine in one line: processor, physical cores, the name of the GPU if given, system."""
    parts = [_processor(), f"{physical_cores()} cores", gpu, f"{platform.system()} {platform.machine()}"]
    return ", ".join(part for part in parts if part)


def physical_cores() -> int:
    """The number of physical cores that this process may run on; of logical ones if Linux does not report them."""
    return len(one_cpu_per_core())


def one_cpu_per_core() -> list[int]:
    """The first logical CPU of each physical core that this process may run on."""
    if not hasattr(os, "sched_getaffinity"):
        return list(range(os.cpu_count() or 1))
    cores: dict[str, int] = {}
    for cpu in sorted(os.sched_getaffinity(0)):
        try:
            core = Path(f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list").read_text()
        except OSError:
            core = str(cpu)
        cores.setdefault(core, cpu)
    return list(cores.values())


def available_memory() -> int:
    """Bytes of main memory that are available without swapping: the machine's, or less if a cgroup allows less."""
    found = re.search(r"MemAvailable:\s+(\d+)", read_proc_file("/proc/meminfo"))
    free = int(found[1]) * 1024 if found else 2**63
    limit, used = (read_proc_file(f"/sys/fs/cgroup/memory.{name}").strip() for name in ("max", "current"))
    if not (limit.isdecimal() and used.isdecimal()):
        return free
    # What a cgroup uses includes the files that Linux keeps in memory while it is free.
    cached = re.findall(r"^(?:in)?active_file (\d+)$", read_proc_file("/sys/fs/cgroup/memory.stat"), re.MULTILINE)
    return min(free, int(limit) - int(used) + sum(map(int, cached)))


def keep_freed_memory() -> None:
    """Keep freed memory in the process: glibc returns large blocks to Linux, which zeroes each page before reuse.

    In a loss over 32,000 tokens and 2,040 positions on one core, that takes a third to half of the time.
    """
    if platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        libc.mallopt(_M_MMAP_MAX, 0)
        libc.mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)


_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # from malloc.h


def return_freed_memory() -> None:
    """Give the memory of what is no longer used back to the system, where the C library can: it keeps freed blocks."""
    gc.collect()  # models and graphs have circular references
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def _processor() -> str:
    for line in read_proc_file("/proc/cpuinfo").splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
