"""The model families with a fused graph, each tried on a tiny model.

`python -m tests.families` prints the README's table and its list of models without a fused graph, each between two
comments. tests/export/graph/test_families.py checks each row, and that all families of transformers are in one of them.
"""

from __future__ import annotations

import copy
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

from tests.fused_model import largest_difference, make_fused_model, make_torch_model, randomize

NOISE = 0.1  # standard deviation of the matrices' entries
README_MARKS = ("<!-- families: made by `python -m tests.families` -->", "<!-- end of families -->")
UNSUPPORTED_MARKS = ("<!-- not fused: made by `python -m tests.families` -->", "<!-- end of not fused -->")

SIZES = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
             max_position_embeddings=128)  # fmt: skip
WINDOW = dict(sliding_window=16)
WINDOW_BY_LAYER = WINDOW | dict(layer_types=["sliding_attention", "full_attention"])
PARTIAL = dict(partial_rotary_factor=0.5, head_dim=16)
GPT2 = dict(n_embd=32, n_layer=2, n_head=4, n_positions=128)
EXPERTS = dict(num_experts=4, num_local_experts=4, num_experts_per_tok=2, moe_intermediate_size=48,
               shared_expert_intermediate_size=40, shared_intermediate_size=40)  # fmt: skip
GATED_DELTA = dict(layer_types=["linear_attention", "full_attention"], head_dim=16, linear_num_key_heads=2,
                   linear_num_value_heads=4, linear_key_head_dim=8, linear_value_head_dim=16)  # fmt: skip
YARN = dict(rope_type="yarn", rope_theta=10_000.0, factor=4.0, original_max_position_embeddings=32, truncate=False)
LLAMA3 = dict(rope_type="llama3", rope_theta=10_000.0, factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
              original_max_position_embeddings=32)  # fmt: skip
LONGROPE = dict(rope_type="longrope", rope_theta=10_000.0, short_factor=[1.0, 1.5, 2.0, 2.5],
                long_factor=[4.0, 5.0, 6.0, 8.0], original_max_position_embeddings=100)  # fmt: skip
MULTIPLIERS = dict(embedding_multiplier=3.0, residual_multiplier=0.5, attention_multiplier=0.2, logits_scaling=2.0)


class Family(NamedTuple):
    """A row of the table, and the configuration of the tiny model to try.

    Attributes:
        max_difference: between PyTorch and the graph, in nats of log-probability.
    """

    name: str
    model_type: str
    config: dict[str, Any]
    note: str = ""
    max_difference: float = 2e-5


FAMILIES = [
    Family("Llama 2, SmolLM, SmolLM2", "llama", SIZES | dict(tie_word_embeddings=True)),
    Family("Llama 3", "llama", SIZES | dict(rope_parameters=LLAMA3), "its rotary scaling; linear, dynamic, yarn too"),
    Family("Mistral", "mistral", SIZES | WINDOW, "sliding window"),
    Family("Ministral", "ministral", SIZES | WINDOW_BY_LAYER | dict(head_dim=16), "a window in some layers"),
    Family(
        "Ministral 3", "ministral3", SIZES | dict(rope_parameters=YARN | dict(llama_4_scaling_beta=0.3)),
        "queries scaled by position",
    ),
    Family("Qwen2, Qwen2.5", "qwen2", SIZES | WINDOW_BY_LAYER | dict(use_sliding_window=True)),
    Family("Qwen3", "qwen3", SIZES | dict(head_dim=16)),
    Family("SmolLM3", "smollm3", SIZES | dict(no_rope_layer_interval=2), "layers without rotary embedding"),
    Family("Gemma", "gemma", SIZES | dict(head_dim=16)),
    Family(
        "Gemma 2", "gemma2",
        SIZES | WINDOW_BY_LAYER | dict(head_dim=16, attn_logit_softcapping=5.0, query_pre_attn_scalar=16),
        "soft caps, every other layer windowed",
    ),
    Family("Gemma 3 (text)", "gemma3_text", SIZES | WINDOW_BY_LAYER | dict(head_dim=16), "two rotary tables"),
    Family("VaultGemma", "vaultgemma", SIZES | WINDOW_BY_LAYER | dict(head_dim=16)),
    Family("Phi-1, Phi-2", "phi", SIZES | dict(partial_rotary_factor=0.5, hidden_size=64)),
    Family("Phi-3, Phi-4", "phi3", SIZES | WINDOW),
    Family(
        "Phi-3 128k, Phi-3.5-mini, Phi-4-mini", "phi3",
        SIZES | dict(rope_parameters=LONGROPE, original_max_position_embeddings=100),
        "longrope: texts up to `original_max_position_embeddings` (4,096)",
    ),
    Family("Granite", "granite", SIZES | MULTIPLIERS),
    Family(
        "Granite 4 (Micro, 350M, 1B)", "granitemoehybrid",
        SIZES | MULTIPLIERS | dict(
            layer_types=["full_attention"] * 2, num_local_experts=0, position_embedding_type="rope",
            shared_intermediate_size=64, mamba_n_heads=8,
        ),
        "not those with Mamba layers (H)",
    ),
    Family(
        "Granite with windows", "granite_swa", SIZES | WINDOW_BY_LAYER | MULTIPLIERS | dict(layer_rope_theta=[1e4, 0]),
        "attention sinks",
    ),
    Family("HyperCLOVA X SEED Think", "hyperclovax", SIZES | MULTIPLIERS),
    Family("OLMo", "olmo", SIZES | dict(clip_qkv=0.5), "clipped queries, keys and values"),
    Family("OLMo 2", "olmo2", SIZES, "norms after attention and MLP"),
    Family("OLMo 3", "olmo3", SIZES | WINDOW_BY_LAYER, "norms after attention and MLP"),
    Family("EXAONE 3, EXAONE 3.5", "exaone", SIZES),
    Family("EXAONE 4", "exaone4", SIZES | WINDOW_BY_LAYER, "no rotary embedding in layers without window"),
    Family("InternLM3", "internlm3", SIZES | dict(head_dim=16, attention_bias=True, mlp_bias=True)),
    Family("CWM", "cwm", SIZES | WINDOW_BY_LAYER | dict(head_dim=16)),
    Family("Seed-OSS", "seed_oss", SIZES | dict(head_dim=16)),
    Family("IQuest-Coder", "iquestcoder", SIZES | dict(head_dim=16)),
    Family("Arcee AFM", "arcee", SIZES, "no gate"),
    Family("Jais 2", "jais2", SIZES, "no gate"),
    Family("Nemotron, Minitron", "nemotron", SIZES | PARTIAL, "no gate"),
    Family("Apertus", "apertus", SIZES, "xIELU"),
    Family("Apertus 1.5 (text)", "apertus1p5_text", SIZES, "xIELU"),
    Family("Hunyuan (dense)", "hunyuan_v1_dense", SIZES | dict(head_dim=16), "norms after the rotary embedding"),
    Family("GLM-4 9B, GLM-Edge", "glm", SIZES | PARTIAL, "neighbours rotated"),
    Family("GLM-4 0414, GLM-Z1", "glm4", SIZES | PARTIAL, "neighbours rotated"),
    Family("ERNIE 4.5", "ernie4_5", SIZES, "neighbours rotated"),
    Family("Helium", "helium", SIZES | dict(head_dim=8), "neighbours rotated"),
    Family("Command R, Aya", "cohere", SIZES | dict(logit_scale=0.5, use_qk_norm=True), "neighbours rotated"),
    Family(
        "Command A, Command R7B", "cohere2", SIZES | WINDOW_BY_LAYER | dict(logit_scale=0.5),
        "no rotary embedding in layers without window",
    ),
    Family("StableLM 2", "stablelm", SIZES | dict(qk_layernorm=True, use_parallel_residual=True)),
    Family("StarCoder2", "starcoder2", SIZES | WINDOW, "no gate"),
    Family("nanochat", "nanochat", SIZES, "norms without weights"),
    Family("Persimmon", "persimmon", SIZES | dict(partial_rotary_factor=0.5, hidden_size=64), "no gate"),
    Family(
        "Falcon 7B", "falcon", dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=4),
        "not Falcon-RW (ALiBi)",
    ),
    Family(
        "Falcon 40B, 180B, Falcon 2", "falcon",
        dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_kv_heads=2, new_decoder_architecture=True),
    ),
    Family("BLOOM", "bloom", dict(hidden_size=32, n_layer=2, n_head=4), "ALiBi"),
    Family("MPT", "mpt", dict(d_model=32, n_layers=2, n_heads=4, max_seq_len=128), "ALiBi"),
    Family("GPT-2", "gpt2", GPT2),
    Family(
        "GPT-Neo", "gpt_neo",
        dict(hidden_size=32, num_layers=2, num_heads=4, max_position_embeddings=128, window_size=16,
             attention_types=[[["global", "local"], 1]]),
        "every other layer windowed",
    ),
    Family("GPT-NeoX, Pythia", "gpt_neox", SIZES | dict(rotary_pct=0.5, hidden_size=64)),
    Family("GPT-J", "gptj", GPT2 | dict(n_embd=64, rotary_dim=8), "neighbours rotated"),
    Family("CodeGen", "codegen", GPT2 | dict(n_embd=64, rotary_dim=8), "neighbours rotated"),
    Family("StarCoder, SantaCoder", "gpt_bigcode", GPT2),
    Family("OPT", "opt", SIZES | dict(ffn_dim=64, word_embed_proj_dim=32), "not 350m (norms after attention and MLP)"),
    Family(
        "XGLM", "xglm",
        dict(d_model=32, num_layers=2, attention_heads=4, ffn_dim=64, max_position_embeddings=128), "fixed positions",
    ),
    Family("BioGPT", "biogpt", SIZES),
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
        "Granite MoE with windows", "granitemoe_swa",
        SIZES | EXPERTS | WINDOW_BY_LAYER | MULTIPLIERS | dict(layer_rope_theta=[1e4, 0]), "experts, attention sinks",
    ),
    Family(
        "Sarvam 30B", "sarvam_moe",
        SIZES | EXPERTS | dict(n_routed_experts=4, first_k_dense_replace=1, routed_scaling_factor=1.5, head_dim=16),
        "experts",
    ),
    Family(
        "GLM-4.5, GLM-4.6", "glm4_moe",
        SIZES | EXPERTS | dict(n_routed_experts=4, first_k_dense_replace=1, routed_scaling_factor=1.5, head_dim=16),
        "experts",
    ),
    Family(
        "dots.llm1", "dots1",
        SIZES | EXPERTS | dict(n_routed_experts=4, n_shared_experts=1, norm_topk_prob=False), "experts",
    ),
    Family(
        "ERNIE 4.5 MoE", "ernie4_5_moe",
        SIZES | EXPERTS | dict(moe_num_experts=4, moe_k=2, moe_num_shared_experts=1, moe_layer_start_index=1),
        "neighbours rotated, experts",
    ),
    Family("K-EXAONE", "exaone_moe", SIZES | EXPERTS | WINDOW_BY_LAYER | dict(num_shared_experts=1), "experts"),
    Family("Hunyuan MoE", "hunyuan_v1_moe", SIZES | dict(head_dim=16, num_experts=4, moe_topk=2), "experts"),
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
        max_difference=3e-4,  # PyTorch's float32 is as far from its float64: the scores are not scaled
    ),
    Family("LFM2", "lfm2", SIZES | dict(layer_types=["conv", "full_attention"]), "short convolutions"),
    Family(
        "LFM2 MoE", "lfm2_moe",
        SIZES | EXPERTS | dict(layer_types=["conv", "full_attention"], num_dense_layers=1),
        "short convolutions, experts",
    ),
    Family(
        "Qwen3.5 (text)", "qwen3_5_text", SIZES | GATED_DELTA, "gated delta rule",
        max_difference=1e-4,  # the state adds up float32 errors
    ),
    Family("Qwen3.5 MoE (text)", "qwen3_5_moe_text", SIZES | EXPERTS | GATED_DELTA, "gated delta rule, experts"),
]  # fmt: skip


# Causal language models of transformers without a fused graph, by the reason.
UNSUPPORTED = {
    "keys and values of unequal size (latent attention)": [
        "axk1", "axk2", "bailing_hybrid", "deepseek_v2", "deepseek_v3", "deepseek_v32", "deepseek_v4",
        "dots3_note_text", "glm4_moe_lite", "glm_moe_dsa", "hy_v4", "kimi_linear", "longcat_flash", "mimo_v2_flash",
        "minicpm3", "sarvam_mla", "youtu",
    ],
    "layers with a state (Mamba, RWKV, linear attention)": [
        "bamba", "falcon_h1", "falcon_mamba", "jamba", "lara_mini", "mamba", "mamba2", "minimax", "nemotron_h",
        "olmo_hybrid", "qwen3_next", "recurrent_gemma", "rwkv", "xlstm", "zamba", "zamba2",
    ],
    "attention or layers of a kind of their own": [
        "afmoe", "beam", "blt", "cpmant", "ctrl", "diffllama", "doge", "dory", "gemma3n_text", "gpt_neox_japanese",
        "hrm_text", "inkling2_loop_text", "inkling2_text", "inkling_text", "jetmoe", "laguna", "lfm3", "llama4_text",
        "minimax_m3_vl_text", "modernbert-decoder", "openai-gpt", "qwen4_exp_text", "reformer", "xlnet", "zaya",
    ],
    "experts that are chosen or joined in another way": [
        "aria_text", "cohere2_moe", "dbrx", "flint", "hy_v3", "kolibri1", "phimoe",
    ],
    "weights that are stored in 2 bits": ["bitnet"],
}  # fmt: skip
# Those that Limbeck does not load.
OF_OTHER_KINDS = {
    "parts of models of images or speech": [
        "cohere_compass_text", "dots3_note", "emu3", "fuyu", "gemma3", "gemma3n", "gemma4", "gemma4_assistant",
        "gemma4_unified", "gemma4_unified_assistant", "gemma4_unified_text", "git", "got_ocr2", "llama4", "mllama",
        "moshi", "moss_transcribe_diarize", "musicgen", "musicgen_melody", "phi4_multimodal", "qwen3_5", "qwen3_5_moe",
        "qwen4_exp", "trocr", "whisper",
    ],
    "encoders and encoder-decoders": [
        "bart", "bert", "bert-generation", "big_bird", "bigbird_pegasus", "blenderbot", "blenderbot-small", "camembert",
        "data2vec-text", "electra", "ernie", "marian", "mbart", "megatron-bert", "mvp", "pegasus", "plbart",
        "prophetnet", "rembert", "roberta", "roberta-prelayernorm", "roc_bert", "roformer", "xlm", "xlm-roberta",
        "xlm-roberta-xl", "xmod",
    ],
}  # fmt: skip


def make_checkpoint(family: Family, tokenizer_folder: Path, folder: Path) -> Path:
    """Save a randomly initialised model of the family in `folder`."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder)
    ids = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"), tokenizer.eos_token_id)
    config = AutoConfig.for_model(family.model_type, vocab_size=len(tokenizer), **ids, **copy.deepcopy(family.config))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        model = AutoModelForCausalLM.from_config(config)
    randomize(model, NOISE)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def export_family(family: Family, precision: str, tokenizer_folder: Path, folder: Path) -> Any:
    """Export the family's tiny model within `folder`. Returns its Parity."""
    from limbeck.export.artifact.export import export_onnx
    from limbeck.export.artifact.parity import measure_parity

    model = make_checkpoint(family, tokenizer_folder, folder / "torch")
    export_onnx(model, folder / "onnx", precision, engine="fused")
    return measure_parity(model, folder / "onnx", max_documents=4, max_tokens=48, new_tokens=8)


def measure_family(family: Family) -> float:
    """Return the largest difference between PyTorch and the fused graph of the family's tiny model, in nats."""
    model = make_torch_model(family.model_type, family.config, NOISE, vocab_size=300)
    with TemporaryDirectory() as folder:
        return largest_difference(make_fused_model(model, Path(folder)))


def format_row(family: Family) -> str:
    """Return the family's row of the table, in Markdown."""
    return f"| {family.name} | `{family.model_type}` | {family.note} |"


def format_table() -> str:
    """Return the table in Markdown, between its marks."""
    head = ["| Family | `model_type` | |", "|---|---|---|"]
    return "\n".join([README_MARKS[0], *head, *map(format_row, FAMILIES), README_MARKS[1]])


def format_unsupported() -> str:
    """Return the list of models without a fused graph in Markdown, between its marks."""
    lines = [f"- {reason}: {', '.join(f'`{name}`' for name in names)}" for reason, names in UNSUPPORTED.items()]
    return "\n".join([UNSUPPORTED_MARKS[0], *lines, UNSUPPORTED_MARKS[1]])


def main() -> None:
    """Try each family and print the table and the list. Exits if one differs from PyTorch."""
    from limbeck.registry.core.terminal import quiet_libraries

    quiet_libraries()
    for family in FAMILIES:
        difference = measure_family(family)
        if not difference < family.max_difference:
            raise SystemExit(f"{family.name}: the graph differs from PyTorch by {difference:.2g} nats")
    print(format_table(), format_unsupported(), sep="\n\n")


if __name__ == "__main__":
    main()
