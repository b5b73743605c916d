"""Weights in mxfp4 and fp8 become the floats that their formats define, computed here without transformers."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from limbeck.registry.catalog.model_ref import resolve_model
from limbeck.registry.checkpoints.load import load_config, load_model
from limbeck.registry.core.digest import read_manifest

E2M1 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])  # values of 4 bits
Tensors = dict[str, torch.Tensor]


def mxfp4(name: str, weights: torch.Tensor) -> tuple[Tensors, torch.Tensor]:
    """The tensors of a quantized weight (expert, in, out), and what they mean. OCP Microscaling Formats, 2023."""
    blocks = weights.transpose(1, 2).unflatten(-1, (-1, 32))
    exponent = (blocks.abs().amax(-1, keepdim=True) / 6).log2().ceil()
    codes = (blocks / exponent.exp2())[..., None].sub(E2M1).abs().argmin(-1)
    packed = (codes[..., 0::2] | codes[..., 1::2] << 4).to(torch.uint8)
    scales = (exponent + 127).to(torch.uint8)[..., 0]
    values = (E2M1[codes] * exponent.exp2()).flatten(-2).transpose(1, 2)
    return {f"{name}_blocks": packed, f"{name}_scales": scales}, values.contiguous()


def fp8(name: str, weights: torch.Tensor) -> tuple[Tensors, torch.Tensor]:
    """The tensors of a weight (out, in) with a scale for each block of 16 by 16, and what they mean."""
    blocks = weights.unflatten(0, (-1, 16)).unflatten(2, (-1, 16)).transpose(1, 2)
    scales = blocks.abs().amax((-1, -2), keepdim=True) / 448
    codes = (blocks / scales).to(torch.float8_e4m3fn)

    def whole(values: torch.Tensor) -> torch.Tensor:
        return values.transpose(1, 2).flatten(2, 3).flatten(0, 1).contiguous()

    return {name: whole(codes), name + "_scale_inv": scales[..., 0, 0].contiguous()}, whole(codes.float() * scales)


def quantize(
    folder: Path, config: dict[str, object], how: Callable[..., tuple[Tensors, torch.Tensor]], ends: tuple[str, ...]
) -> None:
    """Quantize the weights whose names end so, in a folder and in `folder`-reference as floats."""
    stored: Tensors = {}
    meant: Tensors = {}
    for name, tensor in load_file(folder / "model.safetensors").items():
        quantized, values = how(name, tensor) if name.endswith(ends) else ({name: tensor}, tensor)
        stored |= quantized
        meant[name] = values
    shutil.copytree(folder, reference := folder.with_name("reference"))
    save_file(meant, reference / "model.safetensors", metadata={"format": "pt"})
    save_file(stored, folder / "model.safetensors", metadata={"format": "pt"})
    found = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(found | {"quantization_config": config}))


def test_mxfp4(tokenizer_folder: Path, tmp_path: Path, limbeck_home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = Path(shutil.copytree(tokenizer_folder, tmp_path / "oss"))
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(
        AutoConfig.for_model("gpt_oss", vocab_size=300, hidden_size=32, intermediate_size=32, num_hidden_layers=2,
                             num_attention_heads=2, num_key_value_heads=1, head_dim=16, num_local_experts=2,
                             num_experts_per_tok=1, eos_token_id=0, pad_token_id=0)
    ).save_pretrained(folder)  # fmt: skip
    kept = ["model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens", "lm_head"]
    quantize(folder, {"quant_method": "mxfp4", "modules_to_not_convert": kept}, mxfp4, ("gate_up_proj", "down_proj"))
    check(folder, "mxfp4", tmp_path / "reference")
    assert "converting" in capsys.readouterr().err


def test_fp8(tiny_llama: Path, tmp_path: Path, limbeck_home: Path) -> None:
    folder = Path(shutil.copytree(tiny_llama, tmp_path / "llama"))
    config = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [16, 16]}
    quantize(folder, config, fp8, ("_proj.weight",))
    check(folder, "fp8", tmp_path / "reference")


def check(folder: Path, method: str, reference: Path) -> None:
    model = resolve_model(str(folder))
    assert model.path != folder
    assert read_manifest(model.path)["source"]["kind"] == method
    assert getattr(load_config(model.path), "quantization_config", None) is None
    assert model.has_tokenizer
    ids = torch.arange(40)[None]
    with torch.inference_mode():
        assert torch.equal(load_model(model.path)(ids).logits, load_model(reference)(ids).logits)
    assert resolve_model(str(folder)) == model
