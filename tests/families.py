"""The model families that `limbeck export` supports, each tried on a tiny model.

`python -m tests.families` prints the README's table, which stands between the two comments of README_MARKS.
tests/export/graph/test_families.py checks each row, and that each family with a fused graph has one.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

from tests import ROOT

README_MARKS = ("<!-- families: made by `python -m tests.families` -->", "<!-- end of families -->")

SIZES = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1,
             max_position_embeddings=128)  # fmt: skip
WINDOW = dict(sliding_window=16)
GPT2 = dict(n_embd=32, n_layer=2, n_head=2, n_positions=128)
EXPERTS = dict(num_experts=4, num_local_experts=4, num_experts_per_tok=2, moe_intermediate_size=48,
               shared_expert_intermediate_size=40, shared_intermediate_size=40)  # fmt: skip
YARN = dict(rope_type="yarn", rope_theta=10_000.0, factor=4.0, original_max_position_embeddings=32, truncate=False)
LLAMA3 = dict(rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
              original_max_position_embeddings=32)  # fmt: skip


class Family(NamedTuple):
    """A row of the table, and the configuration of the tiny model to try."""

    name: str
    model_type: str
    config: dict[str, Any]
    note: str = ""


FAMILIES = [
    Family("Llama 2, SmolLM, SmolLM2", "llama", SIZES | dict(tie_word_embeddings=True)),
    Family("Llama 3", "llama", SIZES | dict(rope_scaling=LLAMA3), "its rotary scaling, and linear and yarn"),
    Family("Mistral", "mistral", SIZES | WINDOW, "sliding window"),
    Family("Qwen2, Qwen2.5", "qwen2", SIZES),
    Family("Qwen3", "qwen3", SIZES | dict(head_dim=16)),
    Family("SmolLM3", "smollm3", SIZES | dict(no_rope_layer_interval=2), "layers without rotary embedding"),
    Family("Gemma", "gemma", SIZES | dict(head_dim=16)),
    Family(
        "Gemma 2", "gemma2", SIZES | WINDOW | dict(head_dim=16, attn_logit_softcapping=5.0, query_pre_attn_scalar=16),
        "soft caps, every other layer windowed",
    ),
    Family(
        "Gemma 3 (text)", "gemma3_text",
        SIZES | WINDOW | dict(head_dim=16, layer_types=["sliding_attention", "full_attention"]), "two rotary tables",
    ),
    Family("Phi-1, Phi-2", "phi", SIZES | dict(partial_rotary_factor=0.5)),
    Family("Phi-3", "phi3", SIZES | WINDOW, "128k models (longrope): optimum's graph"),
    Family("Granite", "granite", SIZES | dict(embedding_multiplier=3.0, residual_multiplier=0.5, logits_scaling=2.0)),
    Family("OLMo 2", "olmo2", SIZES),
    Family("StableLM", "stablelm", SIZES),
    Family("GPT-2", "gpt2", GPT2),
    Family("GPT-NeoX, Pythia", "gpt_neox", SIZES | dict(rotary_pct=0.5)),
    Family("OPT", "opt", SIZES | dict(ffn_dim=64, word_embed_proj_dim=32), "350m (norms after): optimum's graph"),
    Family("Mixtral", "mixtral", SIZES | WINDOW | dict(num_local_experts=4, num_experts_per_tok=2), "experts"),
    Family(
        "Qwen1.5-MoE, Qwen2-MoE", "qwen2_moe", SIZES | EXPERTS | dict(mlp_only_layers=[1]), "experts and a shared one",
    ),
    Family("Qwen3-MoE", "qwen3_moe", SIZES | EXPERTS | dict(head_dim=16), "experts"),
    Family("OLMoE", "olmoe", SIZES | EXPERTS, "experts"),
    Family("FlexOlmo", "flex_olmo", SIZES | EXPERTS, "experts"),
    Family("Granite MoE", "granitemoe", SIZES | EXPERTS | dict(residual_multiplier=0.5), "experts"),
    Family("Granite MoE, shared", "granitemoeshared", SIZES | EXPERTS | dict(residual_multiplier=0.5), "experts"),
    Family(
        "GLM-4.5, GLM-4.6", "glm4_moe",
        SIZES | EXPERTS | dict(n_routed_experts=4, first_k_dense_replace=1, routed_scaling_factor=1.5, head_dim=16),
        "experts",
    ),
    Family(
        "dots.llm1", "dots1",
        SIZES | EXPERTS | dict(n_routed_experts=4, n_shared_experts=1, norm_topk_prob=False), "experts",
    ),
    Family("MiniMax-M2", "minimax_m2", SIZES | EXPERTS, "experts"),
    Family("Mellum", "mellum", SIZES | EXPERTS, "experts"),
    Family("Solar Open", "solar_open", SIZES | EXPERTS | dict(n_routed_experts=4), "experts"),
    Family(
        "gpt-oss", "gpt_oss",
        SIZES | EXPERTS | WINDOW | dict(
            head_dim=16, swiglu_limit=0.3, layer_types=["sliding_attention", "full_attention"], rope_parameters=YARN,
        ),
        "experts, attention sinks",
    ),
    Family(
        "Gemma 4 (text)", "gemma4_text",
        SIZES | WINDOW | dict(
            num_hidden_layers=4, num_kv_shared_layers=2, layer_types=["sliding_attention", "full_attention"] * 2,
            head_dim=16, global_head_dim=32, attention_k_eq_v=True, num_global_key_value_heads=2,
            hidden_size_per_layer_input=8, vocab_size_per_layer_input=2048, use_double_wide_mlp=True,
            final_logit_softcapping=5.0,
        ),
        "not 26B-A4B (experts with gelu)",
    ),
    Family("Falcon", "falcon", dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=2)),
    Family("BLOOM", "bloom", dict(hidden_size=32, n_layer=2, n_head=2)),
]  # fmt: skip


def make_checkpoint(family: Family, tokenizer_folder: Path, folder: Path) -> Path:
    """Save a randomly initialised model of the family in `folder`."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder)
    ids = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"), tokenizer.eos_token_id)
    config = AutoConfig.for_model(family.model_type, vocab_size=len(tokenizer), **ids, **family.config)
    model = AutoModelForCausalLM.from_config(config)
    generator = torch.Generator().manual_seed(0)
    saved = model.state_dict().keys()
    buffers = [buffer for name, buffer in model.named_buffers() if name in saved]
    with torch.no_grad():
        for parameter in [*model.parameters(), *buffers]:
            # Norms and biases of equal values would hide errors in how they are used.
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(noise * 0.08 if parameter.ndim == 2 else parameter + 0.1 * noise)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def export_family(family: Family, tokenizer_folder: Path, folder: Path) -> tuple[str, Any]:
    """Export the family's tiny model within `folder`. Returns the kind of its graph, and its Parity."""
    from limbeck.export.artifact.export import export_onnx
    from limbeck.export.artifact.parity import measure_parity
    from limbeck.registry.core.digest import read_manifest

    model = make_checkpoint(family, tokenizer_folder, folder / "torch")
    export_onnx(model, folder / "onnx")
    parity = measure_parity(model, folder / "onnx", max_documents=4, max_tokens=48, new_tokens=8)
    return str(read_manifest(folder / "onnx")["graph"]), parity


def format_row(family: Family, graph_kind: str) -> str:
    """Return the family's row of the table, in Markdown."""
    return f"| {family.name} | `{family.model_type}` | {graph_kind} | {family.note} |"


def format_table(rows: Iterable[str]) -> str:
    """Return the table in Markdown, between its marks."""
    head = ["| Family | `model_type` | Graph | |", "|---|---|---|---|"]
    return "\n".join([README_MARKS[0], *head, *rows, README_MARKS[1]])


def main() -> None:
    """Try each family and print the table. Exits if one fails parity."""
    from limbeck.registry.core.terminal import quiet_libraries

    quiet_libraries()
    rows = []
    tokenizer = ROOT / "quickstart" / "teacher"  # any tokenizer works
    for family in FAMILIES:
        with TemporaryDirectory() as temporary:
            graph_kind, parity = export_family(family, tokenizer, Path(temporary))
        if not parity.passed:
            raise SystemExit(f"{family.name}: the graph differs from PyTorch: {parity}")
        rows.append(format_row(family, graph_kind))
    print(format_table(rows))


if __name__ == "__main__":
    main()
