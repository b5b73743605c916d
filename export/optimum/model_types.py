"""The model families that optimum exports."""

# optimum-onnx's list for "text-generation-with-past" without REFUSED.
MODEL_TYPES = frozenset(
    [
        "arcee", "bloom", "codegen", "cohere", "deepseek_v3", "falcon", "gemma", "gemma2", "gemma3_text", "glm", "gpt2",
        "gpt_bigcode", "gpt_neo", "gpt_neox", "gpt_oss", "gptj", "granite", "helium", "llama", "mistral", "mpt",
        "nemotron", "olmo", "olmo2", "opt", "phi", "phi3", "qwen2", "qwen3", "qwen3_moe", "smollm3", "stablelm",
    ]
)  # fmt: skip
# Encoder-decoders, whose decoders count the positions of padding; a vision model; a model that transformers lacks.
REFUSED = frozenset(
    [
        "bart", "bigbird_pegasus", "blenderbot", "blenderbot-small", "marian", "mbart", "pegasus",
        "gemma3",
        "internlm2",
    ]
)  # fmt: skip
