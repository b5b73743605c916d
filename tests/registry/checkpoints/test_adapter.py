"""A LoRA adapter that is merged into its base computes what peft computes with both."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import IA3Config, LoraConfig, PeftConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from limbeck.registry.checkpoints.adapter import base_of_adapter, merged_checkpoint
from limbeck.registry.checkpoints.load import load_model, load_tokenizer
from limbeck.registry.core.digest import folder_digest, read_manifest
from limbeck.registry.core.errors import BadInput, DamagedArtifact

IDS = torch.arange(60)[None]
LORA = dict(task_type="CAUSAL_LM", r=4, lora_alpha=8)
Trained = tuple[Path, torch.Tensor]


@pytest.fixture
def train(tmp_path: Path) -> Callable[..., Trained]:
    """Saves an adapter with random weights; returns its folder and peft's logits of IDS."""

    def trained(base: Path, config: PeftConfig, vocab_size: int | None = None) -> Trained:
        model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
        if vocab_size:
            model.resize_token_embeddings(vocab_size)
        torch.manual_seed(1)
        wrapped = get_peft_model(model, config).eval()
        with torch.no_grad():
            for parameter in wrapped.parameters():
                if parameter.requires_grad:
                    parameter.add_(torch.randn_like(parameter) * 0.1)
            logits = wrapped(input_ids=IDS).logits
        wrapped.save_pretrained(tmp_path / "adapter")
        return tmp_path / "adapter", logits

    return trained


# The tiny Llama's head is tied to its embedding.
CASES: dict[str, tuple[dict[str, Any], int | None]] = {
    "attention": (dict(target_modules=["q_proj", "v_proj"]), None),
    "all layers, DoRA": (dict(target_modules="all-linear", use_dora=True), None),
    "ranks and scales": (
        dict(target_modules=["q_proj", "k_proj"], rank_pattern={"q_proj": 8}, alpha_pattern={"k_proj": 3},
             use_rslora=True, layers_to_transform=[1]), None,
    ),
    "a tied head": (dict(target_modules=["q_proj", "lm_head"]), None),
    "a tied embedding": (dict(target_modules=["embed_tokens"]), None),
    "a head trained whole": (dict(target_modules=["q_proj"], modules_to_save=["lm_head"]), None),
    "some tokens": (dict(target_modules=["q_proj"], trainable_token_indices=[3, 5]), None),
    "more tokens": (dict(target_modules=["q_proj"]), 310),
    "more tokens, trained whole": (dict(target_modules=["q_proj"], modules_to_save=["embed_tokens", "lm_head"]), 310),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore::UserWarning")  # of peft, about tied weights
@pytest.mark.parametrize("case", CASES)
def test_logits_are_those_of_peft(
    case: str, train: Callable[..., Trained], tiny_llama: Path, limbeck_home: Path
) -> None:
    config, vocab_size = CASES[case]
    adapter, expected = train(tiny_llama, LoraConfig(**LORA, **config), vocab_size)
    merged = merged_checkpoint(adapter, tiny_llama, folder_digest(tiny_llama))
    with torch.inference_mode():
        logits = load_model(merged.path)(IDS).logits
        base = load_model(tiny_llama)(IDS).logits
    torch.testing.assert_close(logits, expected, atol=1e-5, rtol=0)
    assert (logits[..., : base.shape[-1]] - base).abs().max() > 0.01


def test_a_merge_is_made_once_for_an_adapter_and_a_base(
    train: Callable[..., Trained], tiny_llama: Path, limbeck_home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    adapter, _ = train(tiny_llama, LoraConfig(**LORA, target_modules=["q_proj"]))
    digest = folder_digest(tiny_llama)
    first = merged_checkpoint(adapter, tiny_llama, digest)
    source = read_manifest(first.path)["source"]
    assert (source["kind"], source["files"]["base model"]) == ("adapter", digest)
    assert "adapter_model.safetensors" in source["files"]
    capsys.readouterr()
    assert merged_checkpoint(adapter, tiny_llama, digest) == first
    assert capsys.readouterr().err == ""
    assert merged_checkpoint(adapter, tiny_llama, "another digest").path != first.path


def test_the_tokenizer_of_the_adapter_goes_first(
    train: Callable[..., Trained], tiny_llama: Path, limbeck_home: Path
) -> None:
    adapter, _ = train(tiny_llama, LoraConfig(**LORA, target_modules=["q_proj"]))
    digest = folder_digest(tiny_llama)
    of_base = load_tokenizer(merged_checkpoint(adapter, tiny_llama, digest).path)
    assert len(of_base) == len(load_tokenizer(tiny_llama))
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|tool|>"]})
    tokenizer.save_pretrained(adapter)
    merged = merged_checkpoint(adapter, tiny_llama, digest)
    assert load_tokenizer(merged.path)("<|tool|>").input_ids == [len(of_base)]


def test_the_base_that_an_adapter_names(train: Callable[..., Trained], tiny_llama: Path, tmp_path: Path) -> None:
    adapter, _ = train(tiny_llama, LoraConfig(**LORA, target_modules=["q_proj"]))
    assert base_of_adapter(adapter) == (str(tiny_llama), None)
    change(adapter, base_model_name_or_path="someone/llama", revision="v2")
    assert base_of_adapter(adapter) == ("someone/llama", "v2")
    shutil.copytree(tiny_llama, tmp_path / "base")
    change(adapter, base_model_name_or_path="../base")
    assert Path(base_of_adapter(adapter)[0]).samefile(tmp_path / "base")
    change(adapter, base_model_name_or_path=None)
    with pytest.raises(BadInput, match=r"names no base model\n.*BASE\+"):
        base_of_adapter(adapter)


def test_an_adapter_for_another_model(
    train: Callable[..., Trained], tiny_llama: Path, tiny_gpt2: Path, tiny_qwen2: Path, limbeck_home: Path
) -> None:
    adapter, _ = train(tiny_llama, LoraConfig(**LORA, target_modules=["q_proj"]))
    with pytest.raises(BadInput, match=r"does not fit its base model: Target modules .* not found[^\n]*\n.*BASE\+"):
        merged_checkpoint(adapter, tiny_gpt2, "gpt2")
    change(adapter, layers_to_transform=[0])
    with pytest.raises(BadInput, match=r"has weights that its base model has no place for: .*layers\.1\.self_attn"):
        merged_checkpoint(adapter, tiny_qwen2, "qwen2")
    change(adapter, layers_to_transform=None, target_modules=["q_proj", "o_proj"])
    with pytest.raises(BadInput, match=r"lacks weights that its adapter_config.json asks for: .*o_proj"):
        merged_checkpoint(adapter, tiny_llama, "llama")


def test_what_is_no_lora_adapter_is_refused(
    train: Callable[..., Trained], tiny_llama: Path, limbeck_home: Path
) -> None:
    adapter, _ = train(tiny_llama, IA3Config(task_type="CAUSAL_LM", target_modules=["k_proj"], feedforward_modules=[]))
    with pytest.raises(BadInput, match="is an adapter of type IA3; Limbeck merges LORA"):
        merged_checkpoint(adapter, tiny_llama, "x")
    change(adapter, peft_type="LORA", task_type="SEQ_CLS")
    with pytest.raises(BadInput, match="is an adapter for SEQ_CLS: Limbeck takes causal"):
        merged_checkpoint(adapter, tiny_llama, "x")
    change(adapter, task_type="CAUSAL_LM")
    (adapter / "adapter_model.safetensors").rename(adapter / "adapter_model.bin")
    with pytest.raises(BadInput, match=r"pickle file \(adapter_model\.bin\)"):
        merged_checkpoint(adapter, tiny_llama, "x")
    (adapter / "adapter_config.json").write_text("{")
    with pytest.raises(DamagedArtifact, match=r"adapter_config\.json is not JSON"):
        merged_checkpoint(adapter, tiny_llama, "x")


def change(adapter: Path, **fields: Any) -> None:
    file = adapter / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))
