"""Memory of the static cache."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest

from limbeck.export.runtime.buffers import Buffer


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_tokens_take_memory_only_where_they_are_written() -> None:
    buffer = Buffer((1, 64, 8192, 64), np.float32, "cpu")  # 134 MB, 2 MB for each head
    before = resident_bytes()
    with buffer.edit() as array:
        array[0, :, :4] = 1
    assert resident_bytes() - before < 10e6
    with buffer.edit() as array:
        assert array[0, :, :4].min() == 1


def resident_bytes() -> int:
    status = Path("/proc/self/status").read_text()
    return 1024 * int(status.split("VmRSS:")[1].split()[0])
