"""The runtime on a CUDA device against itself on the CPU."""

from __future__ import annotations

from pathlib import Path

import onnxruntime as ort
import pytest

from export.onnx import export
from export.runtime import Runtime
from registry.errors import BadInput

ON_GPU = "CUDAExecutionProvider" in ort.get_available_providers()


@pytest.mark.gpu
@pytest.mark.skipif(not ON_GPU, reason="needs a CUDA device and onnxruntime-gpu: `make test-gpu`")
@pytest.mark.parametrize("fused", [True, False])
def test_a_gpu_gives_what_the_cpu_gives(tiny_llama: Path, tmp_path: Path, fused: bool) -> None:
    export(tiny_llama, tmp_path / "fp32", fused=fused)
    cpu, gpu = (Runtime.load(tmp_path / "fp32", device=device) for device in ("cpu", "cuda"))
    prompts = [[5, 6, 7], [9] * 40, [3, 1, 4, 1, 5], [5, 6, 7]]
    settings = dict(max_new_tokens=30, logprobs=1, ignore_eos=True)
    for one, other in zip(cpu.generate(prompts, **settings), gpu.generate(prompts, **settings), strict=True):
        assert one.token_ids == other.token_ids
        assert other.logprobs == pytest.approx(one.logprobs, abs=5e-3)


@pytest.mark.skipif(ON_GPU, reason="there is a CUDA provider here")
def test_cuda_where_there_is_none_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="has no CUDAExecutionProvider"):
        Runtime.load(tmp_path, device="cuda")
