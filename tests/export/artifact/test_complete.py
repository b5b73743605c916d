"""`limbeck generate` with an ONNX artifact and with the checkpoint it came from."""

from __future__ import annotations

import json
from collections.abc import Callable

import onnxruntime as ort
import pytest
import torch

from tests.export.export_helpers import Exported

Limbeck = Callable[..., tuple[int, str, str]]
pytestmark = pytest.mark.usefixtures("limbeck_home")


@pytest.mark.parametrize("options", [("--repetition-penalty", 1.4), ("--temperature", 1.0, "--top-k", 1),
                                     ("--temperature", 0.9, "--min-p", 1.0)])  # fmt: skip
def test_sampling_settings_have_the_meaning_of_transformers(
    limbeck: Limbeck, llama: Exported, options: tuple[object, ...]
) -> None:
    command = ("generate", llama.fp32, "for i in", "--against", llama.torch, "--max-new-tokens", 40, "--format", "json")
    threads = torch.get_num_threads()
    code, out, _ = limbeck(*command, *options)
    assert code == 0
    assert torch.get_num_threads() == threads
    ours, theirs = json.loads(out)
    assert ours["text"] == theirs["text"]
    (plain,) = json.loads(limbeck("generate", llama.fp32, "for i in", "--max-new-tokens", 40, "--format", "json")[1])
    assert (plain["text"] == ours["text"]) == ("--repetition-penalty" not in options)


@pytest.mark.skipif("CUDAExecutionProvider" in ort.get_available_providers(), reason="there is a CUDA provider here")
def test_cuda_without_a_device_is_refused(limbeck: Limbeck, llama: Exported) -> None:
    code, _, err = limbeck("generate", llama.fp32, "for", "--device", "cuda")
    assert code == 2
    assert "has no CUDAExecutionProvider" in err
    assert limbeck("serve", llama.fp32, "--device", "cuda", "--port", 0)[0] == 2
