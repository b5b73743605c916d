"""`python save_checkpoint.py GGUF FOLDER`: what the installed transformers, 4 or 5, saves of SmolLM2's GGUF file."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any


def main(gguf: Path, folder: Path) -> None:
    """Load with transformers' own GGUF loader, and save model and tokenizer."""
    import torch
    from transformers import AutoModelForCausalLM, GenerationConfig, LlamaForCausalLM

    loaded = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    config = loaded.config
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    config.bos_token_id, config.eos_token_id, config.pad_token_id = 1, 2, 2
    model = LlamaForCausalLM(config)  # the loaded one cannot be saved: transformers 5 calls it quantized
    model.load_state_dict(loaded.state_dict())
    model.generation_config = GenerationConfig(bos_token_id=1, eos_token_id=2, pad_token_id=2)
    model.save_pretrained(folder)
    tokenizer(gguf).save_pretrained(folder)


def tokenizer(gguf: Path) -> Any:
    """The published tokenizer: GPT-2's with each digit a token of its own, no post-processor."""
    from tokenizers import Tokenizer, decoders, pre_tokenizers
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    raw = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    published = Tokenizer(raw.backend_tokenizer.model)
    published.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    published.decoder = decoders.ByteLevel()
    published.add_special_tokens([token for token in raw.added_tokens_decoder.values() if token.special])
    return PreTrainedTokenizerFast(
        tokenizer_object=published,
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
        pad_token="<|im_end|>",
        chat_template=raw.chat_template,
        clean_up_tokenization_spaces=False,
        model_max_length=8192,
    )


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
