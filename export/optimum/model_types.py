"""The model families that optimum exports."""

# optimum-onnx's list for "text-generation-with-past"; tests/export/optimum/test_model_types.py compares the two.
MODEL_TYPES = frozenset(
    """
arcee bart bigbird_pegasus blenderbot blenderbot-small bloom codegen cohere deepseek_v3 falcon gemma gemma2 gemma3
gemma3_text glm gpt2 gpt_bigcode gpt_neo gpt_neox gpt_oss gptj granite helium internlm2 llama marian mbart mistral mpt
nemotron olmo olmo2 opt pegasus phi phi3 qwen2 qwen3 qwen3_moe smollm3 stablelm
""".split()
)
