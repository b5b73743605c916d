"""The runtime on a CUDA device, compared with the CPU."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import numpy as np
import onnxruntime as ort
import pytest

from limbeck.export.artifact.export import export_onnx
from limbeck.export.runtime.runtime import Runtime
from limbeck.registry.core.errors import BadInput

ON_GPU = "CUDAExecutionProvider" in ort.get_available_providers()


@pytest.mark.gpu
@pytest.mark.skipif(not ON_GPU, reason="needs a CUDA device and onnxruntime-gpu: `make test-gpu`")
@pytest.mark.parametrize(("precision", "engine"), [("fp32", "fused"), ("fp32", "optimum"), ("fp16", "fused")])
def test_a_gpu_gives_the_tokens_of_the_cpu(
    tiny_llama: Path, tmp_path: Path, precision: str, engine: Literal["fused", "optimum"]
) -> None:
    export_onnx(tiny_llama, tmp_path / precision, precision, engine=engine)
    cpu, gpu = (Runtime.load(tmp_path / precision, device=device) for device in ("cpu", "cuda"))
    prompts = [[5, 6, 7], [9] * 40, [3, 1, 4, 1, 5], [5, 6, 7]]
    settings = dict(max_new_tokens=30, logprobs=1, ignore_eos=True)
    for one, other in zip(cpu.generate(prompts, **settings), gpu.generate(prompts, **settings), strict=True):
        if precision == "fp32":
            assert one.token_ids == other.token_ids
            assert other.logprobs == pytest.approx(one.logprobs, abs=5e-3)
        else:  # nearly equal tokens may be swapped
            assert other.logprobs[0] == pytest.approx(one.logprobs[0], abs=5e-2)
            assert np.isfinite(other.logprobs).all()


@pytest.mark.skipif(ON_GPU, reason="onnxruntime has a CUDA provider")
def test_cuda_is_refused_if_there_is_none(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="has no CUDAExecutionProvider"):
        Runtime.load(tmp_path, device="cuda")
